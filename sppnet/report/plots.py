"""Results and training as curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from sppnet.evaluation.proposals import ProposalQuality
from sppnet.evaluation.voc import ClassResult, VOCEvaluation
from sppnet.report.drawing import class_colour

LOG_COLUMNS = ("step", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate")
DOTS_PER_INCH = 120
MAIN, SECOND, PALE = "#1f5fa8", "#d1495b", "#9aa3ad"
METRIC_NAMES = {"11point": "11-point AP", "area": "area AP"}


def draw_precision_recall(evaluation: VOCEvaluation) -> Image.Image:
    """One small panel per class with its curve and AP, in the order of the evaluation; the mean AP above them."""
    names = list(evaluation.results)
    rows, columns = _grid_shape(len(names))
    figure = Figure(figsize=(max(2.1 * columns + 0.6, 3.6), 2.1 * rows + 0.9), layout="constrained")
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
    return _render(figure)


def draw_training(log: Mapping[str, NDArray[np.float64]]) -> Image.Image:
    """Loss and accuracy over the steps, training and validation, from `read_training_log`."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        _log_line(axes, log, name, MAIN, "training")
        _log_line(axes, log, f"val_{name}", SECOND, "validation")
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        _plain(axes)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
        else:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", color=PALE, transform=axes.transAxes)
        _mark_rate_changes(axes, log)
    return _render(figure)


def read_training_log(path: Path) -> dict[str, NDArray[np.float64]]:
    """The LOG_COLUMNS of a CSV file, each (R,); an empty cell is nan. ValueError where the file cannot be used."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in LOG_COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise ValueError(
                    f"{path}: expected the columns {', '.join(LOG_COLUMNS)}; {', '.join(missing)} not found"
                )
            rows = [[_cell(row[name], path, number) for name in LOG_COLUMNS] for number, row in enumerate(reader, 2)]
    except OSError as error:
        raise ValueError(f"{path}: cannot read the training log ({error.strerror}); fine-tune first") from None
    values = np.array(rows, dtype=np.float64).reshape(-1, len(LOG_COLUMNS))
    return {name: values[:, index] for index, name in enumerate(LOG_COLUMNS)}


def draw_proposal_recall(qualities: Mapping[str, ProposalQuality]) -> Image.Image:
    """Share of the objects that the windows of each named method cover, over the IoU asked for."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    thresholds = np.linspace(0.5, 1, 51)
    for index, (name, quality) in enumerate(qualities.items()):
        label = f"{name}  ({quality.mean_windows:.0f} windows, {_number(quality.recall_at(0.5))} at 0.5)"
        recall = [quality.recall_at(iou) for iou in thresholds]
        axes.plot(thresholds, recall, color=_line_colour(index), linewidth=2, label=label)
    axes.set(xlabel="IoU", ylabel="recall", xlim=(0.5, 1), ylim=(0, 1.02))
    _plain(axes)
    if qualities:
        axes.legend(frameon=False, fontsize=9, loc="lower left")
    return _render(figure)


def draw_recall_by_windows(qualities: Mapping[str, Mapping[int, ProposalQuality]]) -> Image.Image:
    """Recall and mean best overlap over the number of windows an image may keep: name -> number -> quality."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    for axes, title in zip(figure.subplots(1, 2), ("recall", "mean best overlap"), strict=True):
        for index, (name, by_count) in enumerate(qualities.items()):
            values = [q.recall if title == "recall" else q.mean_best_overlap for q in by_count.values()]
            axes.plot(list(by_count), values, color=_line_colour(index), linewidth=2, marker="o", label=name)
        axes.set(xlabel="windows per image", title=title, ylim=(0, 1.02))
        _plain(axes)
        if qualities:
            axes.legend(frameon=False, fontsize=9, loc="lower right")
    return _render(figure)


def _grid_shape(panels: int) -> tuple[int, int]:
    """(rows, columns) of a grid somewhat wider than high, with as few empty places as can be."""
    square = math.ceil(math.sqrt(panels))
    columns = min(range(square, square + 3), key=lambda columns: (-panels % columns, columns))
    return math.ceil(panels / columns), columns


def _precision_recall_panel(axes: Axes, name: str, result: ClassResult) -> None:
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    _plain(axes)
    if result.ap is None:
        axes.set_title(f"{name}  –", fontsize=10, color=PALE, loc="left")
        axes.text(0.5, 0.5, "no objects", ha="center", va="center", color=PALE, fontsize=9)
        return
    axes.set_title(f"{name}  {result.ap:.3f}", fontsize=10, loc="left")
    recall, precision = result.curve.recall, result.curve.precision
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    axes.fill_between(np.append(0, recall), np.append(envelope[:1], envelope), color=MAIN, alpha=0.15, linewidth=0)
    axes.plot(recall, precision, color=MAIN, linewidth=1.4)


def _log_line(axes: Axes, log: Mapping[str, NDArray[np.float64]], name: str, colour: str, label: str) -> None:
    """Only where the column has a value: validation is measured more rarely than it is trained."""
    present = np.isfinite(log[name])
    if present.any():
        marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if present.sum() <= 60 else {}
        axes.plot(log["step"][present], log[name][present], color=colour, linewidth=1.6, label=label, **marker)


def _mark_rate_changes(axes: Axes, log: Mapping[str, NDArray[np.float64]]) -> None:
    """A dotted line with the new learning rate at every step where it changes."""
    rates = log["learning_rate"]
    for row in np.flatnonzero(rates[1:] != rates[:-1]) + 1:
        axes.axvline(log["step"][row], color=PALE, linewidth=1, linestyle=":")
        axes.annotate(
            f"{rates[row]:g}",
            (log["step"][row], 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color="#5a636d",
        )


def _cell(text: str | None, path: Path, line: int) -> float:
    try:
        return float(text) if text and text.strip() else math.nan
    except ValueError:
        raise ValueError(f"{path}, line {line}: expected a number, got {text!r}; delete the line or the log") from None


def _plain(axes: Axes) -> None:
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, length=0)


def _line_colour(index: int) -> tuple[float, float, float]:
    red, green, blue = class_colour(index)
    return red / 255, green / 255, blue / 255


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _render(figure: Figure) -> Image.Image:
    figure.set_dpi(DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
