"""Converting what a snippet returns or reports to JSON, and saying why it can't be."""

from __future__ import annotations

import _json  # `json` would cost a first result some milliseconds
import builtins
import sys

from ..protocol import MAX_DEPTH, MAX_RESULT, is_too_deep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# The first attribute that its type has says how a value is converted.
_CONVERSIONS = (
    ("__index__", "convert it with int()"),
    ("__float__", "convert it with float()"),
    ("isoformat", "convert it with .isoformat()"),
    ("to_dict", "convert it with .to_dict()"),
    ("__dataclass_fields__", "convert it with dataclasses.asdict()"),
    ("_member_map_", "use its .value"),
    ("__await__", "await it"),
    ("__fspath__", "convert it with str()"),
    ("decode", "convert it with .decode()"),
    ("_asdict", "convert it with ._asdict()"),
    ("keys", "convert it with dict()"),
    ("__complex__", "convert it with float() or str()"),
    ("__iter__", "convert it with list()"),
)
_OTHERWISE = "use dict, list, str, int, float, bool or None"
_DICTS = (dict, getattr(builtins, "frozendict", dict))  # CPython 3.15 has the second
_KEYS = (str, int, float, bool, type(None))

# How many digits an interpreter reads in an integer, unless it is told otherwise: the host, too.
MAX_DIGITS = 4300
_TOO_LONG = 10**MAX_DIGITS
# There are none before Python 3.10.7. The user's code may put anything in their place.
_get_max_digits = getattr(sys, "get_int_max_str_digits", int)
_set_max_digits = getattr(sys, "set_int_max_str_digits", bool)


def to_json(value: object, what: str) -> bytes:
    """What `json.dumps(value, allow_nan=False)` makes of a value."""
    encode_str = _json.encode_basestring_ascii
    encode = _json.make_encoder({}, _refuse, encode_str, None, ": ", ", ", False, False, False)
    # One that another thread has set here is left to that thread, which sets the user's again.
    limit = _get_max_digits()
    try:
        if limit != MAX_DIGITS:
            _set_max_digits(MAX_DIGITS)
        data = "".join(encode(value, 0)).encode()
        if is_too_deep(data):
            raise ValueError
    except (TypeError, ValueError, RecursionError) as error:
        try:
            problem = _find_problem(value) or str(error)
        except Exception:  # by a class of the user's
            problem = str(error)
        raise TypeError(f"{what} must be JSON: {problem}") from None
    finally:
        if limit != MAX_DIGITS:
            _set_max_digits(limit)
    if len(data) > MAX_RESULT:
        raise ValueError(
            f"{what} takes {len(data)} bytes as JSON, more than {MAX_RESULT}:"
            " write it to a file and report the file's path"
        )
    return data


def _refuse(value: object) -> object:
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _find_problem(value: object) -> str | None:
    """Where the first part is that is not JSON, and what to do about it."""
    pending: list[tuple[Any, str, tuple[int, ...]]] = [(value, "result", ())]
    while pending:
        each, place, outer = pending.pop()
        if isinstance(each, (*_DICTS, list, tuple)):
            if id(each) in outer:
                return f"{place} contains itself: leave it out there"
            if len(outer) == MAX_DEPTH:
                return f"result is nested more than {MAX_DEPTH} deep: flatten it"
            inner: list[tuple[Any, str, tuple[int, ...]]] = []
            for key, part in each.items() if isinstance(each, _DICTS) else enumerate(each):
                if not isinstance(key, _KEYS):
                    kind = _name(type(key))
                    return f"{place} has {kind} as a key, {_short(key)}: use str keys"
                if _is_too_long(key):
                    return f"{place} has a key of more than {MAX_DIGITS} digits: use str keys"
                inner.append((part, f"{place}[{_short(key)}]", (*outer, id(each))))
            pending += reversed(inner)
        elif _is_too_long(each):
            return f"{place} has more than {MAX_DIGITS} digits: use a str"
        elif isinstance(each, float):
            if each != each or each in (float("inf"), float("-inf")):
                return f"{place} is {float(each)!r}: use None or a str"
        elif not isinstance(each, (str, int, type(None))):
            return f"{place} is {_name(type(each))}: {_conversion(type(each))}"
    return None


def _is_too_long(value: object) -> bool:
    return isinstance(value, int) and not -_TOO_LONG < value < _TOO_LONG


def _conversion(kind: type) -> str:
    if hasattr(kind, "tolist") and hasattr(kind, "__len__"):
        return "convert it with .tolist()"
    if "bool" in kind.__name__:
        return "convert it with bool()"
    found = (advice for name, advice in _CONVERSIONS if hasattr(kind, name))
    return next(found, _OTHERWISE)


def _name(kind: type) -> str:
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _short(key: object) -> str:
    text = repr(key)
    return text if len(text) <= 60 else text[:57] + "..."
