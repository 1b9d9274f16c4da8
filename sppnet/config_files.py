"""Configuration files: YAML and ``key=value`` overrides to settings, and back. The only importer of yaml.

A file holds only what differs from the defaults in ``config``; an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sppnet.artifacts import write_text
from sppnet.config import Config
from sppnet.errors import SppnetError
from sppnet.paths import expand_path
from sppnet.settings import SettingError, Settings

S = TypeVar("S", bound=Settings)

# Numbers as YAML 1.2 has them; 1.1, which PyYAML reads, takes 010 for eight and 1:30 for ninety.
WHOLE_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)$", re.ASCII)
NUMBER = re.compile(r"([-+]?(\d+\.\d*|\.\d+)([eE][-+]\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", re.ASCII)


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


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith((":int", ":float"))]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", WHOLE_NUMBER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


class _TextLoader(_Loader):
    """The same with every value as text: in a list of names "yes" is one."""


_TextLoader.yaml_implicit_resolvers = {}


def read_yaml_texts(path: Path) -> Any:
    """Mappings, lists and texts of a YAML file of another program; SppnetError for one that cannot be read."""
    try:
        return _read_yaml(path.read_bytes(), _TextLoader)
    except (OSError, ValueError) as error:
        raise SppnetError(f"{path}: not valid YAML: {error}; repair it, or remove it") from None


def _read_yaml(text: str | bytes, loader: type[_Loader] = _Loader) -> Any:
    """The values in YAML; ValueError in one line for what cannot be read."""
    try:
        return yaml.load(text, loader)
    except RecursionError:
        raise ValueError("brackets or sections are nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a date that is none, a list as a key
        raise ValueError(" ".join(str(error).split())) from None


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration and apply ``section.key=value`` overrides; ``~`` and ``$NAME`` in paths are filled in.

    Raises SppnetError for a missing file, YAML that does not parse, unknown keys and values of a wrong type.
    """
    return load_settings(Config, path, overrides)


def load_settings(
    kind: type[S], path: Path | str, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> S:
    """`load_config` for settings of another kind, those of a classifier; `values`, where given, are those of `path`."""
    if not isinstance(path, str | Path):
        raise SppnetError(f"expected the path of a YAML file, got {path!r}; without a file take {kind.__name__}()")
    values = _read_settings(Path(path)) if values is None else copy.deepcopy(dict(values))
    for override in overrides:
        _apply_override(values, override)
    try:
        return parse_settings(kind, values, "", expand=True)
    except SettingError as error:
        keys = {f"--set {override}": override.partition("=")[0] for override in overrides}
        own = [name for name, key in keys.items() if f"{error.key}.".startswith(f"{key}.")]
        near = [name for name, key in keys.items() if not error.key or key.startswith(f"{error.key}.")]
        origin = own[-1] if own else " with ".join([str(path), *near])
        raise SppnetError(f"{origin}: {error}") from None


def _read_settings(path: Path, named_by: str = "", above: Sequence[Path] = ()) -> dict[str, Any]:
    """The values of a file, over those of the file that it names as ``base``, relative to itself."""
    try:
        values = _read_yaml(path.read_bytes())
    except OSError as error:
        reason = f"cannot read the configuration ({error.strerror})"
        raise SppnetError(f"{named_by}{path}: {reason}; give an existing YAML file") from None
    except ValueError as error:
        raise SppnetError(f"{path}: not valid YAML: {error}") from None
    if path.resolve() in above:
        raise SppnetError(f"{named_by}{path} is its own base; leave one of them out")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise SppnetError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise SppnetError(f"{path}: base: expected the path of one file, got {base!r}")
    above, below = (*above, path.resolve()), path.parent / expand_path(base)
    return _merged(_read_settings(below, f"{path}: base: ", above), values)


def _merged(base: Any, own: Any) -> Any:
    both = isinstance(base, dict) and isinstance(own, dict)
    return base | {key: _merged(base.get(key), value) for key, value in own.items()} if both else own


def parse_config(values: Mapping[str, Any], origin: str) -> Config:
    """`parse_settings` of a detector."""
    return parse_settings(Config, values, origin)


def parse_settings(kind: type[S], values: Mapping[str, Any], origin: str, expand: bool = False) -> S:
    """Settings from nested mappings; `origin` names them in errors. `expand`: fill in ``~`` and ``$NAME`` in paths."""
    try:
        return kind.model_validate(values, context=expand)
    except SettingError as error:
        raise SettingError(error.key, f"{origin}: {error}" if origin else str(error)) from None


def dump_config(config: Settings) -> str:
    """The complete configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=math.inf)


def write_settings(path: Path, config: Settings, reasons: Mapping[str, str] | None = None) -> None:
    """`dump_config` into a file, with the reasons of settings, by ``section.key``, as comments beside them.

    Without `reasons` a file that holds these settings stays as it is.
    """
    with suppress(OSError, ValueError):  # not there, or damaged
        if reasons is None and _read_yaml(path.read_bytes()) == config.model_dump(mode="json"):
            return
    lines = dump_config(config).splitlines()
    for number, key in _keys(lines):
        lines[number] += f"  # {' '.join(reasons[key].split())}" if reasons and key in reasons else ""
    write_text(path, "\n".join([*lines, ""]))


def read_reasons(path: Path) -> dict[str, str]:
    """The reasons that `write_settings` left in a file."""
    lines, reasons = path.read_text(encoding="utf-8").splitlines(), dict[str, str]()
    for number, key in _keys(lines):
        value, mark, reason = lines[number].rpartition("  # ")
        with suppress(ValueError):  # of quotes that do not end: it stands inside the value
            _read_yaml(value)
            reasons |= {key: reason} if mark else {}
    return reasons


def _keys(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The line of each ``section.key`` in what `dump_config` writes."""
    place: list[str] = []
    for number, line in enumerate(lines):
        found = re.match(r"( *)(\w+):", line)
        if found:
            place = [*place[: len(found[1]) // 2], found[2]]
            yield number, ".".join(place)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=") if isinstance(override, str) else ("", "", "")
    if not separator or not key:
        raise SppnetError(f"--set {override}: expected key=value, e.g. --set maps.scales=[480,688]")
    try:
        value = _read_yaml(text)
    except ValueError as error:
        raise SppnetError(f"--set {override}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    for parent in parents:
        inner = values[parent] = {} if values.get(parent) is None else values[parent]  # an empty section
        if not isinstance(inner, dict):
            raise SppnetError(f"--set {override}: {parent} is not a section")
        values = inner
    values[last] = value
