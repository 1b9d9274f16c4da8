"""The layer: spatial pyramid pooling of whole maps and of many windows (sec. 2.2, 4.1, app. A).

    pyramid      spatial_pyramid_pool (whole maps), pool_windows (windows), and both as layers; RoIPool
    _operators   pool_windows as operators of torch: their dispatch, and what other devices than a CPU run
    _pool_cpu    the compiled CPU loops behind the largest values, imported when they are first used
    compiling    what compiles loops, these and others

The folder can be copied into another project: it imports nothing of sppnet and raises plain ValueError.
"""
