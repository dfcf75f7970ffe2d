"""A name to a feature extractor: a shipped name, a folder, the hub, timm, random weights, or pixels."""

import contextlib
import hashlib
import json
from collections.abc import Iterator

import torch
from torch import nn

from ebt_vision.models.checkpoint import load_pretrained, resolve
from ebt_vision.models.diffusion import Diffusion
from ebt_vision.models.equilibrium import PatchEqM
from ebt_vision.models.patch_ebt import PatchEBT
from ebt_vision.models.pretrained_model import CONFIG_NAME, checkpoint_class, read_config
from ebt_vision.models.registry import image_model_types
from ebt_vision.models.regressor import PatchRegressor
from ebt_vision.probing.extractors import (
    PIXELS,
    DiffusionExtractor,
    FeatureExtractor,
    PixelExtractor,
    TimmExtractor,
    TrunkExtractor,
)

TIMM_PREFIX, RANDOM_PREFIX = "timm:", "random:"


def load_extractor(
    name: str, *, img_size: int | None = None, device: str = "cpu", seed: int = 0, timm_weights: str | None = None
) -> FeatureExtractor:
    """Load the extractor of a shipped name, a folder, "hub:OWNER/NAME", "timm:NAME", "random:NAME" or "pixels".

    `random:NAME` has the architecture of NAME and random weights from `seed`. A timm model also has random weights, unless
    `timm_weights` is a file (safetensors, or a state dict of torch.save) or "pretrained", which downloads. `img_size` is only
    for timm and pixels, 64 if None; a checkpoint has its own. Raises ValueError if a name, a file or a size does not fit.
    """
    if timm_weights is not None and not name.startswith(TIMM_PREFIX):
        raise ValueError(f"timm weights are only for a timm:NAME model, not for {name}; remove them")
    if name == PIXELS:
        return PixelExtractor(img_size or 64)
    if name.startswith(TIMM_PREFIX):
        return _load_timm(name, img_size or 64, device, seed, timm_weights)
    if name.startswith(RANDOM_PREFIX):
        config_path = resolve(name.removeprefix(RANDOM_PREFIX)) / CONFIG_NAME
        cls = checkpoint_class(config_path)
        with _seeded(seed):
            model = cls(cls.config_class(**read_config(config_path)["config"])).to(device)
    else:
        model = load_pretrained(name, device=device)
    own = model.config.img_size
    if img_size not in (None, own):
        raise ValueError(f"{name} was trained at {own} px, not at img_size={img_size}; remove img_size to use {own}")
    identity = weights_hash(model, json.dumps(model.network_config, sort_keys=True))
    if isinstance(model, PatchEBT | PatchRegressor | PatchEqM):
        return TrunkExtractor(model, name, identity)
    if isinstance(model, Diffusion):
        return DiffusionExtractor(model, name, identity)
    raise ValueError(f"a {model.model_type!r} model has no image features; use one of {', '.join(image_model_types())}")


def _load_timm(name: str, img_size: int, device: str, seed: int, weights: str | None) -> FeatureExtractor:
    import timm

    options: dict = {"num_classes": 0}
    if weights is not None:
        options |= {"pretrained": True}
        options |= {} if weights == "pretrained" else {"pretrained_cfg_overlay": {"file": weights}}
    bare = name.removeprefix(TIMM_PREFIX)
    try:
        with _seeded(seed):
            try:
                model = timm.create_model(bare, img_size=img_size, **options)
            except TypeError:  # a convolutional network, which accepts any size
                model = timm.create_model(bare, **options)
        return TimmExtractor(model.to(device), name, img_size, weights_hash(model, bare))
    except Exception as error:  # timm raises many kinds of errors, from KeyError to those of the hub
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} cannot be created at {img_size} px ({reason}); check its name, weights and size") from error


def weights_hash(model: nn.Module, architecture: str) -> str:
    """SHA-256 over an architecture's description and every tensor of the model, 64 hex digits."""
    digest = hashlib.sha256(f"{type(model).__name__} {architecture}".encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Context in which initialisers draw from the global stream with `seed`; afterwards the stream is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
