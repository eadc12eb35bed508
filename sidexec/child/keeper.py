"""The keeper: one for each execution, the parent of whatever the snippet leaves.

Responsible for asking the snippet, for its end after the grace period, and for
the sweep that follows every end: when a keeper says END, no process of its
execution is left. It never runs user code, never believes what a snippet says,
and signals no process but its own unreaped children and the group of one, so that
no pid can have gone to somebody else.

As a child subreaper the keeper becomes the parent of every descendant whose own
parent ends, wherever that descendant has moved and whatever it has emptied: the
tree is empty exactly when `waitpid` says ECHILD. Where the platform can't tell,
the snippet's process group stands for its tree.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import select
import time

from ..protocol import END, FROM_HOST, READY, REFUSED, STOP, Inbox, pack
from . import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

# How long the kernel may take over a SIGKILL before a process counts as stuck.
STUCK_AFTER = 2.0
# How often to look where no SIGCHLD tells.
GROUP_INTERVAL = 0.05
MAX_TIMEOUT = 86400.0  # for `poll`, which does not take just any number


class Keeper:
    def __init__(
        self,
        control: int,
        lifeline: int,
        host: int | None,
        outputs: list[int],
        grace: float,
    ) -> None:
        self._control = control
        self._lifeline = lifeline  # at end of file when the launcher is gone
        self._host = host  # a pidfd
        self._outputs = outputs  # the read ends, see _drain_for_host
        self._grace = grace
        self._poll = select.poll()
        self._wake_poll = select.poll()
        self._inbox = Inbox(FROM_HOST)
        self._wake = -1
        self._leader = 0
        self._leader_reaped = False
        self._exit_code: int | None = None
        self._asked = False
        self._asked_strays: set[int] = set()
        self._deadline: float | None = None
        self._forced = False

    def run(self, run_snippet: Callable[[], NoReturn], snippet_fds: list[int]) -> NoReturn:
        """Fork the snippet, look after it until nothing of it is left, and leave."""
        self._has_tree = kernel.become_subreaper() and kernel.children() is not None
        self._strays = self._adopted_strays if self._has_tree else self._group_strays
        self._wake, wake_end = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake_end, False)
        _signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda signum, frame: None)
        try:
            self._leader = os.fork()
        except OSError as error:
            self._send(REFUSED, f"could not fork the snippet: {error.strerror}")
            os._exit(0)
        own = [self._wake, self._control, self._lifeline, *self._outputs]
        if self._host is not None:
            own.append(self._host)
        if self._leader == 0:
            _signal.set_wakeup_fd(-1)
            _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
            os.setsid()
            kernel.close_all([*own, wake_end])
            run_snippet()
        kernel.close_all(snippet_fds)
        self._send(READY, f"{self._leader} {int(self._has_tree)}")
        self._wake_poll.register(self._wake, select.POLLIN)
        for fd in own:
            if fd not in self._outputs:
                self._poll.register(fd, select.POLLIN)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (_signal.SIGCHLD,))
        self._look_after()
        stuck = self._kill_all()
        self._send(END, " ".join(map(str, (self._exit_code, int(self._forced), *stuck))))
        while stuck:  # until then the launcher must not take them for its own
            time.sleep(1)
            stuck = self._kill_all()
        os._exit(0)

    def _look_after(self) -> None:
        """Until nothing is left, or what is left has had its time."""
        while True:
            if self._leader_has_exited():
                strays = self._strays()
                if not strays:
                    return
                self._ask_strays(strays)
            else:
                self._reap_before_leader()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._forced = True
                return
            self._wait()

    # -- asking

    def _stop(self, grace: float) -> None:
        """Ask once; every further call can only bring the end nearer."""
        deadline = time.monotonic() + grace
        if self._deadline is None or deadline < self._deadline:
            self._deadline = deadline
        if not self._asked and not self._leader_reaped:
            self._asked = True
            # The leader alone: its cleanup may need the helpers that it has started.
            kernel.signal_process(self._leader, _signal.SIGTERM)
            kernel.signal_process(self._leader, _signal.SIGCONT)  # a stopped one is deaf

    def _ask_strays(self, strays: set[int]) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace
        fresh = strays - self._asked_strays
        if not self._asked_strays and not self._leader_reaped:
            fresh.add(-self._leader)
        self._asked_strays |= fresh
        for pid in fresh:
            # The group has been asked as one, and a second SIGTERM would abort the
            # cleanup of its members.
            if pid < 0 or not self._in_group(pid):
                kernel.signal_process(pid, _signal.SIGTERM)
                kernel.signal_process(pid, _signal.SIGCONT)

    def _in_group(self, pid: int) -> bool:
        try:
            return os.getpgid(pid) == self._leader
        except OSError:
            return True

    # -- waiting

    def _wait(self) -> None:
        timeout = None
        if self._deadline is not None:
            timeout = min(max(0.0, self._deadline - time.monotonic()), MAX_TIMEOUT)
            if self._leader_reaped:
                timeout = min(timeout, GROUP_INTERVAL)
        # Rounded up: to wake a moment before the deadline would be to spin until it.
        for fd, _ in self._poll.poll(None if timeout is None else int(timeout * 1000) + 1):
            if fd == self._wake:
                _read(fd)
            elif fd == self._control:
                self._hear_host()
            elif fd in self._outputs:
                if _read(fd) == b"":
                    self._poll.unregister(fd)
            else:  # a lifeline
                self._poll.unregister(fd)
                if fd == self._host:
                    self._drain_for_host()
                self._stop(self._grace)

    def _hear_host(self) -> None:
        data = _read(self._control) or b""
        for kind, payload in self._inbox.feed(data):
            if kind == STOP:
                self._stop(float(payload))
        if not data:
            self._poll.unregister(self._control)
            self._drain_for_host()
            self._stop(self._grace)

    def _drain_for_host(self) -> None:
        """Read the output that nobody reads any more, and throw it away.

        Without a reader the first line that the snippet's cleanup prints would end
        it, by a broken pipe or by waiting for ever.
        """
        for fd in self._outputs:
            os.set_blocking(fd, False)
            self._poll.register(fd, select.POLLIN)

    # -- reaping

    def _leader_has_exited(self) -> bool:
        """Looks without reaping, while that can be: a zombie holds its pid and group."""
        if self._leader_reaped:
            return True
        if not hasattr(os, "waitid"):
            self._reap(self._leader)
            return self._leader_reaped
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._leader, options) is not None

    def _reap_before_leader(self) -> None:
        """Reap adopted orphans while the snippet goes on."""
        if not hasattr(os, "waitid"):
            return
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == self._leader:
                return
            self._reap(ended.si_pid)

    def _reap(self, pid: int) -> int | None:
        """Reap one child: its pid; 0 if none has ended; None if there is none."""
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if ended == self._leader:
            self._leader_reaped = True
            self._exit_code = os.waitstatus_to_exitcode(status)
        return ended

    def _adopted_strays(self) -> set[int]:
        """What is left beside the leader, which stays unreaped for its group's sake."""
        strays = (kernel.children() or set()) - {self._leader}
        return {pid for pid in strays if self._reap(pid) == 0}

    def _group_strays(self) -> set[int]:
        """The same where orphans go to init: whether the group has a member left."""
        self._reap(self._leader)
        try:
            os.kill(-self._leader, 0)
        except OSError:
            return set()
        return {-self._leader}

    def _kill_all(self) -> list[int]:
        """End what is left; returns what the kernel does not let go of."""
        until = time.monotonic() + STUCK_AFTER
        if not self._leader_reaped:
            kernel.signal_process(self._leader, _signal.SIGKILL)
            kernel.signal_process(-self._leader, _signal.SIGKILL)
        while True:
            ended = self._reap(-1)
            while ended:
                ended = self._reap(-1)
            strays = set() if ended is None and self._has_tree else self._strays()
            if ended is None and not strays:
                return []
            if time.monotonic() >= until:
                return sorted(strays if self._leader_reaped else strays | {self._leader})
            # In rounds: what is forked meanwhile turns up in the next one.
            for pid in strays:
                kernel.signal_process(pid, _signal.SIGKILL)
            if self._wake_poll.poll(5):
                _read(self._wake)

    def _send(self, kind: bytes, text: str) -> None:
        try:
            os.write(self._control, pack(kind, text.encode()))
        except OSError:
            pass  # the host is gone, or has let go of this keeper


def _read(fd: int) -> bytes | None:
    """What is there; empty at the end of file, None where there is nothing yet."""
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return None
    except OSError:
        return b""
