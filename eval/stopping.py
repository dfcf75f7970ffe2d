"""Choose the stopping rule of a photograph EBT: PSNR after each step, and where the energy would stop.

    python eval/stopping.py --model runs/photographs_ebt/model --data data/imagenet-photos --split train

Use training images, not those of a benchmark. Every photograph is used at each sigma, and with each kind of realistic noise.
The table has a row for each noise: the PSNR in dB after 0..N steps, and the PSNR and the mean number of steps of two rules. An
image has 99 dB at most.

    tolerance     of the observation: stop when the energy falls below a fraction of the energy of the noisy image
    clean below   no step if the energy of the noisy image shows noise below a standard deviation, in 0..255 units; otherwise
                  the suggested number of steps

The last lines show the worst loss of each rule against the best number of steps for each noise. A loss without noise (sigma 0)
does not count: every step is a loss there.
"""

import functools
import sys
from collections.abc import Callable, Sequence

import torch
from held_out import FULL_SIZE, PROCESSED
from torch import Tensor

from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.core.arguments import number
from ebt_vision.core.metrics import psnr
from ebt_vision.core.rng import sample_generators
from ebt_vision.data.images import DataConfig, load_image_set
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.models.checkpoint import program_device
from ebt_vision.noise.realistic import RealisticNoiseConfig, realistic_pairs

CLEAN_BELOW = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5)
TOLERANCES = (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 1.0)


def stops(energies: Tensor, tolerance: float) -> Tensor:
    """Return the step at which each sample stops, int64 (B,), by the rule of think(); energies (T + 1, B) start with the
    observation.

    A sample stops at the first t >= 1 with E_t <= tolerance * E_0, and at t - 1 if step t raised the energy.
    """
    num_steps, batch = len(energies) - 1, energies.shape[1]
    ended = torch.full((batch,), num_steps)
    for sample in range(batch):
        for t in range(1, num_steps + 1):
            if t > 1 and energies[t, sample] > energies[t - 1, sample]:
                ended[sample] = t - 1
                break
            if energies[t, sample] <= tolerance * energies[0, sample]:
                ended[sample] = t
                break
    return ended


def clean_steps(energies: Tensor, denoiser: Denoiser, clean_below: float) -> Tensor:
    """Return the steps of samples whose observations have the energies (B,), int64 (B,): 0 below the noise `clean_below`,
    otherwise the suggested number."""
    steps = torch.full(energies.shape, denoiser.suggested_steps)
    clean = denoiser.is_clean(energies, DenoiseOptions(clean_below=clean_below))
    return steps if clean is None else torch.where(clean, 0, steps)


def measure(denoiser: Denoiser, clean: Tensor, noisy: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return PSNR after each of 0..num_steps steps and the energies, both (num_steps + 1, B), of images of one size."""
    options = DenoiseOptions(num_steps=num_steps, keep_trajectory=True, clean_below=0.0)
    psnrs, energies = [], []
    for one, clear in zip(noisy.split(8), clean.split(8), strict=True):
        result = denoiser.denoise_whole(one, options)
        assert result.trajectory is not None and result.energies is not None
        images = [image.clamp(0, 1) for image in result.trajectory]
        psnrs.append(torch.stack([psnr(image, clear, data_range=1.0).clamp(max=99.0) for image in images]))
        energies.append(result.energies)
    return torch.cat(psnrs, 1), torch.cat(energies, 1)


def conditions(clean: Tensor, sigmas: Sequence[float], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return clean and noisy images by name: white Gaussian noise of each sigma, and the kinds of realistic noise."""
    pairs = {}
    for sigma in sigmas:
        generators = sample_generators(seed, range(len(clean)), round(sigma))
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators])
        pairs[f"sigma {sigma:g}"] = (clean, clean + sigma / 255.0 * noise)
    realistic = RealisticNoiseConfig(gaussian_share=0.0, clean_share=0.0)
    kinds = {"realistic": realistic, "processed": PROCESSED, "full size": FULL_SIZE}
    for stream, (name, config) in enumerate(kinds.items(), 1000):
        pairs[name] = realistic_pairs(clean, config, sample_generators(seed, range(len(clean)), stream))
    return pairs


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return exit status 2 for bad input."""
    settings = _parser().parse(arguments)
    try:
        denoiser = load_denoiser(settings.model, device=program_device(settings.device))
        if not denoiser.starts_from_proposal:
            raise ValueError(f"{settings.model} does not think from a proposal; use eval/training_gain.py for its rule")
        if settings.steps < denoiser.suggested_steps:
            raise ValueError(
                f"--steps {settings.steps} is below the {denoiser.suggested_steps} steps that {settings.model} suggests"
            )
        data = DataConfig(path=settings.data, split=settings.split, img_size=settings.img_size, limit=settings.limit)
        images = load_image_set(data)
    except (ValueError, OSError) as error:
        print(f"stopping: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    clean = images.images(range(len(images))).float() / 255.0

    def by_noise(energies: Tensor, sigma: float) -> Tensor:
        return clean_steps(energies[0], denoiser, sigma)

    rules: dict[str, Callable[[Tensor], Tensor]] = {
        **{f"tolerance {tolerance:g}": functools.partial(stops, tolerance=tolerance) for tolerance in TOLERANCES},
        **{f"clean below {sigma:g}": functools.partial(by_noise, sigma=sigma) for sigma in CLEAN_BELOW},
    }
    losses = dict.fromkeys(rules, 0.0)
    fixed = torch.zeros(settings.steps)
    for name, (clear, noisy) in conditions(clean, settings.sigmas, settings.seed).items():
        psnrs, energies = measure(denoiser, clear, noisy, settings.steps)
        means = psnrs.mean(1)
        print(f"{name}: after 0..{settings.steps} steps {' '.join(f'{value:.2f}' for value in means)}")
        shares = energies[1:].mean(1) / energies[0].mean()
        print(f"  energies relative to the noisy image: {' '.join(f'{value:.4f}' for value in shares)}")
        counts = name != "sigma 0"
        fixed = torch.maximum(fixed, counts * (means.max() - means[1:]))
        for rule, steps_of in rules.items():
            taken = steps_of(energies)
            value = psnrs.gather(0, taken[None]).mean()
            losses[rule] = max(losses[rule], counts * float(means.max() - value))
            print(f"  {rule}: {value:.2f} dB, {taken.float().mean():.2f} steps")
    for steps, loss in enumerate(fixed.tolist(), 1):
        print(f"{steps} steps for all: at most {loss:.3f} dB behind the best number of each noise")
    for rule, loss in losses.items():
        print(f"{rule}: at most {loss:.3f} dB behind")
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="stopping", description="Choose the stopping rule of a photograph EBT.")
    add = parser.add_argument
    add("--model", required=True)
    add("--data", required=True, help="images, in the forms of data.path")
    add("--split", help="as data.split")
    add("--img-size", type=number(int, 16), default=160)
    add("--limit", type=number(int, 1), default=48, help="number of images, spread over the set")
    add("--steps", type=number(int, 1), default=5)
    add("--sigmas", type=number(float, 0), nargs="+", default=[0.0, 2.55, 5.0, 15.0, 25.0, 50.0, 75.0])
    add("--seed", type=number(int, 0), default=0)
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
