"""The grid of any network, found by running it: no layer need be known.

Pixels that are NaN make NaN of every cell that sees them: convolutions, pools, activations and normalisations with
fixed statistics pass it on. Which cells turn NaN when all columns before, or all from, one column on do gives the first
and the last pixel of a cell, in some 30 runs on a narrow strip. Branches give the union of what they see; the pixels
of a shortcut lie inside those of the path beside it.

Values without a place - what is pooled over the whole map, as in squeeze-and-excitation, and the statistics of a
normalisation over the map - are held fixed: they change what a cell holds, not where it looks.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sppnet.errors import BackboneError

LENGTHS = tuple((64 + 32 * half) << i for i in range(7) for half in (0, 1))[
    :-1
]  # px of a strip: the first in which inner cells see neither end
WIDTHS = (8, 16, 32, 64, 128, 256)  # px of a strip: the first that gives two cells
CELLS = 4  # neighbours that must lie one stride apart: maps that were enlarged come in pairs
_WANTED = "expected a module that maps images (N, 3, H, W) of any size to a grid of cells (N, C, h, w)"


@dataclass(frozen=True)
class Grid:
    """Cell i sees the pixels around first_centre + i · stride in both axes; `width` px give two cells across."""

    stride: int
    first_centre: float
    channels: int
    width: int


def probe(module: nn.Module) -> Grid:
    """The grid of a network, which stays as it was; BackboneError, with what was found, where it has none."""
    if not isinstance(module, nn.Module):
        raise BackboneError(f"{_WANTED}, got {type(module).__name__}; give a torch.nn.Module")
    with _undisturbed(module):
        width, channels = _narrowest(module)
        down, right = (_Axis(module, axis, width, channels) for axis in (2, 3))
        grid = down.grid()
        if right.alike(down):
            return grid
        other = right.grid()
    raise BackboneError(
        f"{_WANTED}, the same in both axes, got stride {grid.stride} and first centre {grid.first_centre:g} downwards, "
        f"{other.stride} and {other.first_centre:g} to the right; give both axes the same layers"
    )


def map_side(module: nn.Module, axis: int, side: int, width: int) -> int:
    """Cells along an axis (2 or 3) for `side` pixels of it; 0 where that is too small for the network."""
    try:
        with _undisturbed(module):
            return _run(module, _strip(module, axis, side, width), marked=False).shape[axis]
    except BackboneError:
        return 0


def _narrowest(module: nn.Module) -> tuple[int, int]:
    """The first of WIDTHS that gives two cells, and the channels of the map."""
    error = None
    for width in WIDTHS:
        images = _strip(module, 2, 256, width)
        try:
            found = _run(module, images, marked=False)
        except BackboneError as reason:  # too narrow, or nothing that fits any image: the widest one tells
            error = reason
            continue
        if bool(found.isnan().any()):
            raise BackboneError(f"{_WANTED}, but its map of finite images holds NaN; check its weights")
        if not torch.equal(found, _run(module, images, marked=False)):
            raise BackboneError(f"{_WANTED}, but two runs on one image differ; leave out what is random in eval mode")
        if min(found.shape[2:]) >= 2:
            return width, found.shape[1]
        error = BackboneError(
            f"{_WANTED}, got a map of {found.shape[2]} × {found.shape[3]} cells for 256 × {width} pixels; "
            "leave out what pools over the whole map"
        )
    assert error is not None
    raise error


class _Axis:
    """Strips along one axis (2 or 3), and which cells of their maps see which pixels."""

    def __init__(self, module: nn.Module, axis: int, width: int, channels: int) -> None:
        self.module, self.axis, self.width, self.channels = module, axis, width, channels
        self.seen = functools.cache(self._seen)
        self.decisive: list[tuple[int, int, int]] = []  # what to look at in the other axis

    def grid(self) -> Grid:
        """Stride and first centre along this axis."""
        lengths = [length for length in LENGTHS if length >= self.width]  # those large enough for the network
        for length in lengths:
            middle, cells = length // 2, len(self.seen(length, 0, 0))
            # The first cell behind all that see something before the middle, and the first that sees something behind.
            before, behind = (np.flatnonzero(self.seen(length, *part)) for part in ((0, middle), (middle, length)))
            low, high = int(before.max(initial=-1)) + 1, int(behind.min(initial=cells))
            inside = min(low, high) > 0 and max(low, high) + CELLS <= cells
            if inside and not self.seen(length, length - 1, length)[high + CELLS - 1]:
                break
        else:
            few = len(self.seen(lengths[0], 0, 0))
            growth = f"got {few} cells for {lengths[0]} pixels and {cells} for {length}"
            why = "none of which changes with a pixel" if not low else "each of which sees most of the image"
            raise BackboneError(
                f"{_WANTED}, {growth}, {why if cells > few else 'whatever the image'}; take the map of an earlier layer"
            )
        reach = 4 * (length // cells + 1)  # more than a stride
        start = self._first(length, low, middle, reach)
        stride = self._first(length, low + 1, start, reach) - start
        end = bisect.bisect_left(
            range(length), True, middle, min(middle + reach, length), key=lambda p: not self._sees(length, p, high)
        )
        for i in range(CELLS):
            self.decisive += [(length, 0, start + i * stride + k) for k in (0, 1)]
            self.decisive += [(length, end + i * stride - k, length) for k in (0, 1)]
            begins = [bool(self.seen(*self.decisive[-4 + k])[low + i]) for k in (0, 1)]
            ends = [bool(self.seen(*self.decisive[-2 + k])[high + i]) for k in (0, 1)]
            if stride < 1 or begins != [False, True] or ends != [False, True]:
                raise BackboneError(
                    f"{_WANTED}, one stride apart, but of {CELLS} neighbours the first two begin {stride} pixels apart "
                    "and others do not; take a map that was not enlarged or resized"
                )
        longer = len(self.seen(length + CELLS * stride, 0, 0))
        self.decisive.append((length + CELLS * stride, 0, 0))
        if longer != cells + CELLS:
            raise BackboneError(
                f"{_WANTED}, got {cells} cells for {length} pixels and {longer} for {length + CELLS * stride}, though "
                f"cells lie {stride} pixels apart; do not resize the map"
            )
        centre = (start - low * stride + end - 1 - high * stride) / 2
        return Grid(stride, centre, self.channels, self.width)

    def alike(self, other: _Axis) -> bool:
        """Whether the same cells see the same pixels as in the other axis, whose grid is known."""
        return all(np.array_equal(self.seen(*place), other.seen(*place)) for place in other.decisive)

    def _first(self, length: int, cell: int, start: int, reach: int) -> int:
        """The first pixel that a cell sees, at `start` or up to `reach` behind it."""
        stop = min(start + reach, length)
        return bisect.bisect_left(
            range(length), True, start, stop, key=lambda p: bool(self.seen(length, 0, p + 1)[cell])
        )

    def _sees(self, length: int, pixel: int, cell: int) -> bool:
        """Whether a cell sees this pixel or one behind it."""
        return bool(self.seen(length, pixel, length)[cell])

    def _seen(self, length: int, start: int, stop: int) -> NDArray[np.bool_]:
        """For every cell: does it see a pixel of [start, stop) of a strip of this length?"""
        images = _strip(self.module, self.axis, length, self.width)
        images.narrow(self.axis, start, stop - start).fill_(torch.nan)
        found = _run(self.module, images)
        if found.shape[1] != self.channels:
            raise BackboneError(
                f"{_WANTED}, got {self.channels} channels for 256 × {self.width} pixels and {found.shape[1]} for "
                f"{images.shape[2]} × {images.shape[3]}; give every map the same channels"
            )
        return found.isnan().transpose(self.axis, 0).flatten(1).any(dim=1).cpu().numpy()


def _strip(module: nn.Module, axis: int, length: int, width: int) -> Tensor:
    """An image (1, 3, H, W) of the module's kind, `length` pixels along the axis and `width` across."""
    size = (length, width) if axis == 2 else (width, length)
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    device, dtype = (tensors[0].device, tensors[0].dtype) if tensors else (torch.device("cpu"), torch.float32)
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _run(module: nn.Module, images: Tensor, marked: bool = True) -> Tensor:
    """The map of images, which hold NaN where they are `marked`."""
    try:
        with _Placeless() if marked else contextlib.nullcontext():
            found = module(images.clone())
    except Exception as error:  # whatever somebody's module raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BackboneError(f"{_WANTED}, but on {tuple(images.shape)} it fails: {reason}") from error
    if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[0] != 1 or not found.is_floating_point():
        kind = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise BackboneError(f"{_WANTED}, got {kind} for {tuple(images.shape)}; return the map before it is pooled")
    return found


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode of every part, the buffers and torch's random numbers are put back."""
    modes = {part: part.training for part in module.modules()}
    buffers = [(part, *named, named[1].clone()) for part in modes for named in part.named_buffers(recurse=False)]
    model = _strip(module, 2, 1, 1)
    gpus = [model.device] if model.is_cuda else []
    with contextlib.ExitStack() as stack:
        # cuDNN's convolutions by tiles, and oneDNN's in 16 bits, would spread NaN beyond the pixels that a cell sees.
        if gpus:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        elif model.element_size() < 4:
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # of other flags, left as they are
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.enter_context(torch.no_grad())
        try:
            for part in modes:
                part.training = False
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode
            for part, name, buffer, value in buffers:
                setattr(part, name, buffer.copy_(value))


class _Placeless(TorchFunctionMode):
    """Keeps NaN out of vectors, which have no place, and out of the statistics of a normalisation over the map."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.batch_norm, F.group_norm, F.instance_norm) and args:
            return func(torch.nan_to_num(args[0]), *args[1:], **kwargs).masked_fill(args[0].isnan(), torch.nan)
        found = func(*args, **kwargs)
        is_vector = isinstance(found, Tensor) and found.ndim > 1 and found.numel() == max(found.shape, default=0)
        return torch.nan_to_num(found) if is_vector and found.is_floating_point() else found
