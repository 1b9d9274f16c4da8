"""Results as curves."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sppnet.evaluation.voc import ClassResult, VOCEvaluation

DOTS_PER_INCH = 120
MAIN, PALE = "#1f5fa8", "#9aa3ad"
METRIC_NAMES = {"11point": "11-point AP", "area": "area AP"}


def draw_precision_recall(evaluation: VOCEvaluation) -> Image.Image:
    """One small panel per class with its curve and AP, in the order of the evaluation; the mean AP above them."""
    names = list(evaluation.results)
    rows, columns = _grid_shape(len(names))
    figure = Figure(figsize=(max(2.1 * columns + 0.6, 3.6), 2.1 * rows + 0.9), dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index < len(names):
            _precision_recall_panel(axes, names[index], evaluation.results[names[index]])
            axes.tick_params(labelbottom=index + columns >= len(names))
        else:
            axes.set_visible(False)
    mean = "undefined" if math.isnan(evaluation.map) else f"{evaluation.map:.3f}"
    figure.suptitle(f"mean AP {mean}  ({METRIC_NAMES[evaluation.metric]}, IoU {evaluation.iou:g})", fontsize=12)
    figure.supxlabel("recall", fontsize=10)
    figure.supylabel("precision", fontsize=10)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _grid_shape(panels: int) -> tuple[int, int]:
    """(rows, columns) of a grid somewhat wider than high, with as few empty places as can be."""
    square = math.ceil(math.sqrt(panels))
    columns = min(range(square, square + 3), key=lambda columns: (-panels % columns, columns))
    return math.ceil(panels / columns), columns


def _precision_recall_panel(axes: Axes, name: str, result: ClassResult) -> None:
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, length=0)
    if result.ap is None:
        axes.set_title(f"{name}  –", fontsize=10, color=PALE, loc="left")
        axes.text(0.5, 0.5, "no objects", ha="center", va="center", color=PALE, fontsize=9)
        return
    axes.set_title(f"{name}  {result.ap:.3f}", fontsize=10, loc="left")
    recall, precision = result.curve.recall, result.curve.precision
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    axes.fill_between(np.append(0, recall), np.append(envelope[:1], envelope), color=MAIN, alpha=0.15, linewidth=0)
    axes.plot(recall, precision, color=MAIN, linewidth=1.4)
