"""`ebt-vision train`: train a model from a YAML config."""

import argparse

from ebt_vision.commands.console import BAD_INPUT, one_line, say
from ebt_vision.core.arguments import named_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.description = "Train what CONFIG describes. Example: ebt-vision train configs/smoke.yaml optim.lr=3e-4"
    parser.add_argument("config", metavar="CONFIG", type=named_path, help="a YAML file of configs/ or your own")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that take the file's place")
    parser.add_argument(
        "--output", metavar="DIR", type=named_path, help="the run's folder; a run that was cut off there goes on"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument(
        "--allow-changes", action="store_true", help="resume a run with other settings, of the learning rate or the data, say"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if not args.config.is_file():
        near = ", ".join(sorted(str(path) for path in args.config.parent.glob("*.yaml"))) or "no .yaml files"
        raise ValueError(f"config {args.config} does not exist; {args.config.parent}/ has: {near}")
    for override in args.overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form key=value")
    from ebt_vision.models.checkpoint import program_device
    from ebt_vision.training.loop import TrainingDivergedError
    from ebt_vision.training.run import train
    from ebt_vision.training.stopping import TrainingInterrupted

    program_device(args.device)
    try:
        folder = train(args.config, args.overrides, output=args.output, device=args.device, allow_changes=args.allow_changes)
    except TrainingDivergedError as error:
        say(one_line(error))
        return BAD_INPUT
    except TrainingInterrupted as error:  # the trainer has said so
        return 128 + error.signal
    print(f"trained: {folder}")
    return 0
