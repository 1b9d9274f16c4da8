"""How good detections (`voc`, `coco`) and windows (`proposals`) are, what is wrong (`errors`), from values in memory.

Nothing here reads a file or knows a detector; the caller brings detections and annotations.
"""
