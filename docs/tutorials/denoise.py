"""Denoise a photograph and read its energies: python docs/tutorials/denoise.py photo.jpg"""

import sys

import torch

from ebt_vision import DenoiseOptions, load_denoiser
from ebt_vision.core import metrics
from ebt_vision.data.image_files import read_image, write_image
from ebt_vision.noise import processes

photo = read_image(sys.argv[1])
noisy = photo.visible_pixels()[None]  # (1, 3, H, W) in [0, 1]
denoiser = load_denoiser("photographs_ebt")

# Denoise in four steps and print the energy after each step.
result = denoiser.denoise(noisy, DenoiseOptions(num_steps=4, keep_trajectory=True))
for step, energy in enumerate(result.energies[:, 0]):
    print(f"after {step} steps: energy {energy:.4f}")
write_image("denoised.png", photo.with_pixels(result.image[0]), overwrite=True)

# Add known noise to the result, so that the error after every step can be measured.
clean = result.image
noisier = processes.add_gaussian_noise(clean, 25, torch.Generator().manual_seed(0))
again = denoiser.denoise(noisier, DenoiseOptions(num_steps=4, keep_trajectory=True))
for step, (image, energy) in enumerate(zip(again.trajectory, again.energies[:, 0], strict=True)):
    psnr = metrics.psnr(image, clean, data_range=1.0).item()
    print(f"after {step} steps: energy {energy:.4f}, PSNR {psnr:.2f} dB")
