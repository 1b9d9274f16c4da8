"""Results as curves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sppnet.evaluation.results import ClassResult, VOCEvaluation
from sppnet.report.fonts import font_file, legible

DOTS_PER_INCH = 120
MAIN, PALE = "#1f5fa8", "#9aa3ad"
MOST_PANELS = 48  # of a figure that is drawn in seconds and can be looked at
LONGEST_TITLE = 18
METRIC_NAMES = {"11point": "11-point AP", "area": "area AP", "ilsvrc": "ILSVRC AP", "coco": "COCO AP; curves"}


def draw_precision_recall(evaluation: VOCEvaluation) -> Image.Image:
    """One small panel per class with its curve and AP, in the order of the evaluation; the mean AP above them.

    Of many classes the 48 with the lowest AP.
    """
    names = list(evaluation.results)
    if len(names) > MOST_PANELS:
        aps = {name: math.inf if ap is None else ap for name, ap in evaluation.ap.items()}
        worst = sorted(names, key=aps.__getitem__)[:MOST_PANELS]
        names = [name for name in names if name in set(worst)]
    square = math.ceil(math.sqrt(len(names)))
    columns = min(range(square, square + 3), key=lambda count: -len(names) % count)  # as few empty places as can be
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(2.1 * columns + 0.6, 3.6), 2.1 * rows + 0.9), dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index < len(names):
            _precision_recall_panel(axes, names[index], evaluation.results[names[index]])
            axes.tick_params(labelbottom=index + columns >= len(names))
        else:
            axes.set_visible(False)
    mean = "undefined" if math.isnan(evaluation.map) else f"{evaluation.map:.3f}"
    title = f"mean AP {mean}  ({METRIC_NAMES[evaluation.metric]} at IoU {evaluation.iou:g})"
    if len(names) < len(evaluation.results):
        title += f"\nthe {len(names)} lowest of {len(evaluation.results)} classes"
    figure.suptitle(title, fontsize=12)
    figure.supxlabel("recall", fontsize=10)
    figure.supylabel("precision", fontsize=10)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _precision_recall_panel(axes: Axes, name: str, result: ClassResult) -> None:
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, length=0)
    text: dict[str, Any] = {"font": font_file(name), "fontsize": 10, "loc": "left", "parse_math": False}  # $ is a $
    name = legible(name)
    name = name if len(name) <= LONGEST_TITLE else f"{name[: LONGEST_TITLE - 1]}…"
    if result.ap is None:
        axes.set_title(f"{name}  –", color=PALE, **text)
        axes.text(0.5, 0.5, "no objects", ha="center", va="center", color=PALE, fontsize=9)
        return
    axes.set_title(f"{name}  {result.ap:.3f}", **text)
    recall, precision = result.curve.recall, result.curve.precision
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    axes.fill_between(np.append(0, recall), np.append(envelope[:1], envelope), color=MAIN, alpha=0.15, linewidth=0)
    axes.plot(recall, precision, color=MAIN, linewidth=1.4)
