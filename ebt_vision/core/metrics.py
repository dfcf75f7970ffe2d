"""Image quality per sample: float64 (B,) on the CPU, with an explicit data range; averages over the batch are named as such.

Images are moved to the CPU first, because some devices (Apple's) have no float64.
"""

import hashlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image, (B, C, H, W) pairs -> float64 (B,), in the square of the images' unit."""
    _check_pair(prediction, target)
    return (prediction.cpu().double() - target.cpu().double()).square().flatten(1).mean(1)


def psnr(prediction: Tensor, target: Tensor, *, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B, C, H, W) pairs -> float64 (B,); inf for equal images.

    `data_range` is the distance from black to white: 1 for [0, 1], 2 for [-1, 1], 255 for bytes.
    """
    return psnr_from_mse(mse(prediction, target), data_range=data_range)


def psnr_from_mse(error: Tensor, *, data_range: float) -> Tensor:
    """10 log10(data_range^2 / error), any shape. The paper applies it to the *mean* error of a batch."""
    if data_range <= 0:
        raise ValueError(f"data_range={data_range} must be positive: 1 for [0, 1] images")
    return 20.0 * math.log10(data_range) - 10.0 * torch.log10(error.cpu().double())


def ssim(prediction: Tensor, target: Tensor, *, data_range: float) -> Tensor:
    """Structural similarity of each image, float64 (B,), by kornia: 11x11 Gaussian, sigma 1.5, valid area (Wang et al. 2004).

    Raises ValueError if an image is smaller than the window.
    """
    from kornia.metrics import ssim as ssim_map

    _check_pair(prediction, target)
    if min(target.shape[-2:]) < 11:
        raise ValueError(f"SSIM's window is 11x11, the image is {tuple(target.shape[-2:])}; use an image of 11 or more")
    values = ssim_map(prediction.cpu().double(), target.cpu().double(), 11, max_val=data_range, padding="valid")
    return values.flatten(1).mean(1)


LPIPS_MIN_SIDE = 32
"""Minimum side in pixels; for a smaller image the last feature maps of AlexNet are empty."""


class MissingBackboneError(ValueError):
    """LPIPS has no trained backbone; the message says what to pass."""


class PerceptualDistance:
    """LPIPS (Zhang et al. 2018), version 0.1, from the `lpips` package, on an ImageNet backbone that is never random.

    `backbone` is a file with torchvision's weights of the network (.pth or .safetensors), "download" for torchvision's usual
    download, or None for the file that an earlier download left in torch.hub's folder. `name` has the network and the SHA-256
    of its weights. Raises MissingBackboneError if there are no weights, ValueError if the file does not contain them.
    """

    def __init__(self, backbone: str | None = None, *, net: Literal["alex", "vgg", "squeeze"] = "alex", device: str = "cpu"):
        import lpips
        import torchvision

        builders: dict[str, tuple[Callable[..., nn.Module], str]] = {
            "alex": (torchvision.models.alexnet, "AlexNet_Weights"),
            "vgg": (torchvision.models.vgg16, "VGG16_Weights"),
            "squeeze": (torchvision.models.squeezenet1_1, "SqueezeNet1_1_Weights"),
        }
        if net not in builders:
            raise ValueError(f"net={net!r} is unknown; use one of {', '.join(builders)}")
        build, weights_name = builders[net]
        file = _backbone_file(backbone, getattr(torchvision.models, weights_name).IMAGENET1K_V1.url)
        trunk = _load_trunk(build, file)
        # The loader of the package would download the trunk, so build the trunk without weights and load ours.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the package uses arguments that torchvision has deprecated
            model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        for piece in (child for child in model.net.children() if isinstance(child, nn.Sequential)):
            for name, layer in piece.named_children():  # the name is the position in the trunk
                layer.load_state_dict(trunk[int(name)].state_dict())
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = device
        self.name = f"lpips 0.1 {net}, backbone {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"

    @torch.no_grad()
    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance of each image, (B, 3, H, W) pairs in [0, 1] -> float64 (B,); NaN below LPIPS_MIN_SIDE px."""
        _check_pair(prediction, target)
        if min(target.shape[-2:]) < LPIPS_MIN_SIDE:
            return torch.full((len(target),), torch.nan, dtype=torch.float64)
        pair = (images.float().to(self._device) * 2.0 - 1.0 for images in (prediction, target))
        distances: Tensor = self._model(*pair)
        return distances.flatten().cpu().double()


def _backbone_file(backbone: str | None, url: str) -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if backbone == "download":
        try:
            torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
        except OSError as error:
            raise MissingBackboneError(
                f"LPIPS's backbone cannot be downloaded ({error}); pass --lpips-backbone FILE"
            ) from error
    elif backbone is not None:
        cached = Path(backbone).expanduser()
        if not cached.is_file():
            raise ValueError(f"no LPIPS backbone at {backbone}; give torchvision's {url.rsplit('/', 1)[-1]}, or 'download'")
    if not cached.is_file():
        raise MissingBackboneError("LPIPS is not available: pass --lpips-backbone FILE (torchvision's weights) or download")
    return cached


def _load_trunk(build: Callable[..., nn.Module], file: Path) -> nn.Sequential:
    """Return all feature layers of the torchvision network with the weights in `file`."""
    from safetensors.torch import load_file

    model = build(weights=None)
    features: nn.Sequential = model.features  # type: ignore[assignment]
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
        state = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        features.load_state_dict(state)
    except Exception as error:  # each reader has its own errors, from a damaged zip to a missing key
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{file} does not contain the weights of torchvision's {build.__name__} ({reason})") from error
    return features


def _check_pair(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape or prediction.ndim != 4:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"prediction and target must be (B, C, H, W) of one shape, got {shapes}")
