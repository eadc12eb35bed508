"""The code that the launcher runs, as it is sent to it.

It goes over a socket, so that it needs no file beside another on disk: it comes from
wherever this package was loaded from, a zip too. The host never imports it.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import marshal
import os
import sys
from types import CodeType
from typing import Any

# One name that no real package has: the modules stand in sys.modules only while they
# import each other, and must not push a package of the user's out of it.
_ROOT = "<side>"
_MODULES = (
    "protocol",
    "procfs",
    "child.kernel",
    "child.masking",
    "child.library",
    "child.source",
    "child.streams",
    "child.loops",
    "child.tasks",
    "child.asking",
    "child.leaving",
    "child.channel",
    "child.failures",
    "child.results",
    "child.confinement",
    "child.snippet",
    "child.sweeping",
    "child.keeper",
    "child.launcher",
)

# In the environment of a new launcher, until BOOT removes it. A process that still has it
# ignored its arguments: it is a program, and not the Python interpreter it was taken for.
MARK = "EXECUTION_MANAGER_LAUNCHER"

# What `python -c` is given. Step by step:
# - It makes a session, and closes the descriptors that it inherited: those without the
#   close-on-exec flag, which Python sets on all that it opens but the file of
#   `PYTHON_PERF_JIT_SUPPORT`, to whose number it goes on writing.
# - It undoes what `options` has set, and takes the current directory off the path: a file there
#   that is named like a module of the standard library would be imported instead.
# - It says which interpreter it is, and takes the modules. They get the built-in names in a copy
#   of their own, since a snippet may change them. Where all imports are lazy, theirs are not:
#   they could not be found any more.
# - It calls the launcher. In a snippet's process `main` returns, and the user's code is called
#   from here, so that this frame is the only one below it. 3 is `asking.SETTLING`.
# - It takes off what observes the code (a trace or profile function, a monitoring tool), by calls
#   that none of these sees, and puts off signal handlers: what one raises would cost the result.
#   That may take a second try, after what is due now, and must have no loop in its `try`: what
#   is raised where a loop jumps back can pass that by.
BOOT = (
    """\
import sys
if sys.version_info<(3,10):sys.exit("Python 3.10 or newer is needed, this is "+sys.version)
import os,marshal,_frozen_importlib_external as e
from _functools import partial as q
os.environ.pop("%s",None)
try:os.setsid()
except OSError:pass
try:f=os.listdir("/proc/self/fd")
except OSError:f=range(min(os.sysconf("SC_OPEN_MAX"),4096))
p=getattr(sys,"is_stack_trampoline_active",bool)()
for x in map(int,f):
 try:
  if x<3 or not os.get_inheritable(x):continue
  if p and"/jit-%%d."%%os.getpid()in os.readlink("/proc/self/fd/%%d"%%x):continue
  os.close(x)
 except OSError:pass
if sys.orig_argv[-3]=="-P"and not(sys.flags.isolated or os.environ.get("PYTHONSAFEPATH")):
 sys.path.insert(0,"")
 sys.flags=sys.flags.__replace__(safe_path=False)
p=sys.path[:]
sys.path[:]=[x for x in p if x]
def r(n):
 b=b""
 while len(b)<n:
  d=os.read(0,n-len(b))
  if not d:sys.exit()
  b+=d
 return b
os.write(0,e.MAGIC_NUMBER)
b=vars(__builtins__).copy()
c,l=marshal.loads(r(int.from_bytes(r(4),"big")))
z=getattr(sys,"get_lazy_imports",bool)()
if z:sys.set_lazy_imports("normal")
for n,k,s in l:
 m=sys.modules[n]=type(sys)(n)
 m.__package__=n if k else n.rpartition(".")[0]
 if k:m.__path__=[]
 m.__builtins__=b
 exec(compile(s,n,"exec",dont_inherit=True)if type(s) is str else s,m.__dict__)
for n,k,s in l:del sys.modules[n]
if z:sys.set_lazy_imports(z)
g,u,h,v=map(q,(sys.gettrace,sys.settrace,sys.getprofile,sys.setprofile))
w=getattr(sys,"monitoring",0)
i,j,w=[q(getattr(w,x,{}.get))for x in("get_tool","get_events","set_events")]
L,F,D,Z,M=list,filter,dict,zip,map
t=m.main(c,p)
if t:
 o=t.observers
 try:
  try:
   try:t.begin();t.returned[0]
   finally:t.ask.clean_up and t.ask.clean_up()
  finally:t.ask.phase=3
 except b["BaseException"]as e:t.failure=e
 for x in 0,1,2:
  try:
   n=L(F(i,(0,1,2,3,4,5)))
   o.tools=o.tools or D(Z(n,M(j,n)));L(M(w,n,[0]*6))
   o.profile=o.profile or h();v(None)
   o.trace=o.trace or g();u(None)
   o.put_off_signals()
   break
  except b["BaseException"]:pass
 t.end()
"""
    % MARK
)


def options(python: str) -> list[str]:
    """Options of the interpreter, whose version its file's name tells, unless it is this one.

    Python 3.13 and 3.14 import `linecache` for `-c`, from the current directory if it is
    there: what a confined snippet has left would be run, and not be confined.
    """
    file = os.path.realpath(python)
    name = os.path.basename(file)
    if file == os.path.realpath(sys.executable or ""):
        name = "python%d.%d" % sys.version_info[:2]
    return ["-P"] if name.startswith(("python3.13", "python3.14")) else []


def pack(greeting: bytes, config: dict[str, Any]) -> bytes:
    """What answers an interpreter's greeting: its modules, as bytecode if it is ours."""
    as_source = greeting != importlib.util.MAGIC_NUMBER
    data = marshal.dumps((config, load(as_source)), 2 if as_source else marshal.version)
    return len(data).to_bytes(4, "big") + data


@functools.lru_cache
def load(as_source: bool) -> list[tuple[str, bool, CodeType | str]]:
    """The modules, whether each is a package, and their code."""
    packages = [(_ROOT, True, ""), (f"{_ROOT}.child", True, "")]
    return packages + [(f"{_ROOT}.{name}", False, _load(name, as_source)) for name in _MODULES]


def _load(name: str, as_source: bool) -> CodeType | str:
    root = __name__.rpartition(".")[0].rpartition(".")[0]
    full_name = f"{root}.{name}"
    package = name.rpartition(".")[0]
    places = [os.path.join(place, package) for place in sys.modules[root].__path__]
    # The others, such as that of a frozen program, whose modules stand in an archive.
    for finder in (importlib.machinery.PathFinder, *sys.meta_path):
        find_spec: Any = getattr(finder, "find_spec", None)
        spec = find_spec and find_spec(full_name, places)
        loader: Any = spec and spec.loader
        if hasattr(loader, "get_code"):
            code: CodeType | str | None = (
                loader.get_source(full_name) if as_source else loader.get_code(full_name)
            )
            if code is not None:
                return code
            version = "%d.%d" % sys.version_info[:2]
            raise OSError(
                f"the source of {name} is missing, which an interpreter of another version needs:"
                f" pass as python an interpreter of this version, Python {version}, or install"
                " this package with its sources"
            )
    raise OSError(f"the module {name} is missing from {places}")


def _name_the_modules() -> None:
    """Never called: what it imports is found by packagers, such as PyInstaller."""
    from ..child import launcher  # noqa: F401
