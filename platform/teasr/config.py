"""Typed settings: YAML plus `key=value` overrides, checked at construction.

Each component declares its own `Settings` class next to the code that uses it; a recipe nests them.
An unknown key, a wrong type or a value out of range becomes a `UsageError` that names the field,
what was given and what is accepted. No setting is read and then ignored: extra keys are refused.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from teasr.errors import UsageError

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Settings(BaseModel):
    """Base of every configuration section: immutable, and strict about keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], source: str) -> Self:
        """Validate `data`; `source` (a file or "command line") is named in errors.

        Raises:
            UsageError: naming the first bad field and what is accepted there.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise _explain(cls, error, source) from None

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file and lay `section.key=value` overrides over it.

        Raises:
            UsageError: when the file is missing or no mapping, or a field is wrong.
        """
        return cls.from_mapping(apply_overrides(read_yaml(path), overrides), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file `path` (`UsageError` when there is none)."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UsageError(f"{path} is not valid YAML{line}.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds a {type(data).__name__}; a mapping of keys is expected.")
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`data` with each `a.b=value` laid over it; values are YAML (`3`, `1e-4`, `[1, 2]`)."""
    result: dict[str, Any] = _copy(data)
    for override in overrides:
        name, separator, text = override.partition("=")
        keys = name.strip().split(".")
        if not separator or not all(keys):
            raise UsageError(f"'{override}' is not an override.", "Write section.key=value.")
        node = result
        for key in keys[:-1]:
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise UsageError(f"'{name}': '{key}' is a value, not a section.")
            node = child
        try:
            node[keys[-1]] = _scalar(text)
        except yaml.YAMLError:
            raise UsageError(
                f"'{override}': the value is not valid YAML.", "Quote text: key='\"a: b\"'."
            ) from None
    return result


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copy(value) if isinstance(value, Mapping) else value for key, value in data.items()
    }


def _scalar(text: str) -> Any:
    if _EXPONENT.fullmatch(text.strip()):  # YAML 1.1 reads 1e-4 as a string
        return float(text)
    return yaml.safe_load(text)


def _explain(cls: type[BaseModel], error: ValidationError, source: str) -> UsageError:
    first = error.errors()[0]
    place = [part for part in first["loc"] if isinstance(part, str)]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(cls, place[:-1])
        close = difflib.get_close_matches(place[-1], known, n=1)
        meant = f" Did you mean '{close[0]}'?" if close else ""
        return UsageError(
            f"{source}: unknown key '{field}'.{meant}", f"Known keys: {', '.join(sorted(known))}."
        )
    given = first.get("input")
    shown = "" if isinstance(given, Mapping) or given is None else f" (given: {given!r})"
    reason = first["msg"].removeprefix("Value error, ")
    return UsageError(f"{source}: '{field}': {reason}{shown}." if field else f"{source}: {reason}.")


def _fields_at(cls: type[BaseModel], place: Iterable[str]) -> list[str]:
    keys = iter(place)
    for key in keys:
        annotation = cls.model_fields[key].annotation if key in cls.model_fields else None
        if typing.get_origin(annotation) is dict:  # sections by name: `dict[str, Section]`
            annotation = typing.get_args(annotation)[1]
            next(keys, None)
        optional = isinstance(annotation, types.UnionType)  # `Section | None`
        options = typing.get_args(annotation) if optional else (annotation,)
        sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not sections:
            return []
        cls = sections[0]
    return list(cls.model_fields)
