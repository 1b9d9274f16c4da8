"""Classification with the pyramid (sec. 2.3, 3).

pretraining  training at alternating sizes that share all weights, on crops of the objects of a detection data set
"""
