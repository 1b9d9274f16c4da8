"""Weight files and their checked loading."""

from __future__ import annotations

import email.message
import io
import urllib.error
import urllib.response
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sppnet.backbones.weights import load_mean_image, load_weight_file, load_weights, torchvision_state
from sppnet.errors import SppnetError

STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3, 1, 1), "conv.bias": torch.tensor([1.0, 2.0])}


def write(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, allow_pickle=False, **{name: value.numpy() for name, value in state.items()})
    elif path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)


KINDS = ["a.pth", "a.pt", "a.safetensors", "a.npz"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_tensors(tmp_path: Path, name: str) -> None:
    state = load_weight_file(write(tmp_path / name, STATE))
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)


def test_a_checkpoint_may_hold_the_tensors_under_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": STATE}, tmp_path / "a.pth")
    assert load_weight_file(tmp_path / "a.pth").keys() == STATE.keys()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SppnetError, match=r"a\.pth: expected a weight file, but there is no such file; check"):
        load_weight_file(tmp_path / "a.pth")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(SppnetError, match=r"of kind \.pth, \.pt, \.safetensors, \.npz, got '\.h5'; convert it"):
        load_weight_file(tmp_path / "a.h5")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [0, 7, 0.5])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, length: float) -> None:
    path = write(tmp_path / name, STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    with pytest.raises(SppnetError, match=rf"{name}: expected a complete .* cannot be read .*; fetch or save it again"):
        load_weight_file(path)


class Touch:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_weight_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Touch(tmp_path / "touched")}, tmp_path / "a.pth")
    np.savez(tmp_path / "a.npz", a=np.array([Touch(tmp_path / "touched")], dtype=object))
    for name in ("a.pth", "a.npz"):
        with pytest.raises(SppnetError, match="cannot be read"):
            load_weight_file(tmp_path / name)
    assert not (tmp_path / "touched").exists()


def test_anything_but_named_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "a.pth")
    with pytest.raises(SppnetError, match="expected named tensors, got list; save a model's state_dict"):
        load_weight_file(tmp_path / "a.pth")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", STATE | {"conv.bias": torch.tensor([1.0, torch.nan])})
    with pytest.raises(SppnetError, match=r"expected finite numbers, but conv\.bias holds NaN"):
        load_weight_file(path)


def test_loading_copies_what_is_named_and_leaves_the_rest() -> None:
    net = Net()
    load_weights(net, STATE | {"classifier.weight": torch.zeros(9)}, "here")
    assert torch.equal(net.conv.weight, STATE["conv.weight"])
    assert torch.equal(net.conv.bias, STATE["conv.bias"])


def test_missing_and_misshaped_tensors_are_named() -> None:
    with pytest.raises(
        SppnetError,
        match=r"x\.npz: 2 of the 2 tensors needed do not fit: conv\.weight is missing; "
        r"conv\.bias has shape \(3,\) instead of \(2,\); expected torchvision's .*choose the backbone\.name",
    ):
        load_weights(Net(), {"conv.bias": torch.zeros(3)}, "x.npz")


def test_only_the_first_faults_are_listed() -> None:
    net = nn.ModuleList(Net() for _ in range(3))
    with pytest.raises(SppnetError, match=r"6 of the 6 .*0\.conv\.weight .*1\.conv\.weight is missing; …; expected"):
        load_weights(net, {}, "x")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module.backbone.", "net._orig_mod.", "my_encoder."]
)
@pytest.mark.parametrize("name", ["a.pth", "a.npz", "a.safetensors"])
def test_the_prefix_of_a_wrapper_is_removed(tmp_path: Path, prefix: str, name: str) -> None:
    wrapped = {f"{prefix}{key}": tensor for key, tensor in STATE.items()}
    net, file = Net(), write(tmp_path / name, {**wrapped, "classifier.bias": torch.zeros(2)})
    load_weights(net, load_weight_file(file), str(file))
    assert torch.equal(net.conv.weight, STATE["conv.weight"])


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("module.", ""),
        ("_orig_mod.", ""),
        ("module._orig_mod.", ""),
        ("_fsdp_wrapped_module.", "module."),
        ("_checkpoint_wrapped_module.", "model."),
    ],
)
def test_a_wrapper_inside_the_names_is_removed(inner: str, outer: str) -> None:
    net = nn.ModuleDict({"features": nn.Sequential(Net(), Net())})
    state = {f"features.{i}.{key}": tensor + i for i in range(2) for key, tensor in STATE.items()}
    for places in (("features.",), ("features.0.",), ("features.1.conv.", "features.0.")):
        wrapped = dict(state)
        for place in places:
            wrapped = {key.replace(place, place + inner, 1): tensor for key, tensor in wrapped.items()}
        load_weights(
            net, {f"{outer}{key}": t for key, t in {**wrapped, "classifier.bias": torch.zeros(2)}.items()}, "x"
        )
        assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
        net["features"][0].conv.weight.data.zero_()
        net["features"][1].conv.weight.data.zero_()


