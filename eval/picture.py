"""The image of the README: noisy photographs, the results of thinking step by step, and the clean photographs.

python eval/picture.py --model NAME --images apps/examples/*.png --output docs/thinking.png
"""

import argparse
import sys

import matplotlib.pyplot as plt
from PIL import Image

from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.core import metrics
from ebt_vision.core.arguments import count, named_path, number
from ebt_vision.core.rng import make_generator
from ebt_vision.data.image_files import read_image
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.tiling import denoise_tiled
from ebt_vision.models.checkpoint import program_device
from ebt_vision.noise import processes


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="picture", description="Draw how an EBT thinks.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", nargs="+", type=named_path, required=True)
    parser.add_argument("--levels", nargs="+", type=number(float, 0, 1), default=[0.1, 0.2])
    parser.add_argument("--steps", nargs="+", type=count, default=[1, 2, 4, 8])
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    parser.add_argument("--output", type=named_path, required=True)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 success, 2 bad input."""
    settings = _parser().parse(arguments)
    try:
        draw(settings)
    except (ValueError, OSError) as error:
        print(f"picture: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(settings.output)
    return 0


def draw(settings: argparse.Namespace) -> None:
    """Draw one row per photograph and noise level; columns are the noisy image, some steps, the clean image."""
    denoiser = load_denoiser(settings.model, device=program_device(settings.device))
    rows = [(path, level) for path in settings.images for level in settings.levels]
    titles = ["noisy", *(f"{n} step{'s' * (n > 1)}" for n in settings.steps), "clean"]
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(2 * len(titles), 2.15 * len(rows)), squeeze=False)
    for (path, level), line in zip(rows, axes, strict=True):
        clean = read_image(path).visible_pixels()[None]  # (1, 3, H, W)
        noisy = processes.to_image_range(
            processes.add_vp_noise(processes.to_model_range(clean), level, make_generator(0, int(1000 * level)))
        )
        images = [noisy.clamp(0, 1)]
        images += [denoise_tiled(denoiser, noisy, DenoiseOptions(num_steps=n, noise_level=level)).image for n in settings.steps]
        for axis, image, title in zip(line, [*images, clean], titles, strict=True):
            axis.imshow(image[0].permute(1, 2, 0).numpy())
            psnr = float(metrics.psnr(image, clean, data_range=1.0))
            label = f"{title}, level {level:g}" if title == "noisy" else title
            axis.set_title(label if title == "clean" else f"{label}\n{psnr:.1f} dB", fontsize=8)
            axis.axis("off")
    figure.tight_layout(pad=0.3)
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.output, dpi=80)
    plt.close(figure)
    with Image.open(settings.output) as drawn:  # 256 colours need a fifth of the bytes
        small = drawn.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(settings.output, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
