"""Classification with the pyramid (sec. 2.3, 3).

``multisize`` trains at alternating sizes that share all weights, here on crops of the objects of a detection data set.
"""
