"""Configuration files: YAML and ``key=value`` overrides to settings, and back. The only importer of yaml.

A file holds only what differs from the defaults in ``config``. ``load_config`` reads it with ``yaml.safe_load``,
applies overrides and returns one frozen Config; an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sppnet.config import Config
from sppnet.errors import SppnetError

# In the words of a YAML file, where pydantic's are those of Python.
EXPECTED = {
    "tuple_type": "expected a list in square brackets, e.g. [a, b]",
    "too_short": "expected a list with something in it",
    "model_type": "expected a section of settings",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "string_type": "expected text",
    "path_type": "expected a path",
}


# Settings of earlier versions -> what to write now.
RENAMED = {
    "trunk": "it is now called backbone",
    "compress": "it is now called low_rank, with fc6, fc7, steps and learning_rates",
    "backbone.stride": "layers beyond stride 16 are always dilated; leave it out",
    "maps.compute": "the setting precision now holds for the whole run",
    "finetune.precision": "the setting precision now holds for the whole run",
    "detect.precision": "the setting precision now holds for the whole run",
    "svm.solver": "there is one solver now; leave it out",
    "svm.epochs": "mining is one pass; leave it out",
}


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration and apply ``section.key=value`` overrides (values in YAML syntax).

    Raises SppnetError for a missing file, YAML that does not parse, unknown keys and values of a wrong type.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SppnetError(
            f"{path}: cannot read the configuration ({error.strerror}); give an existing YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SppnetError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise SppnetError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], origin: str) -> Config:
    """Settings from nested mappings; `origin` names them in errors."""
    _reject_unknown_keys(values, Config, origin, prefix="")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "value_error":  # settings that do not go together: the message names them
            raise SppnetError(": ".join(filter(None, (origin, key, str(first["ctx"]["error"]))))) from None
        message = EXPECTED.get(first["type"], first["msg"])
        raise SppnetError(f"{origin}: {key}: {message}, got {first['input']!r}") from None


def dump_config(config: Config) -> str:
    """The complete configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise SppnetError(f"--set {override}: expected key=value, e.g. --set maps.scales=[480,688]")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise SppnetError(f"--set {override}: the value is not valid YAML: {_one_line(error)}") from None
    *parents, last = key.split(".")
    for parent in parents:
        inner = values[parent] = values.get(parent) or {}  # an empty section is None
        if not isinstance(inner, dict):
            raise SppnetError(f"--set {override}: {parent} is not a section")
        values = inner
    values[last] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _reject_unknown_keys(values: Mapping[str, Any], settings: type[BaseModel], origin: str, prefix: str) -> None:
    known = settings.model_fields
    for key, value in values.items():
        if key not in known:
            if f"{prefix}{key}" in RENAMED:
                raise SppnetError(f"{origin}: unknown setting {prefix}{key}; {RENAMED[f'{prefix}{key}']}")
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
            raise SppnetError(f"{origin}: unknown setting {prefix}{key}; {hint}")
        inner = _settings_class(known[key].annotation)
        if inner is not None and isinstance(value, Mapping):
            _reject_unknown_keys(value, inner, origin, f"{prefix}{key}.")


def _settings_class(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None
