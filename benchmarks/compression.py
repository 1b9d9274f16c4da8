"""What compressing fc6 and fc7 costs in mAP: ranks chosen by answers to training images, and by the weights alone.

    python benchmarks/compression.py RUN --ranks 512,128 256,64 128,64 [--methods responses weights] [--split YEAR/SET]

Every image is searched, embedded and pooled once for all variants; each variant scores its windows, in float32, and
selects its detections as `sppnet eval` does. The ranks and multiply-adds of the whole detector stand first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from sppnet.data.voc import restrict
from sppnet.detection.compression import SAMPLE, sample_responses
from sppnet.detection.detector import SPPDetector, WindowScores
from sppnet.detection.low_rank import CompressionError, both_responses, check_ranks, compress_head, linear_responses
from sppnet.detection.plan import load_test_data, usable_config, windows_folder
from sppnet.detection.proposals import propose_images, read_windows
from sppnet.detection.window_features import pool_cells, window_cells
from sppnet.evaluation.voc import VOCEvaluation, evaluate_voc
from sppnet.images import read_image
from sppnet.network.sppnet import SPPHead
from sppnet.records import Detections, ImageRecord

WHOLE = "whole"


def variants(
    head: SPPHead, responses: torch.Tensor | None, ranks: Sequence[tuple[int, int]], methods: Sequence[str]
) -> dict[tuple[str, int, int], SPPHead]:
    """(method, rank of fc6, rank of fc7) -> a head; the whole one first."""
    heads = {(WHOLE, head.fc6.out_features, head.fc7.out_features): head}
    for method in methods:
        for fc6, fc7 in ranks:
            heads[method, fc6, fc7] = compress_head(head, fc6, fc7, responses if method == "responses" else None)
    return heads


def products(head: SPPHead) -> int:
    """Multiply-adds a window."""
    return sum(layer.weight.numel() for name in ("fc6", "fc7") for layer in head.products(name))


@torch.inference_mode()
def detect_with_all(
    detector: SPPDetector, heads: dict[tuple[str, int, int], SPPHead], record: ImageRecord, folder: Path
) -> dict[tuple[str, int, int], Detections]:
    image, config = read_image(record.path), detector.config
    windows, maps = read_windows(folder, record).astype(float), detector.embed(image)
    where = window_cells(maps, windows, detector.trunk.geometry, config.pyramid, config.maps)
    distinct, rows = where.merged()
    answers = linear_responses(detector.head, pool_cells(maps, distinct, config.pyramid.levels))
    found = {}
    for name, head in heads.items():
        features = both_responses(head, answers, detector.head)[config.svm.layer].relu()
        scores = detector.detectors.score(features).numpy()[rows]
        own = replace(detector, head=head)
        found[name] = own.select(windows, WindowScores(scores, maps, where), image.shape[:2])
    return found


def evaluate(detector: SPPDetector, records: Sequence[ImageRecord], found: Sequence[Detections]) -> VOCEvaluation:
    known = restrict([record for record in records if record.annotation is not None], detector.classes)
    annotations = {record.id: record.annotation for record in known}
    own = {record.id: detections for record, detections in zip(records, found, strict=True)}
    settings = detector.config.evaluate
    detections = {image: own[image] for image in annotations}
    return evaluate_voc(detections, annotations, detector.classes, settings.metric, settings.iou)  # type: ignore[arg-type]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    ranks = ["512,128", "256,64", "128,64"]
    parser.add_argument("--ranks", nargs="+", default=ranks, metavar="FC6,FC7", help="0: that layer stays whole")
    parser.add_argument("--methods", nargs="+", choices=("responses", "weights"), default=["responses", "weights"])
    parser.add_argument("--split", nargs="+", default=[], metavar="YEAR/SET", help="default: data.test")
    parser.add_argument("--images", type=int, default=SAMPLE.images, help="training images that are asked")
    parser.add_argument("--limit", type=int, help="evaluate on so many images alone, for a trial")
    options = parser.parse_args(arguments)
    pairs = [(int(fc6), int(fc7)) for fc6, fc7 in (pair.split(",") for pair in options.ranks)]

    detector = SPPDetector.load(options.run)
    if detector.config.svm.layer == "pool" or detector.head.ranks:
        sys.exit(f"{options.run}: expected a detector with whole fc6 and fc7, which its SVMs use")
    try:  # now, not after minutes of asking images
        for fc6, fc7 in pairs:
            check_ranks(detector.head, {"fc6": fc6, "fc7": fc7})
    except CompressionError as error:
        parser.error(f"--ranks: {error}")
    detector = replace(detector, config=usable_config(detector.config))
    responses = None
    if "responses" in options.methods:
        responses = sample_responses(detector, options.run, options.images).chosen
    heads = variants(detector.head, responses, pairs, options.methods)
    records = load_test_data(detector.config, None, tuple(options.split))[0][: options.limit]
    folder = windows_folder(options.run, detector.config.proposals)
    propose_images(records, detector.config.proposals, folder)
    found: dict[tuple[str, int, int], list[Detections]] = {name: [] for name in heads}
    for record in tqdm(records, desc="detect", unit="image", disable=None):
        for name, detections in detect_with_all(detector, heads, record, folder).items():
            found[name].append(detections)

    whole = None
    print(f"{len(records)} images, {len(detector.classes)} classes, {detector.config.evaluate.metric}")
    print(f"{'directions by':<14}{'fc6':>6}{'fc7':>6}{'multiply-adds':>15}{'times fewer':>13}{'mAP':>8}{'lost':>7}")
    for (method, fc6, fc7), detections in found.items():
        value, work = 100 * evaluate(detector, records, detections).map, products(heads[method, fc6, fc7])
        whole = whole or (value, work)
        line = f"{method:<14}{fc6:>6}{fc7:>6}{work:>15,}{whole[1] / work:>13.1f}{value:>8.2f}{whole[0] - value:>7.2f}"
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
