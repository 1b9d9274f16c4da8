"""The grid of any network, found by running it: no layer need be known.

Pixels that are NaN make NaN of every cell that sees them. Which cells turn NaN when all columns before, or all from,
one column on do gives the first and the last pixel of a cell, in some 30 runs on a narrow strip. Other finite pixels
must not change more cells: what hides NaN is an error. They alone would not do: what the first and last pixels add is
lost in rounding in deep networks. Values without a place - what is pooled over the whole map, as in
squeeze-and-excitation, and the statistics of a normalisation over the map - are held fixed: they change what a cell
holds, not where it looks.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from sppnet.errors import BackboneError

# px of a strip: the first in which inner cells see neither end
LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # px of a strip: the first that gives a cell
CELLS = 4  # neighbours that must lie one stride apart: maps that were enlarged come in pairs
_WANTED = "expected a module that maps images (N, 3, H, W) of any size to a grid of cells (N, C, h, w)"


@dataclass(frozen=True)
class Grid:
    """Cell i sees at most `field` pixels around first_centre + i · stride in both axes; `width` px give one across."""

    stride: int
    first_centre: float
    field: int
    channels: int
    width: int


def probe(module: nn.Module) -> Grid:
    """The grid of a network, of which a copy runs; BackboneError, with what was found, where it has none."""
    if not isinstance(module, nn.Module):
        raise BackboneError(f"{_WANTED}, got {type(module).__name__}; give a torch.nn.Module")
    tensors = (*module.named_parameters(), *module.named_buffers())
    empty = [name for name, tensor in tensors if is_lazy(tensor) or tensor.is_meta]
    if empty:
        raise BackboneError(f"{_WANTED}, but {empty[0]} has no values yet; load weights, or run the network once")
    with _undisturbed():
        try:
            own = copy.deepcopy(module).float().cpu().eval()
        except Exception as error:  # whatever somebody's module raises
            raise BackboneError(f"{_WANTED}, but it cannot be copied: {error}") from error
        width, channels = _narrowest(own)
        down, right = (_along(own, axis, width, channels) for axis in (2, 3))
    if down[:2] != right[:2]:
        raise BackboneError(
            f"{_WANTED}, the same in both axes, got stride {down[0]} and first centre {down[1]:g} downwards, "
            f"{right[0]} and {right[1]:g} to the right; give both axes the same layers"
        )
    return Grid(*down[:2], max(down[2], right[2]), channels, width)


def map_side(module: nn.Module, axis: int, side: int, width: int) -> int:
    """Cells along an axis (2 or 3) for `side` pixels of it; 0 where that is too small for the network, in eval mode."""
    images = _random_images(axis, side, width)
    like = next(module.parameters(), images)
    try:
        with _undisturbed():
            return _run(module, images.to(like.device, like.dtype)).shape[axis]
    except BackboneError:
        return 0


def _narrowest(module: nn.Module) -> tuple[int, int]:
    """The first of WIDTHS that gives cells, and the channels of the map."""
    error = None
    for width in WIDTHS:
        images = _random_images(2, 256, width)
        try:
            found = _run(module, images)
        except BackboneError as reason:  # too narrow, or nothing that fits any image: the widest one tells
            error = reason
            continue
        if bool(found.isnan().any()):
            raise BackboneError(f"{_WANTED}, but its map of finite images holds NaN; check its weights")
        if not torch.equal(found, _run(module, images)):
            raise BackboneError(f"{_WANTED}, but two runs on one image differ; leave out what is random in eval mode")
        sees = any(not torch.equal(found, _run(module, factor * images)) for factor in (10, -1))  # not padding alone
        if found.shape[2] >= 2 and found.shape[3] and sees:
            return width, found.shape[1]
        why = "leave out what pools over the whole map" if sees else "none of which changes with a pixel"
        error = BackboneError(
            f"{_WANTED}, got a map of {found.shape[2]} × {found.shape[3]} cells for 256 × {width} pixels; {why}"
        )
    assert error is not None
    raise error


def _along(module: nn.Module, axis: int, width: int, channels: int) -> tuple[int, float, int]:
    """Stride, first centre and receptive field along an axis (2 or 3)."""
    lengths, fits = [length for length in LENGTHS if length >= width], False  # those large enough for the network
    for length in lengths:
        strip, middle = _Strip(module, axis, width, channels, length), length // 2
        # From cell `low` on nothing before the middle is seen, from cell `high` on something behind it.
        cells, low, high = strip.cells, strip.reached(middle), strip.left(middle)
        apart = length // max(cells, 1) + 1  # roughly a stride, and more
        inside = min(low, high) > 0 and max(low, high) + CELLS <= strip.reached(length)
        fits = inside and strip.left(max(length - 2 * apart, 0)) >= high + CELLS  # between two cells may be a gap
        if fits:
            break
    if not fits:
        strip.check(0, middle)
        strip.check(middle, length)
        few = _Strip(module, axis, width, channels, lengths[0]).cells
        why = "none of which changes with a pixel" if not low else "each of which sees most of the image"
        raise BackboneError(
            f"{_WANTED}, got {few} cells for {lengths[0]} pixels and {cells} for {length}, "
            f"{why if cells > few else 'whatever the image'}; take the map of an earlier layer"
        )
    places = range(length)
    reach = min(middle + 8 * apart, length)  # more than two strides
    start, following = (bisect.bisect(places, cell, middle - 1, reach, key=strip.reached) for cell in (low, low + 1))
    end, stride = bisect.bisect(places, high, middle, reach, key=strip.left), following - start
    strip.check(0, start - 1)  # the next pixel is the first that cell `low` sees
    strip.check(end, length)  # the one before is the last that cell `high` sees
    regular = stride > 0 and _Strip(module, axis, width, channels, length + CELLS * stride).cells == cells + CELLS
    for i in range(CELLS):  # they begin at `start` - 1 and end at `end` - 1, and so on in steps of a stride
        first, last = start + i * stride, end + i * stride
        found = strip.reached(first - 1), strip.reached(first), strip.left(last - 1), strip.left(last)
        regular = regular and found == (low + i, low + i + 1, high + i, high + i + 1)
    with contextlib.suppress(BackboneError):  # of a network that takes multiples of its stride alone
        longer = _Strip(module, axis, width, channels, length + 1)
        found = longer.reached(start - 1), longer.reached(start), longer.left(end - 1), longer.left(end)
        regular = regular and found == (low, low + 1, high, high + 1)
    if not regular:
        raise BackboneError(
            f"{_WANTED}, one stride apart in images of any size, but two neighbours begin {stride} pixels apart and "
            "others do not; take a map that was not enlarged or resized, of layers that pad alike on both sides"
        )
    return stride, (start + end) / 2 - 1 - (low + high) * stride / 2, end - start + 1 - (high - low) * stride


class _Strip:
    """A narrow image along one axis, and which cells of its map see which of its pixels."""

    def __init__(self, module: nn.Module, axis: int, width: int, channels: int, length: int) -> None:
        self.module, self.axis, self.channels = module, axis, channels
        self.images = _random_images(axis, length, width)
        self.seen = functools.cache(self._seen)  # where it bisects, it asks again
        self.cells = len(self.seen(0, 0))

    def reached(self, stop: int) -> int:
        """How many cells there are up to the last that sees a pixel before `stop`."""
        return int(np.flatnonzero(self.seen(0, stop)).max(initial=-1)) + 1

    def left(self, start: int) -> int:
        """How many cells there are before the first that sees a pixel from `start` on."""
        return int(np.flatnonzero(self.seen(start, self.images.shape[self.axis])).min(initial=self.cells))

    def _seen(self, start: int, stop: int) -> NDArray[np.bool_]:
        images = self.images.clone()
        images.narrow(self.axis, start, stop - start).fill_(torch.nan)
        return self._cells(_run(self.module, images, _Placeless(None)).isnan())

    def check(self, start: int, stop: int) -> None:
        """BackboneError where a cell changes with these pixels, though their NaN does not reach it."""
        before, part = self._unmarked, self.images.narrow(self.axis, start, stop - start)
        for factor in (1, -1, 10):  # an activation or a maximum may hide one change, not all
            images = self.images.clone()
            images.narrow(self.axis, start, stop - start).copy_(part.flip(1, 2, 3) * factor)
            after = _run(self.module, images, _Placeless(0.5))
            if (self._cells((before != after) & ~(before.isnan() & after.isnan())) & ~self.seen(start, stop)).any():
                raise BackboneError(
                    f"{_WANTED} and passes NaN on, but cells change with pixels whose NaN does not reach them; "
                    "replace what hides NaN, e.g. torch.where(x > 0, x, 0) by torch.relu(x)"
                )

    @functools.cached_property
    def _unmarked(self) -> Tensor:
        return _run(self.module, self.images, _Placeless(0.5))

    def _cells(self, marks: Tensor) -> NDArray[np.bool_]:
        """Which cells along the axis hold a mark."""
        if marks.shape[1] != self.channels:
            raise BackboneError(
                f"{_WANTED}, got {self.channels} channels for one size and {marks.shape[1]} for "
                f"{self.images.shape[2]} × {self.images.shape[3]}; give every map the same channels"
            )
        return marks.transpose(self.axis, 0).flatten(1).any(dim=1).cpu().numpy()


def _random_images(axis: int, length: int, width: int) -> Tensor:
    """An image (1, 3, H, W) of `length` pixels along the axis and `width` across."""
    size = (length, width) if axis == 2 else (width, length)
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))


def _run(module: nn.Module, images: Tensor, mode: _Placeless | None = None) -> Tensor:
    """The map of images, in a mode where they are marked."""
    try:
        with mode or contextlib.nullcontext():
            found = module(images.clone())
    except Exception as error:  # whatever somebody's module raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BackboneError(f"{_WANTED}, but on {tuple(images.shape)} it fails: {reason}") from error
    if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[0] != 1 or not found.is_floating_point():
        kind = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise BackboneError(f"{_WANTED}, got {kind} for {tuple(images.shape)}; return the map before it is pooled")
    return found


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without gradients, on one thread, whatever the caller has set in torch, which is put back.

    More threads wait for one another on strips so narrow: where others use the cores, twenty times as long.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        for state in (torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), torch.random.fork_rng([])):
            stack.enter_context(state)
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        yield


class _Placeless(TorchFunctionMode):
    """Keeps marks out of vectors, which have no place, and out of the statistics of a normalisation over the map.

    Marks are NaN, or, where vectors get a `value` that is fixed, any change.
    """

    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.value = value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.value is None and func is F.conv2d and len(args) == 7 and args[0].ndim == 4:
            return _marks_of_convolution(*args)
        if func in (F.batch_norm, F.group_norm, F.instance_norm) and args:
            if self.value is not None:
                return F.normalize(args[0], dim=1)  # every place by itself
            return func(torch.nan_to_num(args[0]), *args[1:], **kwargs).masked_fill(args[0].isnan(), torch.nan)
        found = func(*args, **kwargs)
        if not isinstance(found, Tensor) or found.ndim < 2 or found.numel() != max(found.shape):
            return found
        if not found.is_floating_point():
            return found
        return torch.nan_to_num(found) if self.value is None else torch.full_like(found, self.value)


def _marks_of_convolution(images: Tensor, weight: Tensor, bias: object, *options: Any) -> Tensor:
    """NaN where a convolution has NaN, numbers elsewhere: counted in one channel, which takes a tenth of the time."""
    marks = images.isnan()
    groups = 1 if bool((marks == marks[:, :1]).all()) else options[-1]
    seen, ones = marks.unflatten(1, (groups, -1)).any(dim=2), weight.new_ones(groups, 1, *weight.shape[2:])
    count = torch.ops.aten.conv2d(seen.to(weight.dtype), ones, None, *options[:-1], groups)
    return torch.rand_like(count).masked_fill(count > 0, torch.nan).repeat_interleave(len(weight) // groups, dim=1)
