"""How good detections and windows are, from values in memory: `voc` judges detections, `proposals` candidate windows.

Nothing here reads a file or knows a detector; the caller brings detections and annotations.
"""
