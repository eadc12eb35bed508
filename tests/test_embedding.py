"""Hosts that are no plain interpreter, and what a launcher inherits from its host."""

import os
import shlex
import socket
import subprocess
import sys

import pytest
from conftest import HOST_ENVIRONMENT, ROOT, finish, run_as_host

from sidexec import ExecutionManager
from sidexec.engine import payload

NESTED = f"""
import sys
sys.path.insert(0, {ROOT!r})
import sidexec
with sidexec.ExecutionManager() as manager:
    return manager.run("return 5").check().data.result
"""
# Says which descriptors a snippet has: its streams, its channel, and whatever else.
OPEN = """
import os
print([os.readlink(f"/proc/self/fd/{fd}").partition(":")[0] for fd in range(3, 256)
       if os.path.lexists(f"/proc/self/fd/{fd}")])
"""


def test_a_default_timeout_of_sockets_does_not_concern_the_launcher(make_manager):
    socket.setdefaulttimeout(1e-3)
    try:
        assert finish(make_manager(), "return 7").result == 7
    finally:
        socket.setdefaulttimeout(None)


def test_a_host_in_which_bytes_and_str_are_never_compared():
    code = f"""{NESTED.replace("return manager", "print(manager").rstrip()})
import os
with sidexec.ExecutionManager(env=dict(os.environ)) as manager:
    print(manager.run("return 6").check().data.result)
    print(manager.run("return 7", env={{"PATH": os.defpath}}).check().data.result)
with sidexec.ExecutionManager(python=os.path.basename(sys.executable)) as manager:
    print(manager.run("return 8").data.status)
"""
    command = [sys.executable, "-bb", "-c", code]
    done = subprocess.run(command, env=HOST_ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.split()[:3], done.stderr) == (["5", "6", "7"], "")


# -- python


@pytest.mark.parametrize(
    "name, value",
    [
        ("executable", ""),
        ("executable", None),
        # It is the program itself: a frozen one, or a server that embeds Python.
        ("frozen", True),
        ("orig_argv", []),
    ],
)
def test_where_the_interpreter_is_unknown_it_must_be_passed(make_manager, monkeypatch, name, value):
    python = sys.executable
    monkeypatch.setattr(sys, name, value, raising=False)
    with pytest.raises(ValueError, match=r"sys\.executable.*pass python") as caught:
        ExecutionManager()
    assert name == "executable" or repr(python) in str(caught.value)
    assert finish(make_manager(python=python), "return 1").result == 1


def test_a_program_that_embeds_python_may_know_an_interpreter(make_manager, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "orig_argv", [], raising=False)
    monkeypatch.setattr(sys, "executable", str(python))
    assert finish(make_manager(), "return 1").result == 1


def test_python_is_what_is_given_or_sys_executable_when_the_manager_is_made(
    make_manager, monkeypatch, tmp_path
):
    link = tmp_path / "python"
    link.symlink_to(os.path.realpath(sys.executable))
    given = make_manager(python=link)
    monkeypatch.setattr(sys, "executable", str(link))
    for manager in (given, make_manager()):
        assert finish(manager, "import sys; return sys.executable").result == str(link)


@pytest.mark.parametrize("python", ["", "python=sys.executable"])
def test_a_program_that_ignores_its_arguments_does_not_start_itself_forever(tmp_path, python):
    program = tmp_path / "program"
    program.write_text(
        f"#!{os.path.realpath(sys.executable)}\n"
        "import sys\n"
        f"with open({str(tmp_path / 'log')!r}, 'a') as file:\n"
        "    file.write('x')\n"
        "    if file.tell() > 5: sys.exit()\n"
        f"sys.path.insert(0, {ROOT!r})\n"
        "import sidexec\n"
        "sys.executable = __file__\n"
        f"with sidexec.ExecutionManager({python}) as manager:\n"
        "    print(manager.start_with_code('pass').error)\n"
    )
    program.chmod(0o755)
    said = subprocess.check_output([program], text=True, timeout=60)
    assert (tmp_path / "log").read_text() == "xx"
    assert repr(str(program)) in said and "ValueError" in said and "pass python" in said


def test_a_snippet_may_have_a_manager(run):
    assert run(NESTED).result == 5
    code = (
        "import subprocess, sys\n"
        f"code = {NESTED.replace('    return ', '    assert 5 == ')!r}\n"
        "subprocess.run([sys.executable, '-c', code], check=True)\n"
    )
    assert run(code).status == "completed"


def test_what_marks_a_launcher_is_not_in_the_environment_of_a_snippet(run, make_manager):
    data = run("import os, subprocess\nprint(*os.environ)\nsubprocess.run('env')\nos.system('env')")
    assert "PATH" in data.output and payload.MARK not in data.output
    result = finish(make_manager(env={"A": "a"}), "import os\nreturn dict(os.environ)").result
    assert payload.MARK not in {*result, *os.environ} and result["A"] == "a"


# -- what is inherited


def test_an_inherited_descriptor_above_the_soft_limit():
    code = f"""
import os, resource, sidexec
fd = os.open(os.devnull, os.O_RDWR)
os.dup2(fd, 100)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
with sidexec.ExecutionManager() as manager:
    print(manager.run({OPEN!r}).check().data.output, end="")
"""
    assert run_as_host(code) == "['socket']\n"


def test_the_code_for_launchers_is_loaded_once(make_manager, monkeypatch):
    loaded = []
    load = payload._load

    def count(name, as_source):
        loaded.append(name)
        return load(name, as_source)

    monkeypatch.setattr(payload, "_load", count)
    payload.load.cache_clear()
    for _ in range(2):
        assert make_manager().start_with_code("pass").success
    assert loaded == list(payload._MODULES)


def launcher(**options):
    """A launcher that has only greeted its host: its process and the host's socket."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-u", "-c", payload.BOOT]
    with theirs:
        process = subprocess.Popen(command, stdin=theirs, close_fds=False, **options)
    ours.settimeout(60)
    assert len(ours.recv(64)) == 4
    return process, ours


@pytest.mark.parametrize("has_proc", [True, False])
def test_a_launcher_has_its_own_session_and_closes_what_it_inherits_and_nothing_else(
    tmp_path, has_proc
):
    """Not what `sitecustomize` has opened, which is not inherited."""
    (tmp_path / "own").touch()
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nown = os.open({str(tmp_path / 'own')!r}, os.O_RDONLY)\n"
        "def listdir(path, listdir=os.listdir):\n"
        f"    if {not has_proc} and path.startswith(('/proc', '/dev')):\n"
        "        raise FileNotFoundError(path)\n"
        "    return listdir(path)\n"
        "os.listdir = listdir\n"
    )
    read, write = os.pipe()
    try:
        os.set_inheritable(write, True)
        process, ours = launcher(env={**os.environ, "PYTHONPATH": str(tmp_path)})
        with process, ours:
            names = [
                os.readlink(f"/proc/{process.pid}/fd/{fd}")
                for fd in os.listdir(f"/proc/{process.pid}/fd")
                if int(fd) > 2
            ]
            assert names == [str(tmp_path / "own")]
            assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
            ours.close()
    finally:
        os.close(read)
        os.close(write)
