"""The command line: ebt-vision train | denoise | generate | info.

Imports are lazy, so that --help answers at once. What a user can mend comes out as one line on stderr and exit status 2,
without a traceback; an interrupt ends with status 130 and keeps what is done.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from ebt_vision.denoiser import DenoiseOptions, Denoiser, DenoiseResult
    from ebt_vision.noise import Noise

STOPPED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 training diverged, 2 bad input, 130 interrupted."""
    try:
        args = _parse(argv)
        status: int = args.run(args)
        return status
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as in `ebt-vision info | head -1`
        sys.stderr.close()
        return 0
    except (ValueError, OSError) as error:
        _say(_one_line(error))
        return BAD_INPUT


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "overrides"):  # argparse does not go on with key=value after an option
        args.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


class _Parser(argparse.ArgumentParser):
    """argparse with its errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"ebt-vision: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ebt-vision", description="Energy-Based Transformers for vision.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands.add_parser("train", help="train a model from a YAML config"))
    _add_denoise(commands.add_parser("denoise", help="denoise image files and folders of them"))
    _add_generate(commands.add_parser("generate", help="go on with a text"))
    _add_info(commands.add_parser("info", help="describe a checkpoint, or list the shipped ones"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train what CONFIG describes. Example: ebt-vision train configs/smoke.yaml optim.lr=3e-4"
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a YAML file of configs/ or your own")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that take the file's place")
    parser.add_argument("--output", metavar="DIR", type=Path, help="the run's folder; a run that was cut off there goes on")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best there is)")
    parser.set_defaults(run=_train)


def _add_denoise(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Denoise images; each result gets its input's name in DIR, with its bit depth, colour profile, orientation and alpha."
    )
    parser.add_argument("inputs", metavar="FILE_OR_FOLDER", nargs="+", type=Path)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder for the results; made if missing")
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="a shipped name, a folder or hub:OWNER/NAME")
    parser.add_argument("--steps", metavar="N", type=_count, help="thinking steps (default: what the model suggests)")
    parser.add_argument("--candidates", metavar="N", type=_count, default=1, help="think N times, keep the lowest energy")
    parser.add_argument(
        "--tolerance",
        metavar="T",
        type=_not_negative,
        help="stop when a step gains less than this share of the first; try 0.02",
    )
    parser.add_argument(
        "--tolerance-of",
        choices=("first", "previous"),
        default="first",
        help="the step that T is a share of; 'previous' thinks on where noise is stronger than in training; try 0.05",
    )
    parser.add_argument("--step-size-scale", metavar="F", type=_positive, default=1.0, help="factor on the learned step size")
    parser.add_argument("--langevin", metavar="STD", type=_not_negative, default=0.0, help="noise in each thinking step")
    parser.add_argument(
        "--add-noise",
        metavar="SIGMA",
        type=_noise,
        help="add Gaussian noise first, in 0..255 units; or KIND:AMOUNT of gaussian, paper, poisson, salt-and-pepper, jpeg",
    )
    parser.add_argument("--seed", metavar="S", type=_whole_number, default=0, help="seed of all noise (default 0)")
    parser.add_argument("--tile", metavar="SIZE", type=_count, help="tile side in pixels for large images")
    parser.add_argument(
        "--overlap",
        metavar="PIXELS",
        type=_whole_number,
        help="pixels that tiles have in common (default: a quarter of a tile); more is slower and smoother",
    )
    parser.add_argument("--png", action="store_true", help="write PNG whatever the format of the input")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.set_defaults(run=_denoise)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Go on with PROMPT by a text model; an EBT thinks about every token."
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="a shipped name, a folder or hub:OWNER/NAME")
    parser.add_argument("--tokens", metavar="N", type=_count, default=200, help="tokens to add at most (default 200)")
    parser.add_argument("--steps", metavar="N", type=_count, default=2, help="thinking steps a token (default 2)")
    parser.add_argument(
        "--candidates", metavar="N", type=_count, default=1, help="think N times a token, keep the lowest energy"
    )
    parser.add_argument("--tolerance", metavar="T", type=_not_negative, help="stop when a step gains less than this share")
    parser.add_argument("--langevin", metavar="STD", type=_not_negative, default=0.0, help="noise on the logits at every step")
    parser.add_argument("--temperature", metavar="T", type=_not_negative, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--top-p", metavar="P", type=_not_negative, default=1.0, help="draw from this share of the probability")
    parser.add_argument("--seed", metavar="S", type=_whole_number, default=0, help="seed of all draws (default 0)")
    parser.add_argument("--tokenizer", metavar="FILE", default="bytes", help="a tokenizer.json (default: bytes)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.set_defaults(run=_generate)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Describe a checkpoint: kind, size, settings, hash of the weights. Without MODEL, list the shipped ones."
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a shipped name, a folder or hub:OWNER/NAME")
    parser.set_defaults(run=_info)


# --- train


def _train(args: argparse.Namespace) -> int:
    if not args.config.is_file():
        near = ", ".join(sorted(str(path) for path in args.config.parent.glob("*.yaml"))) or "no .yaml files"
        raise ValueError(f"config {args.config} does not exist; {args.config.parent}/ has: {near}")
    for override in args.overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form key=value")
    from ebt_vision.training.loop import TrainingDivergedError
    from ebt_vision.training.run import train

    try:
        print(f"trained: {train(args.config, args.overrides, output=args.output, device=args.device)}")
    except TrainingDivergedError as error:
        _say(_one_line(error))
        return STOPPED
    return 0


# --- denoise


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One image to denoise."""

    source: Path
    target: Path