def test_a_layer_that_is_called_module_keeps_its_name() -> None:
    net = nn.ModuleDict({"module": nn.ModuleDict({"module": Net()})})
    load_weights(net, {f"encoder.module.module.{key}": tensor for key, tensor in STATE.items()}, "x")
    assert torch.equal(net["module"]["module"].conv.weight, STATE["conv.weight"])


def test_two_wrappers_of_one_name_do_not_fit() -> None:
    both = {f"{wrapper}.conv.module.{key[5:]}": tensor for wrapper in ("a", "b") for key, tensor in STATE.items()}
    with pytest.raises(SppnetError, match=r"x: holds these tensors under a\. and b\.; save one of them"):
        load_weights(Net(), both, "x")
    both = {f"conv.{wrapper}.{key[5:]}": tensor for wrapper in ("module", "_orig_mod") for key, tensor in STATE.items()}
    with pytest.raises(SppnetError, match=r"2 of the 2 .*; not used: conv\.module\.weight, conv\.module\.bias"):
        load_weights(Net(), both, "x")


def test_names_that_fit_as_they_are_keep_their_prefix() -> None:
    net = Net()
    load_weights(net, STATE | {f"ema.{key}": torch.zeros_like(tensor) for key, tensor in STATE.items()}, "x")
    assert torch.equal(net.conv.weight, STATE["conv.weight"])


def test_two_prefixes_that_fit_are_refused() -> None:
    both = {f"{prefix}.{key}": tensor for prefix in ("student", "teacher") for key, tensor in STATE.items()}
    with pytest.raises(SppnetError, match=r"x: holds these tensors under student\. and teacher\.; save one of them"):
        load_weights(Net(), both, "x")


def test_a_file_that_fits_in_part_says_what_is_missing_and_what_was_not_used() -> None:
    state = {"module.conv.weight": STATE["conv.weight"], "module.conv.gain": torch.zeros(2)}
    with pytest.raises(
        SppnetError, match=r"2 of the 2 .*conv\.weight is missing; conv\.bias is missing; not used: module\.c"
    ):
        load_weights(Net(), state, "x")
    with pytest.raises(SppnetError, match=r"1 of the 2 .*: conv\.weight has shape \(1,\) instead of .*"):
        load_weights(Net(), {f"module.{k}": t for k, t in (STATE | {"conv.weight": torch.zeros(1)}).items()}, "x")
    with pytest.raises(SppnetError, match=r"conv\.bias holds uint8 instead of floating-point numbers"):
        load_weights(Net(), STATE | {"conv.bias": STATE["conv.bias"].to(torch.uint8)}, "x")


@pytest.mark.parametrize("holders", [("model",), ("model_state_dict",), ("model_ema",), ("ema", "state_dict")])
def test_a_checkpoint_may_hold_the_tensors_under_other_keys(tmp_path: Path, holders: tuple[str, ...]) -> None:
    values: dict[str, Any] = dict(STATE)
    for holder in holders[::-1]:
        values = {"epoch": 3, holder: values}
    torch.save(values, tmp_path / "a.pth")
    assert load_weight_file(tmp_path / "a.pth").keys() == STATE.keys()


OTHER = {key: torch.zeros_like(tensor) for key, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("values", "first", "second"),
    [
        ({"model": STATE, "ema": OTHER}, "model", "ema"),
        ({"epoch": 3, "model_ema": OTHER, "model": STATE, "optimizer": {"state": {}}}, "model", "model_ema"),
        ({"state_dict": STATE, "state_dict_ema": {f"module.{k}": t for k, t in OTHER.items()}}, *["state_dict"] * 2),
        ({"model": STATE, "ema": {"state_dict": OTHER}}, "model", "ema"),
        ({"state_dict": {"model": STATE, "ema": OTHER}}, "model", "ema"),
    ],
)
def test_a_checkpoint_of_two_networks_is_refused(
    tmp_path: Path, values: dict[str, Any], first: str, second: str
) -> None:
    torch.save(values, tmp_path / "a.pth")
    with pytest.raises(
        SppnetError,
        match=rf"a\.pth: holds weights under {first} and {second}.*; save one of them alone",
    ):
        load_weight_file(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "beside",
    [
        {"model": {"depth": 18, "stem": {"width": 3}}},
        {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}},
        {"criterion": {"weight": torch.ones(2)}, "ema": None, "best": torch.ones(1)},
    ],
)
def test_what_else_a_checkpoint_holds_is_left_aside(tmp_path: Path, beside: dict[str, Any]) -> None:
    torch.save({**beside, "state_dict": STATE}, tmp_path / "a.pth")
    assert load_weight_file(tmp_path / "a.pth").keys() == STATE.keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected named tensors, got an empty file"),
        ({"state_dict": {}}, "got an empty file"),
        ({"epoch": 3, "weights": STATE}, "expected named tensors, got int for 'epoch'; save a model's state_dict"),
        ({"conv.weight": [1.0, 2.0]}, "got list for 'conv.weight'"),
        ({3: torch.zeros(1)}, "got Tensor for 3"),
        (Net(), r"cannot be read .*of a whole model save its state_dict\(\)"),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path: Path, values: object, message: str) -> None:
    torch.save(values, tmp_path / "a.pth")
    with pytest.raises(SppnetError, match=message):
        load_weight_file(tmp_path / "a.pth")


