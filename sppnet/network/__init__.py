"""The network: what runs on pixels, and the pyramid that makes one vector of a map of any size (sec. 2).

    normalisation  local response normalisation, in one pass on a CPU
    architectures  the layers of every trunk by name: the paper's four, one of ours, torchvision's
    geometry       stride, first centre and map size, from the layers themselves
    strips         the finest layers of a trunk, some rows at a time
    weights        files of weights, read without running anything in them
    trunks         a trunk: layers, weights, geometry and preprocessing together
    pyramid        spatial_pyramid_pool (whole map), pool_windows (many windows), SpatialPyramidPool, RoIPool
    kernels        the compiled CPU loops behind pool_windows (bins: where bins are computed from; memory: for
                   results and tables; vectors: what such loops cannot say in Python)
    gpu_kernels    the same on a CUDA device, in Triton
    winograd       convolutions with a third to a quarter of the multiplications (tile_kernels: the compiled loop;
                   tile_vectors: its arithmetic in registers)
    sppnet         the head (fc6, fc7, classifier), its starting weights, and SPPNet = trunk + pyramid + head

Nothing here knows where windows come from.
"""
