"""What all settings have in common: kinds of values; they are frozen, closed to slips, and refused in words."""

from __future__ import annotations

import difflib
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from sppnet.errors import SppnetError
from sppnet.paths import expand_path

S = TypeVar("S", bound="Settings")
Overlap = Annotated[float, Field(ge=0, le=1)]  # an intersection over union
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=16)]  # px of an image that goes through a network
Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0)]
Pixel = Annotated[float, Field(ge=0, le=255)]
Score = Annotated[float, Field(allow_inf_nan=False)]
# A class is compared as annotations are read: in Unicode's composed form, without blanks around it.
ClassName = Annotated[str, AfterValidator(lambda name: unicodedata.normalize("NFC", " ".join(name.split())))]
# ``~`` and ``$NAME`` are filled in where a file is read, not in settings made in Python.
FilePath = Annotated[Path, AfterValidator(lambda path, info: expand_path(path) if info.context else path)]

# Where pydantic's words are those of another program, by the beginning of its kind of error.
EXPECTED = {
    "tuple_type": "expected a list in square brackets, e.g. [a, b]",
    "too_short": "expected a list with something in it",
    "model_type": "expected a section of settings",
    "bool": "expected true or false",
    "int": "expected a whole number",
    "float": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "string_pattern": "expected a name without slashes and control characters, not of dots alone",
    "path_type": "expected a path",
}

UNKNOWN = ("extra_forbidden", "invalid_key", "unexpected_keyword_argument")  # the second of a key that is no text

OTHER_KIND = {  # settings of the other kind of configuration
    "training": "this is a classifier's configuration: sppnet classify train",
    "data.root": "this is a detector's configuration: sppnet train",
}


class SettingError(SppnetError):
    """A setting that cannot be; `key` names it, or the section in which two do not go together."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Settings(BaseModel):
    """Base of all settings: frozen, and closed to unknown keys and to numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _in_words(type(self), error) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # or sections would be made by it one by one

    @classmethod
    def model_validate(cls, *values: Any, **options: Any) -> Self:
        try:
            return super().model_validate(*values, **options)
        except ValidationError as error:
            raise _in_words(cls, error) from None

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        number = re.search(r"\b(int|float)\b", str(cls.model_fields[str(info.field_name)].annotation))
        if number and any(isinstance(one, bool) for one in (value if isinstance(value, list | tuple) else [value])):
            raise PydanticKnownError("int_type" if number[1] == "int" else "float_type")
        return value


def checked_settings(kind: type[S], settings: S | None, **changes: Any) -> S:
    """`settings`, or the defaults for None, with those `changes` that are not None; SppnetError names what cannot be.

    Values that entered by ``model_copy``, which checks nothing, are checked too.
    """
    if settings is not None and not isinstance(settings, kind):
        raise SppnetError(f"settings must be {kind.__name__}(...), got {type(settings).__name__} {settings!r}")
    values = {**vars(settings or kind()), **{name: value for name, value in changes.items() if value is not None}}
    return kind(**values)


def _in_words(kind: type[Settings], failure: ValidationError) -> SettingError:
    errors = failure.errors()
    error = next((one for one in errors if one["type"] in UNKNOWN), errors[0])
    key, fault, given = ".".join(map(str, error["loc"])), error["type"], error["input"]
    if fault in UNKNOWN:
        return SettingError(key, f"unknown setting {key}; {_remedy(kind, key, error['loc'])}")
    if fault == "value_error":  # settings that do not go together: the message names them
        return SettingError(key, ": ".join(filter(None, (key, str(error["ctx"]["error"])))))
    message = next((words for start, words in EXPECTED.items() if fault.startswith(start)), error["msg"])
    quotes = fault == "string_type" and not isinstance(given, list | dict | None)
    hint = "; write it in quotes" if quotes else ""  # YAML reads on as true and 2024 as a number
    return SettingError(key, ": ".join(filter(None, (key, f"{message}, got {given!r}{hint}"))))


def _remedy(kind: type[Settings], key: str, place: tuple[int | str, ...]) -> str:
    """What to write instead of a setting that does not exist."""
    section: Any = kind
    for name in place[:-1]:  # a number is a place in a list of sections
        section = get_args(section)[0] if isinstance(name, int) else section.model_fields[name].annotation
    known, prefix = section.model_fields, key.removesuffix(str(place[-1]))
    near = difflib.get_close_matches(str(place[-1]), known, n=1)
    return OTHER_KIND.get(key) or (f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}")
