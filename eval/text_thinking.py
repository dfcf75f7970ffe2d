"""Does thinking help text models? Accuracy and bits per byte on generated problems, by steps and candidates.

    python eval/text_thinking.py --models ebt=runs/text_tasks_ebt/model transformer=runs/text_tasks_transformer/model \\
        --tasks copy:1-8 copy:9-12 --output results/text_thinking

Several folders with one label are seeds of one recipe: `--models ebt=A/model ebt=B/model`. The number of steps and candidates
of a recipe, and its temperature, are chosen on the problems of --choose-on, with another seed. The program writes results.json
and report.md.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebt_vision.benchmark.options import OneLineParser, run_program
from ebt_vision.benchmark.text import candidate_counts
from ebt_vision.benchmark.text_thinking import AnswerScores, best_temperatures, score_answers, task_problems
from ebt_vision.core.arguments import named_path, number
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.provenance import provenance
from ebt_vision.data.text_tasks import TaskSizes, parse_tasks
from ebt_vision.data.tokenizer import ByteTokenizer
from ebt_vision.models.checkpoint import checkpoint_hash, load_pretrained, program_device
from ebt_vision.text.generation import make_reader

CHOOSE_ON = ("copy:1-8", "reverse:1-8", "addition:1-4", "dyck:1-6")
LARGER = ("copy:9-10", "copy:11-12", "reverse:9-10", "reverse:11-12", "addition:5", "addition:6", "dyck:7-8", "dyck:9-10")
TASKS = (*CHOOSE_ON, *LARGER)
STEPS_SHOWN = (1, 2, 3, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a model does by default, chosen on other problems than those reported."""

    steps: int
    candidates: int
    temperatures: list[float]
    """One for each number of steps."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 success, 2 bad input, 130 interrupted."""
    return run_program(_parser(), run, arguments)


def run(settings: Any) -> None:
    """Score every model on every task; write and print the report."""
    device = program_device(settings.device)
    labels = [_label_and_path(word) for word in settings.models]
    tasks, choose_on = ([_one_task(word) for word in words] for words in (settings.tasks, settings.choose_on))
    results: dict[str, Any] = {
        "about": {
            **provenance("eval/text_thinking.py", settings.command, str(device)),
            "seed": settings.seed,
            "problems": settings.problems,
        },
        "models": [],
        "rows": [],
    }
    for label, path in labels:
        model = load_pretrained(path, device=device)
        make_reader(model)  # refuse other kinds of models
        if model.config.vocab_size != ByteTokenizer.vocab_size:
            raise ValueError(f"{path} has {model.config.vocab_size} tokens; the problems are bytes, which need 257")
        print(f"{label}: {path}", file=sys.stderr, flush=True)

        def score(task: TaskSizes, seed: int, model: Any = model) -> AnswerScores:
            group = task_problems(task, settings.problems, seed)
            return score_answers(
                model,
                group,
                num_steps=settings.steps,
                num_candidates=settings.candidates,
                batch_size=settings.batch_size,
                seed=seed,
            )

        choice = choose([score(task, settings.seed + 1) for task in choose_on])
        results["models"].append(
            {
                "label": label,
                "kind": model.model_type,
                "parameters": model.num_parameters,
                "hash": checkpoint_hash(path),
                "steps": choice.steps,
                "candidates": choice.candidates,
                "temperature": choice.temperatures[choice.steps - 1],
            }
        )
        index = len(results["models"]) - 1
        for task in tasks:
            scores = score(task, settings.seed)
            tempered = scores.bits_at(choice.temperatures)
            for count in candidate_counts(len(scores.losses)):
                for row in scores.rows(count):
                    extra = {"bits_at_temperature": tempered[row["steps"] - 1]} if count == 1 else {}
                    results["rows"].append({"model": index, "label": label, "task": str(task), **row, **extra})
    write_text(settings.output / "results.json", json.dumps(results, indent=1) + "\n")
    lines = report(results)
    write_text(settings.output / "report.md", lines)
    print(lines)


def choose(scores: Sequence[AnswerScores]) -> Choice:
    """Return the number of steps (one candidate) and of candidates (at these steps) with the lowest mean loss over all tasks,
    and the best temperature at each number of steps."""

    def mean_loss(candidates: int) -> np.ndarray:
        return np.mean([each.of(each.losses, candidates).mean(1) for each in scores], axis=0)  # (T,)

    steps = int(mean_loss(1).argmin())
    best = min(candidate_counts(len(scores[0].losses)), key=lambda n: float(mean_loss(n)[steps]))
    return Choice(steps + 1, best, best_temperatures(np.mean([each.tempered for each in scores], axis=0)))


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    about = results["about"]
    lines = ["# Text: problems against thinking", "", f"    {about['command']}", ""]
    made = ", ".join([f"commit {about['commit']}", about["hardware"], f"torch {about['torch']}", about["date"]])
    lines += [f"{made}, seed {about['seed']}, {about['problems']} problems per task.", ""]
    lines += ["| model | kind | parameters | hash | steps | candidates | temperature |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {m['label']} | {m['kind']} | {m['parameters']:,} | {m['hash']} "
        f"| {m['steps']} | {m['candidates']} | {m['temperature']:g} |"
        for m in results["models"]
    ]
    lines += ["", "Steps, candidates and temperature were chosen on other problems of the training sizes.", ""]
    lines += _steps_tables(results)
    lines += _gain_table(results)
    return "\n".join(lines) + "\n"


