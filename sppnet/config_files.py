"""Configuration files: YAML and ``key=value`` overrides to settings, and back. The only importer of yaml.

A file holds only what differs from the defaults in ``config``; an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sppnet.config import Config
from sppnet.errors import SppnetError

# In the words of a YAML file, where pydantic's are those of Python, by the beginning of its kind of error.
EXPECTED = {
    "tuple_type": "expected a list in square brackets, e.g. [a, b]",
    "too_short": "expected a list with something in it",
    "model_type": "expected a section of settings",
    "bool": "expected true or false",
    "int": "expected a whole number",
    "float": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "path_type": "expected a path",
}

UNKNOWN = ("extra_forbidden", "invalid_key")  # of a key that is no text

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
    """Read a YAML configuration and apply ``section.key=value`` overrides; ``~`` and ``$NAME`` in paths are filled in.

    Raises SppnetError for a missing file, YAML that does not parse, unknown keys and values of a wrong type.
    """
    path = Path(path)
    try:
        values = _read_yaml(path.read_bytes())
    except OSError as error:
        reason = f"cannot read the configuration ({error.strerror})"
        raise SppnetError(f"{path}: {reason}; give an existing YAML file") from None
    except ValueError as error:
        raise SppnetError(f"{path}: not valid YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise SppnetError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, str(path), expand=True)


def parse_config(values: Mapping[str, Any], origin: str, expand: bool = False) -> Config:
    """Settings from nested mappings; `origin` names them in errors. `expand`: fill in ``~`` and ``$NAME`` in paths."""
    try:
        return Config.model_validate(values, context=expand)
    except ValidationError as failure:
        errors = failure.errors()
    error = next((one for one in errors if one["type"] in UNKNOWN), errors[0])
    key, kind, given = ".".join(map(str, error["loc"])), error["type"], error["input"]
    if kind in UNKNOWN:
        raise SppnetError(f"{origin}: unknown setting {key}; {_remedy(key, error['loc'])}")
    if kind == "value_error":  # settings that do not go together: the message names them
        raise SppnetError(": ".join(filter(None, (origin, key, str(error["ctx"]["error"])))))
    message = next((words for start, words in EXPECTED.items() if kind.startswith(start)), error["msg"])
    quotes = kind == "string_type" and not isinstance(given, list | dict | None)
    hint = "; write it in quotes" if quotes else ""  # YAML reads on as true and 2024 as a number
    raise SppnetError(f"{origin}: {key}: {message}, got {given!r}{hint}")


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


def _remedy(key: str, place: tuple[int | str, ...]) -> str:
    """What to write instead of a setting that does not exist."""
    section: Any = Config
    for name in place[:-1]:
        section = section.model_fields[name].annotation
    known, prefix = section.model_fields, key.removesuffix(str(place[-1]))
    near = difflib.get_close_matches(str(place[-1]), known, n=1)
    return RENAMED.get(key) or (f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}")