def _denoise(args: argparse.Namespace) -> int:
    jobs, problems = _plan(args.inputs, args.output, args.overwrite, args.png)
    for problem in problems:
        _say(problem)
    failed, done = len(problems), 0
    if jobs:
        _make_folder(args.output)
        denoiser, options = _load(args)
    start = time.perf_counter()
    try:
        for number, job in enumerate(jobs, 1):
            try:
                line = _denoise_one(job, denoiser, options, args)
            except Exception as error:
                if not _is_users(error):
                    raise
                message = _one_line(error)
                _say(message if str(job.source) in message else f"{job.source}: {message}")
                failed += 1
                continue
            done += 1
            left = (time.perf_counter() - start) / number * (len(jobs) - number)
            print(line + (f", {_duration(left)} left" if number < len(jobs) else ""), flush=True)
    except KeyboardInterrupt:
        _say(f"interrupted; {done} of {len(jobs)} images are done and kept in {args.output}")
        return INTERRUPTED
    if failed:
        _say(f"{failed} of {failed + done} failed, {done} written to {args.output}")
        return BAD_INPUT
    return 0


def _plan(inputs: Sequence[Path], output: Path, overwrite: bool, png: bool) -> tuple[list[_Job], list[str]]:
    """What to denoise into which file, and a line for each input that cannot be done."""
    jobs: dict[Path, _Job] = {}
    problems: list[str] = []
    for path in inputs:
        try:
            pairs = list(_targets(path, output, png))
        except (ValueError, OSError) as error:
            problems.append(_one_line(error))
            continue
        for source, target in pairs:
            if target in jobs and jobs[target].source != source:
                problems.append(f"{source}: its result {target} is that of {jobs[target].source} too; rename one of them")
            elif target.exists() and not overwrite:
                problems.append(f"{source}: {target} exists; give another --output, or --overwrite to replace it")
            else:
                jobs[target] = _Job(source=source, target=target)
    return list(jobs.values()), problems


def _targets(path: Path, output: Path, png: bool) -> Iterator[tuple[Path, Path]]:
    from ebt_vision.image_files import WRITABLE_SUFFIXES, find_images

    for source in find_images([path]):
        relative = source.relative_to(path) if path.is_dir() else Path(source.name)
        if path.is_dir() and path.resolve() != output.resolve() and source.resolve().is_relative_to(output.resolve()):
            continue  # results of an earlier run, in a folder inside this one
        suffix = relative.suffix if relative.suffix.lower() in WRITABLE_SUFFIXES and not png else ".png"
        yield source, output / relative.with_suffix(suffix)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {folder} cannot be made ({error.strerror}); choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output {folder} cannot be written to; choose another folder")


def _load(args: argparse.Namespace) -> tuple[Denoiser, DenoiseOptions]:
    from ebt_vision.checkpoint import default_pretrained, pick_device
    from ebt_vision.denoiser import DenoiseOptions, load_denoiser
    from ebt_vision.noise import suited

    denoiser = load_denoiser(args.model or default_pretrained(), device=pick_device(args.device))
    noise = args.add_noise
    options = DenoiseOptions(
        num_steps=args.steps or denoiser.suggested_steps,
        num_candidates=args.candidates,
        tolerance=args.tolerance,
        tolerance_of=args.tolerance_of,
        langevin_std=args.langevin,
        step_size_scale=args.step_size_scale,
        seed=args.seed,
        sigma=noise and noise.sigma,
        noise_level=noise and noise.noise_level,
    )
    return suited(denoiser, noise), options


def _denoise_one(job: _Job, denoiser: Denoiser, options: DenoiseOptions, args: argparse.Namespace) -> str:
    """Denoise one file and write the result; returns the line to print."""
    from ebt_vision.image_files import read_image, write_image
    from ebt_vision.metrics import psnr
    from ebt_vision.tiling import denoise_tiled

    start = time.perf_counter()
    image = read_image(job.source)
    clean = image.pixels[None]  # (1, 3, H, W)
    noisy = clean
    if args.add_noise:  # every file gets the draw of its seed, so that it does not matter what else is denoised
        noisy = args.add_noise.add(clean, args.seed)
    progress = _tile_progress(job.source, start)
    result = denoise_tiled(denoiser, noisy, options, tile_size=args.tile, overlap=args.overlap, callback=progress)
    job.target.parent.mkdir(parents=True, exist_ok=True)
    write_image(job.target, image.with_pixels(result.image[0].cpu()), overwrite=args.overwrite)
    parts = [_energies(result), _steps(result), _duration(time.perf_counter() - start)]
    if args.add_noise:
        before, after = (float(psnr(images.clamp(0, 1), clean, data_range=1.0)) for images in (noisy, result.image.cpu()))
        parts.append(f"PSNR {before:.2f} -> {after:.2f} dB")
    return f"{job.source} -> {job.target}: " + ", ".join(part for part in parts if part)


