"""Reports of a linear probe: the report, per-class accuracy, the confusion matrix, plots of the sweep."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ebt_vision.probing.features import FeatureCondition
from ebt_vision.probing.heads import Trial
from ebt_vision.probing.scores import ClassifierScores, wilson_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """The trials of one head on one feature."""

    head: str
    condition: FeatureCondition
    layer: str
    pool: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial with the highest held-out top-1, then top-5, then the first."""
        return max(self.trials, key=lambda trial: (trial.top1, trial.top5))

    @property
    def at_edge(self) -> bool:
        """Whether the best value of an ordered hyper-parameter is the lowest or highest tried value."""
        values = [next(iter(trial.hyper.values())) for trial in self.trials]
        return len(values) > 2 and next(iter(self.best.hyper.values())) in (min(values), max(values))


def report(about: dict, swept: Sequence[Swept], rows: Sequence[dict]) -> str:
    """Write the results as Markdown. `rows` are the records of results.json."""
    lines = [
        f"# Linear probe of {about['model']}",
        "",
        f"{about['parameters']:,} parameters (sha256 {about['weights'][:12]}), images of {about['img_size']} px, "
        f"{about['num_classes']} classes (chance {100 / about['num_classes']:.2f} %), {about['num_train']} training and "
        f"{about['num_val']} validation images. Seed {about['seed']}, commit {about['commit']}, {about['hardware']}, "
        f"{about['date']}.",
        f"Command: `{about['command']}`",
        "",
        f"Feature and hyper-parameters were chosen on {about['num_held_out']} held-out images of {about['num_sweep']} training "
        f"images; the head was then fitted on all {about['num_train']}. Intervals are 95 % (Wilson), over images. "
        f"In this folder the validation set has been measured with {about['num_validation_choices']} different choices.",
        *about["notes"],
        "",
        "| head | chosen feature | hyper-parameter | held-out top-1 | validation top-1 | validation top-5 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        hyper = ", ".join(f"{key} {value:g}" if value is not True else key for key, value in row["hyper"].items() if value)
        lines.append(
            f"| {row['head']} | {row['layer']}, {row['pool']}, {row['condition']} | {hyper or 'none'} "
            f"| {_percent(row['held_out_top1'])} | {_percent(row['top1'], row['top1_interval'])} "
            f"| {_percent(row['top5'], row['top5_interval'])} |"
        )
    lines += ["", "## The sweep (held-out images)", "", "| head | condition | layer | pool | best | top-1 | top-5 |"]
    lines.append("|---|---|---|---|---|---|---|")
    for entry in swept:
        best, held = entry.best, about["num_held_out"]
        remark = ("; edge of the grid" if entry.at_edge else "") + ("" if best.converged else "; not converged")
        hyper = ", ".join(f"{key} {value}" for key, value in best.hyper.items())
        interval = wilson_interval(round(best.top1 * held), held)
        lines.append(
            f"| {entry.head} | {entry.condition.name} | {entry.layer} | {entry.pool} | {hyper}{remark} "
            f"| {_percent(best.top1, interval)} | {_percent(best.top5)} |"
        )
    lines += ["", "## Time and memory", "", *(f"- {line}" for line in about["timings"])]
    return "\n".join(lines) + "\n"


def write_classes(folder: Path, head: str, measured: ClassifierScores, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Write per_class-HEAD.csv, confusion-HEAD.npz and confusion-HEAD.png for the true `labels` (N,).

    The .npz also has the predictions, for other statistics.
    """
    with (folder / f"per_class-{head}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "correct", "top1", "low", "high", "most often taken for"])
        for number, name in enumerate(class_names):
            row = measured.confusion[number]
            total, hits = int(row.sum()), int(row[number])
            low, high = wilson_interval(hits, total)
            others = np.where(np.arange(len(row)) == number, -1, row)
            other = class_names[int(others.argmax())] if others.max() > 0 else ""
            writer.writerow([name, total, hits, f"{hits / total:.4f}" if total else "", f"{low:.4f}", f"{high:.4f}", other])
    np.savez_compressed(
        folder / f"confusion-{head}.npz", confusion=measured.confusion, labels=labels, top5_classes=measured.top5_classes
    )
    _draw_confusion(folder / f"confusion-{head}.png", measured, class_names)


def draw_sweep(folder: Path, swept: Sequence[Swept]) -> list[str]:
    """Draw layers.png, and conditions.png if noise level, timestep or thinking steps were swept; return their names."""
    layers = list(dict.fromkeys(entry.layer for entry in swept))
    _draw_lines(
        folder / "layers.png",
        swept,
        along=lambda entry: layers.index(entry.layer),
        line=lambda entry: f"{entry.condition.name}, {entry.pool}",
        axis="layer",
        ticks=layers,
    )
    names = ["layers.png"]
    for field, axis in (("timestep", "timestep"), ("noise_level", "noise level"), ("thinking_steps", "thinking steps")):
        if len({getattr(entry.condition, field) for entry in swept}) < 2:
            continue

        def value(entry: Swept, field: str = field) -> float:
            return getattr(entry.condition, field)

        def rest(entry: Swept, field: str = field) -> str:
            others = {"timestep": "t", "noise_level": "noise ", "thinking_steps": "think "}
            varied = [name for name in others if name != field and len({getattr(e.condition, name) for e in swept}) > 1]
            fixed = [f"{others[name]}{getattr(entry.condition, name)}" for name in varied]
            return ", ".join([entry.layer, entry.pool, *fixed])

        name = f"{field}.png"
        _draw_lines(folder / name, swept, along=value, line=rest, axis=axis)
        names.append(name)
    return names


def _draw_lines(
    path: Path,
    swept: Sequence[Swept],
    *,
    along: Callable[[Swept], float],
    line: Callable[[Swept], str],
    axis: str,
    ticks: Sequence[str] | None = None,
) -> None:
    heads = list(dict.fromkeys(entry.head for entry in swept))
    figure = Figure(figsize=(5.5 * len(heads), 4.5))
    axes = figure.subplots(1, len(heads), squeeze=False)
    for head, panel in zip(heads, axes[0], strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for entry in swept:
            if entry.head == head:
                lines.setdefault(line(entry), []).append((along(entry), 100 * entry.best.top1))
        for label, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            panel.plot(x, y, marker="o", markersize=3, label=label)
        if ticks is not None:
            panel.set_xticks(range(len(ticks)), ticks, rotation=45, ha="right")
        panel.set(title=head, xlabel=axis, ylabel="held-out top-1, %")
        panel.grid(alpha=0.3)
        if len(lines) <= 20:
            panel.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _draw_confusion(path: Path, measured: ClassifierScores, class_names: Sequence[str]) -> None:
    shares = measured.confusion / np.maximum(measured.confusion.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(7, 6))
    axis = figure.subplots()
    figure.colorbar(axis.imshow(shares, cmap="magma", interpolation="nearest"), label="share of the true class")
    axis.set(xlabel="predicted class", ylabel="true class", title=f"top-1 {100 * measured.top1:.2f} %")
    if len(class_names) <= 20:
        axis.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=6)
        axis.set_yticks(range(len(class_names)), class_names, fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _percent(share: float, interval: Sequence[float] | None = None) -> str:
    text = f"{100 * share:.2f} %"
    return text if interval is None else f"{text} ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})"
