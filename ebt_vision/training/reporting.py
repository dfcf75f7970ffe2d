"""Reports of a run: JSON lines, TensorBoard, sample grids and a progress line with the remaining time."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from ebt_vision.training.config import ExperimentConfig, config_to_dict
from ebt_vision.training.task import ValidationResult


class Reporter:
    """Write config.yaml, log.jsonl, tensorboard/ and samples/ in the run's folder. Only the main process writes."""

    def __init__(self, output: Path, config: ExperimentConfig, start_step: int, *, is_main: bool):
        self.output, self.total, self.is_main = output, config.train.num_updates, is_main
        self.start_step, self.start_time = start_step, time.monotonic()
        self.writer: SummaryWriter | None = None
        if not is_main:
            return
        (output / "samples").mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))
        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=start_step + 1)
        self._drop_lines_after(start_step)
        if start_step:
            self.say(f"resumed at update {start_step}")

    def say(self, line: str) -> None:
        """Print one line for the user."""
        if self.is_main:
            print(line, file=sys.stderr, flush=True)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the numbers of one update, and print them with the speed and the remaining time."""
        if not self.writer:
            return
        elapsed = time.monotonic() - self.start_time
        per_update = elapsed / max(step - self.start_step, 1)
        self._write({"step": step, "seconds": round(elapsed, 3), **values})
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, step)
        left = time.strftime("%H:%M:%S", time.gmtime(per_update * (self.total - step)))
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"update {step}/{self.total}  {left} left  {numbers}")

    def validation(self, step: int, result: ValidationResult) -> None:
        """Log a validation everywhere; write its sample as samples/STEP."""
        if not self.writer:
            return
        self._write({"step": step, **result.record()})
        for name, value in result.scalars().items():
            self.writer.add_scalar(f"validation/{name}", value, step)
        for line in result.lines():
            self.say(line)
        result.save_sample(self.output / "samples", step)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self.writer:
            self.writer.close()

    def _write(self, record: dict[str, Any]) -> None:
        with (self.output / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _drop_lines_after(self, step: int) -> None:
        """Remove log lines after the last checkpoint: a killed run wrote them, and the resumed run repeats these updates."""
        path = self.output / "log.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # an incomplete line of the killed run
        path.write_text("".join(line + "\n" for line in kept))
