"""Checks of what callers pass: misuse raises at the call, and names the argument."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    return value


def utf8(name: str, value: object) -> str:
    checked = text(name, value)
    try:
        checked.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} can't be encoded as UTF-8: {error}") from None
    return checked


def path(name: str, value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a str or a path, not {type(value).__name__}")
    checked = text(name, os.fspath(value))
    if not checked or "\0" in checked:
        raise ValueError(f"{name} must be a path, not {checked!r}")
    return checked


def seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if math.isnan(value) or value < 0:
        raise ValueError(f"{name} must not be negative or NaN: {value!r}")
    return float(value)


def seconds_or_none(name: str, value: object) -> float | None:
    """The same, with None and infinity for no limit."""
    if value is None:
        return None
    checked = seconds(name, value)
    return None if math.isinf(checked) else checked


def count(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
    return value


def names(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be names of modules, such as ['json'], not {value!r}")
    return tuple(utf8(f"each of {name}", each) for each in value)


def environment(name: str, value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of str to str, not {type(value).__name__}")
    checked = {text(f"each key of {name}", k): text(f"{name}[{k!r}]", v) for k, v in value.items()}
    for key, item in checked.items():
        if not key or "=" in key or "\0" in key or "\0" in item:
            raise ValueError(f"{name} can't hold the variable {key!r}")
    return checked


def params(name: str, value: object) -> dict[str, Any]:
    """A copy of `value` as JSON has it."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a dict, not {type(value).__name__}")
    for key in value:
        text(f"each key of {name}", key)
    try:
        copy: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    except RecursionError:
        raise ValueError(f"{name} must be JSON: it is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must be JSON: {error}") from None
    return copy
