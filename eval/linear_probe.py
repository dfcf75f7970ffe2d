"""Linear probes: how well a classifier can read classes from the features of a frozen network.

    python eval/linear_probe.py --model tiny_imagenet_ebt --data data/tiny-imagenet-200 --output results/probe-ebt
    python eval/linear_probe.py --model tiny_imagenet_dit --timesteps 0 25 50 99 --noise-levels 0 matched --data ...

All requested layers, poolings, noise levels, timesteps and numbers of thinking steps are tried on held-out images of the
*training* set, with every head and every setting of the head. The best feature of each head is fitted again on the whole
training set. Only then are features of the validation set made and measured once. --sweep-limit limits the images used for
choices.

Features are kept in --cache and trials in --output; after an interruption the same command resumes. Other processes with the
same command and --extract-only help to extract the training features. ebt_vision/probing/feature_cache.py describes the disk
space and memory for large sets.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.core.arguments import named_path, not_negative, number, one_of, positive
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.provenance import provenance
from ebt_vision.core.thinking_results import ThinkingError
from ebt_vision.data.images import DataConfig
from ebt_vision.data.lazy_images import LazyImages
from ebt_vision.data.sources import HUB_PREFIX, DataError, MissingSplitError
from ebt_vision.models.checkpoint import program_device
from ebt_vision.probing.extraction import FeatureMaker
from ebt_vision.probing.extractors import FeatureExtractor
from ebt_vision.probing.features import FeatureCondition, check_feature, choose_layers
from ebt_vision.probing.heads import Head, KnnHead, LogisticHead
from ebt_vision.probing.labels import align_labels
from ebt_vision.probing.load import load_extractor
from ebt_vision.probing.report import draw_sweep, report, write_classes
from ebt_vision.probing.selection import (
    Candidate,
    LabelledImages,
    Protocol,
    SweepResult,
    Validated,
    all_features,
    check_sizes,
    choose,
    make_training_features,
    sweep,
    validate,
)
from ebt_vision.probing.torch_head import LEARNING_RATES, TorchHead

VAL_SPLITS = ("validation", "val", "valid", "test")
MATCHED = "matched"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    settings = _parse(arguments)
    try:
        run(settings)
    except (ValueError, OSError, ThinkingError) as error:
        print(f"linear_probe: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = f"features in {settings.cache} and trials in {settings.output} are kept"
        print(f"linear_probe: interrupted; {kept}; run the same command to resume", file=sys.stderr)
        return 130
    return 0


def run(settings: argparse.Namespace) -> None:
    """Choose on the training set, measure on the validation set, write the results into settings.output."""
    begin = time.perf_counter()
    extractor = load_extractor(
        settings.model,
        img_size=settings.img_size,
        device=program_device(settings.device),
        seed=settings.seed,
        timm_weights=settings.timm_weights,
    )
    candidates, heads = _candidates(extractor, settings), _heads(settings)
    train, val = _open_sets(settings, extractor.img_size)
    sweep_set = _sweep_set(train, settings.sweep_limit)
    settings.output.mkdir(parents=True, exist_ok=True)
    maker = FeatureMaker(
        extractor, settings.cache, dtype=settings.dtype, batch_size=settings.batch_size, seed=settings.seed, say=_say
    )
    protocol = Protocol(
        maker=maker,
        trials_folder=settings.output / "trials",
        held_out=settings.held_out,
        num_views=settings.views,
        seed=settings.seed,
        say=_say,
    )
    check_sizes(protocol, candidates, heads, len(train.images))
    if settings.extract_only:
        make_training_features(protocol, sweep_set, all_features(candidates))
        _say(f"the training features are in {settings.cache}")
        return
    swept = sweep(protocol, sweep_set, candidates, heads)
    sweep_seconds = time.perf_counter() - begin
    whole = None if sweep_set is train else train
    choices = [choose(protocol, swept, candidates, head, whole) for head in heads]
    found = [validate(protocol, train, choice, val) for choice in choices]
    timings = _timings(maker, sweep_seconds, time.perf_counter() - begin)
    _write_results(settings, _about(settings, extractor, train, val) | {"timings": timings}, swept, found)


def _write_results(settings: argparse.Namespace, about: dict, swept: SweepResult, found: list[Validated]) -> None:
    rows = [_row(validated) for validated in found]
    for validated in found:
        write_classes(settings.output, validated.choice.head.name, validated.measured, validated.labels, about["class_names"])
    notes = [f"{swept.num_unreadable} training images of the sweep cannot be read and are skipped."]
    about |= {
        "num_sweep": swept.num_images,
        "num_held_out": swept.num_held_out,
        "num_validation_choices": _num_choices(rows, settings),
        "notes": notes if swept.num_unreadable else [],
    }
    names = draw_sweep(settings.output, swept.entries)
    results = {"about": about, "validation": rows, "sweep": [asdict(entry) for entry in swept.entries]}
    write_text(settings.output / "results.json", json.dumps(results, indent=1) + "\n")
    text = report(about, swept.entries, rows) + "\n" + "\n".join(f"![]({name})" for name in names) + "\n"
    write_text(settings.output / "report.md", text)
    print(text)


def _row(validated: Validated) -> dict:
    choice, measured = validated.choice, validated.measured
    return {
        "head": choice.head.name,
        "settings": choice.head.settings,
        "condition": choice.candidate.condition.name,
        "layer": choice.candidate.layer,
        "pool": choice.candidate.pool,
        "dimensions": list(validated.dimensions),
        "hyper": choice.trial.hyper,
        "held_out_top1": choice.trial.top1,
        "top1": measured.top1,
        "top1_interval": list(measured.top1_interval),
        "top5": measured.top5,
        "top5_interval": list(measured.top5_interval),
        "num_images": measured.num_images,
        "num_unreadable": validated.num_unreadable,
        "seconds": validated.seconds,
    }


def _candidates(extractor: FeatureExtractor, settings: argparse.Namespace) -> list[Candidate]:
    """Return all candidates. Raises ValueError if the network does not support one."""
    timesteps = settings.timesteps or ([0] if extractor.takes_timestep else [None])
    conditions = []
    for timestep, level, steps in product(timesteps, settings.noise_levels, settings.thinking_steps):
        if level == MATCHED:
            if timestep is None:
                raise ValueError(f"--noise-levels {MATCHED} is the noise of a timestep, but {extractor.name} takes no timestep")
            level = (timestep + 1) / 1000
        conditions.append(FeatureCondition(noise_level=float(level), timestep=timestep, thinking_steps=steps))
    layers = choose_layers(extractor, settings.layers)
    candidates = [
        Candidate(condition=condition, layer=layer, layers=stored, pool=pool)
        for condition, (layer, stored), pool in product(dict.fromkeys(conditions), layers.items(), settings.pool)
    ]
    for feature in all_features(candidates):
        check_feature(extractor, feature)
    return candidates


def _heads(settings: argparse.Namespace) -> list[Head]:
    """Raise ValueError for an unknown head, or a head that accepts none of the requested poolings."""
    heads: list[Head] = []
    for name in dict.fromkeys(settings.heads):
        if name == "logistic":
            heads.append(LogisticHead(settings.cs))
        elif name == "knn":
            heads.append(KnnHead(device=program_device(settings.device)))
        elif name == "torch":
            head = TorchHead(
                optimizer=settings.optimizer,
                learning_rates=settings.learning_rates,
                epochs=settings.epochs,
                batch_size=settings.probe_batch_size,
                seed=settings.seed,
                device=program_device(settings.device),
            )
            heads.append(head)
        else:
            raise ValueError(f"head {name!r} is unknown; use logistic, knn or torch")
        if not any(heads[-1].accepts("tokens" if pool == "attention" else pool) for pool in settings.pool):
            raise ValueError(f"the {name} head cannot train attention pooling; use --heads torch, or --pool mean")
    if settings.views and "torch" not in settings.heads:
        raise ValueError(f"--views {settings.views}: only the torch head trains on random crops; add --heads torch")
    return heads


def _open_sets(settings: argparse.Namespace, img_size: int) -> tuple[LabelledImages, LabelledImages]:
    """Return (training set, validation set) without reading an image. Raises DataErrors of the sources and their labels."""

    def open_one(path: str, split: str | None, limit: int | None) -> LazyImages:
        columns = {"image_column": settings.image_column, "label_column": settings.label_column}
        return LazyImages(DataConfig(path=path, split=split, img_size=img_size, limit=limit, **columns), seed=settings.seed)

    is_file = not settings.data.startswith(HUB_PREFIX) and not Path(settings.data).expanduser().is_dir()
    if settings.val_data is not None:
        train = open_one(settings.data, settings.train_split, settings.limit_train)
        val = open_one(settings.val_data, settings.val_split, settings.limit_val)
    elif is_file:
        raise DataError(f"{settings.data} is not a folder with splits; use one, or hub:OWNER/NAME, or add --val-data")
    else:
        train = open_one(settings.data, settings.train_split or "train", settings.limit_train)
        val = _first_split(lambda name: open_one(settings.data, name, settings.limit_val), settings.val_split, settings.data)
    labels = align_labels(train.labels, train.class_names, val.labels, val.class_names)
    return (
        LabelledImages(images=train, labels=labels.train, class_names=labels.class_names),
        LabelledImages(images=val, labels=labels.val, class_names=labels.class_names),
    )


def _first_split(open_split: Callable[[str], LazyImages], name: str | None, data: str) -> LazyImages:
    if name is not None:
        return open_split(name)
    reason = ""
    for name in VAL_SPLITS:
        try:
            return open_split(name)
        except MissingSplitError as error:
            reason = str(error)
    raise DataError(f"{data} has no validation set ({reason}); name it with --val-split, or add --val-data")


def _sweep_set(train: LabelledImages, limit: int) -> LabelledImages:
    """Return the part of the training set for choices: `train` itself if the limit is not lower.

    The part is spread evenly over the images in source order, which keeps the class frequencies in sorted files.
    """
    if limit >= len(train.images):
        return train
    images = LazyImages(replace(train.images.config, limit=limit), seed=train.images.seed)
    assert images.labels is not None and train.images.labels is not None
    number = dict(zip(train.images.labels, train.labels.tolist(), strict=True))
    strange = len(set(images.labels) - set(number))
    if strange:
        raise DataError(f"--limit-train removes {strange} classes that the sweep has; increase it, or reduce --sweep-limit")
    labels = np.array([number[label] for label in images.labels])
    return LabelledImages(images=images, labels=labels, class_names=train.class_names)


def _num_choices(rows: list[dict], settings: argparse.Namespace) -> int:
    """Count the different choices measured on the validation set from this output folder, including these."""
    path = settings.output / "validation_choices.json"
    seen = json.loads(path.read_text()) if path.exists() else []
    for row in rows:
        choice = {key: row[key] for key in ("head", "settings", "condition", "layer", "pool", "hyper")}
        choice = json.loads(json.dumps({"model": settings.model, **choice}))
        seen += [] if choice in seen else [choice]
    write_text(path, json.dumps(seen, indent=1) + "\n")
    return len(seen)


def _about(settings: argparse.Namespace, extractor: FeatureExtractor, train: LabelledImages, val: LabelledImages) -> dict:
    return {
        "model": settings.model,
        "weights": extractor.identity,
        "parameters": extractor.num_parameters,
        "img_size": extractor.img_size,
        "class_names": list(train.class_names),
        "num_classes": len(train.class_names),
        "num_train": len(train.labels),
        "num_val": len(val.labels),
        "seed": settings.seed,
        **provenance("eval/linear_probe.py", settings.command, str(extractor.device)),
    }


def _timings(maker: FeatureMaker, sweep_seconds: float, seconds: float) -> list[str]:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    rate = f", {maker.num_made / maker.seconds:.0f} images/s" if maker.seconds else ""
    return [
        f"features: {maker.num_made} images through the network by this run in {maker.seconds:.0f} s{rate}",
        f"sweep with its features: {sweep_seconds:.0f} s; all: {seconds:.0f} s; {torch.get_num_threads()} threads",
        f"features on disk: {maker.bytes_used / 1e9:.3f} GB; peak memory: {peak / 1e9:.2f} GB",
    ]


def _say(message: str) -> None:
    print(f"linear_probe: {message}", file=sys.stderr, flush=True)


class _Parser(OneLineParser):
    """A parser that also splits lists at commas."""

    def add_list(self, name: str, kind: Callable[[str], object], default: list, text: str) -> None:
        """Add an option with several values, separated by spaces or commas."""
        self.add_argument(
            name, nargs="+", type=lambda word: [kind(w) for w in word.split(",") if w], default=[default], help=text
        )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="linear_probe", description="Linear probes on frozen features.")
    _add_inputs(parser)
    _add_features(parser)
    _add_heads(parser)
    parser.add_argument(
        "--output", type=named_path, default=Path("results/probe"), help="folder for results.json, report.md, plots"
    )
    parser.add_argument("--cache", type=named_path, default=Path(".cache/features"), help="folder for the features")
    parser.add_argument(
        "--extract-only", action="store_true", help="only extract the training features, in parallel with other processes"
    )
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="seed of noise, crops, the held-out split and random weights"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    settings = parser.parse(arguments)
    for name, value in vars(settings).items():
        if isinstance(value, list):
            setattr(settings, name, [item for part in value for item in part])
    settings.command = sys.argv[1:] if arguments is None else arguments
    return settings


def _add_inputs(parser: _Parser) -> None:
    parser.add_argument("--model", required=True, help="shipped name, folder, hub:OWNER/NAME, timm:NAME, random:NAME, pixels")
    parser.add_argument(
        "--timm-weights", metavar="PATH", help='file of weights, or "pretrained" to download (default: random weights)'
    )
    parser.add_argument("--data", required=True, help="training images: a folder, parquet files, *.tar or hub:OWNER/NAME")
    parser.add_argument("--val-data", help="validation images, if they are not another split of --data")
    parser.add_argument("--train-split", help="sub-folder, prefix or split of --data (default: train)")
    parser.add_argument("--val-split", help=f"split of the validation images (default: the first of {', '.join(VAL_SPLITS)})")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--img-size", type=number(int, 1), help="for timm and pixels (default 64); a checkpoint has its own")
    parser.add_argument("--limit-train", type=number(int, 1), help="number of training images, spread evenly over the set")
    parser.add_argument("--limit-val", type=number(int, 1), help="number of validation images, spread evenly over the set")


def _add_features(parser: _Parser) -> None:
    parser.add_list("--layers", str, ["all"], "all, numbers, lastK (concatenated), final, gradient (EBT), sideS (pixels)")
    parser.add_list("--pool", one_of("mean", "max", "attention"), ["mean"], "mean, max, attention (trained, torch head only)")
    parser.add_list("--noise-levels", _level, [0.0], f"VP noise of the input, 0..1, or {MATCHED}: the level of the timestep")
    parser.add_list("--timesteps", number(int, 0), [], "timesteps of a DiT, 0..999 (default 0, as in the paper)")
    parser.add_list("--thinking-steps", number(int, 0), [0], "thinking steps of an EBT before its tokens are taken")
    parser.add_argument(
        "--views", type=number(int, 0), default=0, help="random crops of each training image for the torch head"
    )
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="dtype of the features on disk")
    parser.add_argument("--batch-size", type=number(int, 1), default=128, help="images per batch of the network")


def _add_heads(parser: _Parser) -> None:
    parser.add_list("--heads", one_of("logistic", "knn", "torch"), ["logistic", "knn"], "logistic, knn, torch")
    parser.add_list("--cs", positive, [1e-4, 1e-3, 1e-2, 1e-1], "C of logistic regression, inverse to its L2 penalty")
    parser.add_list("--learning-rates", positive, [], "learning rates of the torch head, for a batch of 256 (default: a grid)")
    parser.add_argument("--optimizer", choices=list(LEARNING_RATES), default="sgd", help="optimizer of the torch head")
    parser.add_argument("--epochs", type=number(int, 1), default=30, help="epochs of the torch head")
    parser.add_argument("--probe-batch-size", type=number(int, 2), default=1024, help="batch size of the torch head")
    parser.add_argument(
        "--held-out", type=not_negative, default=0.1, help="fraction of the training images that is held out for choices"
    )
    parser.add_argument(
        "--sweep-limit",
        type=number(int, 4),
        default=20_000,
        help="training images of the sweep; the choice is fitted on all images",
    )


def _level(text: str) -> float | str:
    if text == MATCHED:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; use numbers in 0..1 or {MATCHED}") from None


if __name__ == "__main__":
    sys.exit(main())
