"""Uses of an energy in addition to denoising: detection, quality without a reference, uncertainty.

    python eval/energy_uses.py --models tiny_imagenet_ebt tiny_imagenet_regressor tiny_imagenet_dit \
        --data "data/tiny-imagenet-200/validation-*.parquet" --tune-data "data/tiny-imagenet-200/train-*.parquet" \
        --others photographs=data/cbsd68 --output results/energy_uses

Every network gives an image a score, higher for a less likely one: the EBT its energy, the regressor the change that it would
make, the DiT its error at one timestep (ebt_vision/benchmark/energy_scores.py). Three tables:

    detection    AUROC between the images of --data and other images: those of --others, drawings made by a program, and
                 damaged copies. 0.5 tells nothing. Below 0.5 the others look likelier than the images themselves. Two-sided:
                 the same for the distance of the score from its median over --tune-data (Nalisnick et al. 2019, arXiv
                 1906.02994): an image that is too likely is found too.
    quality      Spearman correlation of score and true squared error, over noisy images of several levels, and within a level
    uncertainty  Spearman correlation over patches of score and true squared error of images that the network itself denoised

The DiT's timestep is chosen on images of --tune-data, for the highest mean AUROC there. results.json, report.md and
reliability.png (error against score, in ten bins of patches) are written to --output.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from ebt_vision.benchmark.energy_scores import Scorer, detection_auroc
from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.benchmark.statistics import spearman
from ebt_vision.core.arguments import named_path, number
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.provenance import provenance
from ebt_vision.core.rng import make_generator, randn_like, sample_generators
from ebt_vision.data.graphics import draw_graphic
from ebt_vision.data.images import DataConfig, load_image_set
from ebt_vision.denoising.base import for_vp_images
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.network import ModelDenoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.models.checkpoint import checkpoint_hash, program_device
from ebt_vision.noise import processes

TIMESTEPS = (5, 20, 50, 99)
LEVELS = (0.01, 0.03, 0.06, 0.1, 0.15, 0.2)
DENOISED_LEVEL = 0.1
_BINS = 10


def damaged(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Return name -> copies of the images (B, 3, H, W) in [0, 1], each with one damage, clipped."""
    from torchvision.transforms.functional import gaussian_blur

    generators = sample_generators(seed, range(len(images)))
    noise = randn_like(images, generators)
    return {
        "noise 10": (images + 10 / 255 * noise).clamp(0, 1),
        "noise 50": (images + 50 / 255 * noise).clamp(0, 1),
        "blur 1": gaussian_blur(images, 7, 1.0),
        "blur 3": gaussian_blur(images, 19, 3.0),
        "JPEG 10": processes.add_jpeg(images, 10),
        "salt and pepper 2 %": processes.add_salt_and_pepper(images, 0.02, make_generator(seed, 1)),
        "contrast 30 %": 0.5 + 0.3 * (images - 0.5),
    }


def drawings(count: int, size: int, seed: int) -> Tensor:
    """Drawings made by a program, (count, 3, size, size) in [0, 1]."""
    return torch.stack([torch.from_numpy(draw_graphic(size, make_generator(seed, i))) for i in range(count)]).float() / 255


def detect(scorer: Scorer, images: Tensor, others: dict[str, Tensor], centre: float = -math.inf) -> dict[str, float]:
    """AUROC of the images against each of the others, by the score's distance from `centre`; -inf: by the score itself."""

    def score(some: Tensor) -> Tensor:
        scores = scorer.score(some)
        return scores if math.isinf(centre) else (scores - centre).abs()

    inside = score(images)
    return {name: detection_auroc(inside, score(other)) for name, other in others.items()}


def choose_timestep(denoiser: ModelDenoiser, images: Tensor, seed: int) -> int:
    """Return the timestep of the DiT with the highest mean AUROC against damaged copies of the images (B, 3, H, W)."""
    others = damaged(images, seed)
    means = {t: np.mean(list(detect(Scorer(denoiser, timestep=t, seed=seed), images, others).values())) for t in TIMESTEPS}
    return max(means, key=lambda t: means[t])


