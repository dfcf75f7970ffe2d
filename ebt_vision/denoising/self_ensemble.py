"""The mean over mirrored and rotated copies of an image: geometric self-ensemble (Timofte et al. 2016, Lim et al. 2017).

A network gives slightly different results for the copies of an image. Their errors partly cancel in the mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ebt_vision.denoising.options import SELF_ENSEMBLES, DenoiseOptions
from ebt_vision.denoising.results import Callback, DenoiseResult, DenoiseStep

NUM_COPIES = SELF_ENSEMBLES[-1]
"""Number of mirrored and rotated copies of an image, the image itself among them."""
DenoiseOne = Callable[[Tensor, DenoiseOptions, list[int], Callback], DenoiseResult]
"""Denoises one padded batch, as Denoiser._denoise."""


def turned(images: Tensor, copy: int) -> Tensor:
    """Return copy 0..7 of images (..., H, W): bit 1 mirrors columns, bit 2 rows, and bit 4 first exchanges both."""
    images = images.mT if copy & 4 else images
    return images.flip(_mirrored(copy)) if copy & 3 else images


def turned_back(images: Tensor, copy: int) -> Tensor:
    """Undo `turned` on images (..., H, W)."""
    images = images.flip(_mirrored(copy)) if copy & 3 else images
    return images.mT if copy & 4 else images


def _mirrored(copy: int) -> list[int]:
    return [dim for bit, dim in ((1, -1), (2, -2)) if copy & bit]


def denoise_copies(
    denoise: DenoiseOne, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback
) -> DenoiseResult:
    """Denoise `options.self_ensemble` copies of (B, 3, H, W) one after another; return the mean of their images and energies.

    The callback gets the steps of each copy, turned back, as those of candidate 0, 1, ... If it stops the work, the result is
    the mean of the finished copies. If the first copy is not finished, the result is its image so far.
    """
    count, finished = options.self_ensemble, list[DenoiseResult]()
    if count == 1:
        return denoise(noisy, options, image_ids, callback)
    for copy in range(count):
        stopped = complete = False

        def on_step(step: DenoiseStep, copy: int = copy) -> object:
            nonlocal stopped, complete
            image = turned_back(step.image, copy)
            told = callback(replace(step, image=image, candidate=copy, num_candidates=count))
            stopped = stopped or told is True
            complete = step.index == step.num_steps
            return told

        result = denoise(turned(noisy, copy), options, image_ids, on_step)
        if not stopped or complete or not finished:
            finished.append(_turned_result_back(result, copy))
        else:
            finished[-1] = replace(finished[-1], num_forward=finished[-1].num_forward + result.num_forward)
        if stopped:
            break
    return _mean(finished)


def _turned_result_back(result: DenoiseResult, copy: int) -> DenoiseResult:
    """Turn the images back, and drop what belongs to the single candidate of a copy."""
    return replace(
        result,
        image=turned_back(result.image, copy),
        candidate_images=None,
        candidate_energies=None,
        chosen=None,
        trajectory=result.trajectory and tuple(turned_back(image, copy) for image in result.trajectory),
    )


def running_mean(mean: Tensor | None, value: Tensor, count: int) -> Tensor:
    """Return the mean of `count` values of any shape from the mean of the first count - 1, None for the first.

    The mean of equal values keeps every bit.
    """
    return value if mean is None else mean + (value - mean) / count


def _exact_mean(tensors: Sequence[Tensor]) -> Tensor:
    mean = None
    for number, tensor in enumerate(tensors, 1):
        mean = running_mean(mean, tensor, number)
    assert mean is not None
    return mean


def _mean(results: list[DenoiseResult]) -> DenoiseResult:
    def mean(name: str) -> Tensor | None:
        values = [getattr(result, name) for result in results]
        return None if any(value is None for value in values) else _exact_mean(values)

    image = mean("image")
    assert image is not None
    trajectories = [result.trajectory for result in results if result.trajectory]
    steps = [_exact_mean(images) for images in zip(*trajectories, strict=True)]
    return replace(
        results[0],
        image=image,
        num_steps=torch.stack([result.num_steps for result in results]).amax(0),
        num_forward=torch.stack([result.num_forward for result in results]).sum(0),
        energies=mean("energies"),
        model_energy=mean("model_energy"),
        trajectory=(*steps[:-1], image) if steps else None,
    )
