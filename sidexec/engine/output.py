"""What an execution has written: the newest bytes of each stream, and following them.

The execution's thread adds; any thread reads, without a lock, since all chunks are
immutable and know their offset. Nothing here reads descriptors.
"""

from __future__ import annotations

import codecs
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .waiting import Bell, monotonic

Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, Stream] = ("stdout", "stderr")
# Of each stream the text that was last asked for: whose it is, up to where, and the text.
Texts = dict[Stream, tuple["weakref.ref[Output]", int, str]]

# Writes smaller than this are put together, so that a chunk's own cost stays small.
SMALL = 4096
# With so many chunks, what one stream writes is put together even across what the
# other one wrote in between: their order among each other is given up, no byte is.
MANY = 8192


@dataclass(frozen=True)
class OutputChunk:
    """A piece of an execution's output: which `stream` it came on, and its `text`.

    `dropped` is the number of bytes of that stream that were dropped just before this
    chunk, because its reader was too slow; 0 as a rule.
    """

    stream: Stream
    text: str
    dropped: int = 0


class Decoder:
    """Makes text of one stream's bytes as they come, never of half a character."""

    def __init__(self, stream: Stream) -> None:
        self._stream: Stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._dropped = 0
        self.position = 0  # of what comes next, in bytes

    def feed(self, offset: int, data: bytes, *, final: bool = False) -> Iterator[OutputChunk]:
        """The chunk that `data` makes, if it makes one; with `final`, what was kept back.

        What is missing before `offset` is counted, with the characters that it has torn.
        """
        if offset > self.position:
            torn = _inside_character(data, 0)
            begun = len(self._decoder.getstate()[0])
            self._dropped += begun + offset - self.position + torn
            self._decoder.reset()
            offset, data = offset + torn, data[torn:]
        self.position = offset + len(data)
        text = self._decoder.decode(data, final)
        if text or (final and self._dropped):
            dropped, self._dropped = self._dropped, 0
            yield OutputChunk(self._stream, text, dropped)


