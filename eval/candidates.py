"""What the lowest energy gains among candidates that differ: PSNR of the first, the mean and the chosen candidate.

    python eval/candidates.py --data "data/tiny-imagenet-200/validation-*.parquet" --output results/candidates.json

Noise, images and PSNR are those of the benchmark's paper protocol. The candidates of one noisy image come from

    starts      starts with noise of --start-noise added, as best-of-N of the benchmark has them
    langevin    Langevin noise of --langevin in every step
    rules       the step rules of core/step_rules.py, and multiples of the learned step size
    grids       shifted patch grids: the image moves by up to 3/4 patch in a reflected border, and back after thinking
    mirrored    the eight mirrored and rotated copies, turned back after thinking
    proposal    the reconstruction N(x), alone and as a start
    all         all of them

The first candidate is always plain thinking. All energies are those of the unshifted image. Beside the candidate of lowest
energy the program measures the lowest energy of every patch, means that weight every patch by exp(-energy / temperature), the
plain mean of the candidates, and oracles that know the clean image. Choose temperatures on training images.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_vision.benchmark.images import load_images
from ebt_vision.benchmark.measure import observed
from ebt_vision.benchmark.options import OneLineParser, run_program
from ebt_vision.benchmark.protocols import Condition, paper_psnr
from ebt_vision.benchmark.statistics import bootstrap_means, intervals, spearman
from ebt_vision.benchmark.tables import markdown
from ebt_vision.core.arguments import named_path, number
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.provenance import provenance
from ebt_vision.core.rng import randn_like, sample_generators
from ebt_vision.core.step_rules import BarzilaiBorwein, Momentum
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.denoising.self_ensemble import turned, turned_back
from ebt_vision.models.checkpoint import checkpoint_hash, load_pretrained
from ebt_vision.models.patch_ebt import PatchEBT
from ebt_vision.models.patches import patchify, unpatchify
from ebt_vision.noise.processes import to_model_range

KINDS = ("starts", "langevin", "rules", "grids", "mirrored", "proposal", "all")
SHIFTS = ((4, 4), (0, 4), (4, 0), (2, 2), (6, 6), (2, 6), (6, 2))
"""Eighths of a patch, down and right."""
_BATCH_SIZE = 25
_START_STREAM, _LANGEVIN_STREAM = 0x63616E64, 0x63616E65


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Means over the images of one kind of candidates at one level; PSNR in dB."""

    kind: str
    level: float
    steps: int
    candidates: int
    psnr: dict[str, float]
    """first, mean candidate, lowest energy, lowest energy per patch, weighted T, mean of images, oracle, oracle per patch."""
    gains: dict[str, tuple[float, float, float]]
    """For the same names, the gain over the first candidate with its 95 % interval."""
    over_mean_candidate: tuple[float, float, float]
    """Gain of the lowest energy over the mean candidate, with its 95 % interval."""
    spearman: float
    """Rank correlation of energy and squared error among the candidates of one image, mean over the images."""


