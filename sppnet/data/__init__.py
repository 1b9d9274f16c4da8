"""Data sets on disk -> ImageRecords.

``voc`` reads and writes annotations of PASCAL VOC, ``comp4`` files of detections: the places that know 1-based
inclusive corners; ``splits`` reads image sets, ``ilsvrc`` those of ILSVRC's detection data, whose corners are 0-based;
``selection`` chooses classes and the images to hold out; ``shapes`` generates a VOC-format data set of textured shapes,
the embedded default that needs no download; ``crops`` makes a folder of pictures for each class of a detection data
set; ``folder`` finds images in files, folders and patterns.
"""