def _tile_progress(source: Path, start: float) -> Callable[[int, int], None]:
    """On a terminal: a line that says how far a large image is, wiped at the end."""

    def show(done: int, total: int) -> None:
        if total < 2 or not sys.stderr.isatty():
            return
        line = ""
        if done < total:
            left = f", {_duration((time.perf_counter() - start) / done * (total - done))} left" if done else ""
            line = f"{source}: tile {done} of {total}{left}"
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)

    return show


def _energies(result: DenoiseResult) -> str:
    if result.energies is None:  # not an energy-based model
        return ""
    return f"energy {float(result.energies[0, 0]):.3f} -> {float(result.energies[-1, 0]):.3f}"


def _steps(result: DenoiseResult) -> str:
    steps = int(result.num_steps[0])
    return f"{steps} step" + "s" * (steps != 1)


# --- generate


def _generate(args: argparse.Namespace) -> int:
    from ebt_vision.checkpoint import default_pretrained, load_pretrained, pick_device
    from ebt_vision.data.tokenizer import load_tokenizer
    from ebt_vision.generation import GenerateOptions, generate
    from ebt_vision.thinking import ThinkingError

    options = GenerateOptions(
        num_tokens=args.tokens,
        num_steps=args.steps,
        num_candidates=args.candidates,
        tolerance=args.tolerance,
        langevin_std=args.langevin,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    tokenizer = load_tokenizer(args.tokenizer)
    model = load_pretrained(args.model or default_pretrained("causal_text_ebt"), device=pick_device(args.device))
    start, count = time.perf_counter(), 0
    energies: list[float] = []
    try:
        for token in generate(model, tokenizer, args.prompt, options):
            if count == 0:
                print(args.prompt, end="")
            print(token.text, end="", flush=True)
            count += 1
            if token.energy is not None:
                energies.append(token.energy)
    except ThinkingError as error:
        raise ValueError(f"{error}; or another --seed") from error
    finally:
        if count:
            print(flush=True)
    energy = f", mean energy {sum(energies) / len(energies):.3f}" if energies else ""
    _say(f"{count} tokens in {_duration(time.perf_counter() - start)}{energy}")
    return 0


# --- info


def _info(args: argparse.Namespace) -> int:
    from ebt_vision.checkpoint import PRETRAINED_DIR, list_pretrained, load_pretrained, resolve

    if args.model is None:
        names = list_pretrained()
        for name in names:
            print(name)
        if not names:
            print(f"no checkpoint is shipped in {PRETRAINED_DIR}; train one with `ebt-vision train CONFIG`")
        return 0
    model = load_pretrained(args.model)
    print(f"{args.model}: {model.model_type}, {model.num_parameters:,} parameters")
    if not args.model.startswith("hub:"):
        from ebt_vision.checkpoint import checkpoint_hash

        print(f"  {'folder':<20} {resolve(args.model)}")
        print(f"  {'weights (sha256)':<20} {checkpoint_hash(args.model)}")
    from dataclasses import asdict

    for name, value in asdict(model.config).items():
        print(f"  {name:<20} {value}")
    return 0


# --- shared


def _say(message: str) -> None:
    print(f"ebt-vision: {message}", file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    """The message of an error in one line; an OSError's says what happened to which file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if _out_of_memory(error):
        return "out of memory; use a smaller --tile"
    return " ".join(str(error).split()) or type(error).__name__


def _is_users(error: Exception) -> bool:
    """Whether an error is about this input, so that the other images can go on: not a fault of the program."""
    from ebt_vision.thinking import ThinkingError

    return isinstance(error, ValueError | OSError | ThinkingError) or _out_of_memory(error)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _number(text: str, kind: type[int] | type[float], low: float, remedy: str) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not value >= low or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; {remedy}")
    return value


def _count(text: str) -> int:
    return int(_number(text, int, 1, "use a whole number, 1 or more"))


def _whole_number(text: str) -> int:
    return int(_number(text, int, 0, "use a whole number, 0 or more"))


def _not_negative(text: str) -> float:
    return float(_number(text, float, 0, "use a number, 0 or more"))


def _positive(text: str) -> float:
    value = _not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; use a number above 0")
    return value


def _noise(text: str) -> Noise:
    from ebt_vision.noise import Noise

    try:
        return Noise.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _version() -> str:
    from ebt_vision import __version__

    return f"ebt-vision {__version__}"


if __name__ == "__main__":
    sys.exit(main())
