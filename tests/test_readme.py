"""What README.md, RESULTS.md, data/README.md and configs/ promise is true: code runs, commands parse, names exist."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sppnet.backbones.backbone import BACKBONES
from sppnet.cli import _parser
from sppnet.config import Config
from sppnet.config_files import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "RESULTS.md", "CHANGELOG.md", "data/README.md")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def command_lines() -> list[str]:
    code = [block for page in PAGES for block in blocks("bash", (ROOT / page).read_text())]
    return [line for block in code for line in block.splitlines() if re.match(r"sppnet |torchrun ", line)]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def newcomer(tmp_path: Path, small_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a photo and a trained run, as the code in the README expects them."""
    shutil.copytree(small_run.root / "detector", tmp_path / "runs/demo/detector")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("newcomer")
def test_the_python_code_of_the_readme_runs_from_top_to_bottom() -> None:
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert names["scores"].shape[1] == 5
    assert names["cells"].shape == (1, 4)
    assert names["mined"].detectors.classes == ("thing",)


@pytest.mark.parametrize("line", command_lines())
def test_the_command_line_of_the_readme_is_understood(line: str) -> None:
    words = shlex.split(line, comments=True)
    options = _parser().parse_args(words[words.index("sppnet") + 1 :])
    if isinstance(getattr(options, "config", None), Path) and options.config.name != "CONFIG":
        load_config(ROOT / options.config, options.overrides)


def test_every_command_and_training_stage_is_in_the_table_of_commands() -> None:
    actions = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    commands = actions.choices
    table = "".join(line for line in section("Commands").splitlines(keepends=True) if line.startswith("| `sppnet"))
    assert {name for name in commands if not re.search(rf"\b{name}\b", table)} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    named = re.findall(r"\b(?:configs/\w+\.yaml|scripts/\w+|benchmarks/\w+\.py|tests/\w+\.py)", text)
    files = [ROOT / page, *((ROOT / page).parent / link for link in links), *(ROOT / name for name in named)]
    assert [path for path in files if not path.exists()] == []


def test_anchors_are_headings_of_the_readme() -> None:
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", README, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) - headings == set()


def test_the_floors_of_the_readme_are_those_that_are_checked() -> None:
    """Every module of the layers contract stands in the table of floors, lower floors first."""
    layers = project()["tool"]["importlinter"]["contracts"][0]["layers"][::-1]
    rows = [row for row in section("How it works").splitlines() if re.match(r"\| \d", row)]
    for floor, layer in enumerate(layers):
        expected = {name.strip().removeprefix("sppnet.") for name in layer.split("|")}
        row = rows[min(floor, len(rows) - 1)]
        assert expected <= _modules(row), f"floor {floor}"


def _modules(row: str) -> set[str]:
    """`a` `b.{c, d}` `e.*` of a row -> {a, b.c, b.d, all modules of e}."""
    found: set[str] = set()
    for name in re.findall(r"`([^`]+)`", row):
        package, _, inner = name.partition(".")
        if inner == "*":
            found |= {f"{package}.{path.stem}" for path in (ROOT / "sppnet" / package).glob("[!_]*.py")}
        else:
            found |= {f"{package}.{part.strip()}" for part in inner.strip("{}").split(",")} if inner else {package}
    return found


def test_every_benchmark_is_in_the_layout_and_among_the_things_to_run() -> None:
    layout = "".join(line for line in section("How it works").splitlines() if line.startswith("benchmarks/"))
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert re.search(rf"\b{path.stem}\b", layout), path.name
        assert path.name in section("Develop")


def test_every_dependency_has_its_line() -> None:
    own = project()["project"]
    wanted = [*own["dependencies"], *(name for name in own["optional-dependencies"]["dev"] if "types-" not in name)]
    table = "".join(line for line in section("Develop").splitlines() if line.startswith("|"))
    assert [name for name in (re.split(r"[<>=]", text)[0] for text in wanted) if name not in table] == []


def test_every_section_of_the_settings_and_every_backbone_is_named() -> None:
    text = section("Settings")
    assert [name for name in Config.model_fields if name != "name" and f"`{name}`" not in text] == []
    assert [name for name in BACKBONES if name not in text] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_valid_and_named_after_its_file(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.backbone.name in BACKBONES
    assert len(config.finetune.steps) == len(config.finetune.learning_rates)
