"""Data sets on disk -> ImageRecords.

``splits`` is the door to the records of every format, which ``layouts`` finds by looking: ``voc`` (1-based inclusive
corners, as in ``comp4``), ``coco``, ``yolo``, ``ilsvrc``; ``convert`` writes them. ``selection`` chooses classes and
images to hold out, ``shapes`` generates a data set, ``crops`` cuts pictures for each class, ``folder`` finds images.
"""
