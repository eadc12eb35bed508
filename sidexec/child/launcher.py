"""The launcher: started once by the host, forks a keeper whenever it is told to.

It has what all executions share (an interpreter that is up, modules that are loaded),
and adopts the orphans of keepers that are killed. It is single-threaded, runs no user
code but the modules to preload, and never reads what a snippet sends: it passes the
descriptors of each keeper and snippet to the host at once.

When its host is gone it closes the lifeline, which tells every keeper, and waits for them.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import gc
import os
import select
import sys
import time

from .. import procfs
from ..protocol import (
    FAULT,
    FORK,
    FORK_AHEAD,
    FROM_HOST,
    KILL,
    LOADED,
    LOST,
    PAIR,
    REFUSED,
    SWEEPING,
    Inbox,
    pack,
)
from . import kernel, leaving, library, streams, sweeping
from .keeper import MAX_TIMEOUT, NEVER, Keeper
from .snippet import Forked, Snippet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# What every snippet may need of the standard library: loaded once the first snippet
# is on its way, so that later ones share it.
WARM = ("json", "traceback", "linecache", "ast", "warnings", "opcode")
# Later, so that a host that runs one snippet only need not wait for these at its end.
WARM_UP_AFTER = 0.005
# How long past its grace period a keeper may take when the host is gone.
SWEEP_ALLOWANCE = 4.0


class Launcher:
    def __init__(self, socket: _socket.socket, config: dict[str, Any], path: list[str]) -> None:
        self._socket = socket
        self._config = config
        self._path = path
        self._inbox = Inbox(FROM_HOST)
        self._keepers: set[int] = set()
        self._bystanders: set[int] = set()  # what the preloaded modules have started
        # No pipe: a snippet could open that by way of /proc, and hold it open.
        self._lifeline, self._lifeline_end = (end.detach() for end in _socket.socketpair())
        os.set_blocking(self._lifeline, False)
        self._preloaded: list[Any] = []  # their objects that have finalizers
        self._wake, self._wake_end = os.pipe()
        self._host: int | None = None
        self._cold = list(WARM)  # what is not loaded yet
        self._warm_up_at = NEVER
        self._deadline = NEVER  # for the keepers, once the host is gone
        self._poll = select.poll()

    def run(self) -> None:
        """Serve until the host is gone and the last keeper has ended."""
        kernel.set_name(b"sidexec-launcher")
        self._set_signals()
        kernel.become_subreaper()
        kernel.be_continued_when_parent_ends()
        self._children = kernel.open_children()
        self._host = procfs.open_pidfd(self._config["host"])
        if os.getppid() != self._config["host"] or not self._preload():
            return  # had the host ended before, the pidfd could be somebody else's
        for fd in (self._wake, self._socket.fileno(), self._host):
            if fd is not None:
                self._poll.register(fd, select.POLLIN)
        while self._lifeline_end >= 0 or self._keepers:
            self._step()

    def _step(self) -> None:
        timeout = max(0.0, min(self._deadline, self._warm_up_at) - time.monotonic())
        timeout = min(timeout, 1.0 if self._host is None else MAX_TIMEOUT)
        for fd, _ in self._poll.poll(1000 * timeout):
            if fd == self._wake:
                os.read(fd, 65536)
                self._reap()
            elif fd == self._host:
                self._on_host_gone()
            else:
                self._hear_host()
        if time.monotonic() >= self._warm_up_at:
            self._warm_up()
        if self._host is None and os.getppid() != self._config["host"]:
            self._on_host_gone()
        if time.monotonic() >= self._deadline:
            for pid in self._keepers:
                kernel.signal_process(pid, _signal.SIGKILL)
            self._deadline = NEVER

    def _set_signals(self) -> None:
        """Ignore signals that are meant for others, and reset the rest for the snippets.

        A host's ignored and blocked signals would be the snippets' as well.
        """
        usual = {_signal.SIGINT: _signal.default_int_handler}
        for signum in _signal.valid_signals() - {_signal.SIGPIPE, _signal.SIGXFSZ}:
            if _signal.getsignal(signum) == _signal.SIG_IGN:
                _signal.signal(signum, usual.get(signum, _signal.SIG_DFL))
        everything = _signal.valid_signals() - {_signal.SIGCHLD}
        _signal.pthread_sigmask(_signal.SIG_SETMASK, everything)
        os.set_blocking(self._wake, False)
        os.set_blocking(self._wake_end, False)
        _signal.set_wakeup_fd(self._wake_end, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda signum, frame: None)

    def _preload(self) -> bool:
        # Where `python -c` registers its source, a snippet's own `<string>` would show ours.
        lines = sys.modules.get("linecache")
        if lines is not None:
            lines.cache.pop("<string>", None)
            getattr(lines, "_interactive_cache", {}).clear()
        streams.replace()  # before a module keeps a reference to the old ones
        # From here on nothing else is imported here, least of all what a snippet has written.
        sys.path[:] = self._path
        name = ""
        if self._config["cwd"] is not None:
            try:
                os.chdir(self._config["cwd"])
            except OSError:
                pass  # only a start's own directory has to exist
        try:
            for name in self._config["preload"]:
                __import__(name)
        except BaseException as error:
            text = f"could not preload {name!r}: {type(error).__name__}: {error}"
            self.send(LOADED, text.encode("utf-8", "replace")[:65536])
            return False
        finally:
            sys.path[:] = library.PATH
        self._bystanders = kernel.children(self._children, set())
        if self._config["preload"]:
            self._preloaded = leaving.find_open()
            # Else every snippet would write what is in their buffers.
            leaving.flush_buffers(self._preloaded)
        # Until now it went to the host, as part of the error of a failed start.
        log = os.environ.get("EXECUTION_MANAGER_STDERR", os.devnull)  # see CONTRIBUTING
        errors = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(errors, 2)
        os.close(errors)
        self.send(LOADED)
        return True

    def _hear_host(self) -> None:
        try:
            data = self._socket.recv(65536)
        except OSError:
            data = b""
        for kind, payload in self._inbox.feed(data):
            if kind == FORK:
                self._fork()
            elif kind == FORK_AHEAD and not self._cold:
                self._fork(ahead=True)
            elif kind == FORK_AHEAD:
                self._warm_up_at = time.monotonic() + WARM_UP_AFTER
            elif kind == KILL and int(payload) in self._keepers:
                kernel.signal_process(int(payload), _signal.SIGKILL)
        if not data:
            self._on_host_gone()

    def _on_host_gone(self) -> None:
        """The host is gone: close the lifeline, which ends every keeper."""
        if self._lifeline_end >= 0:
            self._poll.unregister(self._socket.fileno())
            if self._host is not None:
                self._poll.unregister(self._host)
            # Keepers block SIGHUP: it stays pending, and tells them that the host has ended, and
            # not the launcher alone, so that nobody else reads the output.
            for pid in self._keepers:
                kernel.signal_process(pid, _signal.SIGHUP)
            os.close(self._lifeline_end)
            self._lifeline_end = -1
            self._warm_up_at = NEVER
            for pid in self._keepers:
                kernel.signal_process(pid, _signal.SIGCONT)  # a stopped one would not notice
            self._deadline = time.monotonic() + self._config["grace"] + SWEEP_ALLOWANCE

    # -- forking

    def _warm_up(self) -> None:
        """Load the next module that later snippets share, or else fork the first of them."""
        if self._cold:  # one at a time: a host that is gone waits for this launcher's end
            library.module(self._cold.pop(0))
        else:
            self._warm_up_at = NEVER
            gc.collect()
            self._fork(ahead=True)

    def _fork(self, *, ahead: bool = False) -> None:
        fds: list[int] = []
        gc.freeze()  # a collection in the child would touch, and so copy, every page
        try:
            for make in (_socket.socketpair, _socket.socketpair, os.pipe, os.pipe):
                fds += [end if isinstance(end, int) else end.detach() for end in make()]
            pid = os.fork()
        except OSError as error:
            kernel.close_all(fds)
            reason = f"could not fork a keeper: {error.strerror} (see `ulimit -a`)"
            self.send(REFUSED, f"{int(ahead)} {reason}".encode())
            return
        control, keeper_control, channel, snippet_channel, out, snippet_out, err, snippet_err = fds
        if pid == 0:
            launchers = [self._wake, self._wake_end, self._lifeline_end, self._children]
            kernel.close_all([*launchers, self._socket.detach(), control, channel])
            keeper = Keeper(
                keeper_control, self._lifeline, self._host, [out, err], self._config["grace"]
            )
            keeper.run([snippet_channel, snippet_out, snippet_err])
            os.dup2(snippet_out, 1)
            os.dup2(snippet_err, 2)
            kernel.close_all([snippet_out, snippet_err])
            # The first one is waited for as it is.
            raise Forked(Snippet(snippet_channel, self._path, self._preloaded), not self._cold)
        self._keepers.add(pid)
        for_host = (control, channel, out, err)
        rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in for_host)
        try:
            self._socket.sendmsg(
                [pack(PAIR, f"{pid} {int(ahead)}".encode())],
                [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)],
            )
        except OSError as error:
            reason = f"{int(ahead)} could not send descriptors: {error.strerror}"
            self.send(REFUSED, reason.encode())
        kernel.close_all(fds)  # with the host's ends gone, an unsent keeper ends by itself

    # -- reaping

    def _reap(self) -> None:
        lost = {}
        try:
            while ended := kernel.reap():
                pid, code = ended
                self._bystanders.discard(pid)
                if pid in self._keepers:
                    self._keepers.discard(pid)
                    if code != 0:
                        lost[pid] = code
        except ChildProcessError:
            pass  # there are none left
        if lost:
            self._quiet_rounds = 0
            stuck = sweeping.kill_all(
                self._find_orphans, lambda: time.sleep(sweeping.ROUND), lambda: self.send(SWEEPING)
            )
            for pid, code in lost.items():
                self.send(LOST, " ".join(map(str, (pid, code, *sorted(stuck)))).encode())

    def _find_orphans(self) -> set[int] | None:
        """The orphans of keepers that were killed."""
        known = self._keepers | self._bystanders
        found = kernel.children(self._children, known) - known
        found = {pid for pid in found if os.waitpid(pid, os.WNOHANG)[0] == 0}  # not reaped now
        # Twice nothing: the list may miss a child while another one ends.
        self._quiet_rounds = 0 if found else self._quiet_rounds + 1
        return None if self._quiet_rounds == 2 else found

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        try:
            self._socket.sendall(pack(kind, payload))
        except OSError:
            pass  # the host is gone, which the next step finds out


def main(config: dict[str, Any], path: list[str]) -> Snippet | None:
    """Run the launcher on the socket that is its standard input.

    In the process of a snippet this returns, with the snippet, whose request has come.
    """
    socket = _socket.socket(fileno=os.dup(0))
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 0)
    os.close(devnull)
    launcher = Launcher(socket, config, path)
    try:
        launcher.run()
    except Forked as forked:
        snippet, rehearse = forked.args
    except BaseException as error:
        launcher.send(FAULT, kernel.describe(error).encode())
        raise
    else:
        if not config["preload"]:
            os._exit(0)  # nobody's exit handlers; an interpreter takes 4 ms for its end
        return None
    snippet.prepare(rehearse=rehearse)
    return snippet
