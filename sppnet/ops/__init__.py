"""The layer: spatial pyramid pooling of whole maps and of many windows of one map (sec. 2.2, 4.1, app. A).

    pyramid    spatial_pyramid_pool (whole map), pool_windows (many windows), SpatialPyramidPool, RoIPool
    _pool_cpu  the compiled CPU loops behind pool_windows, imported when it is first used

The folder can be copied into another project: it imports nothing of sppnet and raises plain ValueError.
"""
