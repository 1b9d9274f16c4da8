"""What the pages promise is true: code runs, commands parse, names exist, generated pages are current."""

from __future__ import annotations

import argparse
import importlib.util
import pkgutil
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

import sppnet
from sppnet.backbones.backbone import BACKBONES
from sppnet.cli import _parser
from sppnet.config import STAGES, Config
from sppnet.config_files import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = [p for p in sorted(ROOT.glob("configs/*.yaml")) if "classify" not in p.stem]  # of detectors
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "RESULTS.md", "CHANGELOG.md", "data/README.md", *DOCS]
HISTORY = "docs/measurements.md"  # commands, names and files of its time
CURRENT = [page for page in PAGES if page not in (HISTORY, "CHANGELOG.md")]
PLACEHOLDERS = ("CONFIG", "RUN/config.yaml")  # FOLDER is one of pictures


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def command_lines(pattern: str) -> list[str]:
    """Lines of the bash blocks, in the order of the pages."""
    code = [line for page in CURRENT for block in blocks("bash", page) for line in block.splitlines()]
    return list(dict.fromkeys(line for line in code if re.match(pattern, line)))


def named_commands(pattern: str) -> list[str]:
    """Commands in backticks in the text."""
    found = [" ".join(name.split()) for page in CURRENT for name in re.findall(r"`([^`]+)`", prose(page))]
    return list(dict.fromkeys(name for name in found if re.match(pattern, name)))


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)


def columns(table: str) -> list[str]:
    """The first cells of the rows of a Markdown table, without its head."""
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    return rows[2:]


def section(page: str, title: str) -> str:
    return text_of(page).split(f"\n## {title}\n")[1].split("\n## ")[0]


