"""Networks above a backbone (sec. 2.2, 4.1).

sppnet    the head (fc6, fc7, classifier), its starting weights, and SPPNet = backbone + pyramid + head
low_rank  fc6 and fc7 as two linear layers each, by the principal components of their activations
"""
