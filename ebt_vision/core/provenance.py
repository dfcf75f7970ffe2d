"""The provenance of a figure: the command, code and machine, for every results.json."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch


def provenance(program: str, arguments: Sequence[str], device: str = "cpu") -> dict[str, str]:
    """Return command, commit ("unknown" outside a repository), hardware of `device`, torch's version and today's date."""
    root = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root)
    on_gpu = device.startswith("cuda")
    return {
        "command": " ".join(["python", program, *arguments]),
        "commit": git.stdout.strip() or "unknown",
        "hardware": torch.cuda.get_device_name(device) if on_gpu else f"{os.cpu_count()} x {platform.machine()} CPU",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
