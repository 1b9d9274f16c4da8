"""Backbones: the convolutional layers below the pyramid (sec. 3.1, app. A).

architectures  the layers of every backbone by name: the paper's four, a tiny one of ours, torchvision's
timm_models    those of timm
geometry       stride, first centre and map size, from the layers themselves
windows        choose the scale of a window of the image, project it onto the map
probing        the same of any network, found by running it
weights        files of weights, read without running anything in them
backbone       layers, weights, geometry and preprocessing together
runtime        what computes the maps of a frozen backbone: torch or OpenVINO
"""
