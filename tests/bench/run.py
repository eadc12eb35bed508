"""Measure sidexec against a bare child process, and check the bounds.

    python3 tests/bench/run.py [--quick] [--json FILE] [--list] [ROW ...]

For Linux. Makes a clean virtual environment in a temporary directory; its
interpreter is the host's, the snippets' and the bare children's. Each row of
`rows.py` runs in a host process of its own and measures both sides in turn. Prints
Markdown; the exit status is 1 when a bound ("at most") is broken, and 2 when a row
could not be measured.
"""

import argparse
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time

import rows

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# The host gets the package by its own sys.path alone: an environment variable would
# reach the bare children and the snippets as well. It runs by -c, so that the workers
# of multiprocessing have no main module to import.
HOST = "import sys; sys.path[:0] = sys.argv[1:3]; import rows; rows.main(*sys.argv[3:])"
NOT_INHERITED = ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME")
PR_SET_CHILD_SUBREAPER = 36
PATIENCE = 15.0


def main():
    options = parse_arguments()
    # Whatever a row leaves becomes a child of this process, which ends it.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    print(f"{describe_machine()}\n", flush=True)
    results, unmeasured = [], []
    try:
        with tempfile.TemporaryDirectory(prefix="sidexec-bench-") as directory:
            python = make_interpreter(directory)
            try:
                for name in options.rows:
                    began = time.monotonic()
                    got = measure(python, name, options.quick)
                    results += got or []
                    if got is None:
                        unmeasured.append(name)
                    print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
            finally:
                sweep()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print_results(results)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": describe_machine(), "results": results}, file, indent=1)
    broken = [each for each in results if is_broken(each)]
    for each in broken:
        print(f"broken: {each['measured']}: {seen(each)}, at most {bound(each, 'at_most')}")
    for name in unmeasured:
        print(f"not measured: {name}")
    return 2 if unmeasured else 1 if broken else 0


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="by default all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", metavar="FILE", help="also write all figures there")
    parser.add_argument("--list", action="store_true", help="list the rows")
    options = parser.parse_args()
    if options.list:
        for name, row in rows.ROWS.items():
            print(f"{name:10} {row.__doc__}")
        sys.exit()
    for name in options.rows:
        if name not in rows.ROWS:
            parser.error(f"no row {name!r}; there are {', '.join(rows.ROWS)}")
    options.rows = options.rows or list(rows.ROWS)
    return options


def describe_machine():
    load = " ".join(f"{each:.1f}" for each in os.getloadavg())
    return (
        f"{len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()},"
        f" {platform.python_implementation()} {platform.python_version()}, load {load}"
    )


# -- processes


def make_interpreter(directory):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    return os.path.join(directory, "bin", "python")


def measure(python, name, quick):
    """Run a row in a host of its own: its results, None where it failed."""
    environment = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    here = os.path.dirname(os.path.abspath(__file__))
    command = [python, "-c", HOST, ROOT, here, name, "quick" if quick else "full"]
    interrupts = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, interrupts)  # until the host can be ended
    # In its own session: Ctrl-C reaches this process alone, which passes it on once.
    host = subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts)
        out = host.communicate()[0]
    except BaseException:
        host.terminate()
        try:
            host.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            host.kill()
            host.wait()
        raise
    sweep()
    return json.loads(out) if host.returncode == 0 else None


def sweep():
    """Reap what is left; end what does not end by itself, and say so."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0 and time.monotonic() >= deadline:
            for left in rows.children():
                print(f"process {left} was left and is killed", file=sys.stderr)
                os.kill(left, signal.SIGKILL)
            deadline += 1
        if pid == 0:
            time.sleep(0.005)


# -- figures


def print_results(results):
    tables = {}
    for each in results:
        tables.setdefault(each["table"], []).append(each)
    for title, members in tables.items():
        columns = rows.TABLES[title]
        lines = [columns, ["---"] * len(columns)]
        for each in members:
            if title == rows.MAIN:
                ratio = "–" if each["ratio"] is None else f"{each['ratio']:.2f}"
                mark = " **broken**" if is_broken(each) else ""
                lines.append(
                    [
                        each["measured"],
                        quantity(each["sidexec"], each["unit"]),
                        quantity(each["bare"], each["unit"]),
                        ratio,
                        bound(each, "at_most") + mark,
                        bound(each, "aim"),
                    ]
                )
            else:
                took = quantity(each["sidexec"], each["unit"])
                lines.append([each["measured"], took, *each["says"]])
        print("\n".join(f"| {' | '.join(line)} |" for line in lines), end="\n\n")


def is_broken(result):
    if result["at_most"] is None:
        return False
    value = result["ratio"] if result["bounded"] == "ratio" else result["sidexec"]
    return value > result["at_most"]


def seen(result):
    if result["bounded"] == "ratio":
        return f"{result['ratio']:.2f}"
    return quantity(result["sidexec"], result["unit"])


def bound(result, which):
    value = result[which]
    if value is None:
        return "–"
    return f"{value:.2f}" if result["bounded"] == "ratio" else quantity(value, result["unit"])


def quantity(value, unit):
    if value is None:
        return "–"
    if unit == "s":
        scale, name = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
        return f"{value * scale:.3g} {name}"
    if unit == "B":
        scale, name = (2**20, "MiB") if value >= 2**20 else (2**10, "KiB")
        return f"{value / scale:.3g} {name}"
    return f"{value:.3g} {unit}"


if __name__ == "__main__":
    sys.exit(main())
