"""The command line: `run` executes a snippet or an action block, `blocks` lists them."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import signal
import sys
import tokenize
from typing import Any, NoReturn

from . import Confinement, ExecutionManager, __version__, blocks, checks
from .running import BY_SIGNAL, NOT_STARTED, Run, report
from .terminal import NAME, STDERR, STDOUT, encode, tell, write

BAD_USAGE = 2


def main() -> int:
    # The responses say what is worth saying.
    logging.getLogger(__package__).addHandler(logging.NullHandler())
    # Where one of the three is closed, a descriptor of ours would take its number.
    for fd in (0, STDOUT, STDERR):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    try:
        arguments = _parser().parse_args()
        code: int = arguments.call(arguments)
    except KeyboardInterrupt:  # before there was anything to stop
        code = BY_SIGNAL + signal.SIGINT
    return code


# -- arguments


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # With a width: to ask the terminal for it, argparse imports shutil at every start.
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80),
            **options,
        )

    def _print_message(self, message: str, file: object = None) -> None:
        with contextlib.suppress(OSError):
            write(STDOUT, encode(message))

    def error(self, message: str) -> NoReturn:
        """One line, where `argparse` would show the usage as well."""
        tell(message, self.prog)
        sys.exit(BAD_USAGE)


def _parser() -> _Parser:
    is_module = os.path.basename(sys.argv[0]) == "__main__.py"
    parser = _Parser(
        prog=f"python -m {__package__}" if is_module else NAME,
        description="Run Python on the side, and be able to stop it.",
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    commands = parser.add_subparsers(prog=parser.prog, metavar="{run,blocks}", required=True)
    run = commands.add_parser(
        "run",
        help="run Python code or an action block",
        usage="%(prog)s [OPTION...] (-c CODE | PATH [ARG...] | -)",
        description="Run Python code and stream its output. Ctrl-C stops it gracefully,"
        " a second one by force.",
        epilog="Exit code: the code's own (128 + n where signal n killed it); 0 where"
        " --stop-after stopped it; 2 bad usage; 124 timed out; 125 could not be started;"
        " 130 stopped by Ctrl-C; 143 by SIGTERM; 141 nobody reads the output; 1 it can't be"
        " written.",
    )
    run.set_defaults(call=_run, parser=run)
    add = run.add_argument
    add("-c", dest="code", metavar="CODE", help="the code itself")
    path = "a .py file or a directory with a __main__.py, and its arguments; - reads code from"
    add("block", nargs="...", metavar="PATH [ARG...]", help=f"{path} standard input")
    params = "`params` as a JSON object, or @FILE with one"
    add("--params", type=_params, metavar="JSON", help=params)
    timeout = "a limit: after S seconds stop it, and exit with 124 (default: none)"
    add("--timeout", type=_seconds, metavar="S", help=timeout)
    grace = "seconds that it has to clean up when it is stopped (default: 5)"
    add("--grace", type=_seconds, default=5.0, metavar="S", dest="grace_period", help=grace)
    stop_after = "let it run for S seconds, then stop it, and exit with 0"
    add("--stop-after", type=_seconds, default=math.inf, metavar="S", help=stop_after)
    add("--cwd", metavar="DIR", help="the directory to run it in")
    add("--python", metavar="EXE", help="the interpreter to run it with")
    confine = "let it write nowhere, use no network and reach no other process"
    add("--confine", action="store_true", help=confine)
    write = "with --confine, a directory or file that it may write; may be repeated"
    add("--write", action="append", default=[], metavar="PATH", help=write)
    add("--network", action="store_true", help="with --confine, let it use the network")
    wire = "write the final response to standard output, all else to standard error"
    add("--json", action="store_true", help=wire)

    listing = commands.add_parser(
        "blocks",
        help="list action blocks",
        description="List the directories that have a __main__.py: name, description, path.",
    )
    listing.set_defaults(call=_list_blocks, parser=listing)
    listing.add_argument("path", nargs="?", default=".", metavar="PATH", help="where to look")
    listing.add_argument("--json", action="store_true", help="write the response as JSON")
    return parser


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        value = float(text)
        if value >= 0:
            return value
    raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, not {text!r}")


def _params(text: str) -> dict[str, Any]:
    source: str | bytes = text
    try:
        if text.startswith("@"):
            with open(text[1:], "rb") as file:
                source = file.read()
        value = json.loads(source)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't read {text[1:]!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, such as {{}}, not {text!r}")
    return value


def _read_standard_input(parser: _Parser) -> str:
    try:
        with open(0, "rb", closefd=False) as stream:
            source = stream.read()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        return source.decode(encoding)
    except (OSError, SyntaxError, ValueError, LookupError) as error:
        parser.error(f"can't read code from standard input: {error}")


# -- run


def _run(arguments: argparse.Namespace) -> int:
    parser: _Parser = arguments.parser
    code, block = arguments.code, arguments.block
    if block[:1] == ["--"]:
        del block[0]
    if (code is not None and block) or (block[:1] == ["-"] and block[1:]):
        parser.error("-c CODE and - take no PATH and no arguments: pass them by --params")
    if code is None and not block:
        parser.error("pass either -c CODE, or PATH, or - for code from standard input")
    if block == ["-"]:
        code = _read_standard_input(parser)
    if (arguments.write or arguments.network) and not arguments.confine:
        parser.error("--write and --network need --confine")
    options = {name: getattr(arguments, name) for name in ("python", "cwd", "grace_period")}
    if not arguments.json:
        options["max_output"] = 1  # `on_output` gets all of it, and nobody asks again
    try:
        if arguments.confine:
            options["confinement"] = Confinement(write=arguments.write, network=arguments.network)
        manager = ExecutionManager(default_timeout=arguments.timeout, **options)
    except ValueError as error:
        parser.error(str(error))
    except NotImplementedError as error:
        tell(str(error))
        return NOT_STARTED
    try:
        return Run(manager, arguments).run(code)
    finally:
        manager.close(grace=0)


# -- blocks


def _list_blocks(arguments: argparse.Namespace) -> int:
    parser: _Parser = arguments.parser
    try:
        response = blocks.find(checks.path("PATH", arguments.path))
    except ValueError as error:
        parser.error(str(error))
    if arguments.json:
        text = response.to_json() + "\n"
    else:
        rows = [
            (block.name, (block.description or "-").partition("\n")[0], block.path)
            for block in response.data.action_blocks
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        text = "".join(line + "\n" for line in lines)
        if response.success and not rows:
            tell(f"no action blocks below {response.data.search_path}")
    try:
        write(STDOUT, encode(text))
    except OSError as error:
        return report(error)
    if not response.success:
        parser.error(str(response.error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
