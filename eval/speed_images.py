"""The parts of eval/speed.py on images: training, growth with tokens, the loader, denoising."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from plain_steps import plain_image_update
from speed_rounds import timed, update_of
from torch import Tensor

from ebt_vision.benchmark.timing import Version
from ebt_vision.core.rng import sample_generators
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.dit import DiTDenoiser
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.regressor import RegressorDenoiser
from ebt_vision.models import blocks
from ebt_vision.models.trunk_config import TrunkConfig
from ebt_vision.objectives.image import ImageBatch
from ebt_vision.training.build import build_model, build_objective
from ebt_vision.training.config import build_config
from ebt_vision.training.image_task import ImageTask
from ebt_vision.training.optim import build_optimizer


def image_training(settings: argparse.Namespace) -> dict:
    """Time the plain step first, then ours, eager and compiled with both heads, and the feed-forward step of the same trunk."""
    sizes = _image_sizes(settings)
    torch.manual_seed(settings.seed)
    size = (settings.batch_size, 3, sizes.img_size, sizes.img_size)
    clean, noisy = torch.randn(2, *size, device=settings.device)

    def ours(model_type: str, *, compiled: bool, checkpoint: bool = False, **model: Any) -> Callable[[], None]:
        train = {"compile": compiled, "checkpoint_blocks": checkpoint}
        return _image_update(settings, sizes, model_type, clean, train=train, **model)

    eager = {head: ours("patch_ebt", compiled=False, energy_head=head) for head in ("linear", "quadratic")}
    forward = ours("patch_regressor", compiled=False)
    calls: list[tuple[str, Callable[[], None], Callable[[], None] | None]]
    calls = [("plain, eager, float32", plain_image_update(sizes, noisy, clean), None)]
    calls += [(f"ours, {head} head, eager", call, None) for head, call in eager.items()]
    if settings.compile:
        calls += [
            (f"ours, {head} head, compiled", ours("patch_ebt", compiled=True, energy_head=head), call)
            for head, call in eager.items()
        ]
    if settings.checkpoint:
        again = ours("patch_ebt", compiled=False, checkpoint=True, energy_head="quadratic")
        calls += [("ours, quadratic head, eager, blocks checkpointed", again, None)]
    calls += [("feed-forward, eager", forward, None)]
    if settings.compile:
        calls += [("feed-forward, compiled", ours("patch_regressor", compiled=True), forward)]
    versions = [Version(name=n, call=call, units=settings.batch_size, counted=counted) for n, call, counted in calls]
    return _timed_images(settings, versions, sizes, settings.batch_size, "images")


def _image_sizes(settings: argparse.Namespace) -> TrunkConfig:
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    return TrunkConfig(**{name: getattr(settings, name) for name in names})


def _image_update(
    settings: argparse.Namespace, sizes: TrunkConfig, model_type: str, clean: Tensor, *, train: dict, **model: Any
) -> Callable[[], None]:
    """Make one update of the project's own objective and optimiser."""
    config = build_config(
        {
            "name": "speed",
            "model_type": model_type,
            "model": asdict(sizes) | model,
            "data": {"path": "unused"},
            "train": train,
        }
    )
    network = build_model(config).to(settings.device)
    objective = build_objective(network, config)
    optimizer = build_optimizer(network, config.optim, bfloat16=config.train.mixed_precision == "bf16")
    generators = sample_generators(0, range(len(clean)), device=clean.device)
    batch = ImageBatch(clean=clean, noise=torch.randn_like(clean), generators=generators)
    return update_of(settings, lambda: objective(batch)["loss"], optimizer, network)