def _steps_tables(results: dict[str, Any]) -> list[str]:
    steps = [s for s in STEPS_SHOWN if s <= max(row["steps"] for row in results["rows"])]
    head = "| task | model | " + " | ".join(f"{s} step{'s' * (s > 1)}" for s in steps) + " |"
    lines = []
    for title, key, form in (
        ("Whole answers that are right, one candidate, percent", "answer_accuracy", lambda v: f"{100 * v:.1f}"),
        ("Bits per byte of the answers, one candidate", "bits_per_byte", lambda v: f"{v:.3f}"),
        ("Bits per byte at the chosen temperature, one candidate", "bits_at_temperature", lambda v: f"{v:.3f}"),
    ):
        lines += [f"{title}:", "", head, "|---|---|" + "---|" * len(steps)]
        for task, label in _groups(results):
            cells = [_mean(results, key, form, task=task, label=label, candidates=1, steps=s) for s in steps]
            lines.append(f"| {task} | {label} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _gain_table(results: dict[str, Any]) -> list[str]:
    """The two columns of the ablation table of Gladstone et al. 2025, for the largest number of steps and the chosen one."""
    lines = ["How much lower the perplexity per token is than after one step from one start, percent:", ""]
    lines += [
        "| task | model | chosen steps | most steps | most steps, most candidates | answers right: gain of the last | FLOPs |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    most_steps = max(row["steps"] for row in results["rows"])
    most = max(row["candidates"] for row in results["rows"])
    percent = lambda v: f"{v:+.2f}"  # noqa: E731
    for task, label in _groups(results):
        mine = [row for row in results["rows"] if row["label"] == label and row["task"] == task]
        if max(row["steps"] for row in mine) == 1:
            continue
        chosen = [m["steps"] for m in results["models"] if m["label"] == label]
        index = [i for i, m in enumerate(results["models"]) if m["label"] == label]
        at_chosen = [
            row["gain_percent"]
            for i, s in zip(index, chosen, strict=True)
            for row in mine
            if (row["model"], row["steps"], row["candidates"]) == (i, s, 1)
        ]
        cells = [_spread(at_chosen, percent)]
        cells.append(_mean(results, "gain_percent", percent, task=task, label=label, steps=most_steps, candidates=1))
        cells.append(_mean(results, "gain_percent", percent, task=task, label=label, steps=most_steps, candidates=most))
        last = [row for row in mine if (row["steps"], row["candidates"]) == (most_steps, most)]
        error = f" ± {100 * last[0]['answer_gain_error']:.1f}" if len(last) == 1 else ""
        cells.append(_spread([100 * row["answer_gain"] for row in last], lambda v: f"{v:+.1f}") + error)
        one = next(row["flops"] for row in mine if (row["steps"], row["candidates"]) == (1, 1))
        cells.append(f"x{last[0]['flops'] / one:.0f}")
        lines.append(f"| {task} | {label} | {' | '.join(cells)} |")
    lines += [
        "",
        "± is half of a 95 % interval, over problems for one model and over seeds for several. Steps and candidates are",
    ]
    lines += ["not chosen per task. FLOPs: of the most steps and candidates over one step."]
    return lines


def _groups(results: dict[str, Any]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["task"], row["label"]) for row in _by_task(results["rows"])))


def _by_task(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = list(dict.fromkeys(row["task"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["task"]))  # stable: labels stay in their order


def _mean(results: dict[str, Any], key: str, form: Any, **where: Any) -> str:
    found = [row[key] for row in results["rows"] if all(row[name] == value for name, value in where.items())]
    return _spread(found, form)


def _spread(values: list[float], form: Any) -> str:
    """The mean over seeds, with half of its 95 % t interval for two seeds or more."""
    if not values:
        return ""
    if len(values) == 1:
        return str(form(values[0]))
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{form(float(np.mean(values)))} ± {form(float(half)).lstrip('+')}"


def _label_and_path(word: str) -> tuple[str, str]:
    label, equals, path = word.partition("=")
    if not equals:
        return word, word
    if not label or not path:
        raise ValueError(f"--models {word} does not have the form LABEL=FOLDER")
    return label, path


def _one_task(word: str) -> TaskSizes:
    found = parse_tasks(word)
    if len(found) != 1:
        raise ValueError(f"--tasks {word} has {len(found)} tasks; separate them by spaces")
    return found[0]


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="text_thinking", description="Accuracy of text models on problems, against steps and candidates."
    )
    add, count = parser.add_argument, number(int, 1)
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="LABEL=FOLDER",
        help="models; folders with one label are seeds of a recipe",
    )
    add(
        "--tasks",
        nargs="+",
        default=TASKS,
        metavar="NAME:MIN-MAX",
        help="tasks and sizes (default: trained ones and larger ones)",
    )
    add("--choose-on", nargs="+", default=CHOOSE_ON, metavar="NAME:MIN-MAX", help="tasks to choose steps and temperature on")
    add("--problems", type=number(int, 2), default=200, help="problems per task")
    add("--steps", type=count, default=16)
    add("--candidates", type=count, default=16)
    add("--batch-size", type=count, default=32)
    add("--seed", type=number(int, 0), default=0)
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    add("--output", type=named_path, default=Path("results/text_thinking"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
