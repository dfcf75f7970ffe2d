"""Image files and folders of images, one by one: what `denoise` and `restore` share. A file that fails is reported."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ebt_vision.commands.console import BAD_INPUT, INTERRUPTED, duration, is_users, one_line, say, tell

if TYPE_CHECKING:
    from ebt_vision.commands.pipeline import Job
    from ebt_vision.data.image_files import ImageFile

    Work: TypeAlias = Callable[[Job, ImageFile], Callable[[], str]]
    """Work on one image. Return a function that writes the result and returns the line to print."""


def run_jobs(inputs: Sequence[Path], output: Path, prepare: Callable[[], Work], *, overwrite: bool, png: bool) -> int:
    """Read every image, work on it and write the result. Return the exit status.

    `prepare` loads what the work needs; it is called if there is any work. `png` writes PNG whatever the input's format.
    """
    from ebt_vision.commands.pipeline import Pipeline
    from ebt_vision.core.sharing import Share

    share = Share.of_environment()
    if share.count > 1 and any(path.is_dir() and path.resolve() == output.resolve() for path in inputs):
        raise ValueError(f"{output} has the images and would get the results, which needs one process; choose another --output")
    planned, problems = _plan(inputs, output, png)
    if share.index > 0:
        problems = []  # the first process reports and counts them
    for problem in problems:
        say(problem)
    jobs = []
    for job in share.of(planned):  # before any look at results: the other processes may have written theirs already
        if job.target.exists() and not overwrite:
            problems.append(f"{job.source}: {job.target} exists; choose another --output, or add --overwrite to replace it")
            say(problems[-1])
        else:
            jobs.append(job)
    failed, done, num_all = len(problems), 0, len(jobs)
    if jobs:
        _make_folder(output)
        work = prepare()
    started = time.time_ns()
    pipeline: Pipeline[ImageFile, str] = Pipeline(
        output,
        read=lambda job: _read(job.source),
        work=lambda job, image: work(job, image),
        is_done=lambda job: _is_done(job.target, started if overwrite else None),
    )
    start = time.perf_counter()
    try:
        for number, outcome in enumerate(pipeline.run(jobs), 1):
            job, error = outcome.job, outcome.error
            if outcome.value is not None:
                done += 1
                left = (time.perf_counter() - start) / number * (num_all - number)
                tell(outcome.value + (f", {duration(left)} left" if number < num_all else ""))
            elif error is None:
                say(f"{job.source}: skipped; another run has written {job.target} or is working on this image")
            elif isinstance(error, Exception) and is_users(error):
                message = one_line(error)
                say(message if str(job.source) in message else f"{job.source}: {message}")
                failed += 1
            else:
                raise error
    except KeyboardInterrupt:
        say(f"interrupted; {done} of {num_all} images are finished and kept in {output}")
        return INTERRUPTED
    if failed:
        say(f"{failed} of {failed + done} failed, {done} written to {output}")
        return BAD_INPUT
    return 0


def _is_done(target: Path, since: int | None) -> bool:
    """Whether a finished result exists: any result, or only one written after the time `since` (ns)."""
    try:
        return since is None or target.stat().st_mtime_ns > since if target.exists() else False
    except OSError:
        return False


def _plan(inputs: Sequence[Path], output: Path, png: bool) -> tuple[list[Job], list[str]]:
    """Return the jobs, with or without a result, and one line for each input that cannot be used."""
    from ebt_vision.commands.pipeline import Job

    jobs: dict[Path, Job] = {}
    problems: list[str] = []
    sources: set[Path] = set()
    for path in inputs:
        try:
            pairs = list(_targets(path, output, png))
        except (ValueError, OSError) as error:
            problems.append(one_line(error))
            continue
        for source, target in pairs:
            sources.add(source.resolve())
            if target in jobs and jobs[target].source.resolve() != source.resolve():
                problems.append(f"{source}: {jobs[target].source} has the same result {target}; rename one of the inputs")
            elif target.is_dir():
                problems.append(f"{source}: its result {target} is a folder; choose another --output")
            else:
                jobs[target] = Job(source=source, target=target)
    for target, job in list(jobs.items()):
        if target.exists() and target.resolve() in sources - {job.source.resolve()}:
            problems.append(f"{job.source}: its result {target} would replace another input; choose another --output")
            del jobs[target]
    return list(jobs.values()), problems


def _targets(path: Path, output: Path, png: bool) -> Iterator[tuple[Path, Path]]:
    from ebt_vision.data.image_files import find_images

    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device, not a file; save the image to a file first")
    if not path.is_dir():
        for source in find_images([path]):
            yield source, output / _result_name(Path(source.name), png)
        return
    found = find_images([path])
    inside = output.resolve().is_relative_to(path.resolve()) and output.resolve() != path.resolve()
    earlier = {file for file in found if file.resolve().is_relative_to(output.resolve())} if inside else set()
    if len(earlier) == len(found):
        raise ValueError(f"{path} has no images except earlier results in {output}; name a folder with images")
    left_out = _left_out(path, set(found), output.resolve())
    if left_out:
        say(f"{path}: skipped {left_out}; to include a skipped image, name the file itself")
    for source in found:
        if source not in earlier:
            yield source, output / _result_name(source.relative_to(path), png)


def _result_name(relative: Path, png: bool) -> Path:
    """Return the name of a result. The suffix of its format replaces the suffix of an image format; other suffixes stay."""
    from ebt_vision.data.image_files import WRITABLE_SUFFIXES, without_suffix

    if relative.suffix.lower() in WRITABLE_SUFFIXES and not png:
        return relative
    return relative.with_name(without_suffix(relative).name + ".png")


def _left_out(folder: Path, found: set[Path], output: Path) -> str:
    """Describe the visible files and linked folders in `folder` that are neither found images nor in `output`."""
    suffixes: list[str] = []
    links: list[str] = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [f for f in folders if not f.startswith(".") and (here / f).resolve() != output]
        links += [str((here / f).relative_to(folder)) for f in folders if (here / f).is_symlink()]
        suffixes += [Path(f).suffix or f for f in files if not f.startswith(".") and here / f not in found]
    kinds = sorted(set(suffixes))
    named = ", ".join(kinds[:5]) + (", ..." if len(kinds) > 5 else "")
    parts = [f"{len(suffixes)} file{'s' * (len(suffixes) > 1)} not named as images ({named})"] if suffixes else []
    parts += [f"the linked folder{'s' * (len(links) > 1)} {', '.join(sorted(links))}"] if links else []
    return " and ".join(parts)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {folder} cannot be created ({error.strerror}); choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output {folder} is not writable; choose another folder")


def _read(source: Path) -> ImageFile:
    from ebt_vision.data import image_files

    return image_files.read_image(source)


def write_result(job: Job, image: ImageFile, line: str, *, overwrite: bool) -> str:
    """Write a result, say what its format cannot hold, and return `line`."""
    from ebt_vision.data.image_files import losses, write_image

    job.target.parent.mkdir(parents=True, exist_ok=True)
    write_image(job.target, image, overwrite=overwrite)
    lost = losses(job.target, image)
    for note in [*image.notes, *lost]:
        say(f"{job.source}: {note}" + ("; --png keeps it" if note in lost and job.target.suffix.lower() != ".png" else ""))
    return line


def tile_progress(source: Path, start: float) -> Callable[[int, int], None]:
    """On a terminal, show the progress on a large image in one line, and clear this line at the end."""

    def show(done: int, total: int) -> None:
        if total < 2 or not sys.stderr.isatty():
            return
        line = ""
        if done < total:
            left = f", {duration((time.perf_counter() - start) / done * (total - done))} left" if done else ""
            line = f"{source}: tile {done} of {total}{left}"
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)

    return show
