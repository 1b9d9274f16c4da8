"""sppnet: SPP-net, object detection with spatial pyramid pooling (He, Zhang, Ren, Sun, 2014/15).

Boxes are float xyxy, 0-based, half-open, in pixels of the original image; windows on a map are int xyxy, half-open,
in cells; sizes are (height, width).

A name is imported from its module when it is first used: torch and all that detection needs take seconds, which
neither ``sppnet --help`` nor someone who wants the evaluation alone should wait for. Modules are imported by name, as
ever: ``import sppnet.data.voc``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppnet.backbones.geometry import Geometry
    from sppnet.backbones.windows import choose_scales, project_windows
    from sppnet.config import BoxRegressionSettings, Config, SVMSettings
    from sppnet.config_files import load_config
    from sppnet.detection.box_regression import fit_box_regressor
    from sppnet.detection.detector import SPPDetector
    from sppnet.detection.hard_negatives import mine_detectors
    from sppnet.detection.linear_svm import fit_linear_svm
    from sppnet.detection.nms import nms
    from sppnet.errors import SppnetError
    from sppnet.evaluation.voc import evaluate_voc
    from sppnet.images import read_image
    from sppnet.ops.pyramid import SpatialPyramidPool, WindowPool, pool_windows, spatial_pyramid_pool
    from sppnet.pipeline.training import train_detector
    from sppnet.proposals.selective_search import selective_search
    from sppnet.records import Annotation, Detections, ImageRecord

__version__ = "0.1.0"

_MODULES = {
    "Annotation": "records",
    "BoxRegressionSettings": "config",
    "Config": "config",
    "Detections": "records",
    "Geometry": "backbones.geometry",
    "ImageRecord": "records",
    "SPPDetector": "detection.detector",
    "SVMSettings": "config",
    "SpatialPyramidPool": "ops.pyramid",
    "SppnetError": "errors",
    "WindowPool": "ops.pyramid",
    "choose_scales": "backbones.windows",
    "evaluate_voc": "evaluation.voc",
    "fit_box_regressor": "detection.box_regression",
    "fit_linear_svm": "detection.linear_svm",
    "load_config": "config_files",
    "mine_detectors": "detection.hard_negatives",
    "nms": "detection.nms",
    "pool_windows": "ops.pyramid",
    "project_windows": "backbones.windows",
    "read_image": "images",
    "selective_search": "proposals.selective_search",
    "spatial_pyramid_pool": "ops.pyramid",
    "train_detector": "pipeline.training",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found  # the next access does not come here
    return found


def __dir__() -> list[str]:
    return __all__
