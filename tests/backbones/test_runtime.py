"""The runtimes of a frozen backbone agree, share the machine with others, and send nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from sppnet.backbones.runtime import make_runtime, resolve_precision, resolve_runtime
from sppnet.errors import SppnetError

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
SIZES = ((96, 128), (131, 97), (200, 267))


class Normalised(nn.Module):
    """Normalisation over a neighbourhood, and a size that is compared: what tracing could get wrong."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < 1:
            raise ValueError("too small")
        mean = nn.functional.avg_pool2d(x * x, 3, stride=1, padding=1)
        return x * (1 + 0.5 * mean).pow(-0.75)


class Joined(nn.Module):
    """The maps of two layers, joined along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return torch.cat([first.clone(), self.second(first.relu_())], dim=1)


class OutsideTorch(nn.Module):
    """Computes by numpy: a trace of it holds the values of its example."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)


def frozen(module: nn.Module) -> nn.Module:
    """The module with statistics and weights that leave nothing at zero or one, in eval mode."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values in (part.weight, part.running_var):
                values.data.uniform_(0.5, 1.5, generator=generator)
            for values in (part.bias, part.running_mean):
                values.data.uniform_(-0.5, 0.5, generator=generator)
    return module.requires_grad_(False).eval()


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(16, 32, 3, dilation=2, padding=2), Normalised()]
        return frozen(nn.Sequential(*layers))


def resnet18() -> nn.Module:
    return nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2])


MODULES: dict[str, Callable[[], nn.Module]] = {
    "small": small,
    "joined": Joined,
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(weights=None).features,
    "squeezenet1_1": lambda: torchvision.models.squeezenet1_1(weights=None).features,
    "alexnet": lambda: torchvision.models.alexnet(weights=None).features,
    "resnet18": resnet18,
}


def images(size: tuple[int, int], count: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2))


def apart(received: Tensor, expected: Tensor) -> float:
    """The largest difference as a part of the largest value."""
    assert received.shape == expected.shape
    return float((received - expected).abs().max() / expected.abs().max())


def run_program(program: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", program]
    folder = Path(__file__).parents[2]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@needs_openvino
@pytest.mark.parametrize("name", MODULES)
def test_openvino_gives_the_maps_of_torch(name: str) -> None:
    backbone = frozen(MODULES[name]())
    run = make_runtime(backbone, "openvino")
    for size in SIZES:
        for prepared in (images(size), images(size, count=2)):
            expected = backbone(prepared)
            received = run(prepared)
            assert received.dtype == torch.float32
            assert apart(received, expected) < 1e-4


@pytest.mark.parametrize("kind", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_a_map_belongs_to_the_caller_and_the_layout_of_images_is_free(kind: str) -> None:
    backbone = small()
    run = make_runtime(backbone, kind)
    one, other = images((96, 128)), images((96, 128), count=2)[1:]
    received = run(one.contiguous(memory_format=torch.channels_last))
    before = received.clone()
    run(other)
    assert torch.equal(received, before)
    assert apart(received, backbone(one)) < 1e-4
    assert received.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_bfloat16_is_as_exact_as_torchs(kind: str) -> None:
    backbone, prepared = small(), images((200, 267))
    exact = backbone(prepared)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(prepared).float()
    received = make_runtime(backbone, kind, precision="bfloat16")(prepared)
    assert received.dtype == torch.float32
    assert apart(received, exact) < 1.5 * apart(rounded, exact)
    if resolve_precision("auto", "cpu") == "bfloat16":
        assert apart(received, exact) > 1e-4  # it was computed in bfloat16


@needs_openvino
def test_several_threads_share_one_runtime() -> None:
    backbone = small()
    run = make_runtime(backbone, "openvino", threads=1)
    wrong: list[tuple[int, int]] = []

    def work(size: tuple[int, int]) -> None:
        prepared = images(size)
        expected = backbone(prepared)
        wrong.extend(size for _ in range(30) if apart(run(prepared), expected) > 1e-4)

    threads = [threading.Thread(target=work, args=(size,)) for size in SIZES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_openvino
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="the system does not tell which cores a thread may use"
)
@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_leaves_every_thread_free_to_use_every_core(threads: int) -> None:
    allowed, seen = os.sched_getaffinity(0), []
    run = make_runtime(small(), "openvino", threads=threads)
    thread = threading.Thread(target=lambda: [run(images((600, 800))) for _ in range(5)])
    thread.start()
    while thread.is_alive():  # a pinned thread is so while it computes
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                seen.append(os.sched_getaffinity(int(task.name)))
    assert seen
    assert all(cores == allowed for cores in seen)


@needs_openvino
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_is_told_to_be_spawned() -> None:
    finished = run_program(FORKED)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == ["old: spawn", "new: spawn"]


def test_a_backbone_in_training_is_refused() -> None:
    with pytest.raises(SppnetError, match="frozen"):
        make_runtime(nn.Conv2d(3, 4, 3).eval())
    with pytest.raises(SppnetError, match="eval mode"):
        make_runtime(nn.Conv2d(3, 4, 3).requires_grad_(False))


@needs_openvino
def test_a_backbone_that_cannot_be_converted_runs_by_torch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), OutsideTorch()).requires_grad_(False).eval()
    with pytest.raises(SppnetError, match=r"maps\.runtime=torch"):
        make_runtime(backbone, "openvino")
    with caplog.at_level(logging.WARNING, logger="sppnet"):
        run = make_runtime(backbone)
    assert "takes torch" in caplog.text
    assert torch.equal(run(images((50, 60))), backbone(images((50, 60))))


def test_openvino_is_for_the_cpu_and_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_runtime("auto", "cuda") == "torch"
    with pytest.raises(SppnetError, match=r"cuda.*maps\.runtime=torch"):
        resolve_runtime("openvino", "cuda")
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_runtime("auto", "cpu") == "torch"
    with pytest.raises(SppnetError, match=r'pip install "sppnet\[cpu\]".*maps\.runtime=torch'):
        make_runtime(small(), "openvino")
    assert make_runtime(small())(images((96, 128))).shape[1] == 32


@needs_openvino
def test_auto_takes_openvino_on_a_cpu() -> None:
    assert resolve_runtime("auto", "cpu") == "openvino"


def test_bfloat16_only_where_the_processor_computes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("avx512_bf16", "amx_bf16", "bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True, "avx2": True}, raising=False)
        assert resolve_precision("auto", "cpu") == "bfloat16"
        assert resolve_precision("float32", "cpu") == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False}, raising=False)
    assert resolve_precision("auto", "cpu") == "float32"
    assert resolve_precision("bfloat16", "cpu") == "bfloat16"


FORKED = """
import os, torch
from torch import nn
from sppnet.backbones.runtime import make_runtime
from sppnet.errors import SppnetError
backbone = nn.Conv2d(3, 4, 3).requires_grad_(False).eval()
old = make_runtime(backbone, "openvino", threads=2)
if child := os.fork():
    raise SystemExit(os.waitpid(child, 0)[1])
