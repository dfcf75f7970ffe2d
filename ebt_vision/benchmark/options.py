"""Options on a command line or in a YAML file, with the same names and the same checks."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ebt_vision.core.arguments import named_path
from ebt_vision.core.names import escape_unprintable
from ebt_vision.core.yaml_files import load_yaml


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser with one-line errors and exit status 2. It accepts --config FILE.yaml for all its options."""

    def __init__(self, **keywords: Any):
        super().__init__(allow_abbrev=False, **keywords)
        self.add_argument(
            "--config", type=named_path, metavar="FILE.yaml", help="options from a file; the command line takes precedence"
        )

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse the config file, if given, and the command line, which takes precedence."""
        escape_unprintable()
        given = list(sys.argv[1:] if arguments is None else arguments)
        early = OneLineParser(prog=self.prog, add_help=False)
        try:
            config = early.parse_known_args(given)[0].config
            words = [] if config is None else config_to_arguments(config, self)
        except ValueError as error:
            self.error(str(error))
        return self.parse_args([*words, *given])


def run_program(parser: OneLineParser, run: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None) -> int:
    """Parse the arguments, run a program and return its exit status: 0 success, 2 bad input, 130 interrupted.

    `run` gets the settings, with the words of the command line in `settings.command`. Errors are one line.
    """
    settings = parser.parse(arguments)
    settings.command = sys.argv[1:] if arguments is None else list(arguments)
    try:
        run(settings)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def config_to_arguments(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """Convert a YAML file to the words of a command line. Raises ValueError, in one line, for an invalid file.

    Lists are several values of an option, null keeps the default, true and false set a switch, and a mapping becomes NAME=a,b.
    Unknown keys are refused with the nearest known key.
    """
    try:
        raw = load_yaml(path.read_text())
    except OSError as error:
        raise ValueError(f"config {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"config {path} must be a mapping of options to values")
    actions = {option.removeprefix("--"): a for a in parser._actions for option in a.option_strings if option.startswith("--")}
    names = [name for name in actions if name not in ("help", "config") and not name.startswith("no-")]
    words: list[str] = []
    for key, value in raw.items():
        name = str(key).replace("_", "-")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"unknown key {str(key)!r} in {path}; {hint}")
        words += _words(name, value, switch=actions[name].nargs == 0)
    return words


def _words(name: str, value: Any, *, switch: bool) -> list[str]:
    if value is None:
        return []
    if switch:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {value!r} is not true or false")
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, dict):
        values = [f"{key}={','.join(map(str, several))}" for key, several in value.items()]
    elif isinstance(value, list):
        values = [str(item) for item in value]
    else:
        return [f"--{name}={value}"]
    return [f"--{name}", *values]
