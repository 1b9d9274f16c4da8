"""Detection, the paper's section 4, room after room: the map of an image once, then thousands of windows on it.

    proposals          1  candidate windows of an image
    feature_maps       2  the convolutional map of an image, once, at every scale
    windows            3  choose the scale of a window, project it onto the map, merge windows on the same cells
    window_features    4  maps + windows -> pyramid vectors -> fc features
    sampling           5  foreground and background windows, by overlap
    training_windows   5  the windows of the training images, as rooms 5 to 7 draw them
    finetuning         5  fc6, fc7 and a classifier, the trunk frozen
    linear_svm         6  one linear SVM per class
    hard_negatives     6  mining: one pass over the images (negative_cache, reservoir: its bounded memory)
    box_regression     7  class-wise corrections of boxes
    nms                8  suppression, per class

    detector              rooms 1 to 4 and 6 to 8 at test time, on one screen
    plan                  which data a run uses, and where each stage keeps its artifacts
    stages                what is there of each stage, and what would be done
    training_networks     the trunk and the head of a training run, as far as its stages have made them
    training              rooms 1 to 7, on one screen; every stage resumes
    testing               a split: detections, evaluation, files
    folder_detection      any images: pictures, detections.json, detections.csv
    low_rank              fc6 and fc7 as thin layers, by what they answer or by their weights
    compression           the same in a trained detector, by what its fc6 answers to windows of training images
    profiling             where the time of one image goes

Boxes and windows are numpy arrays, features are torch tensors.
"""