# torchvision's own


def test_without_network_the_error_says_which_file_to_put_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(url: str, *args: object, **options: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(
        SppnetError,
        match=r"https://download.*resnet18-f37072fd\.pth: expected to download .*no network.*; "
        rf"fetch resnet18-f37072fd\.pth elsewhere and put it into {tmp_path}/checkpoints, or set backbone\.weights",
    ):
        torchvision_state("resnet18")


def test_a_download_with_another_digest_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = urllib.response.addinfourl(io.BytesIO(b"something else"), email.message.Message(), "https://x")
    monkeypatch.setattr("torch.hub.urlopen", lambda request: other)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(SppnetError, match=r'resnet18-f37072fd\.pth: .*expected "f37072fd", got'):
        torchvision_state("resnet18")
    assert not list(tmp_path.rglob("*.pth"))


def test_weights_already_in_the_cache_are_read_from_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    write(tmp_path / "checkpoints" / "resnet18-f37072fd.pth", STATE)
    assert torchvision_state("resnet18").keys() == STATE.keys()


@pytest.mark.parametrize("name", ["zf5", "overfeat7", "tiny5"])
def test_networks_that_torchvision_lacks_need_a_file_or_random_weights(name: str) -> None:
    with pytest.raises(
        SppnetError, match=rf"no weights for '{name}'; set backbone\.weights\.source=file .* or .*random"
    ):
        torchvision_state(name)


# mean images


@pytest.mark.parametrize("name", ["mean.npy", "mean.npz", "mean.safetensors"])
def test_an_array_is_a_mean_image_in_the_order_of_the_weights(tmp_path: Path, name: str) -> None:
    image = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (3, 4, 5)))
    if name.endswith(".npy"):
        np.save(tmp_path / name, image.numpy())
    else:
        write(tmp_path / name, {"mean": image})
    assert torch.equal(load_mean_image(tmp_path / name, "bgr"), image.float())


def test_a_picture_is_a_mean_image_whose_channels_are_put_in_order(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mean.png")
    assert np.array_equal(load_mean_image(tmp_path / "mean.png", "rgb").numpy(), pixels.transpose(2, 0, 1))
    assert np.array_equal(load_mean_image(tmp_path / "mean.png", "bgr").numpy(), pixels.transpose(2, 0, 1)[::-1])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.full((4, 5, 3), 9.0),
            r"expected the mean of .* \(3, height, width\), .* rgb order, got shape \(4, 5, 3\); ",
        ),
        (np.full(3, 9.0), r"got shape \(3,\); save it so, or as a picture"),
        (np.full((3, 4, 5), 0.5), "got values from 0.5 to 0.5"),
        (np.full((3, 4, 5), -9.0), "got values from -9 to -9"),
        (np.full((3, 4, 5), np.nan), "expected finite numbers"),
        (np.full((3, 4, 5), None), "cannot be read"),
    ],
)
def test_an_array_that_is_no_mean_image_is_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "mean.npy", array, allow_pickle=True)
    with pytest.raises(SppnetError, match=rf"mean\.npy: .*{message}"):
        load_mean_image(tmp_path / "mean.npy", "rgb")


def test_files_that_hold_no_mean_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mean.npy").write_bytes(b"none")
    (tmp_path / "mean.png").write_bytes(b"none")
    write(tmp_path / "two.npz", STATE)
    for name, message in (
        ("mean.npy", "cannot be read"),
        ("mean.png", "got a file of another kind"),
        ("two.npz", "got 2 arrays"),
        ("none.npy", r"no such file; check backbone\.weights\.mean_image"),
    ):
        with pytest.raises(SppnetError, match=f"{name}: .*{message}"):
            load_mean_image(tmp_path / name, "rgb")


# the real files


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "tensors"),
    [("squeezenet_v1_0.npz", 52), ("squeezenet_v1_1_body.npz", 50), ("mobilenet_v2_1.0_from_uint8.npz", 314)],
)
def test_the_shared_weight_files_are_read(shared: Path, name: str, tensors: int) -> None:
    assert len(load_weight_file(shared / "weights" / name)) == tensors