def assess_quality(scorer: Scorer, images: Tensor, seed: int) -> dict[str, float]:
    """Rank correlation of score and mean squared error of noisy images, over all levels and as a mean within a level."""
    scores, errors = [], []
    for index, level in enumerate(LEVELS):
        generators = sample_generators(seed, range(len(images)), index)
        signal, std = processes.signal_and_noise_scale(level)
        noise = randn_like(images, generators)
        noisy = images + 0.5 * std / signal * noise  # as a photograph, in [0, 1]
        scores.append(scorer.score(noisy).numpy())
        errors.append((noisy - images).square().flatten(1).mean(1).numpy())
    within = [float(spearman(s, e)) for s, e in zip(scores, errors, strict=True)]
    return {
        "all levels": float(spearman(np.concatenate(scores), np.concatenate(errors))),
        "within a level": float(np.mean(within)),
    }


def patch_uncertainty(scorer: Scorer, denoised: Tensor, images: Tensor) -> tuple[float, list[tuple[float, float]]]:
    """Spearman correlation over all patches of score and error of denoised images, and (mean score, RMSE) of ten bins."""
    side = scorer.denoiser.patch_size
    scores = scorer.score_map(denoised).flatten().numpy()
    errors = torch.nn.functional.avg_pool2d((denoised - images).square().mean(1, keepdim=True), side).flatten().double().numpy()
    order = np.argsort(scores)
    bins = [(float(scores[part].mean()), float(np.sqrt(errors[part].mean()))) for part in np.array_split(order, _BINS)]
    return float(spearman(scores, errors)), bins


def denoise(denoiser: ModelDenoiser, images: Tensor, seed: int) -> Tensor:
    """Add VP noise of DENOISED_LEVEL to the images (B, 3, H, W) and denoise them with the defaults of the network."""
    generators = sample_generators(seed, range(len(images)), 100)
    noisy = processes.to_image_range(processes.add_vp_noise(processes.to_model_range(images), DENOISED_LEVEL, generators))
    adapted = for_vp_images(denoiser, DENOISED_LEVEL)
    options = DenoiseOptions(num_steps=1, noise_level=DENOISED_LEVEL)
    return torch.cat([adapted.denoise(part, options).image for part in noisy.split(50)])


def measure(
    name: str, device: str, settings, images: Tensor, tune: Tensor, others: dict[str, Tensor], say: Callable[[str], object]
) -> dict:
    """Return all figures of one model as plain data."""
    denoiser = load_denoiser(name, device=device, precision="float32")
    if not isinstance(denoiser, ModelDenoiser):
        raise ValueError(f"{name} has no network; name an EBT, a regressor or a DiT")
    found: dict = {"model": name, "checkpoint": checkpoint_hash(name), "timestep": None}
    scorer = Scorer(denoiser, seed=settings.seed)
    if not scorer.has_map:
        found["timestep"] = choose_timestep(denoiser, tune, settings.seed)
        scorer = Scorer(denoiser, timestep=found["timestep"], seed=settings.seed)
    say(f"{name}: detection")
    found["detection"] = detect(scorer, images, others)
    found["two-sided detection"] = detect(scorer, images, others, centre=float(scorer.score(tune).median()))
    say(f"{name}: quality")
    found["quality"] = assess_quality(scorer, images, settings.seed)
    if scorer.has_map:
        say(f"{name}: uncertainty")
        spearman_of_patches, bins = patch_uncertainty(scorer, denoise(denoiser, images, settings.seed), images)
        found["uncertainty"] = {"spearman": spearman_of_patches, "bins": bins}
    return found


