"""Train a small EBT on photos/train in ten minutes: python docs/tutorials/train.py"""

import json
import sys
from pathlib import Path

from ebt_vision import load_config, load_denoiser
from ebt_vision.training.run import train

CONFIG = Path(__file__).parents[2] / "configs" / "tutorial_ebt.yaml"

config = load_config(CONFIG, sys.argv[1:])
length, batch = config.train.num_updates, config.train.batch_size
print(f"{length} updates of {batch} images of {config.data.img_size} px")
weights = train(CONFIG, sys.argv[1:])

# Print the last validation: PSNR of the noisy images, then after each thinking step.
lines = [json.loads(line) for line in (weights.parent / "log.jsonl").read_text().splitlines()]
last = [line for line in lines if "validation_psnr" in line][-1]
for level, psnr in last["validation_psnr"].items():
    print(f"level {level}: noisy {psnr[0]:.2f} dB, then", *(f"{value:.2f}" for value in psnr[1:]))

# Load the weights: every program accepts their folder in place of a model name.
denoiser = load_denoiser(str(weights))
print(f"{denoiser.num_parameters:,} parameters in {weights}")
