"""pool_windows loses the forward-mode tangent without a word; torch.func.grad raises an obscure error.

Right: the derivative as for spatial_pyramid_pool, or a clear error.
"""

import sys

import torch
import torch.autograd.forward_ad as fa

from sppnet import pool_windows

m, w = torch.rand(1, 4, 4), [[0, 0, 4, 4]]
try:
    with fa.dual_level():
        tangent = fa.unpack_dual(pool_windows(fa.make_dual(m, torch.ones_like(m)), w, (1,))).tangent
    lost = tangent is None
except (RuntimeError, NotImplementedError) as error:
    print("refused:", error)
    lost = False
try:
    torch.func.grad(lambda x: pool_windows(x, w, (1,)).sum())(m)
    grad = True
except Exception as error:
    print("torch.func.grad:", type(error).__name__, str(error)[:100])
    grad = False
print("tangent lost:", lost)
sys.exit(lost or not grad)
