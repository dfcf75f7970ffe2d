"""Write the mean of the weights of two trainings of one network as a new model (Wortsman et al. 2022).

    python eval/mix_weights.py photographs_ebt runs/photographs_smooth/model --share 0.75 --output runs/mean

The new model has the config of the first one; an EBT can be mixed with the regressor of the same network. `--half` writes
float16 weights, as the shipped ones are. eval/held_out.py measures such means before they are written (MODEL+OTHER@SHARE).
"""

import sys
from collections.abc import Sequence
from typing import Any

from held_out import mixed

from ebt_vision.benchmark.options import OneLineParser, run_program
from ebt_vision.core.arguments import named_path, number
from ebt_vision.models.checkpoint import load_pretrained


def run(settings: Any) -> None:
    """Mix and write the weights."""
    if settings.output.exists():
        raise ValueError(f"{settings.output} exists; choose another --output")
    model = mixed(load_pretrained(settings.first).float(), load_pretrained(settings.second).float(), settings.share)
    (model.half() if settings.half else model).save_pretrained(settings.output)
    print(f"{1 - settings.share:g} of {settings.first} and {settings.share:g} of {settings.second} -> {settings.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 success, 2 bad input, 130 interrupted."""
    return run_program(_parser(), run, arguments)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="mix_weights", description="Write the mean of the weights of two trainings of one network.")
    add = parser.add_argument
    add("first", metavar="MODEL", help="a shipped name or a folder")
    add("second", metavar="OTHER", help="another training of the same network")
    add("--share", type=number(float, 0, 1), default=0.5, help="share of OTHER, 0 to 1 (default 0.5)")
    add("--output", type=named_path, required=True, metavar="FOLDER")
    add("--half", action="store_true", help="write float16 weights")
    return parser


if __name__ == "__main__":
    sys.exit(main())
