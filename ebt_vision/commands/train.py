"""`ebt-vision train`: train a model from a YAML config."""

import argparse

from ebt_vision.commands.console import BAD_INPUT, one_line, say
from ebt_vision.core.arguments import named_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.description = "Train the model of CONFIG. Example: ebt-vision train configs/smoke.yaml optim.lr=3e-4"
    parser.add_argument("config", metavar="CONFIG", type=named_path, help="a YAML file, from configs/ or your own")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that override the file")
    parser.add_argument(
        "--output", metavar="DIR", type=named_path, help="folder of the run; an interrupted run in this folder resumes"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    parser.add_argument(
        "--allow-changes", action="store_true", help="resume with changed settings, such as another learning rate or data"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if not args.config.is_file():
        near = ", ".join(sorted(str(path) for path in args.config.parent.glob("*.yaml"))) or "no .yaml files"
        raise ValueError(f"config {args.config} does not exist; {args.config.parent}/ has: {near}")
    for override in args.overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} does not have the form key=value")
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
    except TrainingInterrupted as error:  # the trainer has already printed a message
        return 128 + error.signal
    print(f"trained: {folder}")
    return 0
