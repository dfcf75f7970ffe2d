"""`ebt-vision info`: list the shipped checkpoints, or describe one."""

import argparse

from ebt_vision.core.arguments import name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.description = (
        "Describe a checkpoint: kind, size, settings, hash of the weights. Without MODEL, list the shipped checkpoints."
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", type=name, help="a shipped name, a folder or hub:OWNER/NAME")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ebt_vision.models.checkpoint import list_pretrained, load_pretrained, resolve
    from ebt_vision.models.pretrained_model import PRETRAINED_DIR

    if args.model is None:
        shipped = list_pretrained()
        for line in shipped:
            print(line)
        if not shipped:
            print(f"{PRETRAINED_DIR} has no checkpoint; train one with `ebt-vision train CONFIG`")
        return 0
    model = load_pretrained(args.model)
    print(f"{args.model}: {model.model_type}, {model.num_parameters:,} parameters")
    if not args.model.startswith("hub:"):
        from ebt_vision.models.checkpoint import checkpoint_hash

        print(f"  {'folder':<20} {resolve(args.model)}")
        print(f"  {'weights (sha256)':<20} {checkpoint_hash(args.model)}")
    from dataclasses import asdict

    for field, value in asdict(model.config).items():
        print(f"  {field:<20} {value}")
    return 0
