"""restore(): restore an image with a known damage, by the energy of a denoiser and a likelihood of the damage."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ebt_vision.denoising.base import Denoiser, for_photographs
from ebt_vision.denoising.inputs import check_images, working
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.self_ensemble import running_mean
from ebt_vision.models.checkpoint import default_pretrained
from ebt_vision.restoration.likelihoods import Likelihood, Mask
from ebt_vision.restoration.options import Callback, RestoreOptions, RestoreResult, RestoreStep
from ebt_vision.restoration.prior import Prior, tile_side
from ebt_vision.restoration.solvers import SOLVERS, Record, complete


def restore(
    image: Tensor,
    likelihood: Likelihood,
    options: RestoreOptions | None = None,
    *,
    denoiser: Denoiser | None = None,
    callback: Callback | None = None,
) -> RestoreResult:
    """Restore one image (3, H, W) or (1, 3, H, W), float RGB in [0, 1]. `likelihood` describes its damage.

    `denoiser` is the prior: any of load_denoiser, the shipped photograph EBT by default; the descent needs an EBT. Where pixels
    are missing, only tiles that touch them are computed, and known pixels are returned bit for bit unless options.noise is
    above 0. The callback is called after every step. Raises ValueError for an invalid image or option.
    """
    image = image[None] if image.ndim == 3 else image
    check_images(image)
    if len(image) != 1:
        raise ValueError(f"image is a batch of {len(image)}; restore one image at a time")
    likelihood.check_observed(image)
    denoiser = for_photographs(load_denoiser(default_pretrained()) if denoiser is None else denoiser)
    with torch.inference_mode(False), torch.no_grad():
        observed = working(image.clone() if image.is_inference() else image)
        options = complete(options or RestoreOptions(), likelihood, observed)
        assert options.num_runs is not None
        if options.num_runs > 1 and options.solver != "renoising":
            raise ValueError(f"num_runs={options.num_runs} needs noise; solver={options.solver!r} has none, so use num_runs=1")
        if isinstance(likelihood, Mask):
            restore_once = functools.partial(_restore_holes, observed, likelihood)
        else:
            restore_once = functools.partial(_run, observed, likelihood)
        return _mean_of_runs(restore_once, options, denoiser, callback).to(image)


def _mean_of_runs(
    restore_once: Callable[[RestoreOptions, Denoiser, Callback | None], RestoreResult],
    options: RestoreOptions,
    denoiser: Denoiser,
    callback: Callback | None,
) -> RestoreResult:
    """Return the mean of options.num_runs results. If the callback stops a run that is not the first, the run is left out of
    the image; the history has its steps."""
    assert options.num_runs is not None and options.num_steps is not None
    num_runs, num_steps = options.num_runs, options.num_steps
    results: list[RestoreResult] = []
    stopped = complete = False
    mean: Tensor | None = None

    def listen(step: RestoreStep) -> object:
        nonlocal stopped, complete
        assert callback is not None
        image = running_mean(mean, step.image, len(results) + 1)
        index, count = len(results) * num_steps + step.index, num_runs * num_steps
        stopped = callback(replace(step, index=index, num_steps=count, image=image)) is True
        complete = step.index == step.num_steps
        return stopped

    for run in range(num_runs):
        result = restore_once(replace(options, seed=options.seed + run), denoiser, None if callback is None else listen)
        results.append(result)
        if not stopped or complete or mean is None:
            mean = running_mean(mean, result.image, len(results))
        if stopped:
            break
    if len(results) == 1:
        return results[0]
    assert mean is not None
    trajectories = [result.trajectory or () for result in results]
    return replace(
        results[-1],
        image=mean,
        num_runs=len(results) if not stopped or complete else max(len(results) - 1, 1),
        energies=tuple(energy for result in results for energy in result.energies),
        likelihoods=tuple(value for result in results for value in result.likelihoods),
        sums=tuple(value for result in results for value in result.sums),
        num_forward=sum(result.num_forward for result in results),
        trajectory=tuple(image for images in trajectories for image in images) or None,
    )


def _restore_holes(
    observed: Tensor, mask: Mask, options: RestoreOptions, denoiser: Denoiser, callback: Callback | None
) -> RestoreResult:
    """Restore the part of the image around the missing pixels, with a margin of one tile."""
    missing = ~mask.known[0, 0]
    margin = tile_side(denoiser, options.tile_size)
    window = tuple(
        slice(max(int(found[0]) - margin, 0), int(found[-1]) + 1 + margin)
        for found in (missing.any(1).nonzero()[:, 0], missing.any(0).nonzero()[:, 0])
    )
    part, hole = observed[..., window[0], window[1]], missing[window]

    def put_back(image: Tensor) -> Tensor:
        whole = observed.clone()
        whole[..., window[0], window[1]] = image
        return whole

    def listen(step: RestoreStep) -> object:
        assert callback is not None
        return callback(replace(step, image=put_back(step.image)))

    result = _run(part, Mask(~hole), options, denoiser, None if callback is None else listen, hole)
    return result.with_images(put_back)


def _run(
    observed: Tensor,
    likelihood: Likelihood,
    options: RestoreOptions,
    denoiser: Denoiser,
    callback: Callback | None,
    region: Tensor | None = None,
) -> RestoreResult:
    assert options.solver is not None and options.num_steps is not None and options.moving_tiles is not None
    prior = Prior(
        denoiser,
        tile_size=options.tile_size,
        moving=options.moving_tiles,
        turning=options.turning_tiles,
        first_copy=options.seed,
        region=region,
    )
    record = Record(num_steps=options.num_steps, callback=callback, keep_trajectory=options.keep_trajectory)
    x = SOLVERS[options.solver](prior, likelihood, observed, options, record)
    return RestoreResult(
        image=likelihood.finish(x, observed).clamp(0, 1),
        energies=tuple(record.energies),
        likelihoods=tuple(record.likelihoods),
        sums=tuple(record.sums),
        num_forward=record.num_forward,
        solver=options.solver,
        num_runs=1,
        noise=options.noise,
        trajectory=tuple(record.trajectory) or None,
    )
