"""The keeper: one for each execution, the parent of all that the snippet leaves.

It asks the snippet to stop, kills it after the grace period, and sweeps after every end:
when a keeper says END, no process of its execution is left, or END says which are. It never
runs user code, never trusts what a snippet sends, and signals no process but its own
unreaped children and the group of one, so that no pid can have been reused; `sweeping`
reaches further. At its end it sends SIGCONT to its launcher if the host is gone: the snippet
may have stopped it.

As a child subreaper the keeper becomes the parent of every descendant whose own
parent ends, in whichever session it is: the tree is empty exactly when `waitpid` says
ECHILD. On a platform without subreapers, it looks after the snippet's process group.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import select
import time

from .. import procfs
from ..protocol import END, FAULT, FROM_HOST, READY, REFUSED, STOP, SWEEPING, Inbox, pack
from . import kernel, sweeping

# How often to check where no SIGCHLD comes, in seconds.
GROUP_INTERVAL = 0.05
# When to send the first SIGURG after an ask, and the longest interval between two.
FIRST_NUDGE = 0.005
LAST_NUDGE = 1.0
# How long after an ask a snippet is left alone while it computes, in seconds.
UNDISTURBED = 0.1
MAX_TIMEOUT = 86400.0  # the most that `poll` takes
NEVER = float("inf")
# How long a keeper stays after its END, in seconds: ending a process costs about 0.5 ms of
# CPU time, and the host has just been woken on this very processor.
LINGER = 0.001
# When to rehearse, in milliseconds: when nobody waits for anything.
REHEARSE_AFTER = 20


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
        self._lifeline = lifeline  # a socket, at end of file when the launcher is gone
        self._host = host  # a pidfd
        self._outputs = outputs  # the read ends, see _drain_for_host
        self._grace = grace
        self._launcher = os.getppid()
        self._poll = select.poll()
        self._wake_poll = select.poll()
        self._inbox = Inbox(FROM_HOST)
        self._leader_reaped = False
        self._exit_code: int | None = None
        self._asked_at: float | None = None
        self._nudge_at = 0.0
        self._asked_strays: set[int] = set()
        self._deadline = NEVER
        self._forced = False
        self._is_orphaned = False  # its launcher or its host has ended

    def run(self, snippet_fds: list[int]) -> None:
        """Fork the snippet, look after it until nothing of it is left, and leave.

        In the process of the snippet this returns.
        """
        try:
            self._fork()
            if self._leader == 0:
                return
            kernel.close_all(snippet_fds)
            self._send(READY, f"{self._leader} {int(self._has_tree)}")
            self._wake_poll.register(self._wake, select.POLLIN)
            for fd in self._watched:
                self._poll.register(fd, select.POLLIN)
            if not self._poll.poll(REHEARSE_AFTER):
                self._rehearse()
            self._serve()
            os._exit(0)
        except BaseException as error:
            self._send(FAULT, kernel.describe(error))
            os._exit(1)  # for the launcher to sweep

    def _fork(self) -> None:
        kernel.set_name(b"sidexec-keeper")
        self._has_tree = kernel.become_subreaper()
        self._children = kernel.open_children()
        self._strays = self._adopted_strays if self._has_tree else self._group_strays
        self._wake, wake_end = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake_end, False)
        _signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda signum, frame: None)
        try:
            self._leader = os.fork()
        except OSError as error:
            self._send(REFUSED, f"could not fork the snippet: {error.strerror} (see `ulimit -a`)")
            os._exit(0)
        self._watched = [self._wake, self._control, self._lifeline]
        if self._host is not None:
            self._watched.append(self._host)
        if self._leader == 0:
            _signal.set_wakeup_fd(-1)
            _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
            os.setsid()
            kernel.set_name(b"sidexec-snippet")
            kernel.close_all([*self._watched, *self._outputs, self._children, wake_end])

    def _serve(self) -> None:
        """From READY to END, and a moment longer."""
        stuck = [] if self._look_after() else self._kill_all()
        self._send(END, self._describe_end(stuck))
        while stuck:  # until then the launcher must not take them for its own
            time.sleep(1)
            stuck = self._kill_all()
        if self._is_orphaned and os.getppid() == self._launcher:
            # The snippet may have stopped it again since the kernel has continued it.
            kernel.signal_process(self._launcher, _signal.SIGCONT)
        time.sleep(LINGER)

    def _describe_end(self, stuck: list[int]) -> str:
        seconds, peak = kernel.used_by_children()
        flags = int(self._forced), int(self._is_orphaned)
        numbers = (self._exit_code, *flags, round(seconds * 1e6), peak, *stuck)
        return " ".join(map(str, numbers))

    def _rehearse(self) -> None:
        """Wait and reap as at an end, which then need not copy the pages that this writes to."""
        kernel.signal_process(os.getpid(), _signal.SIGCHLD)
        self._wait()
        self._reap()
        self._describe_end([])

    def _look_after(self) -> bool:
        """Wait until nothing is left, or time is up; returns whether nothing is left."""
        while True:
            if self._reap():
                return True
            if self._leader_reaped:
                self._ask_strays(self._strays())
            if time.monotonic() >= self._deadline:
                self._forced = True
                return False
            self._wait()

    # -- asking

    def _stop(self, grace: float) -> None:
        """Ask once; further calls can only shorten the grace period."""
        self._deadline = min(self._deadline, time.monotonic() + grace)
        if grace <= 0 or self._leader_reaped:
            return
        # The leader alone: its cleanup may need the helpers that it has started.
        if self._asked_at is None:
            kernel.signal_process(self._leader, _signal.SIGTERM)
            kernel.signal_process(self._leader, _signal.SIGCONT)  # it may be stopped
            self._asked_at = time.monotonic()
            self._nudge_at = self._asked_at + FIRST_NUDGE

    def _nudge(self, now: float, waited: float) -> None:
        """Interrupt the system call that the snippet is in, in case it has missed the ask.

        Python only notes a signal, and checks for it between opcodes: one that comes
        after such a check and before a system call waits for that call to end. While the
        snippet computes, it is in no call, and may be closing an asyncio loop: a signal then
        makes Python report that the loop's descriptor for signals is closed. But a callback
        that holds up the ask may compute for ever.
        """
        if waited >= UNDISTURBED or not procfs.is_running(self._leader):
            kernel.signal_process(self._leader, _signal.SIGURG)
        self._nudge_at = now + min(2 * (waited + FIRST_NUDGE), LAST_NUDGE)

    def _ask_strays(self, strays: set[int]) -> None:
        if self._deadline == NEVER and self._asked_at is None:  # else a stop's grace period runs
            self._deadline = time.monotonic() + self._grace
        # The group as one, and once: a second SIGTERM would abort a member's cleanup.
        targets = {self._target(pid) for pid in strays} - self._asked_strays
        self._asked_strays |= targets
        for target in targets:
            kernel.signal_process(target, _signal.SIGTERM)
            kernel.signal_process(target, _signal.SIGCONT)

    def _target(self, pid: int) -> int:
        """What to signal for a stray: the snippet's group if it is in that, else the stray.

        The stray, our unreaped child, keeps the number of its group from being reused.
        """
        try:
            return -self._leader if pid > 0 and os.getpgid(pid) == self._leader else pid
        except OSError:
            return pid

    # -- waiting

    def _wait(self) -> None:
        now = time.monotonic()
        timeout = min(max(0.0, self._deadline - now), MAX_TIMEOUT)
        if self._leader_reaped:
            timeout = min(timeout, GROUP_INTERVAL)
        elif self._asked_at is not None:
            if now >= self._nudge_at:
                self._nudge(now, now - self._asked_at)
            timeout = min(timeout, self._nudge_at - now)
        for fd, _ in self._poll.poll(1000 * timeout):
            if fd == self._wake:
                _read(fd)
            elif fd == self._control:
                self._hear_host()
            elif fd in self._outputs:
                if _read(fd, 65536) == b"":
                    self._poll.unregister(fd)
            elif fd == self._host or _read(fd) == b"":  # of a lifeline only the end counts
                self._poll.unregister(fd)
                self._is_orphaned = True
                if fd == self._host or _signal.SIGHUP in _signal.sigpending():
                    self._drain_for_host()
                self._stop(self._grace)

    def _hear_host(self) -> None:
        data = _read(self._control) or b""
        for kind, payload in self._inbox.feed(data):
            if kind == STOP:
                self._stop(float(payload))
        if not data:
            self._poll.unregister(self._control)
            self._stop(self._grace)

    def _drain_for_host(self) -> None:
        """Read and discard the output, as the host no longer does.

        Else the first line that the snippet's cleanup prints would end it, by a broken
        pipe, or block it for ever.
        """
        for fd in self._outputs:
            os.set_blocking(fd, False)
            self._poll.register(fd, select.POLLIN)

    # -- reaping

    def _reap(self) -> bool:
        """Reap what has ended; returns whether nothing is left to wait for."""
        while True:
            try:
                ended = kernel.reap()
            except ChildProcessError:
                return self._has_tree or not self._strays()
            if ended is None:
                return False
            # A second process with this pid is a stray that has been given the same number.
            if ended[0] == self._leader and not self._leader_reaped:
                self._leader_reaped = True
                self._exit_code = ended[1]

    def _adopted_strays(self) -> set[int]:
        found = kernel.children(self._children, set())
        return found if self._leader_reaped else found - {self._leader}

    def _group_strays(self) -> set[int]:
        """The same on systems where orphans go to init: the group, if it has members."""
        members = procfs.group(self._leader)
        if members is None:
            try:
                os.kill(-self._leader, 0)
            except OSError:
                return set()
        return set() if members == [] else {-self._leader}

    def _kill_all(self) -> list[int]:
        """Kill what is left; returns the pids that can't be killed."""
        left = sweeping.kill_all(
            self._find_left, self._wait_for_an_end, lambda: self._send(SWEEPING, "")
        )
        if left and not self._has_tree:
            # A group's zombies can't be told from its members without /proc.
            left |= set(procfs.group(self._leader) or ())
        return sorted(left - {-self._leader})

    def _find_left(self) -> set[int] | None:
        if self._reap():
            return None
        # At first with the whole group, whose number is the snippet's as yet: one by one, its
        # members could fork faster than they are killed.
        leader = set() if self._leader_reaped else {self._leader, -self._leader}
        return self._strays() | leader

    def _wait_for_an_end(self) -> None:
        if self._wake_poll.poll(1000 * sweeping.ROUND):
            _read(self._wake)

    def _send(self, kind: bytes, text: str) -> None:
        try:
            os.write(self._control, pack(kind, text.encode()))
        except OSError:
            pass  # the host is gone, or has closed its end


def _read(fd: int, size: int = 4096) -> bytes | None:
    """Read what is there: empty at the end of the file, None if there is nothing yet."""
    try:
        return os.read(fd, size)
    except BlockingIOError:
        return None
    except OSError:
        return b""
