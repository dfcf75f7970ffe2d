"""Compare an EBT with a DiT in the paper's protocol: python docs/tutorials/compare.py EBT DIT FOLDER"""

import sys

from ebt_vision import DenoiseOptions, load_denoiser
from ebt_vision.core import metrics
from ebt_vision.core.rng import sample_generators
from ebt_vision.data.images import DataConfig, load_image_set
from ebt_vision.denoising.base import for_vp_images
from ebt_vision.noise import processes

ebt, dit, folder = sys.argv[1:]
size = load_denoiser(ebt).training_size
images = load_image_set(DataConfig(path=folder, img_size=size, limit=64))
indices = range(len(images))
clean = images.images(indices).float() / 255  # (B, 3, size, size) in [0, 1]


def psnr_of(name: str, level: float, num_steps: int) -> float:
    """Return the mean PSNR over the images; the noise depends only on the level and the image."""
    generators = sample_generators(0, indices, round(1000 * level))
    noisy = processes.add_vp_noise(processes.to_model_range(clean), level, generators)
    denoiser = for_vp_images(load_denoiser(name), level)
    options = DenoiseOptions(num_steps=num_steps, noise_level=level)
    result = denoiser.denoise(processes.to_image_range(noisy), options, image_ids=indices)
    return metrics.psnr(result.image, clean, data_range=1.0).mean().item()


print(f"{len(images)} images of {size} px; PSNR in dB at levels 0.1 and 0.2")
for name, steps in ((ebt, (1, 2, 4, 8)), (dit, (1, 2, 10, 50))):
    for num_steps in steps:
        known, unseen = psnr_of(name, 0.1, num_steps), psnr_of(name, 0.2, num_steps)
        print(f"{name}, {num_steps} steps: {known:.2f}, {unseen:.2f}")
