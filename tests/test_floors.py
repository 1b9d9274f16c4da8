"""The floors table names every module, so that a new one cannot stay out of it unnoticed."""

import pkgutil
import tomllib
from pathlib import Path

import sppnet

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def test_every_module_has_its_floor():
    contract = tomllib.loads(PROJECT.read_text())["tool"]["importlinter"]["contracts"][0]
    listed = [name.strip() for floor in contract["layers"] for name in floor.split("|")]
    modules = [module.name for module in pkgutil.walk_packages(sppnet.__path__, "sppnet.") if not module.ispkg]
    assert sorted(listed) == sorted(modules)
