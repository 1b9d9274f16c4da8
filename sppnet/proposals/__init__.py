"""Candidate windows of an image (sec. 4.1).

selective_search  the search: every region of several hierarchies of an image is a window
segmentation      the regions at the bottom of a hierarchy
regions           what is known of a region: size, colours, textures
grouping          the hierarchy above them
edge_boxes        windows that hold many edges whole
edge_forest       the edges of a structured forest, which is checked first
search            a method by name, over a data set, one file an image
files             the windows of many images in one .npz or .mat file
"""
