"""A start, from the arguments of the call to what the engine is given.

Checks arguments and reads the host's surroundings. It starts nothing and waits for nothing.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import marshal
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Union

from . import checks
from .confinement import Confinement
from .engine import payload
from .engine.delivery import Delivery
from .engine.descriptors import Descriptor, pipe
from .engine.execution import Execution
from .engine.input import Input
from .engine.output import Output, OutputChunk
from .engine.process import Environment
from .limits import Limits
from .responses import StartData, StartSideExecutionResponse

# As `subprocess` has them, which is not needed here for anything else.
PIPE, STDOUT = -1, -2
# How a directory is opened that need not be read, where the system can do that.
DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY)

Path = Union[str, "os.PathLike[str]"]


class Default(enum.Enum):
    DEFAULT = "the manager's default_timeout"


DEFAULT: Literal[Default.DEFAULT] = Default.DEFAULT
"""As a `timeout`: the one that the manager was made with."""


class StartOptions(TypedDict, total=False):
    """What `run` takes beside its own arguments, as `start_with_code` does."""

    thread_id: str | None
    cwd: Path | None
    env: Mapping[str, str] | None
    limits: Limits | None
    confinement: Confinement | None
    on_output: Callable[[OutputChunk], object] | None
    input: str | bytes | None
    stdin: int | None
    stderr: int | None


if TYPE_CHECKING:
    if sys.version_info >= (3, 11):
        from typing import Unpack as Unpack
    else:  # there, a type checker takes any options
        _T = TypeVar("_T")
        Unpack = Union[Any, _T]


# For `stdin`, from the command line alone: what this process has.
INHERITED: Any = object()


@dataclasses.dataclass
class Request:
    """The arguments of a start; `check` validates and converts them."""

    code: str | None = None
    block: str | None = None
    args: Any = ()
    params: Any = None
    timeout: Any = None
    thread_id: Any = None
    cwd: Any = None
    env: Any = None
    limits: Any = None
    confinement: Any = None
    on_output: Callable[[OutputChunk], object] | None = None
    input: Any = None
    stdin: Any = None
    stderr: Any = None
    id: str = dataclasses.field(default_factory=lambda: os.urandom(16).hex())

    def fill_from(self, default: Request) -> None:
        """Take what is not given from what the manager was made with."""
        if self.timeout is DEFAULT:
            self.timeout = default.timeout
        if self.cwd is None:
            self.cwd = default.cwd
        if self.limits is None:
            self.limits = default.limits
        if self.confinement is None:
            self.confinement = default.confinement

    def environment(self, default: Request) -> Environment:
        env = default.env if self.env is None else self.env
        return _current_environment() if env is None else env

    def check(self) -> None:
        """Invalid arguments raise `TypeError` or `ValueError`, which name the argument."""
        if self.code is not None:
            self.code = checks.utf8("code", self.code)
        self.args = checks.arguments("args", self.args)
        self.params = {} if self.params is None else checks.params("params", self.params)
        self.timeout = checks.seconds_or_none("timeout", self.timeout)
        if self.thread_id is not None:
            checks.text("thread_id", self.thread_id)
        if self.cwd is not None:
            self.cwd = checks.absolute(checks.path("cwd", self.cwd))
        if self.env is not None:
            self.env = checks.environment("env", self.env)
        if self.limits is not None:
            checks.instance("limits", self.limits, Limits)
        if self.confinement is not None:
            checks.instance("confinement", self.confinement, Confinement)
        if self.on_output is not None:
            checks.function("on_output", self.on_output)

        if isinstance(self.input, str):
            self.input = checks.utf8("input", self.input).encode()
        if not isinstance(self.input, (bytes, type(None))):
            raise TypeError(f"input must be a str or bytes, not {type(self.input).__name__}")
        if self.stdin not in (None, PIPE, INHERITED):
            raise ValueError(f"stdin must be None or subprocess.PIPE, not {self.stdin!r}")
        if self.stdin is not None and self.input is not None:
            raise ValueError("input is all of standard input: stdin can't be given with it")
        if self.stderr not in (None, STDOUT):
            raise ValueError(f"stderr must be None or subprocess.STDOUT, not {self.stderr!r}")

    def why_not(self) -> str | None:
        """Why it can't be started, as far as that can be told before it is; else None."""
        patcher = sys.modules.get("eventlet.patcher")
        if patcher is not None and patcher.is_monkey_patched("thread"):
            return (
                "eventlet has replaced the threads of this process, which are needed here:"
                " call eventlet.monkey_patch(thread=False), or use gevent"
            )
        if self.cwd is not None and not checks.is_directory(self.cwd):
            return f"no such directory: {self.cwd!r}; cwd must be one that exists"
        if self.cwd is not None and not checks.is_allowed(self.cwd, os.X_OK):
            return f"can't enter the directory {self.cwd!r}: check its permissions"
        if self.block is not None:
            from .blocks import why_not_runnable

            problem = why_not_runnable(self.block)
            if problem is not None:
                return problem
        if self.confinement is not None:
            from .confining import missing

            return missing()
        return None

    def execution(self, output: Output) -> Execution:
        """Raises `OSError`, which says what could not be opened."""
        descriptors: list[Descriptor] = []
        input = None
        takes_input = self.input is not None or self.stdin is not None
        if self.stdin is INHERITED:
            descriptors.append(Descriptor(functools.partial(os.dup, 0)))
        elif takes_input:
            try:
                reader, writer = pipe()
            except OSError as problem:
                raise OSError(f"could not make a pipe for its input: {problem}") from None
            descriptors.append(reader)
            input = Input(writer, self.input or b"", is_open=self.stdin is not None)
        cwd = self.cwd or _current_directory()
        if cwd is None:
            open_it = functools.partial(os.open, ".", DIRECTORY | os.O_CLOEXEC)
            descriptors.append(Descriptor(open_it))
        confinement = None
        if self.confinement is not None:
            from .confining import open_paths, to_request

            descriptors += open_paths(self.confinement)
            confinement = to_request(self.confinement)
        frame = {
            "code": None if self.code is None else _dedent(self.code),
            "block": None if self.block is None else checks.absolute(self.block),
            "args": self.args,
            "params": self.params,
            "cwd": cwd,  # None for the first descriptor after that of the input
            "descriptors": len(descriptors),
            "has_input": takes_input,
            "joins_stderr": self.stderr is not None,
            "limits": {} if self.limits is None else self.limits._to_request(),
            "confinement": confinement,
        }
        try:
            request = marshal.dumps(frame, 2)
        except ValueError:  # it takes less than `json` does, since Python 3.12
            raise ValueError("params must be JSON: it is nested too deeply") from None
        return Execution(
            self.id,
            request,
            output,
            None if self.on_output is None else Delivery(self.id, self.on_output),
            input,
            descriptors,
            thread_id=self.thread_id,
            action_block=self.block,
            timeout=self.timeout,
        )

    def answer(self, execution: Execution | None, error: str | None) -> StartSideExecutionResponse:
        data = StartData(
            side_execution_id=None if execution is None else execution.id,
            code=self.code,
            action_block=self.block,
            status="failed" if execution is None else "running",
            start_time=None if execution is None else execution.start_time,
            params=self.params,
            timeout=self.timeout,
        )
        message = "not started" if execution is None else "started"
        return StartSideExecutionResponse(
            data, error is None, message, error, thread_id=self.thread_id
        )