def growth_with_tokens(settings: argparse.Namespace) -> dict:
    """Time our step at each number of tokens; the batch shrinks as the number grows."""
    rows: list[dict] = []
    rate = 0.0
    for tokens in settings.tokens:
        side = round(tokens**0.5)
        if side * side != tokens:
            raise ValueError(f"--tokens {tokens} is not a square; use numbers such as 64, 256, 1024, 4096")
        sizes = replace(_image_sizes(settings), img_size=settings.patch_size * side)
        batch = max(1, settings.batch_size * 64 // tokens)
        clean = torch.randn(batch, 3, sizes.img_size, sizes.img_size, device=settings.device)
        versions = _versions_at(settings, sizes, tokens, clean)
        if not versions:  # --peak-of asks for a row of another length
            continue
        found = _timed_images(settings, versions, sizes, batch, "tokens")
        rows, rate = rows + found["rows"], found["matrix_rate"]
    for row in rows:
        row["ratio"] = row["rate"] / rows[0]["rate"]
    return {"unit": "tokens", "matrix_rate": rate, "rows": rows}


def _versions_at(settings: argparse.Namespace, sizes: TrunkConfig, tokens: int, clean: Tensor) -> list[Version]:
    """Time our step on `clean`: compiled or eager; from 1024 tokens on eager with both kinds of attention too."""
    name, units = f"{tokens} tokens, batch {len(clean)}", len(clean) * tokens
    eager = _image_update(settings, sizes, "patch_ebt", clean, train={})
    whole = _blockwise_from(tokens + 1, eager)  # counted version, because blocks compute their scores again
    versions: dict[str, Callable[[], object]] = {}
    if settings.compile:
        compiled = _image_update(settings, sizes, "patch_ebt", clean, train={"compile": True})
        versions[f"{name}, compiled"] = compiled
    if tokens >= 1024:
        versions |= {f"{name}, whole scores": whole, f"{name}, blocks": _blockwise_from(0, eager)}
    elif not settings.compile:
        versions[name] = eager
    if settings.peak_of is not None:
        versions = {row: call for row, call in versions.items() if row == settings.peak_of}
    return [Version(name=row, call=call, units=units, counted=whole) for row, call in versions.items()]


def _blockwise_from(tokens: int, call: Callable[[], object]) -> Callable[[], object]:
    """Return `call` with attention by blocks from this number of tokens on."""

    def run() -> None:
        with patch.object(blocks, "BLOCKWISE_TOKENS", tokens):
            call()

    return run


def _timed_images(settings: argparse.Namespace, versions: Sequence[Version], sizes: TrunkConfig, batch: int, unit: str) -> dict:
    rows = batch * (sizes.img_size // sizes.patch_size) ** 2
    return timed(settings, versions, (rows, sizes.embed_dim, round(sizes.embed_dim * sizes.mlp_ratio)), unit)


def loader(settings: argparse.Namespace) -> dict:
    """Time the training set, from the decoded cache and with decoding on use, against our step."""
    sizes, size = _image_sizes(settings), settings.batch_size
    clean = torch.randn(size, 3, sizes.img_size, sizes.img_size, device=settings.device)
    versions = [Version(name="our step, eager", call=_image_update(settings, sizes, "patch_ebt", clean, train={}), units=size)]
    with tempfile.TemporaryDirectory() as folder:
        _write_photographs(Path(folder), size, 2 * sizes.img_size, settings.seed)
        for name, cache in (("batches, decoded cache", True), ("batches, decoded on use", False)):
            data = {"path": folder, "img_size": sizes.img_size, "crop": "random", "flip": True, "cache": cache}
            raw = {"name": "speed", "model_type": "patch_ebt", "model": asdict(sizes), "data": data}
            versions.append(Version(name=name, call=_loading(ImageTask(build_config(raw)), size), units=size))
        return _timed_images(settings, versions, sizes, size, "images")


def _loading(task: ImageTask, batch_size: int) -> Callable[[], object]:
    samples, indices = task.load_samples(), list(range(batch_size))
    return lambda: task.make_batch(samples, indices, [0] * batch_size, torch.device("cpu"))


def _write_photographs(folder: Path, count: int, side: int, seed: int) -> None:
    """Make JPEGs with structure at several scales, which take about as long to decode as photographs."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        octaves = [torch.rand(1, 3, cells, cells, generator=generator) for cells in (2, 8, 32)]
        picture = torch.stack([F.interpolate(o, (side, side), mode="bilinear")[0] for o in octaves]).mean(0)
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.jpg", quality=90)


def inference(settings: argparse.Namespace) -> dict:
    """Time an EBT with 1, 2, 4, 8 steps, the regressor once, and a DiT of about the same size by DDIM; all with random
    weights."""
    sizes = _image_sizes(settings)
    noisy = torch.rand(settings.batch_size, 3, sizes.img_size, sizes.img_size, device=settings.device)

    def network(model_type: str, model: dict) -> Any:
        raw = {"name": "speed", "model_type": model_type, "model": model, "data": {"path": "unused"}}
        return build_model(build_config(raw)).to(settings.device).eval()

    dit_sizes = {"img_size": sizes.img_size, "patch_size": sizes.patch_size, "embed_dim": settings.dit_dim}
    dit_sizes |= {"depth": settings.dit_depth, "num_heads": settings.dit_heads}
    ebt = EBTDenoiser(network("patch_ebt", asdict(sizes)), name="ebt")
    regressor = RegressorDenoiser(network("patch_regressor", asdict(sizes)), name="regressor")
    dit = DiTDenoiser(network("dit", dit_sizes), mode="ddim", name="dit")
    print(f"speed: EBT {ebt.num_parameters:,} parameters, DiT {dit.num_parameters:,}", file=sys.stderr)
    runs: list[tuple[str, Denoiser, int]]
    runs = [(f"DiT, DDIM, {settings.dit_passes} passes", dit, settings.dit_passes)]
    runs += [(f"EBT, {steps} step{'s' * (steps > 1)}", ebt, steps) for steps in (1, 2, 4, 8)] + [
        ("regressor, once", regressor, 1)
    ]
    versions = []
    for name, denoiser, steps in runs:
        options = DenoiseOptions(num_steps=steps, noise_level=0.1)
        versions.append(Version(name=name, call=_denoising(denoiser, noisy, options), units=settings.batch_size))
    return _timed_images(settings, versions, sizes, settings.batch_size, "images")


def _denoising(denoiser: Denoiser, noisy: Tensor, options: DenoiseOptions) -> Callable[[], object]:
    return lambda: denoiser.denoise(noisy, options)