class Lines:
    """Makes whole lines of one stream's bytes as they come, the last perhaps unfinished.

    A line of which a part is missing counts as missing.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream: Stream = stream
        self._begun: list[bytes] = []
        self._is_torn = False  # and so what comes is left out up to the next newline
        self._dropped = 0
        self.position = 0  # of what comes next, in bytes

    def feed(self, offset: int, data: bytes, *, final: bool = False) -> Iterator[OutputChunk]:
        """The lines that `data` ends; with `final`, what was kept back."""
        if offset > self.position:
            self._dropped += sum(map(len, self._begun)) + offset - self.position
            self._begun.clear()
            self._is_torn = True
        self.position = offset + len(data)
        if self._is_torn:
            torn, newline, data = data.partition(b"\n")
            self._dropped += len(torn + newline)
            self._is_torn = not newline
        *lines, rest = data.split(b"\n")
        for line in lines:
            yield self._take(line, b"\n")
        if rest:
            self._begun.append(rest)
        if final and (self._begun or self._dropped):
            yield self._take()

    def _take(self, *rest: bytes) -> OutputChunk:
        text = b"".join((*self._begun, *rest)).decode("utf-8", "replace")
        dropped, self._dropped = self._dropped, 0
        self._begun.clear()
        return OutputChunk(self._stream, text, dropped)


class _Chunk(NamedTuple):
    sequence: int
    offset: int
    data: bytes


def _inside_character(data: bytes, start: int) -> int:
    """How many bytes from `start` on are the rest of a character; garbage is no character."""
    rest = 0
    while start + rest < len(data) and data[start + rest] & 0xC0 == 0x80:
        rest += 1
        if rest > 3:
            return 0
    return rest


def _torn(chunk: _Chunk) -> int:
    """How many bytes of the first chunk kept belong to a character that was dropped."""
    return _inside_character(chunk.data, 0) if chunk.offset else 0


class _Kept:
    """The newest bytes of one stream."""

    def __init__(self) -> None:
        self.chunks: list[_Chunk] = []  # a deque takes 700 bytes when it is empty
        self.end = 0


class Output:
    """Both streams of one execution, each kept to its newest `limit` bytes."""

    def __init__(self, limit: int, texts: Texts) -> None:
        self._limit = limit
        self._kept = {stream: _Kept() for stream in STREAMS}
        self._sequence = 0
        self._texts = texts  # shared by all executions
        self.changed = Bell()

    # -- from the execution's thread

    def add(self, stream: Stream, data: bytes) -> None:
        kept = self._kept[stream]
        if len(data) > self._limit:
            cut = len(data) - self._limit
            cut += _inside_character(data, cut)
            kept.end += cut
            data = data[cut:]
        chunks = kept.chunks
        self._make_room(kept, len(data))
        last = chunks[-1] if chunks and len(chunks[-1].data) < SMALL else None
        if last is not None and (last.sequence == self._sequence or len(chunks) >= MANY):
            chunks[-1] = last._replace(data=last.data + data)
        else:
            self._sequence += 1
            chunks.append(_Chunk(self._sequence, kept.end, data))
        kept.end += len(data)
        self.changed.ring()

    def _make_room(self, kept: _Kept, size: int) -> None:
        chunks = kept.chunks
        while chunks:
            first = chunks[0]
            excess = kept.end + size - self._limit - first.offset
            if excess <= 0:
                return
            if excess < len(first.data):
                # Not in the middle of a character, which would come out as garbage.
                excess += _inside_character(first.data, excess)
                rest = first.data[excess:]
                if rest:
                    chunks[0] = first._replace(offset=first.offset + excess, data=rest)
                    return
            del chunks[0]

    # -- from any thread

    @property
    def size(self) -> int:
        """How many bytes are kept."""
        return sum(self._kept[stream].end - self._start(stream) for stream in STREAMS)

    @property
    def dropped(self) -> int:
        """How many bytes were dropped."""
        return sum(self._start(stream) for stream in STREAMS)

    def text(self, stream: Stream) -> str:
        chunks = self._kept[stream].chunks.copy()
        if not chunks:
            return ""
        end = chunks[-1].offset + len(chunks[-1].data)
        texts = self._texts
        cached = texts.get(stream)
        if cached is not None and cached[0]() is self and cached[1] == end:
            return cached[2]
        data = b"".join(chunk.data for chunk in chunks)[_torn(chunks[0]) :]
        text = data.decode("utf-8", "replace")
        owner = weakref.ref(self, lambda _: texts.pop(stream, None))  # once it is forgotten
        texts[stream] = (owner, end, text)
        return text

    def follow(
        self, is_over: Callable[[], bool], deadline: float | None, *, lines: bool
    ) -> Iterator[OutputChunk]:
        """Yield what is kept, then what comes, until `is_over()` and all is yielded.

        Raises `TimeoutError` when there is more to wait for at `deadline`, a time of
        `waiting.monotonic()`.
        """
        decoders = {stream: Lines(stream) if lines else Decoder(stream) for stream in STREAMS}
        while True:
            over = is_over()  # checked first: what came before the end is then there
            news = sorted(
                (chunk.sequence, stream, chunk)
                for stream in STREAMS
                for chunk in self._since(stream, decoders[stream].position)
            )
            for _, stream, chunk in news:
                yield from decoders[stream].feed(chunk.offset, chunk.data)
            if over:
                break
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("the execution has not ended in time")
            self.changed.wait_for(lambda: is_over() or self._is_news(decoders), left)
        for decoder in decoders.values():
            yield from decoder.feed(decoder.position, b"", final=True)

    def _is_news(self, decoders: Mapping[Stream, Decoder | Lines]) -> bool:
        return any(self._kept[stream].end > decoders[stream].position for stream in STREAMS)

    def _since(self, stream: Stream, position: int) -> list[_Chunk]:
        found = []
        for chunk in reversed(self._kept[stream].chunks.copy()):
            if chunk.offset + len(chunk.data) <= position:
                break
            if chunk.offset < position:
                offset = position - chunk.offset
                chunk = chunk._replace(offset=position, data=chunk.data[offset:])
            found.append(chunk)
        return found

    def _start(self, stream: Stream) -> int:
        kept = self._kept[stream]
        try:
            first = kept.chunks[0]
        except IndexError:
            return kept.end
        return first.offset + _torn(first)
