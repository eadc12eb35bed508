"""Checking a result that a snippet has sent, before anything is made of it.

Whatever it is, it must not harm the host: nothing here takes more of the stack, or of time,
than its size allows.
"""

from __future__ import annotations

import json
import math
from typing import Any

from ..protocol import is_too_deep

# Any digit becomes 0, to find numerals that may overflow a float: Python would read them as
# infinity. A regular expression takes ten times as long.
_DIGITS = bytes.maketrans(b"123456789E", b"000000000e")


def parse_result(data: bytes) -> Any:
    """The value of a result's JSON; raises `ValueError` if it is invalid or too deep."""
    # Checked first: the interpreter's parser recurses in C, on the stack of this thread.
    if is_too_deep(data):
        raise ValueError("JSON that is nested too deeply")
    try:
        shape = data.translate(_DIGITS, b"+")
        number = _finite if b"e00" in shape or b"0" * 300 in shape else None
        # Decoded here: `json` would also take it for UTF-16, which nothing above looks into.
        text = data.decode("utf-8", "surrogatepass")
        return json.loads(text, parse_constant=_finite, parse_float=number)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a JSON number")
    return value
