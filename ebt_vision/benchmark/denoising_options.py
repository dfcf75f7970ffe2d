"""The options of eval/denoising.py: the command line, checks, and what the options select."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.benchmark.protocols import OOD_STRENGTHS, Condition, Protocol
from ebt_vision.benchmark.rows import RowSettings
from ebt_vision.core.arguments import named_path, number
from ebt_vision.core.thinking_config import ToleranceOf

SWEEP = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
MODELS = "shipped names, folders, hub:OWNER/NAME, bm3d, nlm, identity, spandrel:FILE, deepinv:NAME[:FILE]"
OPTIONS_OF = {
    "levels": ("paper",),
    "sweep": ("paper",),
    "sweep_limit": ("paper",),
    "sigmas": ("awgn",),
    "camera_sigmas": ("camera",),
    "corruptions": ("ood",),
}
"""The protocols in which an option has an effect; a Condition checks --clipped itself."""


def _whole_or_pixels(text: str) -> int | str:
    return "whole" if text == "whole" else int(number(int, 8)(text))


def denoising_parser() -> OneLineParser:
    parser = OneLineParser(prog="denoising", description="The denoising benchmark.")
    add = parser.add_argument_group("what is measured").add_argument
    add("--models", nargs="+", required=True, help=MODELS)
    add("--data", required=True, help="images: a folder, parquet files or hub:OWNER/NAME")
    add("--protocol", choices=get_args(Protocol), default="paper")
    add("--pairs", metavar="NOISY:CLEAN", help='real: patterns of the file names, such as "*_noisy*:*_clean*"')
    add("--output", type=named_path, default=Path("results"), help="folder of all results")
    add("--limit", type=number(int, 1), help="number of images, spread evenly over the set")
    add("--img-size", type=_whole_or_pixels, help="side of centre squares, or whole (default 64; awgn, camera: whole)")
    add("--group", nargs="*", default=[], metavar="NAME=A,B", help="checkpoints to combine into mean and spread")
    _add_noise(parser)
    _add_rows(parser)
    add = parser.add_argument_group("how").add_argument
    add("--tile", type=_whole_or_pixels, help="side of tiles, or whole (default: from the model; paper: whole)")
    add("--overlap", type=number(int, 0), help="overlap of tiles in pixels (default: from each model)")
    add("--batch-size", type=number(int, 1), help="images at a time (default 100; 1 for whole images)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="float32",
        help="precision of the networks; see ebt-vision denoise",
    )
    add("--lpips-backbone", metavar="FILE", help="torchvision's weights of the backbone, or download")
    add("--lpips-net", choices=("alex", "vgg", "squeeze"), default="alex")
    add("--resamples", type=number(int, 100), default=1000, help="bootstrap samples")
    add("--strip", type=number(int, 0), default=2, help="number of images in the strip of each model; 0 disables strips")
    return parser


def _add_noise(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("noise").add_argument
    level = number(float, 1e-3, 1)
    add("--levels", type=level, nargs="+", default=[0.1, 0.2], help="paper: VP noise levels")
    add("--sigmas", type=number(float, 0, 255), nargs="+", default=[15.0, 25.0, 50.0], help="awgn: 0..255 units")
    add("--camera-sigmas", type=number(float, 0, 255), nargs="+", default=[5.0, 10.0, 20.0], help="camera: 0..255 units")
    add("--corruptions", nargs="+", default=list(OOD_STRENGTHS), help=f"ood: some of {', '.join(OOD_STRENGTHS)}")
    switch = argparse.BooleanOptionalAction
    add("--clipped", action=switch, default=False, help="awgn, ood: clip the noisy input and round it to 8 bits")
    add("--sweep", type=level, nargs="*", default=list(SWEEP), help="paper: levels of the plot over levels; no value: no plot")
    add("--sweep-limit", type=number(int, 1), default=256, help="number of images of the sweep, spread evenly")
    add("--seed", type=number(int, 0), default=0)
    add("--seeds", type=number(int, 0), nargs="*", default=[], help="several seeds, combined into mean and spread")


def _add_rows(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rows").add_argument
    count, amount = number(int, 1), number(float, 0)
    add("--steps", type=count, default=10, help="EBT: thinking steps; regressor: how often it is applied")
    add("--tolerances", type=amount, nargs="*", default=[], help="EBT: tolerances, with a row of adaptive thinking for each")
    add(
        "--tolerance-of",
        choices=get_args(ToleranceOf),
        default="first",
        help="EBT: reference of --tolerances; see ebt-vision denoise",
    )
    add("--regressor-tolerances", type=amount, nargs="*", default=[], help="regressor: rows stopped by the size of its change")
    add("--step-sizes", type=amount, nargs="*", default=[], help="EBT: factors on the learned step size, with rows for each")
    add("--candidates", type=number(int, 0), default=8, help="EBT: candidates of best-of-N; 0 disables it")
    add("--candidate-steps", type=count, nargs="*", default=[], help="EBT: steps of best-of-N (default: 1 and --steps)")
    add("--candidate-noise", type=amount, default=0.1, help="EBT: noise on the candidates' starts, on [-1, 1]")
    add("--langevin", type=amount, default=0.0, help="EBT: noise before each gradient of a candidate, on [-1, 1]")
    add("--clean-below", type=number(float, 0, 255), help="EBT: as in ebt-vision denoise (default: from each model)")
    add("--passes", type=count, nargs="*", default=[1, 2, 5, 10, 25, 50, 100], help="DiT: passes of DDIM")
    add("--loops", type=number(int, 0), default=3, help="DiT: loops of the recursion; 0 disables it")
    add("--self-ensemble", type=count, nargs="*", default=[], help="numbers of mirrored copies whose mean is measured: 2, 4, 8")
    add("--reference", metavar="MODEL:METHOD:STEPS", help="the row to compare with (default: the best ddim row)")


def check_options(settings: argparse.Namespace) -> None:
    """Raise ValueError for an option that has no effect with the others."""
    parser = denoising_parser()
    for name, protocols in OPTIONS_OF.items():
        value = getattr(settings, name)
        if value and value != parser.get_default(name) and settings.protocol not in protocols:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} has no effect with --protocol {settings.protocol}, only with {' and '.join(protocols)}")
    if settings.tolerance_of != parser.get_default("tolerance_of") and not settings.tolerances:
        raise ValueError(
            f"--tolerance-of {settings.tolerance_of} has no effect without --tolerances; add --tolerances or remove it"
        )
    for name in ("candidate_steps", "candidate_noise", "langevin"):
        if not settings.candidates and getattr(settings, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --candidates 0; remove it")


def conditions_of(settings: argparse.Namespace) -> tuple[list[Condition], list[Condition]]:
    """Return the conditions of the tables, and those of the sweep over noise levels (only in the paper protocol)."""
    seeds = settings.seeds or [settings.seed]
    kinds: list[tuple[str, float]] = {
        "paper": [("level", level) for level in settings.levels],
        "awgn": [("sigma", sigma) for sigma in settings.sigmas],
        "camera": [("camera", sigma) for sigma in settings.camera_sigmas],
        "ood": [(kind, OOD_STRENGTHS.get(kind, 0.0)) for kind in settings.corruptions],
        "real": [("pairs", 0.0)],
    }[settings.protocol]
    protocol = cast(Protocol, settings.protocol)
    main_conditions = [
        Condition(protocol=protocol, kind=kind, strength=strength, seed=seed, clipped=settings.clipped)
        for seed in dict.fromkeys(seeds)
        for kind, strength in dict.fromkeys(kinds)
    ]
    levels = settings.sweep if protocol == "paper" else []
    return main_conditions, [Condition(protocol="paper", kind="level", strength=level, seed=seeds[0]) for level in levels]


def row_settings(settings: argparse.Namespace) -> RowSettings:
    return RowSettings(
        steps=settings.steps,
        tolerances=tuple(settings.tolerances),
        tolerance_of=settings.tolerance_of,
        regressor_tolerances=tuple(settings.regressor_tolerances),
        step_sizes=tuple(settings.step_sizes),
        candidates=settings.candidates,
        candidate_steps=tuple(settings.candidate_steps),
        candidate_noise=settings.candidate_noise,
        langevin=settings.langevin,
        clean_below=settings.clean_below,
        passes=tuple(sorted(set(settings.passes))),
        loops=settings.loops,
        self_ensembles=tuple(sorted(set(settings.self_ensemble))),
    )


def distinct_names(models: Sequence[str]) -> dict[str, str]:
    """Return the names of the models in tables: the last part of the path, or as many parts as make it unique."""
    names: dict[str, str] = {}
    for model in models:
        parts = _path_of(model)
        others = [_path_of(other) for other in models if other != model]
        length = 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        names[model] = "/".join(parts[-length:])
    if len(set(names.values())) < len(names):
        raise ValueError(f"--models has one model twice: {' '.join(models)}; remove one")
    return names


def _path_of(model: str) -> list[str]:
    return model.removeprefix("hub:").removeprefix("spandrel:").rstrip("/").split("/")


def groups_of(texts: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for text in texts:
        name, equals, models = text.partition("=")
        groups[name] = [model for model in models.split(",") if model]
        if not name or not equals or len(groups[name]) < 2:
            raise ValueError(f"--group {text} does not have the form NAME=MODEL,MODEL with at least two models")
    return groups


def without_output(arguments: Sequence[str]) -> list[str]:
    """Return the command without --output, so that runs into different folders have the same command."""
    kept, skip = [], False
    for word in arguments:
        if not skip and word != "--output" and not word.startswith("--output="):
            kept.append(word)
        skip = word == "--output"
    return kept
