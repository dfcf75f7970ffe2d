"""Measure the training gain of an EBT: the mean decrease of the energy by the first step at the training noise level.

    python eval/training_gain.py --model tiny_imagenet_ebt --data "train-*.parquet" --level 0.1

prints the mean over images, in energy per patch. `--tolerance-of training` needs this number as `training_gain` in the config
of the model (its config.json, or the `model` section of a training config). The noise is that of the VP process at one level. A
model that was trained on noise of many strengths has no training gain.
"""

import sys

import torch

from ebt_vision.benchmark.images import load_images
from ebt_vision.benchmark.measure import observed
from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.benchmark.protocols import Condition
from ebt_vision.benchmark.rows import Row, prepare
from ebt_vision.core.arguments import number
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.models.checkpoint import program_device


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="training_gain", description="Measure an EBT's training_gain.")
    parser.add_argument("--model", required=True, help="a shipped name, a folder or hub:OWNER/NAME; an EBT for images")
    parser.add_argument("--data", required=True, help="images like the training images, but not the test images")
    parser.add_argument("--level", type=number(float, 0, 1), default=0.1, help="VP noise level of the training (default 0.1)")
    parser.add_argument("--limit", type=number(int, 1), default=512, help="number of images, spread evenly over the data")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 success, 2 bad input."""
    settings = _parser().parse(arguments)
    try:
        device = program_device(settings.device)
        gains = measure(settings.model, settings.data, settings.level, settings.limit, device=device)
    except (ValueError, OSError) as error:
        print(f"training_gain: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"training_gain: {gains.mean():.4g} (standard deviation over {len(gains)} images {gains.std():.3g})")
    return 0


def measure(model: str, data: str, level: float, limit: int, *, batch_size: int = 32, device: str = "cpu") -> torch.Tensor:
    """Return the gain of each image's first step, mean over patches, (N,). Raises ValueError for other models."""
    denoiser = load_denoiser(model, device=device)
    if not isinstance(denoiser, EBTDenoiser):
        raise ValueError(f"{model} is not an EBT for images, so it has no energy")
    images = load_images(data, img_size=denoiser.training_size, limit=limit)
    condition = Condition(protocol="paper", kind="level", strength=level)
    row = Row(model=model, kind="ebt", method="thinking", num_steps=1, reported=(1,), clean_below=0.0)
    falls = []
    for start in range(0, len(images), batch_size):
        indices = range(start, min(start + batch_size, len(images)))
        _, noisy = observed(images, condition, indices)
        ready, noisy, options = prepare(denoiser, row, condition, noisy)
        energies = ready.denoise(noisy, options, image_ids=indices).energies
        assert energies is not None  # an EBT's result has them
        falls.append((energies[0] - energies[1]).cpu())
    return torch.cat(falls)


if __name__ == "__main__":
    sys.exit(main())
