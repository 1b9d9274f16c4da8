"""The runtime of a frozen backbone: torch, or OpenVINO on a CPU where it is installed (extra `[cpu]`).

The only importer of openvino, which is imported when first used. Nothing here sends anything over the network.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sppnet.backbones.backbone import Backbone
from sppnet.errors import SppnetError
from sppnet.images import prepare

logger = logging.getLogger("sppnet")

Kind = Literal["auto", "torch", "openvino"]
Precision = Literal["float32", "bfloat16"]
Run = Callable[[Tensor], Tensor]

# Shapes stay dynamic: a model reshaped to each size is no faster and is compiled for 0.03 to 0.4 s per size. What
# OpenVINO keeps per layer and size is limited: over 300 sizes its default, 5000, takes 500 MB and grows, 256 take 100.
KEPT_LAYERS = 256

TRACED_SIZE = (96, 128)  # any size that every backbone accepts: the converted model takes all sizes
CHECKED_SIZE = (128, 96)  # another one

_used_by: set[int] = set()  # the process that uses OpenVINO; a forked one inherits the entry of its parent


@dataclass(frozen=True)
class Runtime:
    """A frozen backbone and what runs it: prepared images (N, 3, H, W) -> their maps (N, C, h, w), both float32."""

    backbone: Backbone
    run: Run

    def __call__(self, images: Tensor) -> Tensor:
        return self.run(images)

    def prepare(self, image: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
        """uint8 RGB (H, W, 3) -> what the network sees of it at `size`: (1, 3, h, w) on its device."""
        weights = self.backbone.weights
        return prepare(image, size, weights.channel_order, self.backbone.mean, self.backbone.std, self.device)

    @property
    def device(self) -> torch.device:
        return device_of(self.backbone)


def make_runtime(
    backbone: Backbone, kind: Kind = "auto", precision: Precision = "float32", threads: int | None = None
) -> Runtime:
    """A function from prepared images (N, 3, H, W) to their map (N, C, h, w), for a frozen backbone.

    Images are float32, on the device of the backbone. The map is float32, on the same device, in channels-last
    memory, and belongs to the caller. In float32 OpenVINO differs from torch by at most 1e-4 of the largest value.
    Weights are those of this moment. Several threads may call the function; each worker process makes its own.

    kind: "auto" takes OpenVINO on a CPU where it is installed, and torch where it cannot convert the backbone.
    threads: those of OpenVINO; None takes torch.get_num_threads(). torch has its own setting.
    Raises SppnetError for a backbone that is not frozen, and for "openvino" where it cannot run.
    """
    if backbone.training or any(parameter.requires_grad for parameter in backbone.parameters()):
        raise SppnetError("expected a frozen backbone in eval mode; call requires_grad_(False).eval() first")
    if resolve_runtime(kind, device_of(backbone)) == "openvino":
        try:
            return Runtime(backbone, _OpenVINORuntime(backbone, precision, threads or torch.get_num_threads()))
        except SppnetError as error:
            if kind == "openvino":
                raise
            logger.warning("%s; maps.runtime=auto takes torch", error)
    return Runtime(backbone, _torch_runtime(backbone, precision))


def resolve_runtime(kind: Kind, device: torch.device | str) -> Literal["torch", "openvino"]:
    """What runs a backbone on this device; SppnetError for "openvino" where it is not installed, or off the CPU."""
    on_cpu = torch.device(device).type == "cpu"
    if kind == "auto":
        return "openvino" if on_cpu and _openvino_is_installed() else "torch"
    if kind == "openvino" and not on_cpu:
        raise SppnetError(f"maps.runtime=openvino: expected device cpu, got {device}; set maps.runtime=torch")
    if kind == "openvino" and not _openvino_is_installed():
        raise SppnetError(
            'maps.runtime=openvino: the package openvino is not installed; pip install "sppnet[cpu]", '
            "or set maps.runtime=torch"
        )
    return kind


def resolve_precision(precision: Literal["auto", "float32", "bfloat16"], device: torch.device | str) -> Precision:
    """The precision to compute in: "auto" takes bfloat16 only where the device has instructions for it.

    Depends on the device alone.
    """
    if precision == "auto":
        return "bfloat16" if _computes_bfloat16(torch.device(device)) else "float32"
    return precision


def device_of(backbone: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a backbone without any."""
    tensors = (*backbone.parameters(), *backbone.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


# torch


def _torch_runtime(backbone: nn.Module, precision: Precision) -> Run:
    def run(images: Tensor) -> Tensor:
        rounded = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16")
        with torch.inference_mode(), rounded:
            return backbone(images).float().contiguous(memory_format=torch.channels_last)

    return run


# OpenVINO


class _OpenVINORuntime:
    """A converted and compiled backbone; not kept on disk, because making it takes 0.1 to 0.9 s (tiny to VGG16)."""

    def __init__(self, backbone: nn.Module, precision: Precision, threads: int) -> None:
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # workers of one thread each must not all sit on the first core
            "CPU_RUNTIME_CACHE_CAPACITY": str(KEPT_LAYERS),
        }
        try:
            core = _import_openvino().Core()
            bfloat16 = precision == "bfloat16" and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            settings["INFERENCE_PRECISION_HINT"] = "bf16" if bfloat16 else "f32"
            compiled = core.compile_model(_converted(backbone), "CPU", settings)
        except Exception as error:  # OpenVINO's errors, and those of tracing and of a damaged package, have no base
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise _unfit(backbone, reason[-1]) from error
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()  # one request, whose output is overwritten by the next
        self._check_size: Callable[[tuple[int, int]], object] | None = getattr(backbone, "map_size", None)
        self._compare(backbone, 1e-4 if precision == "float32" else 0.5)

    def _compare(self, backbone: nn.Module, tolerance: float) -> None:
        """Raises SppnetError where the map of another size is not that of torch: a trace can hold its example."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(1, 3, *CHECKED_SIZE, generator=generator, dtype=torch.float32)
        try:
            received, expected = self(images), _torch_runtime(backbone, "float32")(images)
        except RuntimeError as error:
            raise _unfit(backbone, "it fails for another size of image") from error
        if received.shape != expected.shape:
            raise _unfit(backbone, "the size of its map does not follow that of the image")
        if not (received - expected).abs().max() <= tolerance * expected.abs().max():
            raise _unfit(backbone, "its map differs from that of torch")

    def __call__(self, images: Tensor) -> Tensor:
        _refuse_fork()
        if self._check_size is not None:
            self._check_size((images.shape[2], images.shape[3]))
        array = images.detach().contiguous().numpy()
        with self._lock:
            results = self._request.infer([array], share_inputs=True, share_outputs=True)
            return torch.from_numpy(results[0]).clone(memory_format=torch.channels_last)


def _unfit(backbone: nn.Module, reason: str) -> SppnetError:
    return SppnetError(f"OpenVINO cannot run this {type(backbone).__name__} ({reason}); set maps.runtime=torch")


def _openvino_is_installed() -> bool:
    return "openvino" in sys.modules or importlib.util.find_spec("openvino") is not None


def _import_openvino() -> Any:
    """The package openvino, without its telemetry.

    `import openvino` alone reports its use to Google Analytics, and writes an identifier to the home folder, unless
    openvino_telemetry is missing. So it is made to be missing, for the rest of the process: later reports would follow.
    """
    _refuse_fork()
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # importing it raises ImportError
    import openvino

    _used_by.add(os.getpid())
    return openvino


def _refuse_fork() -> None:
    """A forked process has none of OpenVINO's threads and would wait for them for ever."""
    if _used_by and os.getpid() not in _used_by:
        raise SppnetError("OpenVINO cannot run in a forked process; spawn workers, or set maps.runtime=torch")


def _converted(backbone: nn.Module) -> Any:
    """The backbone as an openvino.Model for images (N, 3, H, W) of any size.

    By the front end alone, as openvino.convert_model does: that function reports every conversion over the network.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = torch.zeros(1, 3, *TRACED_SIZE, dtype=torch.float32)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # sizes are compared: all are accepted
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit is, but the sole way to any size
        warnings.filterwarnings("ignore", category=FutureWarning)  # the same
        traced = torch.jit.trace(backbone, example, check_trace=False)
        decoder = TorchScriptPythonDecoder(traced)  # must outlive the conversion
        front_end = FrontEndManager().load_by_framework("pytorch")
        model = front_end.convert(front_end.load(decoder))
    model.reshape([-1, 3, -1, -1])
    return model


# precision


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
