"""Speed side by side in one run: our training steps against plain implementations of the paper's and a feed-forward step.

    python eval/speed.py                                                  images, tokens, inference and text at two-core sizes
    python eval/speed.py --parts image --compile --precision bf16 --device cuda --img-size 128 --patch-size 16 \\
        --embed-dim 1536 --depth 24 --num-heads 16 --mlp-ratio 1 --batch-size 64

Parts: `image` and `text` are training steps (thinking, loss, backward, clipping, AdamW); plain_steps.py has the plain ones.
`inference` is denoising with 1, 2, 4 and 8 steps and with a DiT by DDIM. `photographs` compares the default denoiser with the
network of DnCNN on one photograph. `tokens` is our image step at 64..4096 tokens. `generation` is text with and without the
cache. `loader` compares the rate of the training set with that of our step. Every part except generation reports its fraction
of the machine's matrix rate, by counted FLOPs. `--peak-memory` adds the memory of each row beyond its weights, `--profile` its
use of time. Compare only ratios of one run; see ebt_vision/benchmark/timing.py. The program writes results.json and report.md
after every part.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from speed_images import growth_with_tokens, image_training, inference, loader
from speed_photographs import photographs
from speed_report import report
from speed_rounds import PeakFound
from speed_text import generation, text_training

from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.benchmark.time_profile import show_compiled_kernels
from ebt_vision.core.arguments import named_path, number
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.provenance import provenance
from ebt_vision.models.checkpoint import program_device

PARTS = ("image", "inference", "photographs", "tokens", "loader", "text", "generation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 success, 2 bad input, 130 interrupted."""
    settings = _parser().parse(arguments)
    settings.command = sys.argv[1:] if arguments is None else list(arguments)
    try:
        run(settings)
    except PeakFound as found:
        print(found.args[0])
    except ValueError as error:
        print(f"speed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("speed: interrupted", file=sys.stderr)
        return 130
    return 0


def run(settings: argparse.Namespace) -> None:
    """Time every part; print and write the report after each, so that finished parts are kept."""
    settings.device = program_device(settings.device)
    torch.manual_seed(settings.seed)
    if settings.profile:
        show_compiled_kernels()
    about = provenance("eval/speed.py", settings.command, settings.device) | {"threads": torch.get_num_threads()}
    results: dict[str, Any] = {"about": about, "parts": {}}
    measure: dict[str, Callable[[argparse.Namespace], dict]] = {
        "image": image_training,
        "inference": inference,
        "photographs": photographs,
        "tokens": growth_with_tokens,
        "loader": loader,
        "text": text_training,
        "generation": generation,
    }
    for part in settings.parts:
        print(f"speed: {part} ...", file=sys.stderr, flush=True)
        settings.part = part
        results["parts"][part] = measure[part](settings)
        write_text(settings.output / "results.json", json.dumps(results, indent=1) + "\n")
        write_text(settings.output / "report.md", report(results))
    print(report(results))


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="speed", description="Training and inference speed, side by side.")
    add, count = parser.add_argument, number(int, 1)
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--rounds", type=count, default=8)
    add("--seed", type=number(int, 0), default=0)
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="precision of our steps and of the matrix rate; plain is float32",
    )
    add("--no-compile", dest="compile", action="store_false", help="do not run the compiled versions")
    add("--checkpoint", action="store_true", help="add rows with train.checkpoint_blocks")
    add("--peak-memory", action="store_true", help="measure the peak memory of each row in its own process")
    add(
        "--profile",
        action="store_true",
        help="add the time fractions of matrix products, attention, fused kernels and optimizer",
    )
    add("--peak-of", metavar="ROW", help="print the peak memory of one row of one part in bytes, and nothing else")
    add("--output", type=named_path, default=Path("results/speed"))
    images = parser.add_argument_group("image models")
    for name, kind, value in [
        ("--img-size", count, 64),
        ("--patch-size", count, 8),
        ("--embed-dim", count, 256),
        ("--depth", count, 4),
        ("--num-heads", count, 4),
        ("--mlp-ratio", number(float, 0), 2.0),
        ("--batch-size", count, 32),
        ("--dit-dim", count, 192),
        ("--dit-depth", count, 3),
        ("--dit-heads", count, 3),
        ("--dit-passes", count, 100),
    ]:
        images.add_argument(name, type=kind, default=value)
    images.add_argument("--tokens", type=count, nargs="+", default=[64, 256, 1024, 4096])
    images.add_argument("--photograph-size", type=count, default=512, help="side of the photograph, pixels")
    images.add_argument(
        "--photograph-models", nargs="+", metavar="NAME", help="default: the default model of `ebt-vision denoise`"
    )
    text = parser.add_argument_group("text models")
    for name, value in [
        ("--context-length", 256),
        ("--text-embed-dim", 384),
        ("--text-depth", 6),
        ("--text-num-heads", 6),
        ("--text-batch-size", 4),
        ("--text-steps", 2),
    ]:
        text.add_argument(name, type=count, default=value)
    text.add_argument("--energy-head", choices=("linear", "quadratic"), default="quadratic")
    text.add_argument("--generate", type=count, nargs="+", default=[64, 256, 1024], metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
