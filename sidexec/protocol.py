"""The frames that host, launcher, keeper and snippet exchange.

A frame is one byte for its kind, four for the length of its payload, most
significant first, and the payload. This module packs frames and splits byte
streams into frames, with a bound on each kind's length, since one of the peers
is never trusted. It never reads or writes a descriptor, and imports nothing:
both sides run it. Both also check here how deep a result is.
"""

HEADER = 5

# host -> launcher
FORK = b"F"  # bring up one keeper and snippet, now
FORK_AHEAD = b"A"  # the same, ahead of need: it may take longer
KILL = b"K"  # "<keeper pid>": end a keeper that does not answer

# launcher -> host
LOADED = b"L"  # the modules to preload are there; or why not, as text
PAIR = b"P"  # "<keeper pid> <1 if forked ahead, else 0>", with the host's four descriptors attached
LOST = b"X"  # "<keeper pid> <exit code> <pid that can't be killed>...": swept

# launcher -> host and keeper -> host
REFUSED = b"R"  # what the system did not give; the launcher's begins with "<1 if ahead, else 0> "
FAULT = b"f"  # what went wrong in launcher or keeper itself, which then ends
SWEEPING = b"w"  # it kills what is left, and is not done yet: sent again and again

# keeper -> host
READY = b"r"  # "<snippet pid> <1 if orphans come to the keeper, else 0>"
# "<exit code or None> <1 if forced, else 0> <1 if its launcher has ended, else 0> <microseconds
# of processor time> <bytes of memory> <pid that can't be killed>..."
END = b"e"

# host -> keeper
STOP = b"s"  # "<grace period in seconds>"

# host -> snippet
RUN = b"g"  # marshalled: the umask or None, and a marshalled dict: what to run, and how

# snippet -> host: the only frames that come from untrusted code
PROGRESS = b"p"  # "<percent>"
RESULT = b"v"  # JSON; the last one counts
ERROR = b"x"  # the text for a failed execution's `error`

MAX_RESULT = 8 * 1024 * 1024
MAX_ERROR = 1024 * 1024
# Levels of lists and dicts in a result: `copy` and `pickle` fail on deeper ones, each at
# its own depth.
MAX_DEPTH = 100

FROM_SNIPPET = {PROGRESS: 64, RESULT: MAX_RESULT, ERROR: MAX_ERROR}
FROM_KEEPER = {READY: 64, SWEEPING: 0, END: 65536, REFUSED: 65536, FAULT: 65536}
FROM_LAUNCHER = {LOADED: 65536, PAIR: 64, LOST: 65536, SWEEPING: 0, REFUSED: 65536, FAULT: 65536}
FROM_HOST = {FORK: 0, FORK_AHEAD: 0, KILL: 64, STOP: 64}


class ProtocolError(Exception):
    """A peer sent something that is not a frame, or a frame that is too long."""


def is_too_deep(json: bytes) -> bool:
    """Whether lists and dicts are nested more than `MAX_DEPTH` deep.

    Checked without parsing: a parser that recurses could take a thread's whole stack.
    """
    if json.count(b"[") + json.count(b"{") <= MAX_DEPTH:
        return False
    # Escapes occur in strings only; split at quotes, every second part is a string.
    outside = b"".join(json.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = outside.translate(_AS_ONE_KIND, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


_AS_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(each for each in range(256) if each not in b"[]{}")


def pack(kind: bytes, payload: bytes = b"") -> bytes:
    return kind + len(payload).to_bytes(4, "big") + payload


class Inbox:
    """Splits a byte stream into frames, of the kinds that are allowed."""

    def __init__(self, limits: "dict[bytes, int]") -> None:
        self._limits = limits
        self._data = bytearray()

    def feed(self, data: bytes) -> "list[tuple[bytes, bytes]]":
        """The frames that `data` completes; `ProtocolError` at the first bad header."""
        self._data += data
        frames = []
        start = 0
        while len(self._data) - start >= HEADER:
            kind = bytes(self._data[start : start + 1])
            length = int.from_bytes(self._data[start + 1 : start + HEADER], "big")
            if length > self._limits.get(kind, -1):
                raise ProtocolError(f"a frame of kind {kind!r} with {length} bytes")
            end = start + HEADER + length
            if len(self._data) < end:
                break
            frames.append((kind, bytes(self._data[start + HEADER : end])))
            start = end
        del self._data[:start]
        return frames
