"""Data sets on disk -> ImageRecords.

``splits`` is the door to the records of every format, which ``layouts`` finds by looking: ``voc`` (1-based inclusive
corners, as ``comp4``'s detections), ``coco``, ``yolo``, ``ilsvrc``; ``convert`` writes them. ``selection`` chooses
classes and images to hold out; ``shapes`` generates a data set; ``crops`` makes a folder of pictures for each class;
``folder`` finds images in files, folders and patterns.
"""
