"""sppnet: SPP-net, object detection with spatial pyramid pooling (He, Zhang, Ren, Sun, 2014/15).

Boxes are float xyxy, 0-based, half-open, in pixels of the original image; windows on a map are int xyxy, half-open,
in cells; sizes are (height, width).
"""

from sppnet.config import BoxRegressionSettings, Config, SVMSettings
from sppnet.config_files import load_config
from sppnet.detection.box_regression import fit_box_regressor
from sppnet.detection.detector import SPPDetector
from sppnet.detection.linear_svm import fit_linear_svm
from sppnet.detection.nms import nms
from sppnet.detection.windows import choose_scales, project_windows
from sppnet.evaluation.voc import evaluate_voc
from sppnet.images import read_image
from sppnet.network.pyramid import SpatialPyramidPool, pool_windows, spatial_pyramid_pool
from sppnet.network.trunks import Geometry
from sppnet.records import Annotation, Detections, ImageRecord

__version__ = "0.1.0"

__all__ = [
    "Annotation",
    "BoxRegressionSettings",
    "Config",
    "Detections",
    "Geometry",
    "ImageRecord",
    "SPPDetector",
    "SVMSettings",
    "SpatialPyramidPool",
    "choose_scales",
    "evaluate_voc",
    "fit_box_regressor",
    "fit_linear_svm",
    "load_config",
    "nms",
    "pool_windows",
    "project_windows",
    "read_image",
    "spatial_pyramid_pool",
]
