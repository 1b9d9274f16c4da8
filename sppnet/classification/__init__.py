"""Classification of whole images of any size, the paper's section 3.

settings    of a classifier
training    single-size and multi-size, from random weights or of the head alone
classifier  a trained network and its folder
views       the parts of an image that are classified: centre, ten, full, on maps
testing     softmax averaged over views and runs
features    full-image features; linear: SVMs on them; strongest: where a filter responds
"""