def interpreter(python: Path | None) -> str:
    """An absolute path, unless it is a bare name, to be looked up on PATH."""
    if payload.MARK in os.environ:
        raise ValueError(
            "an ExecutionManager has started this program as if it were a Python"
            " interpreter: pass python there, the path of an interpreter"
        )
    if python is None:
        if not sys.executable:
            raise ValueError("sys.executable is empty: pass python, the path of an interpreter")
        if _is_embedded():
            raise ValueError(
                f"sys.executable, {sys.executable!r}, is this program itself: pass python,"
                " the path of a Python interpreter"
            )
        python = sys.executable
    path = checks.path("python", python)
    return checks.absolute(path) if os.sep in path else path


def _current_environment() -> Environment:
    # Where `os.environ` keeps what the system has: to decode and encode each item takes longer.
    raw: Environment | None = getattr(os.environ, "_data", None)
    while True:
        try:
            return dict(os.environb if raw is None else raw)
        except (KeyError, RuntimeError):
            pass  # another thread has just changed it


def _is_embedded() -> bool:
    """Whether `sys.executable` is a program that has Python inside, frozen or as a library."""
    if getattr(sys, "frozen", False):
        return True
    # Python's own `main` sets it; a program that calls the library instead may not.
    if getattr(sys, "orig_argv", True):
        return False
    return os.path.realpath(sys.executable) == os.path.realpath("/proc/self/exe")


def _dedent(code: str) -> str:
    """`code` without the indentation of its first line, if it has one, or a BOM."""
    code = code.removeprefix("\ufeff")  # as of a file
    before = code[: len(code) - len(code.lstrip())]
    if before[-1:] not in (" ", "\t"):
        return code
    import textwrap

    return textwrap.dedent(code)


def _current_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None  # it has been removed
