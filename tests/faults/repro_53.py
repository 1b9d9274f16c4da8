"""torch.compile around pool_windows: an AssertionError from inside dynamo in a fresh process; with fullgraph it cannot be compiled at all.

Right: pool_windows is an operator that torch knows (torch.library.custom_op with its fake and its gradient), as torchvision's roi_pool is.
"""

import sys

import torch

from sppnet import pool_windows

windows = torch.tensor([[0, 0, 3, 4], [1, 2, 8, 8]])
m = torch.rand(4, 8, 8)
try:
    out = torch.compile(lambda x: pool_windows(x * 2, windows, (1, 2)), fullgraph=True)(m)
except Exception as error:  # whatever the compiler raises
    print("failed:", type(error).__name__, str(error)[:120])
    sys.exit(1)
print(torch.equal(out, pool_windows(m * 2, windows, (1, 2))))
sys.exit(not torch.equal(out, pool_windows(m * 2, windows, (1, 2))))
