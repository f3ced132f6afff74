"""The command line, one file a verb: `python -m torch_mbv2 VERB`, also installed as `torch-mbv2`.

A verb's file has `HELP`, `EXAMPLE`, `add_arguments(parser)` and `run(args) -> int`. The exit status
is 0, 1 if a comparison failed, or 2 for input that cannot be used, with one line on stderr.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from torch_mbv2.cli import bench, classify, compare, info, inspect, output, profile, weights
from torch_mbv2.errors import Error, is_out_of_memory

VERBS = {
    "info": info,
    "inspect": inspect,
    "classify": classify,
    "compare": compare,
    "bench": bench,
    "profile": profile,
    "weights": weights,
}


class _Parser(argparse.ArgumentParser):
    """Bad arguments raise `Error`, like any other bad input, instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise Error(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torch-mbv2",
        description="MobileNetV2 inference in PyTorch on hand-written CUDA kernels.",
        epilog="torch-mbv2 VERB --help tells more, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"torch_mbv2 {_version()}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for name, module in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=f"example:\n  python -m torch_mbv2 {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
        verb.add_argument(
            "--json",
            nargs="?",
            const=output.STDOUT,
            metavar="FILE",
            help="also write everything to FILE as JSON; without FILE, or for -, print only that",
        )
        verb.set_defaults(run=module.run)
    return parser


def _version() -> str:
    try:
        return version("torch_mbv2")
    except PackageNotFoundError:
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status.

    argv: the arguments behind the program's name; those of the process by default.
    """
    # A shell may have closed them (`>&-`).
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name must not stop the output
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser().parse_args(argv)
        args.command = shlex.join(["python", "-m", "torch_mbv2", *argv])
        output.check_json_path(args.json)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has seen enough. Python would complain when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Error, OSError) as error:
        return _fail(_one_line(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail("not enough memory: give smaller images or batches")


def _fail(why: str) -> int:
    print(f"torch-mbv2: error: {why}", file=sys.stderr)
    return 2


def _one_line(error: Error | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
