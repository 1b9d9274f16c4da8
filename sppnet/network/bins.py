"""Where the bins of a pyramid are computed from (app. A): from squares of cells of the map, or from finer bins.

Level n divides a side of H cells into bins floor(i·H / n) … ceil((i + 1)·H / n) - 1. Bins are floor / ceil of exact
fractions, so level n is the exact maximum over blocks of level m wherever n divides m. Only levels that divide no
other one, the roots, read the map: (1, 2, 3, 6) is a single pass over a window.

A bin is covered by the largest squares of 1, 2, 4 … cells a side that fit into it, overlapping where they must: a
maximum does not notice. Four squares or fewer cover nearly all bins, so places are given in groups of four.

numba keeps callers on disk and does not see changes here: after one, delete ``__pycache__/kernels.*.nb*``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppnet.compiling import compiled

GROUP = 4  # places of a group, as `vectors.largest_of_four` takes them; where fewer are needed the last is repeated


def level_plan(levels: Sequence[int]) -> NDArray[np.int64]:
    """How to compute the levels, roots first and then finest first: rows (n, parent, first row, first bin).

    `parent` is the plan row of the smallest level already computed that n divides; -1 reads the map itself. Rows count
    the bins in the order in which they are computed.
    """
    firsts = np.cumsum([0, *(n * n for n in levels)])
    finest_first = sorted(range(len(levels)), key=lambda k: -levels[k])
    roots = [k for at, k in enumerate(finest_first) if all(levels[j] % levels[k] for j in finest_first[:at])]
    plan: list[tuple[int, int, int, int]] = []
    row = 0
    for k in [*roots, *(k for k in finest_first if k not in roots)]:
        n = levels[k]
        parents = [] if k in roots else [at for at, (m, *_) in enumerate(plan) if m % n == 0]
        plan.append((n, min(parents, key=lambda at: plan[at][0], default=-1), row, int(firsts[k])))
        row += n * n
    return np.array(plan, dtype=np.int64)


def bin_order(levels: Sequence[int]) -> NDArray[np.int64]:
    """(Σn²,): which bin of the pyramid vector, counted over its levels, each computed bin is."""
    return np.concatenate([np.arange(first, first + n * n) for n, _, _, first in level_plan(levels)])


@functools.lru_cache(maxsize=16)
def reads_of_bins(plan: tuple[tuple[int, ...], ...], step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of every bin that is computed from finer bins: its first group (B + 1,), and groups (G, 4) of their places.

    Places are bytes from the first computed bin on, at `step` bytes a bin.
    """
    firsts, groups = [0], list[list[int]]()
    for n, parent, _, _ in plan:
        if parent < 0:
            continue
        m, _, row, _ = plan[parent]
        side = m // n
        for i in range(n):
            for j in range(n):
                own = [row + (i * side + k // side) * m + j * side + k % side for k in range(side * side)]
                own += [own[-1]] * (-len(own) % GROUP)
                groups += [[step * place for place in own[k : k + GROUP]] for k in range(0, len(own), GROUP)]
                firsts.append(len(groups))
    return np.array(firsts, np.int64), np.array(groups, np.int64).reshape(-1, GROUP)


@compiled()
def reads_of_windows(windows: Any, plan: Any, squares: int, height: int, width: int, step: int) -> Any:
    """The same of the bins of the roots of windows (R, 4), in the squares of a map: window after window.

    Squares of 2ᵏ cells a side, k < `squares`, lie one after the other as [k, y, x], `step` bytes each, at their first
    cell.
    """
    bins = 0
    for level in range(plan.shape[0]):
        bins += plan[level, 0] * plan[level, 0] if plan[level, 1] < 0 else 0
    firsts = np.empty(windows.shape[0] * bins + 1, np.int64)
    groups = np.empty((windows.shape[0] * bins * 5 // 4 + 64, GROUP), np.int64)
    current, count = 0, 0
    for r in range(windows.shape[0]):
        x1, y1, x2, y2 = windows[r]
        for level in range(plan.shape[0]):
            n = plan[level, 0]
            if plan[level, 1] >= 0:
                continue
            for i in range(n):
                top, bottom = y1 + i * (y2 - y1) // n, y1 + ((i + 1) * (y2 - y1) + n - 1) // n
                for j in range(n):
                    left, right = x1 + j * (x2 - x1) // n, x1 + ((j + 1) * (x2 - x1) + n - 1) // n
                    firsts[current] = count
                    current += 1
                    k, side = 0, 1
                    while k + 1 < squares and 2 * side <= min(bottom - top, right - left):
                        k, side = k + 1, 2 * side
                    first, last_y, last_x = k * height, bottom - side, right - side
                    if last_y <= top + side and last_x <= left + side:  # up to four, one in each corner
                        upper, lower = (first + top) * width, (first + last_y) * width
                        own = groups[count]
                        own[0], own[1] = step * (upper + left), step * (upper + last_x)
                        own[2], own[3] = step * (lower + left), step * (lower + last_x)
                        count += 1
                    else:
                        across = (right - left + side - 1) // side
                        most = across * ((bottom - top + side - 1) // side) - 1
                        more = most // GROUP + 1
                        if count + more + windows.shape[0] * bins - current > groups.shape[0]:
                            larger = np.empty((2 * groups.shape[0] + more, GROUP), np.int64)
                            larger[:count] = groups[:count]
                            groups = larger
                        for place in range(GROUP * more):
                            at = min(place, most)
                            y, x = min(top + at // across * side, last_y), min(left + at % across * side, last_x)
                            groups[count + place // GROUP, place % GROUP] = step * ((first + y) * width + x)
                        count += more
    firsts[current] = count
    return firsts, groups[:count]
