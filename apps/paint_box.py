"""A gr.ImageEditor whose value is what was painted: a bool array. Its background is only a view of the photograph.

The photograph itself comes as a file, in another box: a canvas in a browser keeps neither 16 bits nor the bytes of a JPEG.
"""

import io
from abc import ABCMeta
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_SIDE = 4096
"""Longest side in pixels of a painting that is accepted; views are smaller."""


def painted(self: gr.ImageEditor, payload: Any) -> np.ndarray | None:
    """Return (h, w), True where a layer was painted on; None without a layer."""
    if payload is None:
        return None
    blobs = self.blob_storage.pop(payload.id, None) if payload.id is not None else payload
    found = None
    for layer in [] if blobs is None else blobs.layers:
        if layer is None:
            continue
        alpha = _alpha(bytes(layer) if isinstance(layer, (bytes, bytearray, memoryview)) else str(layer.path))
        found = alpha if found is None or found.shape != alpha.shape else found | alpha
    return found


def _alpha(layer: bytes | str) -> np.ndarray:
    try:
        with Image.open(layer if isinstance(layer, str) else io.BytesIO(layer)) as image:
            if max(image.size) > MAX_SIDE:
                raise gr.Error(f"The painting is larger than {MAX_SIDE} pixels; upload a mask.", print_exception=False)
            return np.asarray(image.convert("RGBA"))[..., 3] > 0
    except (OSError, UnidentifiedImageError):
        raise gr.Error("The painting cannot be read; paint again, or upload a mask.", print_exception=False) from None


# See sent_image.py for why this is a class, made by the plain metaclass. The script of the page needs the name "ImageEditor".
PaintBox: Any = ABCMeta.__new__(
    type(gr.ImageEditor),
    "ImageEditor",
    (gr.ImageEditor,),
    {"preprocess": painted, "__module__": __name__, "__doc__": __doc__},
)
