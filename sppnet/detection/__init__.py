"""Detection, the paper's section 4, in this order: the map of an image once, then thousands of windows on it.

    feature_maps      the convolutional maps of an image, at every scale
    window_features   maps + windows -> pyramid vectors -> fc features
    training_windows  the windows of the training images, by overlap, as the steps below draw them
    finetuning        fc6, fc7 and a classifier, the backbone frozen
    linear_svm        one linear SVM per class
    hard_negatives    mining: one pass over the images, in bounded memory, that of negative_cache
    box_regression    class-wise corrections of boxes
    embedding         beside these: windows as rows of principal components, computed once
    joint_head        fc6, fc7, softmax and box regression learned together on these rows
    nms               suppression, per class
    refinement        boxes that vote for better ones
    detector          all of it at test time; detector_description: what a saved one says of itself
    combination       several detectors as one

Boxes and windows are numpy arrays, features are torch tensors.
"""
