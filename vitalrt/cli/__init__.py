"""The command line. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import os
import sys

from vitalrt.cli.parser import build_parser
from vitalrt.errors import VitalError


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an error that the caller can mend or nobody reads on, 2 wrong usage, 130 interrupted."""
    try:
        try:
            return _run(build_parser().parse_args(argv))
        finally:
            sys.stdout.flush()  # here, where it can still be told that nobody reads on
    except BrokenPipeError:  # `vitalrt ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter still has to flush
        return 1


def _run(arguments: argparse.Namespace) -> int:
    try:
        arguments.run(arguments)
    except VitalError as error:
        if arguments.debug:
            raise
        print(f"vitalrt: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vitalrt: interrupted", file=sys.stderr)
        return 130
    return 0
