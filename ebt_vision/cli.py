"""The command line: ebt-vision train | denoise | restore | generate | export | info.

The commands are in ebt_vision/commands/. Imports are lazy, so that --help is fast. A user error prints one line on stderr and
exits with status 2, without a traceback. An interrupt exits with status 130 and keeps finished results.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ebt_vision.commands import denoise, export, generate, info, restore, train
from ebt_vision.commands.console import (
    BAD_INPUT,
    INTERRUPTED,
    READER_LEFT,
    drop_stdout,
    one_line,
    say,
)
from ebt_vision.core.names import escape_unprintable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 success, 2 bad input or diverged, 130 interrupted, 143 terminated."""
    escape_unprintable()
    try:
        args = _parse(argv)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe, as in `ebt-vision generate ... | head -1`
        drop_stdout()
        return READER_LEFT
    except (ValueError, OSError) as error:
        say(one_line(error))
        return BAD_INPUT


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    words = sys.argv[1:] if argv is None else argv
    num_empty = sum(not word or (word.startswith("--") and word.endswith("=")) for word in words)
    if num_empty > (getattr(args, "prompt", None) == ""):
        parser.error("an argument is empty; is a shell variable unset?")
    if hasattr(args, "overrides"):  # argparse does not collect key=value after an option
        args.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"ebt-vision: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ebt-vision", description="Energy-Based Transformers for vision.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train.add_arguments(commands.add_parser("train", help="train a model from a YAML config"))
    denoise.add_arguments(commands.add_parser("denoise", help="denoise image files and folders of images"))
    restore.add_arguments(commands.add_parser("restore", help="fill in, deblur, enlarge or de-block images"))
    generate.add_arguments(commands.add_parser("generate", help="continue a text"))
    export.add_arguments(commands.add_parser("export", help="export a network as ONNX or a torch.export program"))
    info.add_arguments(commands.add_parser("info", help="describe a checkpoint, or list the shipped checkpoints"))
    return parser


def _version() -> str:
    from ebt_vision import __version__

    return f"ebt-vision {__version__}"


if __name__ == "__main__":
    sys.exit(main())