def generator(name: str = "_docs") -> ModuleType:
    """scripts/_docs.py, or another script, as a module."""
    spec = importlib.util.spec_from_file_location(f"generator{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys_of(settings: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in settings.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, BaseModel)
        found += keys_of(kind, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]  # type: ignore[arg-type]
    return found


def commands() -> dict[str, argparse.ArgumentParser]:
    return next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


# --- code -------------------------------------------------------------------------------------------


@pytest.fixture
def newcomer(tmp_path: Path, small_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a photo and a trained run, as the code on the pages expects them."""
    shutil.copytree(small_run.root / "detector", tmp_path / "runs/demo/detector")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("newcomer")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page)])
def test_the_python_code_of_a_page_runs_from_top_to_bottom(page: str) -> None:
    """A block that ends with the main guard is a script, which trains for long: it is compiled, and its imports run."""
    names: dict[str, Any] = {"__name__": "page"}
    for code in blocks("python", page):
        exec(compile(code, page, "exec"), names)
    if page == "README.md":
        assert names["scores"].shape[1] == 5


@pytest.mark.parametrize("line", command_lines(r"sppnet |torchrun "))
def test_a_command_line_is_understood_and_its_configuration_loads(line: str) -> None:
    words = shlex.split(line, comments=True)
    options = _parser().parse_args(words[words.index("sppnet") + 1 :])
    if isinstance(getattr(options, "config", None), Path):
        example = ROOT / "configs" / "voc07_zf5_1scale.yaml"
        named = str(options.config)
        if named.endswith(".yaml") or named in PLACEHOLDERS:
            load_config(example if named in PLACEHOLDERS else ROOT / named, options.overrides)
        else:
            assert options.command == "train"  # a folder


@pytest.mark.parametrize("line", named_commands(r"sppnet [a-z]"))
def test_a_command_in_the_text_exists_with_its_options(line: str) -> None:
    _, name, *words = line.split()
    parser = commands()[name]
    for action in (each for each in parser._actions if words and isinstance(each.choices, dict)):
        parser = action.choices[words[0]]
    known = parser._option_string_actions
    assert [word for word in words if word.startswith("--") and word not in known] == []


SCRIPTS = r"scripts/\w+ |(?:\.venv/bin/)?python (?:scripts|benchmarks)/"


@pytest.mark.parametrize("line", [*command_lines(SCRIPTS), *named_commands(SCRIPTS)])
def test_the_options_of_scripts_and_benchmarks_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    path, *options = words[1:] if "python" in words[0] else words
    source = (ROOT / path).read_text()
    passed_on = path in ("scripts/test", "scripts/demo")  # to pytest, and to `sppnet demo`
    assert passed_on or [word for word in options if word.startswith("--") and f'"{word}"' not in source] == []


def test_the_first_installation_takes_the_extra_for_cpus() -> None:
    first = next(line for line in section("README.md", "Install").splitlines() if line.startswith("pip install"))
    assert first == "pip install -c constraints.txt -e '.[cpu,backbones]'"


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page: str) -> None:
    text = text_of(page)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    named = re.findall(r"\b(?:configs/\w+\.yaml|scripts/\w+(?:\.py)?|benchmarks/\w+\.py|tests/\w+\.py)", text)
    named = named if page in CURRENT else []
    files = [*((ROOT / page).parent / link.partition("#")[0] for link in links), *(ROOT / name for name in named)]
    assert [path for path in files if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_anchors_are_headings(page: str) -> None:
    for link in re.findall(r"\]\(([^)]*#[^)]+)\)", text_of(page)):
        target, _, anchor = link.partition("#")
        if "://" not in link:
            text = ((ROOT / page).parent / target).read_text() if target else text_of(page)
            titles = re.findall(r"^##+ (.+)$", text, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", [page for page in CURRENT if "`sppnet." in text_of(page)])
def test_named_functions_exist(page: str) -> None:
    for name in sorted(set(re.findall(r"`(sppnet\.[\w.]+)[`(]", text_of(page)))):
        assert exists(name), name


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ModuleNotFoundError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", CURRENT)
def test_named_settings_exist(page: str) -> None:
    keys, sections = set(keys_of(Config)), "|".join(Config.model_fields)
    named = re.findall(rf"`((?:{sections})(?:\.\w+)+)(?=[`=:])", prose(page))
    known = keys | {key.rpartition(".")[0] for key in keys}
    parts = ("json", "yaml", "safetensors", "weight", "bias", "input_scale")  # of files and of what is in them
    assert [name for name in named if name not in known and not name.endswith(parts)] == []


def test_every_public_name_is_on_the_first_page() -> None:
    table = "".join(line for line in section("README.md", "Python").splitlines() if line.startswith("|"))
    assert [name for name in sppnet.__all__ if f"`{name}`" not in table] == []


def test_every_command_is_on_its_page_and_every_stage_on_that_of_runs() -> None:
    assert [name for name in commands() if f"\n## sppnet {name}\n" not in text_of("docs/commands.md")] == []
    assert [row.strip("`") for row in columns(text_of("docs/runs.md").split("##")[0])] == list(STAGES)


def test_every_setting_and_every_backbone_is_on_their_page() -> None:
    text = text_of("docs/settings.md")
    assert [key for key in keys_of(Config) if f"| `{key}` |" not in text] == []
    assert [row.strip("`") for row in columns(section("docs/settings.md", "Backbones"))] == list(BACKBONES)


@pytest.mark.parametrize("name", generator().PAGES)
def test_generated_pages_are_current(name: str) -> None:
    assert text_of(f"docs/{name}") == generator().PAGES[name](), f"docs/{name} is stale; run scripts/docs"


@pytest.mark.parametrize("name", sppnet.__all__)
def test_a_public_name_has_a_page_with_a_short_example(name: str) -> None:
    (example,) = blocks("python", f"docs/api/{name}.md")
    lines = [line for line in example.splitlines() if line and not line.startswith(("import ", "from "))]
    assert re.search(rf"\b{name}\b", example)
    assert 1 <= len(lines) <= 5
    assert (getattr(sppnet, name).__doc__ or "").strip()


def test_the_package_shows_its_public_names_alone() -> None:
    assert dir(sppnet) == sppnet.__all__


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_valid_and_named_after_its_file(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.backbone.name in BACKBONES
    assert len(config.finetune.steps) == len(config.finetune.learning_rates)


def test_the_configuration_of_a_backbone_of_ones_own_is_valid(tmp_path: Path) -> None:
    found = []
    for block in blocks("yaml", "docs/own-backbone.md"):
        (tmp_path / "own.yaml").write_text(block)
        found.append(load_config(tmp_path / "own.yaml").backbone)
    assert [own.module or own.name for own in found] == ["timm/resnet34.a1_in1k", "my_networks:small_resnet"]


# --- the project ------------------------------------------------------------------------------------


def project() -> dict[str, Any]:
    return tomllib.loads(text_of("pyproject.toml"))


def test_every_dependency_has_its_line_and_its_version() -> None:
    own = project()["project"]
    wanted = [*own["dependencies"], *(name for names in own["optional-dependencies"].values() for name in names)]
    rows = columns(section("docs/development.md", "Dependencies"))
    listed = [name for row in rows for name in row.split(", ")]
    assert sorted(listed) == sorted(re.split(r"[<>=]", text)[0] for text in wanted)
    pinned = [line.partition("==")[0].lower() for line in text_of("constraints.txt").splitlines()]
    assert [name for name in listed if name.lower() not in pinned] == []


def test_every_benchmark_is_on_the_page_of_development() -> None:
    text = section("docs/development.md", "Benchmarks")
    assert [p.name for p in (ROOT / "benchmarks").glob("*.py") if f"`benchmarks/{p.name}`" not in text] == []


def test_the_layers_are_those_that_are_checked() -> None:
    layers = project()["tool"]["importlinter"]["contracts"][0]["layers"]
    text = section("docs/development.md", "Layers of imports")
    named = [re.split(r" [|:] ", layer.replace("sppnet.", "")) for layer in layers]
    assert [name for names in named for name in names if f"`{name}`" not in text] == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = set(re.findall(r"- (?:\w+: )?([\w/-]+\.md)", text_of("mkdocs.yml")))
    assert listed == {page.removeprefix("docs/") for page in DOCS} | {"index.md", "results.md", "changelog.md"}


def test_the_pages_stay_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 200
    assert len(text_of("RESULTS.md").splitlines()) <= 150
    assert (ROOT / "docs/pictures/detections.jpg").stat().st_size <= 200_000


def test_the_site_is_no_part_of_the_repository() -> None:
    assert "/site/" in text_of(".gitignore").splitlines()


def test_the_page_of_layers_shows_what_its_script_draws_and_prints(tmp_path: Path, capsys: Any) -> None:
    assert generator("_layers").main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out in text_of("docs/layers.md")
    for drawn in tmp_path.iterdir():
        shown = ROOT / "docs" / "pictures" / drawn.name
        assert f"(pictures/{drawn.name})" in text_of("docs/layers.md")
        assert shown.stat().st_size <= 200_000
        with Image.open(drawn) as new, Image.open(shown) as old:
            assert new.size == old.size
