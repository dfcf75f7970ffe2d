"""Run one row of the table on the images, part by part, and keep the figures of every image."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebt_vision.benchmark.flops import Cost, CostMeter
from ebt_vision.benchmark.images import BenchmarkImages
from ebt_vision.benchmark.pairs import BenchmarkPairs
from ebt_vision.benchmark.parts import Part, Parts, join
from ebt_vision.benchmark.protocols import Condition, same_shapes
from ebt_vision.benchmark.rows import Row, prepare
from ebt_vision.core import metrics
from ebt_vision.core.names import file_name
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.results import DenoiseResult, join_results
from ebt_vision.denoising.tiling import TileGrid, denoise_tiled, tile_grid
from ebt_vision.models.pretrained_model import PretrainedModel

FORMAT = 2
"""Part of the key of every part; a new number makes older parts invalid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model under test: its denoiser, and its name in tables."""

    name: str
    denoiser: Denoiser
    hash: str | None
    """Hash of the checkpoint; None for a method without weights."""

    def config_of(self, row: Row) -> dict | None:
        """Return the config fields that affect the figures of `row`; None for a method without weights."""
        model: PretrainedModel | None = getattr(self.denoiser, "model", None)
        if model is None:
            return None
        names = ["suggested_start"]  # rows do not set a start
        if row.tolerance is not None and row.tolerance_of == "training":
            names.append("training_gain")
        if row.kind == "ebt" and row.clean_below is None and getattr(model.config, "suggested_clean_below", None):
            names.append("suggested_clean_below")
        return model.network_config | {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}

    @property
    def device(self) -> str:
        """The kind of device of the network; rounding and seconds depend on it."""
        weight = next(self.denoiser.parameters(), None)
        return "cpu" if weight is None else weight.device.type


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A row under a condition, with the figures of every image. S is len(row.reported), N the number of candidates."""

    row: Row
    condition: Condition
    model_hash: str | None
    parameters: int
    indices: list[int]
    """The images, by their index in the set."""
    arrays: Part
    """mse (on 0..255), ssim, lpips, energy, passes and flops, all float64 (n, S); steps_used and seconds (n,). With candidates
    also candidate_mse and candidate_energy (n, N). NaN if a figure is not available."""
    sweep: bool = False

    @property
    def psnr(self) -> np.ndarray:
        """PSNR of every image, dB, (n, S)."""
        return psnr_of(self.arrays["mse"])


