"""Make the example images of apps/denoise.py from photographs in scikit-image: python apps/examples/make_examples.py"""

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

HERE = Path(__file__).parent


def main() -> None:
    """Write chelsea.png, coffee.png and rocket.png, 256 pixels on the longer side."""
    for name in ("chelsea", "coffee", "rocket"):
        image = Image.fromarray(np.asarray(getattr(skimage.data, name)()))
        image.thumbnail((256, 256), Image.Resampling.LANCZOS)
        image.save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
