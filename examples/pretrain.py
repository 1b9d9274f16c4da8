"""A detector whose backbone, fc6 and fc7 first learn to classify its own objects: no weights, no other pictures needed.

python examples/pretrain.py CONFIG RUN
"""

import sys
from pathlib import Path

from sppnet import load_config
from sppnet.classification.settings import ClassifierConfig
from sppnet.classification.training import train_classifier
from sppnet.data.crops import write_crops
from sppnet.distributed import choose_device
from sppnet.pipeline.run_data import load_run_data
from sppnet.pipeline.training import train_detector

if __name__ == "__main__":  # other processes may read the crops
    if len(sys.argv) != 3:
        sys.exit("python examples/pretrain.py CONFIG RUN")
    path, run, device = sys.argv[1], Path(sys.argv[2]), choose_device("auto")
    config = load_config(path)
    data = load_run_data(config)  # without the images that are held out
    crops = write_crops(data.train, data.classes, run / "crops", side=110)
    settings = ClassifierConfig(
        data={"train": crops},
        backbone=config.backbone,
        pyramid=config.pyramid,
        head=config.head.model_copy(update={"dropout": 0.1}),  # 0.5 would keep a new backbone from learning
        training={"sizes": [64, 96], "min_side": 110, "batch": 64, "learning_rate": 0.01, "epochs": 60, "patience": 20},
    )
    train_classifier(settings, run / "crops", device)
    weights = run / "crops/classifier/weights.safetensors"
    start = {"backbone.weights.source": "file", "backbone.weights.file": weights}
    start |= {"head.init": "checkpoint", "head.checkpoint": weights}
    config = load_config(path, [f"{key}={value}" for key, value in start.items()])
    train_detector(config, run, device)
    print(f"a detector is in {run / 'detector'}; next: sppnet eval {run}")
