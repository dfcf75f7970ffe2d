"""Synthetic drawings: text, shapes, tables and gradients, as in screenshots and line art.

A denoiser trained only on photographs treats flat colours and sharp edges as unlikely. A fraction of drawings among its
training images corrects this (DataConfig.graphics_share).
"""

import string

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_LETTERS = string.ascii_letters + string.digits + "      .,;:-()"
_SCALE = 2
"""Shapes are drawn at this multiple of the size and downscaled, so that their edges are smooth, as in most programs."""


class _Dice:
    """Random values from one generator."""

    def __init__(self, generator: torch.Generator):
        self._generator = generator

    def share(self) -> float:
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def number(self, low: int, high: int) -> int:
        """Return a whole number in low..high."""
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def colour(self) -> tuple[int, int, int]:
        """Return a colour: often black, white, grey or a pure colour, otherwise any."""
        kind = self.share()
        if kind < 0.35:
            grey = (0, 255, 255, 240, 128)[self.number(0, 4)]
            return grey, grey, grey
        if kind < 0.6:
            red, green, blue = (255 * self.number(0, 1) for _ in range(3))
            return red, green, blue
        red, green, blue = (self.number(0, 255) for _ in range(3))
        return red, green, blue

    def box(self, size: int) -> tuple[int, int, int, int]:
        """Return left, top, right, bottom of a rectangle that is at least partly inside."""
        left, top = self.number(-size // 4, size - 2), self.number(-size // 4, size - 2)
        return left, top, left + self.number(2, size), top + self.number(2, size)


def draw_graphic(size: int, generator: torch.Generator) -> np.ndarray:
    """Draw one image, (3, size, size) uint8 RGB; every draw is from `generator`."""
    dice = _Dice(generator)
    smooth = dice.share() < 0.6
    side = size * _SCALE if smooth else size
    image = Image.new("RGB", (side, side), dice.colour())
    background = dice.share()
    if background < 0.15:
        image = _gradient(side, dice)
    elif background < 0.35:
        image = _pattern(side, dice)
    draw = ImageDraw.Draw(image)
    for _ in range(dice.number(0, 6)):
        _SHAPES[dice.number(0, len(_SHAPES) - 1)](draw, side, dice)
    if smooth:
        image = image.resize((size, size), Image.Resampling.BOX)
        draw = ImageDraw.Draw(image)
    for _ in range(dice.number(0, 2)):
        _text(draw, size, dice)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # HWC -> CHW


def _gradient(side: int, dice: _Dice) -> Image.Image:
    ends = np.array([dice.colour(), dice.colour()], dtype=np.float64)
    ramp = np.linspace(0, 1, side)[:, None]
    column = (ends[0] * (1 - ramp) + ends[1] * ramp).round().astype(np.uint8)  # (side, 3)
    pixels = np.repeat(column[:, None], side, axis=1)
    return Image.fromarray(pixels if dice.share() < 0.5 else np.ascontiguousarray(pixels.transpose(1, 0, 2)))


def _pattern(side: int, dice: _Dice) -> Image.Image:
    """Waves in each channel, sharp or smooth, with periods of 8 pixels to twice the side."""
    channels = []
    for _ in range(3):
        across, down = (np.sin(2 * np.pi * (np.arange(side) / _period(side, dice) + dice.share())) for _ in range(2))
        channels.append(np.outer(down, across))
    waves = np.stack(channels, -1)
    if dice.share() < 0.7:
        waves = np.sign(waves)
    low, high = 100 * dice.share(), 155 + 100 * dice.share()
    return Image.fromarray((low + (high - low) * (waves + 1) / 2).round().astype(np.uint8))


def _period(side: int, dice: _Dice) -> float:
    return 8.0 * (max(side, 4) / 4.0) ** dice.share()


def _confetti(draw: ImageDraw.ImageDraw, side: int, dice: _Dice) -> None:
    """Many small spots of one or of many colours."""
    one, size = dice.colour() if dice.share() < 0.3 else None, dice.number(3, max(4, side // 12))
    for _ in range(dice.number(20, 120)):
        left, top = dice.number(0, side), dice.number(0, side)
        box = (left, top, left + size, top + size)
        (draw.ellipse if dice.share() < 0.5 else draw.rectangle)(box, fill=one or dice.colour())


def _rectangle(draw: ImageDraw.ImageDraw, side: int, dice: _Dice) -> None:
    outline = dice.colour() if dice.share() < 0.5 else None
    draw.rectangle(dice.box(side), fill=dice.colour(), outline=outline, width=dice.number(1, 4))


def _ellipse(draw: ImageDraw.ImageDraw, side: int, dice: _Dice) -> None:
    outline = dice.colour() if dice.share() < 0.5 else None
    draw.ellipse(dice.box(side), fill=dice.colour() if dice.share() < 0.7 else None, outline=outline, width=dice.number(1, 4))


def _polygon(draw: ImageDraw.ImageDraw, side: int, dice: _Dice) -> None:
    corners = [(dice.number(0, side), dice.number(0, side)) for _ in range(dice.number(3, 6))]
    draw.polygon(corners, fill=dice.colour())


def _lines(draw: ImageDraw.ImageDraw, side: int, dice: _Dice) -> None:
    colour, width = dice.colour(), dice.number(1, 5)
    points = [(dice.number(0, side), dice.number(0, side)) for _ in range(dice.number(2, 12))]
    draw.line(points, fill=colour, width=width)


def _grid(draw: ImageDraw.ImageDraw, side: int, dice: _Dice) -> None:
    colour, step, width = dice.colour(), dice.number(6, max(7, side // 3)), dice.number(1, 2)
    for place in range(dice.number(0, step), side, step):
        draw.line([(0, place), (side, place)], fill=colour, width=width)
        draw.line([(place, 0), (place, side)], fill=colour, width=width)


_SHAPES = (_rectangle, _rectangle, _ellipse, _polygon, _lines, _grid, _confetti)
"""A kind that is listed twice is drawn twice as often."""


def _text(draw: ImageDraw.ImageDraw, size: int, dice: _Dice) -> None:
    """Draw some lines of random letters in Pillow's own font."""
    height = dice.number(8, 24)
    font, colour = ImageFont.load_default(size=height), dice.colour()
    top, left = dice.number(-height // 2, size // 2), dice.number(-height, size // 3)
    for line in range(dice.number(1, 8)):
        letters = "".join(_LETTERS[dice.number(0, len(_LETTERS) - 1)] for _ in range(size // 4))
        draw.text((left, top + line * height * 5 // 4), letters, fill=colour, font=font)
