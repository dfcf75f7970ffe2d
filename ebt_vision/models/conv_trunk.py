"""A patch transformer between convolutions: a stem goes from pixels to tokens, and a decoder upsamples again with skips.

Stem and decoder represent details that a linear patch embedding cannot. The transformer blocks between them work on the same
patches as in the plain trunk. The architecture is a U-Net (Ronneberger et al. 2015) with residual blocks and strided 2x2
convolutions, as in DRUNet (Zhang et al. 2021), and transformer blocks at the coarsest level. Activations are smooth (GELU),
because thinking differentiates the network twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebt_vision.models.patch_trunk import PatchTrunk
from ebt_vision.models.patches import check_image_size, patchify
from ebt_vision.models.trunk_config import TrunkConfig


class ConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions, (B, width, H, W) -> (B, width, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)  # a block starts close to the identity

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(x), approximate="tanh"))


class ConvStem(nn.Module):
    """Images (B, num_inputs * in_chans, H, W) -> tokens (B, N, embed_dim) and the skips of every level, finest first."""

    def __init__(self, config: TrunkConfig, num_inputs: int):
        super().__init__()
        self.unshuffle = config.stem_unshuffle
        widths = config.stem_widths
        self.input = nn.Conv2d(config.in_chans * num_inputs * self.unshuffle**2, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(_conv_blocks(width, config.stem_blocks) for width in widths)
        outputs = (*widths[1:], config.embed_dim)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in zip(widths, outputs, strict=True))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        # Channels last is the faster memory layout for convolutions on CPUs and tensor cores.
        x = F.pixel_unshuffle(images, self.unshuffle).contiguous(memory_format=torch.channels_last)
        x = self.input(x)  # (B, widths[0], H / unshuffle, W / unshuffle)
        skips = []
        for level, down in zip(self.levels, self.down, strict=True):
            x = level(x)
            skips.append(x)
            x = down(x)
        return x.flatten(2).transpose(1, 2), skips  # NCHW -> NLC


class ConvDecoder(nn.Module):
    """Tokens (B, N, embed_dim) and skips -> the change of the image, (B, in_chans, H, W)."""

    def __init__(self, config: TrunkConfig):
        super().__init__()
        self.unshuffle = config.stem_unshuffle
        widths = config.stem_widths
        inputs = (*widths[1:], config.embed_dim)
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in zip(inputs, widths, strict=True))
        self.levels = nn.ModuleList(_conv_blocks(width, config.stem_blocks) for width in widths)
        self.output = nn.Conv2d(widths[0], config.in_chans * self.unshuffle**2, 3, padding=1)
        with torch.no_grad():
            self.output.weight.mul_(0.1)  # the reconstruction starts close to the image itself

    def forward(self, tokens: Tensor, skips: list[Tensor], grid: tuple[int, int]) -> Tensor:
        x = tokens.transpose(1, 2).unflatten(2, grid)  # NLC -> NCHW
        for up, level, skip in zip(reversed(self.up), reversed(self.levels), reversed(skips), strict=True):
            x = level(up(x) + skip)
        return F.pixel_shuffle(self.output(x), self.unshuffle)


def _conv_blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ConvBlock(width) for _ in range(count)))


class ConvTrunk(PatchTrunk):
    """PatchTrunk with a convolutional stem, and a ConvDecoder as head; the reconstruction is the image plus the head's
    output."""

    def _make_embedding(self, config: TrunkConfig, num_inputs: int) -> None:
        self.stem = ConvStem(config, num_inputs)

    def with_second_input(self, weights: dict[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
        name, chans = f"{prefix}stem.input.weight", self.config.in_chans * self.config.stem_unshuffle**2
        plain = weights.get(name)
        if plain is None or plain.shape[1] != chans:
            return {}
        return {name: torch.cat([plain, torch.zeros_like(plain)], dim=1)}  # pixel_unshuffle keeps the images apart

    def make_head(self) -> nn.Module:
        return ConvDecoder(self.config)

    def reconstruct_patches(self, head: nn.Module, *images: Tensor) -> Tensor:
        return patchify(images[0] + self._output(head, *images), self.config.patch_size)

    def output_patches(self, head: nn.Module, *images: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return patchify(self._output(head, *images, conditioning=conditioning), self.config.patch_size)

    def _output(self, head: nn.Module, *images: Tensor, conditioning: Tensor | None = None) -> Tensor:
        """Return the output of the decoder, (B, in_chans, H, W)."""
        grid = check_image_size(images[0], self.config.patch_size)
        x, skips = self.stem(torch.cat(images, dim=1))
        x = x if conditioning is None else x + conditioning[:, None]
        tokens = self.norm(self._run_blocks(x, grid, [self.config.depth - 1])[0])
        return head(tokens, skips, grid)

    def _embed(self, images: Tensor) -> Tensor:
        return self.stem(images)[0]
