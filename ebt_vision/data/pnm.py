"""PGM and PPM of more than 8 bits, which Pillow reduces to 8 bits (netpbm's pgm(5) and ppm(5))."""

import re

import numpy as np

from ebt_vision.data.decoded import DecodedImage, DecodeError, assemble, check_size
from ebt_vision.data.metadata import Metadata

SPACE = rb"(?:\s|#[^\n\r]*[\n\r])+"
HEADER = re.compile(rb"P([2356])" + SPACE + rb"(\d{1,9})" + SPACE + rb"(\d{1,9})" + SPACE + rb"(\d{1,9})\s")


def is_deep(data: bytes) -> bool:
    """Whether the bytes start like a PGM or PPM with a maximum value above 255."""
    found = HEADER.match(data[:4096])
    return found is not None and int(found[4]) > 255


def decode_deep_pnm(data: bytes, max_pixels: int) -> DecodedImage:
    """Decode a file for which `is_deep` is true to 16 bits: 0..maxval becomes 0..65535. Raises DecodeError."""
    found = HEADER.match(data[:4096])
    assert found is not None
    width, height, top = int(found[2]), int(found[3]), int(found[4])
    check_size(width, height, max_pixels)
    if top > 65535:
        raise DecodeError(f"has a maximum value of {top}, which is not supported; save it with 65535 or as PNG")
    channels = 3 if found[1] in b"36" else 1
    count = width * height * channels
    if found[1] in b"56":
        if len(data) - found.end() < 2 * count:
            raise DecodeError("is truncated; copy it again")
        values = np.frombuffer(data, ">u2", count, found.end())
    else:
        words = re.sub(rb"#[^\n\r]*", b" ", data[found.end() :]).split(None, count)[:count]
        if len(words) < count or any(len(word) > 5 or not word.isdigit() for word in words):
            raise DecodeError("is damaged or truncated; copy it again")
        values = np.array(words, dtype="S5").astype(np.int64)
    if values.max() > top:
        raise DecodeError(f"is damaged (a value of {values.max()} above its maximum of {top}); copy it again")
    scaled = values if top == 65535 else np.rint(values * (65535.0 / top))
    return assemble(scaled.astype(np.uint16).reshape(height, width, channels), 1, None, None, Metadata())