def report(results: dict) -> str:
    """Return the three tables as Markdown."""
    models = results["models"]
    head = ["| | " + " | ".join(m["model"] for m in models) + " |", "| --- |" + " ---: |" * len(models)]
    lines = ["# What an energy is good for", "", f"{results['num_images']} images."]
    for title, part in (("Detection, AUROC", "detection"), ("Two-sided detection, AUROC", "two-sided detection")):
        lines += ["", f"## {title}", "", *head]
        for kind in models[0][part]:
            lines.append(f"| {kind} | " + " | ".join(f"{m[part][kind]:.3f}" for m in models) + " |")
        means = [np.mean(list(m[part].values())) for m in models]
        lines.append("| **mean** | " + " | ".join(f"{value:.3f}" for value in means) + " |")
    lines += ["", "## Quality without a reference, Spearman", "", *head]
    for kind in models[0]["quality"]:
        lines.append(f"| {kind} | " + " | ".join(f"{m['quality'][kind]:.3f}" for m in models) + " |")
    lines += ["", f"## Uncertainty of patches, denoised from level {DENOISED_LEVEL:g}, Spearman", "", *head]
    values = [m.get("uncertainty") for m in models]
    lines.append("| patches | " + " | ".join("none" if v is None else f"{v['spearman']:.3f}" for v in values) + " |")
    chosen = [f"{m['model']}: {m['timestep']}" for m in models if m["timestep"] is not None]
    lines += ["", *(["Timesteps chosen on the images of --tune-data: " + ", ".join(chosen) + ".", ""] if chosen else [])]
    made = results["provenance"]
    lines += [
        "    " + made["command"],
        "",
        f"Commit {made['commit']}, {made['hardware']}, {made['date']}, seed {results['seed']}.",
    ]
    return "\n".join(lines) + "\n"


def relative(scores: np.ndarray) -> np.ndarray:
    """Scores divided by the largest magnitude; unchanged if it is 0 or not finite."""
    largest = np.abs(scores).max()
    return scores / largest if 0 < largest < np.inf else scores


def plot_reliability(results: dict, path: Path) -> None:
    """RMSE against the mean score of each bin, scores relative to the largest magnitude; one line a model."""
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    for model in results["models"]:
        if "uncertainty" in model:
            scores, errors = np.array(model["uncertainty"]["bins"]).T
            axis.plot(relative(scores), errors, marker="o", label=model["model"])
    axis.set(xlabel="score of the patches / largest magnitude of a bin", ylabel="RMSE of the patches, on [0, 1]")
    axis.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Write results.json, report.md and the plot; exit status 2 for bad input."""
    settings = _parser().parse(arguments)
    try:
        device = program_device(settings.device)
        images, tune = (_load(path, settings) for path in (settings.data, settings.tune_data))
        others = {"drawings": drawings(len(images), settings.img_size, settings.seed)} | damaged(images, settings.seed)
        for pair in settings.others:
            name, equals, path = pair.partition("=")
            if not (name and equals and path):
                raise ValueError(f"--others {pair!r} is not of the form NAME=PATH")
            others = {name: _load(path, settings)} | others
        models = [
            measure(name, device, settings, images, tune, others, lambda text: print(text, file=sys.stderr))
            for name in settings.models
        ]
    except (ValueError, OSError) as error:
        print(f"energy_uses: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    given = sys.argv[1:] if arguments is None else arguments
    made = provenance("eval/energy_uses.py", given, device)
    results = {"provenance": made, "seed": settings.seed, "num_images": len(images), "models": models}
    settings.output.mkdir(parents=True, exist_ok=True)
    write_text(settings.output / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(settings.output / "report.md", report(results))
    plot_reliability(results, settings.output / "reliability.png")
    print(f"written: {settings.output / 'report.md'}")
    return 0


def _load(path: str, settings) -> Tensor:
    """Return images (B, 3, S, S) in [0, 1], S = --img-size: the central square of each image."""
    data = DataConfig(path=path, img_size=settings.img_size, limit=settings.limit)
    images = load_image_set(data)
    return images.images(range(len(images))).float() / 255.0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="energy_uses", description="What an energy is good for beside denoising.")
    add = parser.add_argument
    add("--models", nargs="+", required=True, help="shipped names, folders or hub:OWNER/NAME")
    add("--data", required=True, help="images of the kind that the models were trained on, not those of the training")
    add("--tune-data", required=True, help="images of the training, which choices are made on")
    add("--others", nargs="*", default=[], metavar="NAME=PATH", help="other images to tell apart")
    add("--img-size", type=number(int, 16), default=64, help="side of the images, pixels (default 64)")
    add("--limit", type=number(int, 2), default=200, help="images of each set (default 200)")
    add("--seed", type=number(int, 0), default=0)
    add("--device", help="cpu, cuda, cuda:1 or mps (default: a GPU if there is one)")
    add("--output", type=named_path, default=Path("results/energy_uses"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
