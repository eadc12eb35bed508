"""Checks of arguments: an invalid one raises at the call, and the message names it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")

MOST = 2**63 - 1  # the largest number that the system takes


def instance(name: str, value: object, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")
    return value


def text(name: str, value: object) -> str:
    return instance(name, value, str)


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
    try:
        encoded = os.fsencode(checked)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} can't be a path: {error}") from None
    if not encoded or b"\0" in encoded:
        raise ValueError(f"{name} must be a path, not {checked!r}")
    return checked


def absolute(path: str) -> str:
    """`path` unchanged if the current directory has been removed."""
    try:
        return os.path.abspath(path)
    except OSError:
        return path


def is_directory(path: str) -> bool:
    """For what `absolute` returned: `.` is a directory even after it has been removed."""
    return os.path.isabs(path) and os.path.isdir(path)


def is_allowed(path: str, mode: int) -> bool:
    """Whether this process may use it so, as the user that it now is."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} is larger than any number of seconds") from None
    if math.isnan(number) or number < 0:
        raise ValueError(f"{name} must not be negative or NaN: {value!r}")
    return number


def seconds_or_none(name: str, value: object) -> float | None:
    """The same, with None and infinity for no limit."""
    if value is None:
        return None
    checked = seconds(name, value)
    return None if math.isinf(checked) else checked


def count(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not least <= value <= MOST:
        raise ValueError(f"{name} must be from {least} to {MOST}")
    return value


def function(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {type(value).__name__}")
    import inspect

    if inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(type(value).__call__):
        raise TypeError(
            f"{name} must be a plain function, not an asynchronous one: from it, call"
            " loop.call_soon_threadsafe"
        )


def options(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """As Python says it of a function's own parameters."""
    for each in given:
        if each not in known:
            raise TypeError(f"{name}() got an unexpected keyword argument {each!r}")


def names(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be names of modules, such as ['json'], not {value!r}")
    # As plain `str`: `marshal` takes no subclass.
    return tuple("".join(utf8(f"each of {name}", each)) for each in value)


def arguments(name: str, value: object) -> tuple[str, ...]:
    # `tuple` first, the default: an abstract class takes 20 µs to ask.
    if isinstance(value, (str, bytes)) or not isinstance(value, (tuple, Sequence)):
        raise TypeError(f"{name} must be a sequence of str, such as ['--all'], not {value!r}")
    for each in value:
        try:
            encoded = os.fsencode(text(f"each of {name}", each))
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} can't hold {each!r}: {error}") from None
        if b"\0" in encoded:
            raise ValueError(f"{name} can't hold {each!r}: it has a null character")
    return tuple(map("".join, value))  # of plain `str`: `marshal` takes no subclass


def environment(name: str, value: object) -> dict[bytes, bytes]:
    """As the system has it."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of str to str, not {type(value).__name__}")
    given = {text(f"each key of {name}", k): text(f"{name}[{k!r}]", v) for k, v in value.items()}
    checked = {}
    for key, item in given.items():
        try:
            encoded = os.fsencode(key), os.fsencode(item)
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} can't hold the variable {key!r}: {error}") from None
        if not key or "=" in key or any(b"\0" in each for each in encoded):
            raise ValueError(f"{name} can't hold the variable {key!r}")
        checked[encoded[0]] = encoded[1]
    return checked


def params(name: str, value: object) -> dict[str, Any]:
    """A copy of `value`, converted to JSON and back."""
    instance(name, value, dict)
    try:
        copy: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
        pending: list[Any] = [value]
        while pending:
            each = pending.pop()
            if isinstance(each, dict):
                for key in each:  # `json` silently turns some others into str
                    text(f"each key in {name}", key)
                pending += each.values()
            elif isinstance(each, (list, tuple)):
                pending += each
    except RecursionError:
        raise ValueError(f"{name} must be JSON: it is nested too deeply") from None
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be JSON: {error}") from None
    return copy
