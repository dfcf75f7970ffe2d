"""Test images of screenshots and line art: a plot, a diagram, a window, a map, colours, and a scanned page.

    python eval/graphics.py --output runs/graphics
    python eval/denoising.py --protocol awgn --data runs/graphics --sigmas 0 25 --models photographs_ebt bm3d

matplotlib draws them with its own fonts. The training drawings of photographs_ebt (ebt_vision/data/graphics.py) come from
another program. The scanned page is from skimage.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

from ebt_vision.core.arguments import named_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle
from skimage import data

WIDTH, HEIGHT, DPI = 480, 320, 100


def plot(figure: Figure) -> None:
    """Three curves with a legend and a grid."""
    axes = figure.add_subplot()
    x = np.linspace(0, 10, 200)
    for k in range(3):
        axes.plot(x, np.sin(x + k) * np.exp(-0.1 * k * x), label=f"curve {k + 1}")
    axes.set_title("Amplitude over time")
    axes.set_xlabel("time, s")
    axes.grid(visible=True)
    axes.legend()


def diagram(figure: Figure) -> None:
    """Black boxes and arrows on white."""
    axes = _canvas(figure)
    for i, name in enumerate(("input", "network", "energy", "gradient")):
        axes.add_patch(Rectangle((0.04 + 0.24 * i, 0.4), 0.17, 0.2, fill=False, linewidth=1.5))
        axes.text(0.125 + 0.24 * i, 0.5, name, ha="center", va="center", fontsize=10)
        if i:
            axes.add_patch(FancyArrowPatch((0.24 * i - 0.03, 0.5), (0.24 * i + 0.04, 0.5), arrowstyle="->", mutation_scale=12))
    axes.add_patch(
        FancyArrowPatch((0.85, 0.4), (0.12, 0.4), connectionstyle="arc3,rad=-0.5", arrowstyle="->", mutation_scale=12)
    )
    axes.text(0.5, 0.85, "Thinking: y - alpha dE/dy", ha="center", fontsize=13, style="italic")


def window(figure: Figure) -> None:
    """A window of a program: a title bar, a list, buttons and text."""
    axes = _canvas(figure)
    figure.set_facecolor("#d9dde3")
    for box, colour in (
        ((0.03, 0.05, 0.94, 0.9), "#ffffff"),
        ((0.03, 0.87, 0.94, 0.08), "#2b5797"),
        ((0.03, 0.05, 0.25, 0.82), "#f0f0f0"),
        ((0.74, 0.08, 0.2, 0.1), "#1f8a4c"),
        ((0.5, 0.08, 0.2, 0.1), "#e4e4e4"),
    ):
        axes.add_patch(Rectangle(box[:2], box[2], box[3], facecolor=colour, edgecolor="#8a8a8a", linewidth=0.8))
    axes.text(0.05, 0.905, "Settings", color="white", va="center", fontsize=10)
    for i, word in enumerate(("General", "Display", "Network", "Sound", "Accounts", "Updates")):
        axes.text(0.05, 0.8 - 0.11 * i, word, va="center", fontsize=9)
    for i in range(9):
        axes.text(
            0.31, 0.81 - 0.065 * i, f"Line {i + 1}: the quick brown fox jumps over {i * 37} lazy dogs.", va="center", fontsize=7
        )
    axes.text(0.84, 0.13, "Apply", ha="center", va="center", color="white", fontsize=9)
    axes.text(0.6, 0.13, "Cancel", ha="center", va="center", fontsize=9)


def city_map(figure: Figure) -> None:
    """Streets, a river and areas in flat colours."""
    axes = _canvas(figure)
    figure.set_facecolor("#f2efe9")
    axes.add_patch(Rectangle((0.1, 0.55), 0.3, 0.3, facecolor="#c8e6b0"))
    axes.add_patch(Circle((0.75, 0.3), 0.16, facecolor="#e8d4c0", edgecolor="#a08060"))
    x = np.linspace(0, 1, 100)
    axes.plot(x, 0.45 + 0.1 * np.sin(7 * x), color="#90b8e0", linewidth=9)
    for k in range(7):
        axes.plot([0.15 * k, 0.15 * k + 0.1], [0, 1], color="white", linewidth=4)
        axes.plot([0, 1], [0.16 * k, 0.16 * k + 0.05], color="#f6c744" if k == 3 else "white", linewidth=3)
        axes.text(0.15 * k + 0.02, 0.16 * k, f"Street {k}", fontsize=7, rotation=4)


def colours(figure: Figure) -> None:
    """Pure colours side by side."""
    axes = _canvas(figure)
    names = ("red", "lime", "blue", "yellow", "magenta", "cyan", "black", "white", "gray", "orange", "purple", "teal")
    for i, name in enumerate(names):
        axes.add_patch(Rectangle((i % 4 / 4, i // 4 / 3), 0.25, 1 / 3, facecolor=name))


DRAWINGS: tuple[Callable[[Figure], None], ...] = (plot, diagram, window, city_map, colours)


def _canvas(figure: Figure) -> plt.Axes:
    """Axes from 0 to 1 over the whole figure, without ticks."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    return axes


def main(arguments: list[str] | None = None) -> int:
    """Write the images as PNG; return 0, or 2 if the folder cannot be created."""
    parser = argparse.ArgumentParser(description="Draw test images of screenshots and line art.")
    parser.add_argument("--output", type=named_path, required=True, help="folder for the images")
    folder: Path = parser.parse_args(arguments).output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"graphics: --output {folder} cannot be created ({error.strerror}); choose another folder", file=sys.stderr)
        return 2
    for draw in DRAWINGS:
        figure = plt.figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
        draw(figure)
        figure.savefig(folder / f"{draw.__name__}.png", facecolor=figure.get_facecolor())
        plt.close(figure)
    plt.imsave(folder / "page.png", np.repeat(data.page()[:, :, None], 3, axis=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
