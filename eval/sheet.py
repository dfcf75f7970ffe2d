"""A sheet of noisy photographs and the results of models with default settings, for unknown noise.

    python eval/sheet.py --data data/rni15 --models photographs_ebt --output docs/rni15.jpg

It shows a square from the middle of each noisy photograph, and the same square of each result. The whole photograph is
denoised.
"""

import sys
from collections.abc import Sequence

import matplotlib.pyplot as plt
from torch import Tensor

from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.core.arguments import named_path, number
from ebt_vision.data.image_files import find_images, read_image
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.tiling import denoise_tiled
from ebt_vision.models.checkpoint import program_device


def middle(image: Tensor, size: int) -> Tensor:
    """Return the middle square of side `size` of (3, H, W); a shorter side is not cut."""
    top, left = (max((side - size) // 2, 0) for side in image.shape[-2:])
    return image[:, top : top + size, left : left + size]


def draw(rows: Sequence[Sequence[tuple[str, Tensor]]], columns: int) -> plt.Figure:
    """Draw squares (3, h, w) in [0, 1] with their titles, row by row, `columns` rows side by side."""
    lines = -(-len(rows) // columns)
    width = len(rows[0])
    figure, axes = plt.subplots(lines, columns * width, figsize=(1.7 * columns * width, 1.85 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number_of_row, row in enumerate(rows):
        line, place = divmod(number_of_row, columns)
        for column, (title, image) in enumerate(row):
            axis = axes[line][place * width + column]
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            axis.set_title(title, fontsize=7)
    figure.tight_layout(pad=0.3)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Write the sheet; return exit status 2 for bad input."""
    settings = _parser().parse(arguments)
    try:
        device = program_device(settings.device)
        denoisers: dict[str, Denoiser] = {name: load_denoiser(name, device=device) for name in settings.models}
        rows = []
        for path in find_images([settings.data]):
            noisy = read_image(path).visible_pixels()
            row = [(path.stem, middle(noisy, settings.size))]
            for name, denoiser in denoisers.items():
                result = denoise_tiled(denoiser, noisy)
                steps = int(result.num_steps[0])
                title = f"{name.rstrip('/').rsplit('/', 1)[-1]}, {steps} step{'s' * (steps != 1)}"
                row.append((title, middle(result.image[0].cpu(), settings.size)))
            rows.append(row)
        figure = draw(rows, settings.columns)
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(settings.output, dpi=settings.dpi)
        plt.close(figure)
    except (ValueError, OSError) as error:
        print(f"sheet: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="sheet", description="Draw noisy photographs and the results of models.")
    add = parser.add_argument
    add("--data", type=named_path, required=True, help="a folder of noisy photographs")
    add("--models", nargs="+", required=True)
    add("--output", type=named_path, required=True, help="a .jpg or .png file")
    add("--size", type=number(int, 8), default=160, help="side of the squares, pixels")
    add("--columns", type=number(int, 1), default=2, help="photographs side by side")
    add("--dpi", type=number(int, 30), default=110)
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
