"""The parser of `tensafe-nb`: each group of commands adds its own, and says what is run."""

import argparse
import sys
from collections.abc import Sequence

from tensafe_nb.cli.artifacts import add_artifacts
from tensafe_nb.cli.audit import add_audit
from tensafe_nb.cli.classroom import add_class
from tensafe_nb.cli.demo import add_demo
from tensafe_nb.cli.keys import add_keys
from tensafe_nb.cli.lab import add_lab
from tensafe_nb.cli.run import add_run
from tensafe_nb.cli.server import add_server
from tensafe_nb.errors import TGTinkerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser("tensafe-nb", description="Train language models from a notebook.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_demo, add_lab, add_run, add_artifacts, add_keys, add_audit, add_server, add_class):
        add(commands)
    chosen, options = parser.parse_known_args(arguments)
    chosen.options = options
    if options and chosen.command != "lab":
        parser.error(f"unknown: {' '.join(options)}")
    try:
        return int(chosen.run(chosen))
    except (TGTinkerError, OSError) as error:
        print(f"tensafe-nb {chosen.command}: {error}", file=sys.stderr)
        return 1
