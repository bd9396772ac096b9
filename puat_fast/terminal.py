"""What the verbs of the command line share: parsers whose errors are one line, checks of targets, tables."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from puat_fast import files
from puat_fast.config import ConfigError, number

DEBUG = "on an error, show where it happened"


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with texts as they were written, and room for long flags."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=42, **kwargs)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors, told by main in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(message)


def spelled(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The arguments, flags spelled as they are declared: - and _ are alike. Raises ConfigError for unknown flags.

    Verbs come first, and what follows one is spelled as its parser has it.
    """
    verbs = next((action.choices for action in parser._actions if action.nargs == argparse.PARSER), None)
    if verbs is not None:
        verb = argv[0] if argv else ""
        return [verb, *spelled(argv[1:], verbs[verb])] if verb in verbs else list(argv)  # type: ignore[index]
    known = {flag.replace("-", "_"): flag for flag in parser._option_string_actions if flag.startswith("--")}
    found: list[str] = []
    for token in argv:
        if re.match(r"-[\d.]", token) and found and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] += f"={token}"  # a negative number, 8/255 too, which argparse would take for a flag
            continue
        flag, equals, value = token.partition("=")
        name = flag.replace("-", "_")
        if flag.startswith("--") and name not in known:
            # --eps for --attack.eps: the group forgotten is the likeliest mistake
            close = [full for full in known if full.endswith(f".{name[2:]}")] or difflib.get_close_matches(name, known)
            raise ConfigError(f"{flag}: no such option" + (f"; did you mean {known[close[0]]}?" if close else ""))
        found.append(known[name] + equals + value if flag.startswith("--") else token)
    return found


def add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, usage: str, epilog: str = ""
) -> argparse.ArgumentParser:
    """A verb's parser, with --debug; `run` takes the options and gives the exit code."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text, usage=f"puat-fast {name} {usage}", epilog=epilog
    )
    parser.add_argument("--debug", action="store_true", help=DEBUG)
    parser.set_defaults(run=run)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option --device."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option --json; the parser's epilog tells the keys."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the screen shows; keys below")


def add_normalisation(parser: argparse.ArgumentParser) -> None:
    """The options --mean and --std of a classifier whose file does not tell them: three floats each, or None."""
    for name in ("mean", "std"):
        what = f"{name} that the network normalises with, where the file does not tell"
        parser.add_argument(f"--{name}", type=_three_numbers, metavar="A,B,C", help=what)


def _three_numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(map(number, text.split(",")))
    except (ValueError, ZeroDivisionError):
        values = ()
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not 3 numbers, such as 0.4914,0.4822,0.4465")
    return values


def at_least(low: int) -> Callable[[str], int]:
    """An option's type: a whole number from `low` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {low}")
        return int(text)

    return parse


def check_target(file: Path | None) -> None:
    """Before the work, not after it: can the file be written? Raises ConfigError."""
    if file is not None and file.is_dir():
        raise ConfigError(f"{file}: is a folder, not a file to write")
    if file is not None and not os.access(file.absolute().parent, os.W_OK):
        raise ConfigError(f"{file}: cannot be written: no such folder, or no right to write there")


def write_json(file: Path | None, value: Any) -> None:
    """What --json asked for, or nothing. Raises OSError."""
    if file is not None:
        files.write_json(file, value)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if title:  # not the table's own title, which is wrapped to the width of the table
        console.print(title, soft_wrap=True, markup=False, highlight=False)
    shown = Table(box=None, pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
