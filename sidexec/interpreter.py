"""The launcher's process: starting, ending and reaping it.

By `posix_spawn`. `subprocess` waits for a pipe of its own to be closed by the child,
and a worker that another thread of the host forks in that moment holds it open: the
one thread that serves all executions would wait for as long as that worker lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import signal
import time

FIRST_INTERVAL = 0.0005
LAST_INTERVAL = 0.02


class Interpreter:
    def __init__(
        self, python: str, arguments: list[str], environment: dict[str, str], stdin: int, stderr: int
    ) -> None:
        """Start it, with nothing on standard output; raises `OSError` if it can't be."""
        # Where the host has closed its standard streams, these have their numbers.
        fds: list[int] = []
        try:
            for fd in (stdin, stderr):
                fds.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
            actions = [
                (os.POSIX_SPAWN_DUP2, fds[0], 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, fds[1], 2),
            ]
            spawn = functools.partial(
                os.posix_spawnp,
                python,
                [python, *arguments],
                environment,
                file_actions=actions,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python itself ignores
            )
            try:
                self.pid = spawn(setsid=True)
            except NotImplementedError:  # an old C library; a group is the next best
                self.pid = spawn(setpgroup=0)
        finally:
            for fd in fds:
                os.close(fd)
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, once it has ended: negative, the signal that killed it."""
        if self._exit_code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._exit_code = os.waitstatus_to_exitcode(status)
            except ChildProcessError:
                self._exit_code = 0  # the host ignores SIGCHLD, or reaps whatever it finds
        return self._exit_code

    def wait(self, timeout: float) -> int | None:
        """Wait for its end, and bring it about when `timeout` seconds are over.

        None if the kernel does not let go of it for as long again.
        """
        began = time.monotonic()
        interval = FIRST_INTERVAL
        is_killed = False
        while True:
            code = self.poll()
            waited = time.monotonic() - began
            if code is not None or waited >= 2 * timeout:
                return code
            if waited >= timeout and not is_killed:
                self.kill()
                is_killed = True
            time.sleep(interval)
            interval = min(2 * interval, LAST_INTERVAL)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def kill_group(self) -> None:
        """End it with what it has started, while it holds the number of its group."""
        if self._exit_code is None:
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