def psnr_of(mse: np.ndarray) -> np.ndarray:
    """PSNR in dB of mean squared errors on 0..255, any shape; an error of zero counts as 100 dB, so that means are finite."""
    return np.minimum(metrics.psnr_from_mse(torch.from_numpy(np.asarray(mse)), data_range=255.0).numpy(), 100.0)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The common part of all rows: the images, tiles, batches, metrics, and the folder of the parts."""

    images: BenchmarkImages
    folder: Path
    batch_size: int
    tile: int | None
    """Side of the tiles in pixels; 0 for each denoiser's default; None for whole images."""
    lpips: metrics.PerceptualDistance | None
    meter: CostMeter
    overlap: int | None = None
    """Overlap of tiles in pixels; None for each denoiser's default."""

    def batches(self, indices: Sequence[int]) -> list[list[int]]:
        """Return the indices in batches."""
        starts = range(0, len(indices), self.batch_size)
        return [list(indices[start : start + self.batch_size]) for start in starts]

    def parts(self, subject: Subject, row: Row, condition: Condition, indices: Sequence[int]) -> Parts:
        """Return the store of the parts of a row under a condition. Raises ValueError if the folder belongs to another run."""
        key = {
            "row": asdict(row),
            "condition": asdict(condition),
            "checkpoint": subject.hash,
            "config": subject.config_of(row),
            "device": subject.device,
            "images": self.images.hash,
            "limit": len(indices),
            "batch-size": self.batch_size,
            "tile": self.tile,
            "lpips-backbone": self.lpips and self.lpips.name,
            "format": FORMAT,
        } | ({} if self.overlap is None else {"overlap": self.overlap})
        if self.tile == 0 and subject.denoiser.fits_tiles:
            own = subject.denoiser.tile_size  # parts with the former tiles stay apart
            key["fitted-tiles"] = f"{own} px, overlap {subject.denoiser.overlap_for(own)} px"
        precision = getattr(subject.denoiser, "precision", "float32")
        if precision != "float32":
            key["precision"] = precision
        sweep = f"-{len(indices)}" if len(indices) < len(self.images) else ""
        return Parts(self.folder / file_name(f"{condition.key}-{row.model}-{row.method}-{row.num_steps}{sweep}"), key)

    def measure(
        self, subject: Subject, row: Row, condition: Condition, batches: Iterable[list[int]], parts: Parts
    ) -> list[Part]:
        """Return the figures of the images of each batch; batches that are in `parts` are read, the others are measured."""
        return [
            parts.get(batch, lambda chosen: self._measure_part(subject.denoiser, row, condition, chosen)) for batch in batches
        ]

    def denoise(
        self, denoiser: Denoiser, row: Row, condition: Condition, noisy: Tensor, indices: Sequence[int]
    ) -> tuple[DenoiseResult, TileGrid]:
        """Return the result of a row for noisy images (B, 3, H, W) of one shape, and the tiles of each image."""
        denoiser, noisy, options = prepare(denoiser, row, condition, noisy)
        # Here 0 is the denoiser's own tile and None the whole image; for denoise_tiled it is the other way round.
        tile = {0: None, None: 0}.get(self.tile, self.tile)
        grid = tile_grid(denoiser, noisy.shape[-2:], tile, None if tile == 0 else self.overlap)
        if grid.count == 1:
            return denoiser.denoise_whole(noisy, options, image_ids=indices), grid
        results = [denoise_tiled(denoiser, image[None], options, tile_size=tile, overlap=grid.overlap) for image in noisy]
        return join_results(results), grid

    def _measure_part(self, denoiser: Denoiser, row: Row, condition: Condition, indices: Sequence[int]) -> Part:
        pieces = []
        for group in same_shapes(self.images.images(indices)):
            chosen = [indices[position] for position in group]
            clean, noisy = observed(self.images, condition, chosen)
            begin = time.perf_counter()
            result, grid = self.denoise(denoiser, row, condition, noisy, chosen)
            seconds = (time.perf_counter() - begin) / len(group)
            piece = self._score(row, condition, clean, result)
            piece |= self._spent(denoiser, row, result, grid)
            pieces.append(piece | {"seconds": np.full(len(group), seconds)})
        return join(pieces)

    def _score(self, row: Row, condition: Condition, clean: Tensor, result: DenoiseResult) -> Part:
        target = clean.double()
        trajectory = result.trajectory
        images = [result.image if trajectory is None else trajectory[step] for step in row.reported]
        outputs = [condition.measured(image.cpu().double()) for image in images]
        nothing = torch.full((len(clean),), torch.nan, dtype=torch.float64)
        windowed = min(clean.shape[-2:]) >= 11
        energies = [nothing if result.energies is None else result.energies[step].cpu().double() for step in row.reported]
        columns = {
            "mse": [metrics.mse(output, target) for output in outputs],
            "ssim": [metrics.ssim(output, target, data_range=255.0) if windowed else nothing for output in outputs],
            "lpips": [self.lpips(output / 255.0, target / 255.0) if self.lpips else nothing for output in outputs],
            "energy": energies,
        }
        part = {name: torch.stack(values, dim=1).numpy() for name, values in columns.items()}  # (B, S)
        if result.candidate_images is not None and result.candidate_energies is not None:
            errors = [metrics.mse(condition.measured(image.cpu().double()), target) for image in result.candidate_images]
            part["candidate_mse"] = torch.stack(errors, dim=1).numpy()  # (B, N)
            part["candidate_energy"] = result.candidate_energies.T.cpu().double().numpy()
        return part

    def _spent(self, denoiser: Denoiser, row: Row, result: DenoiseResult, grid: TileGrid) -> Part:
        """Return passes per pixel (of a tile, if tiled), FLOPs of the whole image, and used steps."""
        num_forward = result.num_forward.cpu().double().numpy() / grid.count
        if row.kind == "ebt" and not row.needs_final_energy:
            num_forward = num_forward - row.self_ensemble  # the energy of the last image, of each copy, is only for the table
        cost: Cost | None = self.meter.cost(denoiser, *grid.tile)
        shares = [step / row.num_steps for step in row.reported]
        flops = [
            [grid.count * cost.of_run(row, passes, step) if cost else np.nan for step in row.reported] for passes in num_forward
        ]
        return {
            "passes": np.outer(num_forward, shares),
            "flops": np.asarray(flops, dtype=np.float64),
            "steps_used": result.num_steps.cpu().double().numpy(),
        }


def observed(images: BenchmarkImages, condition: Condition, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return (clean uint8, noisy float) batches (B, 3, H, W) of the images `indices`, which have one shape."""
    clean = torch.stack(images.images(indices))
    if condition.protocol == "real":
        assert isinstance(images, BenchmarkPairs)
        return clean, torch.stack(images.noisy(indices)).float() / 255.0
    return clean, condition.observe(clean, indices)
