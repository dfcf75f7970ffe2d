"""Train the points of a grid with the training loop of the project. Processes share them by claims, and each run can resume."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ebt_vision.benchmark.scaling_grid import Point, Recipe, folder_of
from ebt_vision.benchmark.training_cost import training_cost
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.sharing import CLAIMS, claim_part, release, shared_folder
from ebt_vision.training.config import ExperimentConfig
from ebt_vision.training.loop import Trainer, TrainingDivergedError

RESULT = "result.json"
_POLL_SECONDS = 2.0


class GridRuns:
    """The runs of a grid in `output`/runs, each with its result.json once it is done."""

    def __init__(self, recipe: Recipe, output: Path, *, device: str | None, say: Callable[[str], None]):
        self.recipe, self.output, self.device, self._say = recipe, output, device, say

    def results(self, points: Sequence[Point], *, first: int = 0) -> dict[Point, dict[str, Any]]:
        """Return the result of every point: read it, train it here, or wait for the process that trains it.

        This process starts its search for work at position `first`. A point whose process was killed is free again.
        """
        configs = {point: self.recipe.config(point) for point in points}
        order = [*points[first % max(len(points), 1) :], *points[: first % max(len(points), 1)]]
        done: dict[Point, dict[str, Any]] = {}
        with shared_folder(self.output / CLAIMS):
            while len(done) < len(points):
                worked = False
                for point in order:
                    if point not in done and (result := self._result(point, configs[point])) is not None:
                        done[point] = result
                        worked = True
                if not worked:
                    time.sleep(_POLL_SECONDS)
        return {point: done[point] for point in points}

    def _result(self, point: Point, config: ExperimentConfig) -> dict[str, Any] | None:
        """Return the result of a point and train it if needed; None while another process trains it."""
        name = folder_of(config)
        path = self.output / "runs" / name / RESULT
        if path.is_file():
            return json.loads(path.read_text())
        claim = claim_part(self.output / CLAIMS, name)
        if claim is None:
            return None
        try:
            if not path.is_file():  # another process may have finished it between the two looks
                self._say(f"training {config.name}")
                write_text(path, json.dumps(self._train(config, path.parent), indent=1))
                shutil.rmtree(path.parent / "checkpoints", ignore_errors=True)  # the exported model stays
            return json.loads(path.read_text())
        finally:
            release(claim)

    def _train(self, config: ExperimentConfig, folder: Path) -> dict[str, Any]:
        cost = training_cost(config)
        resumed = (folder / "checkpoints").is_dir()
        start = time.perf_counter()
        error: float | None
        try:
            Trainer(config, folder, device=self.device).run()
            error = read_error(folder / "log.jsonl")
        except TrainingDivergedError as diverged:
            self._say(str(diverged))
            error = None
        samples = config.train.num_updates * config.train.batch_size
        return {
            "parameters": cost.num_parameters,
            "flops_per_sample": cost.flops,
            "training_flops": cost.flops * samples,
            "error": error,
            "seconds": None if resumed else time.perf_counter() - start,
        }


def read_error(log: Path) -> float | None:
    """Return the error of the last validation in the log.jsonl of a run, after its last step; None if it is not finite.

    Images: 10^(-PSNR / 10) of the mean PSNR, the geometric mean over images of the mean squared error on [0, 1]. Text: bits per
    byte.
    """
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in reversed(records):
        if "validation_psnr" in record:
            return float(10.0 ** (-next(iter(record["validation_psnr"].values()))[-1] / 10.0))
        if "validation_bits_per_byte" in record:
            return float(record["validation_bits_per_byte"][-1])
    return None
