"""How good an answer is, from values in memory: `voc` judges detections, `proposals` candidate windows.

Nothing here reads a file or knows a detector; the caller brings detections and annotations.
"""
