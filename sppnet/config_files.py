"""Configuration files: YAML and ``key=value`` overrides to settings, and back. The only importer of yaml.

A file holds only what differs from the defaults in ``config``. ``load_config`` reads it with a safe loader, applies
overrides, fills in ``~`` and ``$NAME`` in paths and returns one frozen Config; an unknown key is an error that names
the nearest known one.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sppnet.config import Config
from sppnet.errors import SppnetError
from sppnet.paths import expand_path

S = TypeVar("S", bound=BaseModel)

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
    "finite_number": "expected a finite number",
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


class _Loader(yaml.SafeLoader):
    """YAML without what hides a slip or an attack: keys that stand twice in a mapping, and references (``*name``)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for billions of values
            reason = "references (*name) are not read; write the value out"
            raise yaml.MarkedYAMLError(None, None, reason, self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            other = keys.setdefault(str(key.value), key)
            if other is not key:
                lines = f"lines {other.start_mark.line + 1} and {key.start_mark.line + 1}"
                raise yaml.MarkedYAMLError(None, None, f"{key.value} stands twice, in {lines}; leave one out")
        return super().construct_mapping(node, deep)


def _read_yaml(text: str | bytes) -> Any:
    """The values in YAML; ValueError in one line for what cannot be read."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("brackets or sections are nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a date that is none, a list as a key
        raise ValueError(" ".join(str(error).split())) from None


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration and apply ``section.key=value`` overrides (values in YAML syntax).

    Raises SppnetError for a missing file, YAML that does not parse, unknown keys and values of a wrong type.
    """
    path = Path(path)
    try:
        values = _read_yaml(path.read_bytes())
    except OSError as error:
        raise SppnetError(
            f"{path}: cannot read the configuration ({error.strerror}); give an existing YAML file"
        ) from None
    except ValueError as error:
        raise SppnetError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise SppnetError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return _with_paths(parse_config(values, str(path)))


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
        quotes = first["type"] == "string_type" and not isinstance(first["input"], list | dict | None)
        hint = "; write it in quotes" if quotes else ""  # YAML reads on as true and 2024 as a number
        raise SppnetError(f"{origin}: {key}: {message}, got {first['input']!r}{hint}") from None


def dump_config(config: Config) -> str:
    """The complete configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise SppnetError(f"--set {override}: expected key=value, e.g. --set maps.scales=[480,688]")
    try:
        value = _read_yaml(text)
    except ValueError as error:
        raise SppnetError(f"--set {override}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    for parent in parents:
        inner = values[parent] = values.get(parent) or {}  # an empty section is None
        if not isinstance(inner, dict):
            raise SppnetError(f"--set {override}: {parent} is not a section")
        values = inner
    values[last] = value


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


def _with_paths(settings: S) -> S:
    """The settings with ``~`` and ``$NAME`` in their paths filled in."""
    update: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            update[name] = _with_paths(value)
        elif isinstance(value, Path):
            update[name] = expand_path(value)
        elif isinstance(value, tuple) and any(isinstance(item, Path) for item in value):
            update[name] = tuple(map(expand_path, value))
    return settings.model_copy(update=update)


def _settings_class(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None
