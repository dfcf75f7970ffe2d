"""`ebt-vision export`: export a network as an ONNX file or a torch.export program, for other programs."""

import argparse
import re
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.description = (
        "Export a network for other programs. Input and output images are float32 RGB (B, 3, H, W) in [0, 1]; H and W "
        "are multiples of the patch size."
    )
    parser.add_argument("model", metavar="MODEL", help="a shipped name, a folder or hub:OWNER/NAME")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="FILE.onnx, or FILE.pt2 for torch.export")
    parser.add_argument(
        "--part",
        choices=("proposal", "step"),
        default="proposal",
        help="proposal: denoise in one forward pass, any size (default); step: one thinking step, at --size",
    )
    parser.add_argument("--size", metavar="HxW", type=_size, help="height and width of a step, for example 256x256")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.set_defaults(run=_run)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; use HEIGHTxWIDTH, for example 256x256")
    return int(found[1]), int(found[2])


def _run(args: argparse.Namespace) -> int:
    from ebt_vision.denoising.export import export_model
    from ebt_vision.models.checkpoint import load_pretrained

    if args.size is not None and args.part == "proposal":
        raise ValueError("--size is only for --part step; a proposal accepts images of any size")
    if args.output.is_dir():
        raise ValueError(f"{args.output} is a folder; choose another --output")
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists; choose another --output, or add --overwrite to replace it")
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent} is not a folder; create it, or choose another --output")
    export_model(load_pretrained(args.model), args.output, part=args.part, size=args.size)
    print(f"{args.model} ({args.part}) -> {args.output}, {args.output.stat().st_size / 2**20:.1f} MiB")
    return 0