for name, use in {"old": old, "new": lambda images: make_runtime(backbone, "openvino")(images)}.items():
    try:
        use(torch.ones(1, 3, 50, 60))
    except SppnetError as error:
        print(f"{name}: spawn" if "spawn" in str(error) else error, flush=True)
os._exit(0)
"""

# Raises at whatever could send: sockets, look-ups, processes and threads. The hook cannot be removed or avoided by
# Python code; what was tried is kept, because a raised error could be caught.
SILENT = """
import sys, torch
from torch import nn
tried = []
def watch(event, arguments):
    network = event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib."))
    if network or event in {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec",
                            "_thread.start_new_thread"}:
        tried.append(event)
        raise OSError(event)
sys.addaudithook(watch)
from sppnet.backbones.runtime import make_runtime
assert "openvino" not in sys.modules
backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False).eval()
run = make_runtime(backbone, "openvino")
assert "openvino" in sys.modules
assert run(torch.ones(1, 3, 50, 60)).shape == (1, 4, 48, 58)
import openvino
openvino.convert_model(backbone, example_input=torch.ones(1, 3, 50, 60))  # not ours, silent all the same
assert not tried, tried
"""


@needs_openvino
def test_nothing_is_sent_and_nothing_is_left_in_the_home_folder(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in {"CI", "TF_BUILD", "JENKINS_URL"}}
    environment |= {"HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path)}  # no consent, and no refusal, on record
    finished = run_program(SILENT, environment)
    assert finished.returncode == 0, finished.stderr
    assert list(tmp_path.iterdir()) == []


class Particular(nn.Conv2d):
    """Refuses small images, as a backbone does whose map of them would have no cell."""

    def map_size(self, size: tuple[int, int]) -> None:
        if min(size) < 20:
            raise SppnetError("too small")


@needs_openvino
def test_openvino_refuses_the_images_that_the_backbone_refuses() -> None:
    run = make_runtime(frozen(Particular(3, 4, 3)), "openvino")
    assert run(torch.ones(1, 3, 20, 30)).shape == (1, 4, 18, 28)
    with pytest.raises(SppnetError, match="too small"):
        run(torch.ones(1, 3, 10, 30))


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_bfloat16_only_where_the_gpu_computes_with_it(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", "cuda") == precision
