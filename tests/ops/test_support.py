"""The page of what works, run line by line; what its words add to the table."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import support_table
import torch
from support_table import CASES, LEVELS, PAGE, WINDOWS, expected, maps_of, same, through_onnx
from torch import nn

from sppnet.ops.pyramid import SpatialPyramidPool, WindowPool

COMPILER = shutil.which("g++") and (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


@pytest.mark.parametrize("name", CASES)
def test_a_line_of_the_page_is_what_happens(name: str) -> None:
    assert support_table.row(name) in PAGE.read_text().splitlines()


def test_the_page_has_these_lines_and_no_other() -> None:
    rows = [line.split(" | ")[0] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows == ["| with", *(f"| {name}" for name in CASES)]
    assert support_table.TEXT in PAGE.read_text()
    assert support_table.BELOW in PAGE.read_text()


def test_a_layer_that_does_something_else_would_fail() -> None:
    layer = SpatialPyramidPool(LEVELS)
    assert same(layer, layer)
    assert not same(layer, lambda maps: layer(maps).detach() + 0 * maps.sum())
    assert not same(layer, lambda maps: layer(-maps))


@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler and Python's headers")
@pytest.mark.slow
@pytest.mark.parametrize("layer", [SpatialPyramidPool((2,)), WindowPool(LEVELS)])
def test_inductor_compiles_the_layers(layer: nn.Module) -> None:
    torch._dynamo.reset()
    compiled, (first, *rest) = torch.compile(layer, fullgraph=True), support_table.arguments(layer, maps_of())
    ours, theirs = first.clone().requires_grad_(), first.clone().requires_grad_()
    (compiled(ours, *rest) ** 2).sum().backward()
    (layer(theirs, *rest) ** 2).sum().backward()
    assert torch.equal(compiled(first, *rest), layer(first, *rest))
    assert torch.allclose(ours.grad, theirs.grad)


@pytest.mark.parametrize("size", [(13, 10), (6, 6), (1, 5), (23, 31)])
def test_onnx_of_one_size_gives_the_same_vectors(size: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    layer = SpatialPyramidPool((1, 6) if size == (13, 10) else (1, 2, 3))
    assert torch.equal(through_onnx(layer, (maps,))(maps), layer(maps))


@pytest.mark.slow
def test_onnx_of_any_size_gives_the_same_vectors() -> None:
    layer, sizes = SpatialPyramidPool((1, 3)), ({0: "batch", 2: "height", 3: "width"},)
    exported = through_onnx(layer, (torch.rand(2, 2, 9, 8),), sizes)
    for size in [(3, 2, 13, 10), (1, 2, 4, 3), (2, 2, 1, 1), (2, 2, 60, 61)]:
        maps = torch.randn(*size, generator=torch.Generator().manual_seed(0))
        assert torch.equal(exported(maps), layer(maps))


def test_torchvision_extracts_the_pyramid_of_a_network() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    network = nn.Sequential(nn.Conv2d(3, 8, 3), SpatialPyramidPool((1, 2)), nn.Linear(40, 2)).eval()
    images = torch.rand(2, 3, 9, 12)
    found = create_feature_extractor(network, ["1"])(images)["1"]
    assert torch.equal(found, network[1](network[0](images)))


def test_a_compiled_layer_checks_windows_when_it_runs() -> None:
    layer = WindowPool((1, 2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(maps_of()[0], WINDOWS), layer(maps_of()[0], WINDOWS))
    with pytest.raises(ValueError, match=r"window 0 is not inside the map of 13 × 10 cells: got \[0, 0, 20, 26\]"):
        compiled(maps_of()[0], WINDOWS * 2)


def test_an_exported_layer_checks_windows_too_and_can_be_trained() -> None:
    example = (torch.rand(3, 13, 10), WINDOWS)
    program = torch.export.export(WindowPool(LEVELS), example).module()
    with pytest.raises(ValueError, match="window 2 is empty"):
        program(example[0], WINDOWS - torch.tensor([[0, 0, 0, 0]] * 2 + [[0, 0, 1, 0]] + [[0, 0, 0, 0]]))
    assert same(WindowPool(LEVELS), program)


@pytest.mark.parametrize("windows", [WINDOWS.tolist(), WINDOWS.numpy(), WINDOWS.int(), [], WINDOWS[:0].float()])
def test_every_form_of_windows_can_be_compiled(windows: object) -> None:
    torch._dynamo.reset()
    layer, maps = WindowPool((1, 3)), maps_of()[0]
    compiled = torch.compile(lambda one, cells: layer(2 * one, cells), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(maps, windows), layer(2 * maps, windows))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch's own forward mode uses it
def test_a_compiled_derivative_is_the_derivative() -> None:
    torch._dynamo.reset()
    maps, tangent = maps_of()[0].clone(), maps_of()[1].clone()

    def derivatives(one: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        forward = torch.func.jvp(lambda given: WindowPool(LEVELS)(given, WINDOWS), (one,), (tangent,))[1]
        return forward, torch.func.grad(lambda given: WindowPool(LEVELS)(given, WINDOWS).sum())(one)

    found = torch.compile(derivatives, fullgraph=True, backend="aot_eager")(maps)
    assert [torch.equal(*pair) for pair in zip(found, derivatives(maps), strict=True)] == [True, True]
    assert torch.equal(found[0], torch.func.jvp(lambda one: expected(WindowPool(LEVELS), one), (maps,), (tangent,))[1])


def test_windows_in_half_precision_are_pooled_with_the_gradient_of_each_crop() -> None:
    maps = maps_of(torch.bfloat16)[0].requires_grad_()
    WindowPool(LEVELS)(maps, WINDOWS[:1]).sum().backward()
    alone = maps.detach().clone().requires_grad_()
    expected(WindowPool(LEVELS), alone)[:1].sum().backward()
    assert torch.equal(maps.grad, alone.grad)
