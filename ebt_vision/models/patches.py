"""Images to patches, and back."""

from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """NCHW -> NLC: (B, C, H, W) -> (B, H/p * W/p, p * p * C)."""
    B, C, H, W = images.shape
    p = patch_size
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """NLC -> NCHW, the inverse of patchify for images of (height, width)."""
    B, _, dim = patches.shape
    p = patch_size
    x = patches.reshape(B, height // p, width // p, p, p, dim // p**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, dim // p**2, height, width)


def check_image_size(images: Tensor, patch_size: int) -> tuple[int, int]:
    """Return the patch grid (rows, columns) of images (B, C, H, W). Raises ValueError if the patch does not divide them."""
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image of {height}x{width} is not divisible by patch_size={patch_size}; the Denoiser pads such images"
        )
    return height // patch_size, width // patch_size
