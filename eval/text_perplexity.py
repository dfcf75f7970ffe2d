"""Perplexity of text models over thinking steps and candidates, on held-out and shifted text.

    python eval/text_perplexity.py --models runs/text_shakespeare_ebt/model runs/text_shakespeare_transformer/model \\
        --data data/tinyshakespeare/input.txt --share 0.9 1.0 --output results/text

The text is scored unchanged, with swapped case and with typos. Program code (of this library) is always added; --texts
NAME=FILE adds other texts, such as another language. The program writes results.json and report.md. Bits per byte are
comparable for different tokenizers; perplexity is per token.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ebt_vision.core.thinking
from ebt_vision.benchmark.options import OneLineParser, run_program
from ebt_vision.benchmark.text import SHIFTS, TextScores, candidate_counts, score_text
from ebt_vision.core.arguments import named_path, number
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.provenance import provenance
from ebt_vision.data.text import TextDataConfig, TextSet, load_text_set
from ebt_vision.models.checkpoint import checkpoint_hash, load_pretrained, program_device
from ebt_vision.text.generation import make_reader


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 success, 2 bad input, 130 interrupted."""
    return run_program(_parser(), run, arguments)


def run(settings: Any) -> None:
    """Score every model on every text; write and print the report."""
    device = program_device(settings.device)
    models = {name: load_pretrained(name, device=device) for name in dict.fromkeys(settings.models)}
    for model in models.values():
        make_reader(model)  # refuse other kinds of models before the work starts
    length = settings.context_length or min(int(model.config.context_length) for model in models.values())
    texts = load_texts(settings, length)
    for name, model in models.items():
        for samples in texts.values():
            if samples.tokenizer.vocab_size > model.config.vocab_size:
                sizes = f"{samples.tokenizer.vocab_size} tokens, {name} {model.config.vocab_size}"
                raise ValueError(f"--tokenizer {settings.tokenizer} has {sizes}; use the tokenizer of its training")
        if length > model.config.context_length:
            raise ValueError(f"--context-length {length} is above the {model.config.context_length} of {name}")
    results: dict[str, Any] = {
        "about": {
            **provenance("eval/text_perplexity.py", settings.command, str(device)),
            **{"context_length": length, "seed": settings.seed, "data": settings.data},
        },
        "models": {
            name: {"kind": model.model_type, "parameters": model.num_parameters, "hash": checkpoint_hash(name)}
            for name, model in models.items()
        },
        "rows": [],
        "difficulty": [],
    }
    for text, samples in texts.items():
        scores = {}
        for name, model in models.items():
            print(f"{name} on {text}: {samples.num_tokens:,} tokens", file=sys.stderr, flush=True)
            scores[name] = score_text(
                model,
                samples,
                num_steps=settings.steps,
                num_candidates=settings.candidates,
                langevin_std=settings.langevin,
                max_tokens=settings.limit,
                batch_size=settings.batch_size,
                seed=settings.seed,
            )
        _collect(results, text, scores)
    write_text(settings.output / "results.json", json.dumps(results, indent=1) + "\n")
    lines = report(results)
    write_text(settings.output / "report.md", lines)
    print(lines)


def load_texts(settings: Any, length: int) -> dict[str, TextSet]:
    """Return the texts to score by name: the data with every shift, code, and --texts."""
    base = TextDataConfig(path=settings.data, tokenizer=settings.tokenizer, context_length=length, share=tuple(settings.share))
    held_out = load_text_set(base)
    text = held_out.text()
    texts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shift in SHIFTS.items():
            file = Path(folder) / f"{name}.txt"
            file.write_text(shift(text, settings.seed))
            texts[name] = load_text_set(replace(base, path=str(file), share=(0.0, 1.0)))
    others = {"code": str(Path(ebt_vision.core.thinking.__file__))}
    for word in settings.texts:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise ValueError(f"--texts {word} does not have the form NAME=FILE")
        others[name] = path
    return texts | {name: load_text_set(replace(base, path=path, share=(0.0, 1.0))) for name, path in others.items()}


def _collect(results: dict[str, Any], text: str, scores: dict[str, TextScores]) -> None:
    references = [s.losses[0, 0] for s in scores.values() if s.energies is None]
    for name, score in scores.items():
        for count in candidate_counts(len(score.losses)):
            results["rows"] += [{"model": name, "text": text, **row} for row in score.summary(count)]
        if score.energies is None:
            continue
        # Difficulty of a token, from another model or another start: see gain_by_difficulty.
        others = references or ([score.losses[-1, 0]] if len(score.losses) > 1 else [])
        for other in others[:1]:
            rows = score.gain_by_difficulty(other)
            results["difficulty"] += [{"model": name, "text": text, "tenth": i, **row} for i, row in enumerate(rows, 1)]


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    about = results["about"]
    lines = ["# Text: perplexity against thinking", "", f"    {about['command']}", ""]
    made = ", ".join([f"commit {about['commit']}", about["hardware"], f"torch {about['torch']}", about["date"]])
    lines += [f"{made}, seed {about['seed']}.", ""]
    lines += [f"- `{name}`: {m['kind']}, {m['parameters']:,} parameters, {m['hash']}" for name, m in results["models"].items()]
    head = "| model | text | candidates | steps | perplexity | bits per byte | gain over one step (nats per token) |"
    lines += ["", head, "|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        gain = f"{row['gain_nats']:+.4f} ± {row['gain_error']:.4f}"
        numbers = f"{row['candidates']} | {row['steps']} | {row['perplexity']:.3f} | {row['bits_per_byte']:.4f} | {gain}"
        lines.append(f"| {row['model']} | {row['text']} | {numbers} |")
    lines += ["", "± is one standard error, with tokens treated as independent, although neighbours are not."]
    if results["difficulty"]:
        lines += ["", "Gain of the last step over the first, by tenths of the tokens from the easiest to the hardest:", ""]
        lines += ["| model | text | tenth | difficulty (nats) | gain (nats) |", "|---|---|---|---|---|"]
        lines += [
            f"| {row['model']} | {row['text']} | {row['tenth']} | {row['difficulty']:.3f} | {row['gain_nats']:+.4f} |"
            for row in results["difficulty"]
        ]
    return "\n".join(lines) + "\n"


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="text_perplexity", description="Perplexity of text models against steps and candidates.")
    add, count = parser.add_argument, number(int, 1)
    add("--models", nargs="+", required=True, help="folders, shipped names or hub:OWNER/NAME of text models")
    add("--data", required=True, help="text: a file, a folder, parquet or hub:OWNER/NAME")
    add("--share", type=number(float, 0, 1), nargs=2, default=[0.0, 1.0], help="the part of the text to score")
    add("--texts", nargs="*", default=[], metavar="NAME=FILE", help="more texts, such as another language")
    add("--tokenizer", default="bytes", help="bytes, or a tokenizer.json")
    add("--context-length", type=count, help="predictions per sequence (default: the shortest context of the models)")
    add("--steps", type=count, default=10)
    add("--candidates", type=count, default=8)
    add("--langevin", type=number(float, 0), default=0.0, help="noise on the logits before each gradient")
    add("--limit", type=count, default=20_000, help="number of tokens of each text")
    add("--batch-size", type=count, default=8)
    add("--seed", type=number(int, 0), default=0)
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    add("--output", type=named_path, default=Path("results/text"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