class Candidates:
    """Makes the candidates (N, B, C, H, W) of noisy images (B, C, H, W) on [-1, 1]; the first one is plain thinking."""

    def __init__(self, model: PatchEBT, settings: Any):
        self.model, self.settings = model, settings

    def of(self, kind: str, noisy: Tensor, ids: Sequence[int]) -> Tensor:
        """Return the candidates of one of KINDS except "all". Raises ValueError for another kind."""
        makers = {
            "starts": self._starts,
            "langevin": self._langevin,
            "rules": self._rules,
            "grids": self._grids,
            "mirrored": self._mirrored,
            "proposal": self._proposal,
        }
        if kind not in makers:
            raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(KINDS)}")
        return torch.stack([self._think(noisy, noisy), *makers[kind](noisy, ids)])

    def each(self, kinds: Sequence[str], noisy: Tensor, ids: Sequence[int]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield each of the kinds with its candidates and the energies of their patches; "all" makes no candidate twice."""
        made: dict[str, tuple[Tensor, Tensor]] = {}
        for kind in KINDS[:-1] if "all" in kinds else kinds:
            candidates = self.of(kind, noisy, ids)
            made[kind] = candidates, self.energies(candidates, noisy)
        if "all" in kinds:
            first, *rest = made.values()
            made["all"] = tuple(torch.cat([first[i], *(part[i][1:] for part in rest)]) for i in range(2))  # type: ignore[assignment]
        for kind in kinds:
            yield kind, *made[kind]

    def energies(self, images: Tensor, noisy: Tensor) -> Tensor:
        """Return the energy of every patch, (N, B, H / p, W / p)."""
        return torch.stack([self.model.energy_map(image, *self.model.context_of(noisy)) for image in images])

    def _think(self, start: Tensor, noisy: Tensor, scale: float = 1.0, generator: Any = None, **options: Any) -> Tensor:
        config = ThinkingConfig(num_steps=self.settings.steps, **options)
        size = scale * self.model.step_size.detach()
        context = self.model.context_of(noisy)
        return think(
            self.model, start, config, context=context, step_size=size, generator=generator, evaluate_final=False
        ).final

    def _starts(self, noisy: Tensor, ids: Sequence[int]) -> Iterator[Tensor]:
        for candidate in range(1, self.settings.candidates):
            generators = sample_generators(self.settings.seed, ids, _START_STREAM, candidate)
            yield self._think(noisy + self.settings.start_noise * randn_like(noisy, generators), noisy)

    def _langevin(self, noisy: Tensor, ids: Sequence[int]) -> Iterator[Tensor]:
        for candidate in range(1, self.settings.candidates):
            generators = sample_generators(self.settings.seed, ids, _LANGEVIN_STREAM, candidate)
            yield self._think(noisy, noisy, langevin_std=self.settings.langevin, generator=generators)

    def _rules(self, noisy: Tensor, ids: Sequence[int]) -> Iterator[Tensor]:
        for scale in (0.7, 0.85, 1.15, 1.3):
            yield self._think(noisy, noisy, scale)
        if self.settings.steps > 1:  # the first step of these rules is the fixed one
            yield self._think(noisy, noisy, step_rule=BarzilaiBorwein())
            yield self._think(noisy, noisy, step_rule=Momentum())

    def _grids(self, noisy: Tensor, ids: Sequence[int]) -> Iterator[Tensor]:
        patch, (height, width) = self.model.config.patch_size, noisy.shape[-2:]
        padded = F.pad(noisy, [patch] * 4, mode="reflect")
        for down, right in ((patch * y // 8, patch * x // 8) for y, x in SHIFTS):
            # A window that is one patch larger; the image is `down` and `right` of its corner.
            rows = slice(patch - down, 2 * patch - down + height)
            columns = slice(patch - right, 2 * patch - right + width)
            window = padded[..., rows, columns]
            yield self._think(window, window)[..., down : down + height, right : right + width]

    def _mirrored(self, noisy: Tensor, ids: Sequence[int]) -> Iterator[Tensor]:
        for copy in range(1, 8):
            image = turned(noisy, copy)
            yield turned_back(self._think(image, image), copy)

    def _proposal(self, noisy: Tensor, ids: Sequence[int]) -> Iterator[Tensor]:
        proposal, _ = self.model.propose(noisy, *self.model.context_of(noisy))
        yield proposal
        yield self._think(proposal, noisy)


def chosen_per_patch(images: Tensor, scores: Tensor, patch_size: int) -> Tensor:
    """Put together the patches of lowest score: images (N, B, C, H, W), scores (N, B, H / p, W / p) -> (B, C, H, W)."""
    patches = torch.stack([patchify(image, patch_size) for image in images])  # (N, B, P, C * p^2)
    index = scores.flatten(2).argmin(0)[None, :, :, None].expand(1, *patches.shape[1:])
    return unpatchify(patches.gather(0, index)[0], patch_size, *images.shape[-2:])


def weighted_mean(images: Tensor, energies: Tensor, temperature: float, patch_size: int) -> Tensor:
    """Mean of the images with the weight exp(-energy / temperature) for every patch; shapes as in chosen_per_patch."""
    weights = torch.softmax(-energies / temperature, 0)  # (N, B, H / p, W / p)
    pixels = weights.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)
    return (images * pixels[:, :, None]).sum(0)


def measure_batch(
    images: Tensor, energies: Tensor, clean: Tensor, temperatures: Sequence[float], patch_size: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """PSNR of each way to use the candidates, name -> (B,), and the rank correlation of energy and error, (B,).

    Candidates (N, B, C, H, W) on [-1, 1], energies of their patches (N, B, H / p, W / p), clean images (B, C, H, W) uint8.
    """
    images = images.clamp(-1, 1)
    target = to_model_range(clean.float() / 255)
    errors = torch.stack([patchify((image - target).square(), patch_size).sum(-1) for image in images])  # (N, B, P)
    whole, each = energies.flatten(2).sum(2), torch.stack([paper_psnr(image, clean) for image in images])  # (N, B)
    column = torch.arange(images.shape[1])
    ways = {
        "first": each[0],
        "mean candidate": each.mean(0),
        "lowest energy": each[whole.argmin(0), column],
        "lowest energy per patch": paper_psnr(chosen_per_patch(images, energies, patch_size), clean),
    }
    for temperature in temperatures:
        mean = weighted_mean(images, energies, temperature, patch_size)
        ways[f"weighted, temperature {temperature:g}"] = paper_psnr(mean, clean)
    ways |= {
        "mean of the images": paper_psnr(images.mean(0), clean),
        "oracle": each.amax(0),
        "oracle per patch": paper_psnr(chosen_per_patch(images, errors.reshape(energies.shape), patch_size), clean),
    }
    ranks = spearman(whole.T.numpy(), errors.sum(2).T.numpy())
    return {name: value.double().numpy() for name, value in ways.items()}, ranks


@torch.no_grad()
def measure(settings: Any) -> Iterator[Result]:
    """Measure every kind of candidates at every level."""
    model = load_pretrained(settings.model)
    if not isinstance(model, PatchEBT):
        raise ValueError(f"{settings.model} is a {model.model_type}, which has no energy; give a patch_ebt")
    images = load_images(settings.data, img_size=model.config.img_size, limit=settings.limit)
    maker, patch = Candidates(model, settings), model.config.patch_size
    for level in settings.levels:
        condition = Condition(protocol="paper", kind="level", strength=level, seed=settings.seed)
        kinds = list(dict.fromkeys(settings.kinds))
        parts: dict[str, list] = {kind: [] for kind in kinds}
        counts: dict[str, int] = {}
        for start in range(0, len(images), _BATCH_SIZE):
            ids = list(range(start, min(start + _BATCH_SIZE, len(images))))
            clean, noisy = observed(images, condition, ids)
            noisy = to_model_range(noisy)
            for kind, candidates, energies in maker.each(kinds, noisy, ids):
                parts[kind].append(measure_batch(candidates, energies, clean, settings.temperatures, patch))
                counts[kind] = len(candidates)
        for kind, measured in parts.items():
            each = {name: np.concatenate([ways[name] for ways, _ in measured]) for name in measured[0][0]}
            ranks = np.concatenate([rank for _, rank in measured])
            yield Result(
                kind=kind,
                level=level,
                steps=settings.steps,
                candidates=counts[kind],
                psnr={name: float(values.mean()) for name, values in each.items()},
                gains={name: _gain(values, each["first"]) for name, values in each.items() if name != "first"},
                over_mean_candidate=_gain(each["lowest energy"], each["mean candidate"]),
                spearman=float(np.nanmean(ranks)),
            )


def _gain(values: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """Mean difference and its 95 % interval over the images."""
    difference = (values - others)[:, None]
    low, high = intervals(bootstrap_means(difference))[:, 0]
    return float(difference.mean()), float(low), float(high)


def tables(results: Sequence[Result]) -> str:
    """Return a table of PSNR for each level, with the gains of the lowest energy."""
    text = []
    for level in dict.fromkeys(result.level for result in results):
        records = [asdict(result) for result in results if result.level == level]
        columns = [("candidates", lambda r: f"{r['kind']} ({r['candidates']})")]
        columns += [(name, lambda r, name=name: f"{r['psnr'][name]:.2f}") for name in records[0]["psnr"]]  # type: ignore[misc]
        columns += [("Spearman", lambda r: f"{r['spearman']:.2f}")]
        gains = [("candidates", lambda r: r["kind"])]
        gains += [(name, lambda r, name=name: _shown(r["gains"][name])) for name in records[0]["gains"]]  # type: ignore[misc]
        gains += [("lowest energy over the mean candidate", lambda r: _shown(r["over_mean_candidate"]))]
        title = f"Level {level:g}, {records[0]['steps']} steps"
        text.append(f"### {title}: PSNR\n\n{markdown(columns, records)}\n### {title}: gain over the first candidate\n")
        text.append(markdown(gains, records))
    return "\n".join(text)


def _shown(gain: Sequence[float]) -> str:
    return f"{gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}]"


def run(settings: Any) -> None:
    """Measure, print the tables and write the figures."""
    results = []
    for result in measure(settings):
        results.append(result)
        print(f"level {result.level:g} {result.kind}: {result.psnr}", file=sys.stderr, flush=True)
    if settings.output:
        about = provenance("eval/candidates.py", settings.command)
        figures = {"about": about, "weights": checkpoint_hash(settings.model), "results": [asdict(each) for each in results]}
        write_text(settings.output, json.dumps(figures, indent=1) + "\n")
    print(tables(results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 success, 2 bad input, 130 interrupted."""
    return run_program(_parser(), run, arguments)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="candidates", description="Choose among candidates that differ by their energy.")
    add = parser.add_argument
    add("--data", required=True, help="images, as data.path of a config")
    add("--model", default="tiny_imagenet_ebt", help="a patch_ebt")
    add("--limit", type=number(int, 1), default=100, help="images, spread over the set")
    add("--levels", type=number(float, 0, 1), nargs="+", default=[0.1, 0.2])
    add("--steps", type=number(int, 1), default=1, help="thinking steps of every candidate")
    add("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    add("--candidates", type=number(int, 2), default=8, help="number of candidates of starts and langevin")
    add("--start-noise", type=number(float, 0), default=0.1, help="noise on the starts, on [-1, 1]")
    add("--langevin", type=number(float, 0), default=0.05, help="Langevin noise of each step, on [-1, 1]")
    add("--temperatures", type=number(float, 1e-6), nargs="*", default=[], help="of the weighted means, in units of energy")
    add("--seed", type=number(int, 0), default=0)
    add("--output", type=named_path, metavar="FILE", help="where the figures are written, JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
