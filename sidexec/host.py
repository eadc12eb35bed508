"""The host: a manager's executions and launchers, and the thread that runs them.

    caller's threads          the loop's thread                    other processes
    ────────────────          ──────────────────────────────       ───────────────
    ExecutionManager ─post──▶ Host ─▶ Launcher (launching) ──────▶ launcher
                                │        │ its Pool: pairs ahead      │ forks
                                ▼        ▼                            ▼
                              Supervision ─▶ Pair ───────────────▶ keeper, snippet
                                │              ◀── output, frames, end
    reads  ◀──────────────────  Execution

Responsible for which launcher a start goes to, for what is remembered of finished
executions, and for the order in which everything is closed. What a single execution
goes through is its supervision's business.
"""

from __future__ import annotations

import collections
import os
from dataclasses import dataclass
from typing import Deque

from .execution import Execution, StopReason
from .journal import Journal
from .launching import Launcher
from .loop import Loop
from .supervision import Supervision

CLOSED = "this manager is closed: make a new ExecutionManager"
# What finished executions may hold together, of output and results.
MAX_REMEMBERED_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Settings:
    python: str
    cwd: str | None
    preload: tuple[str, ...]
    grace: float
    max_history: int


class Host:
    def __init__(self, settings: Settings, executions: dict[str, Execution]) -> None:
        """Raises `OSError` where the system has no descriptors left."""
        self.journal = Journal()
        self.loop = Loop(self.journal, self._on_loop_end)
        self.is_closing = False
        self._settings = settings
        self._executions = executions
        self._supervisions: dict[str, Supervision] = {}
        self._finished: Deque[Execution] = collections.deque()
        self._bytes_held = 0  # by those that have finished
        self._launchers: list[Launcher] = []
        self._default: Launcher | None = None

    # -- in the loop's thread

    def start(
        self, execution: Execution, request: bytes, environment: dict[str, str], is_default: bool
    ) -> None:
        """Have `execution` begin; whether it did, its bell tells."""
        supervision = Supervision(
            execution, request, self._settings.grace, self.loop, self.journal, self._on_end
        )
        self._executions[execution.id] = execution
        self._supervisions[execution.id] = supervision
        if self.is_closing:
            supervision.refuse(CLOSED)
            return
        try:
            launcher = self._launcher(environment)
        except Exception as error:  # whatever it is, who waits for the start has to hear of it
            supervision.refuse(self._explain(error))
            return
        if is_default and launcher is not self._default:
            # The host's own environment has changed, and with it the one to fork from.
            if self._default is not None:
                self._default.pool.forks_ahead = False
                if self._default.pool.is_idle:
                    self._default.retire()
            self._default = launcher
            launcher.pool.forks_ahead = True
        supervision.start(launcher)

    def stop(self, id: str, reason: StopReason, grace: float, caller: object) -> None:
        supervision = self._supervisions.get(id)
        if supervision is not None:
            supervision.stop(reason, grace, caller)

    def close(self, grace: float) -> None:
        """Stop everything, end the launchers, then the loop; a second call hurries it."""
        self.is_closing = True
        for supervision in list(self._supervisions.values()):
            supervision.stop("closed", grace)
        self._close_if_empty()

    def _close_if_empty(self) -> None:
        if self.is_closing and not self._supervisions:
            for launcher in list(self._launchers):
                launcher.retire()
            if not self._launchers:
                self.journal.close()
                self.loop.stop()

    def _on_loop_end(self) -> None:
        """Let go of whoever waits for what can't come any more, if the loop has failed."""
        for execution in list(self._executions.values()):
            execution.changed.ring()
            execution.output.changed.ring()

    # -- launchers

    def _launcher(self, environment: dict[str, str]) -> Launcher:
        for launcher in self._launchers:
            if launcher.is_up and launcher.environment == environment:
                return launcher
        settings = self._settings
        launcher = Launcher(
            self.loop,
            self.journal,
            settings.python,
            environment,
            {
                "preload": settings.preload,
                "grace": settings.grace,
                "host": os.getpid(),
                "cwd": settings.cwd,
            },
            on_gone=self._on_launcher_gone,
        )
        launcher.boot()
        self._launchers.append(launcher)
        return launcher

    def _on_launcher_gone(self, launcher: Launcher) -> None:
        self._launchers.remove(launcher)
        if launcher is self._default:
            self._default = None
        self._close_if_empty()

    def _explain(self, error: Exception) -> str:
        python = self._settings.python
        if isinstance(error, FileNotFoundError) and error.filename == python:
            return f"no such interpreter: {python!r}; pass the path of a Python 3.9 or newer"
        if isinstance(error, PermissionError) and error.filename == python:
            return f"the interpreter {python!r} can't be executed: check its permissions"
        return f"could not start the interpreter {python!r}: {error}"

    # -- what is remembered

    def _on_end(self, supervision: Supervision) -> None:
        execution = supervision.execution
        del self._supervisions[execution.id]
        if execution.refused is not None:
            self._executions.pop(execution.id, None)
        else:
            self._finished.append(execution)
            self._bytes_held += execution.bytes_held
            self._forget_old()
        self._close_if_empty()

    def _forget_old(self) -> None:
        newest = 1  # is kept whatever it holds, or it could never be asked for
        while len(self._finished) > self._settings.max_history or (
            self._bytes_held > MAX_REMEMBERED_BYTES and len(self._finished) > newest
        ):
            oldest = self._finished.popleft()
            self._bytes_held -= oldest.bytes_held
            self._executions.pop(oldest.id, None)
