"""Data sets on disk -> ImageRecords.

``voc`` reads and writes PASCAL VOC folders and is the one place that knows 1-based inclusive corners;
``shapes`` generates a VOC-format data set of textured shapes, the embedded default that needs no download;
``folder`` finds images in files, folders and patterns.
"""
