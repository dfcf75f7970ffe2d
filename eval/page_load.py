"""The Gradio page under load: seconds to the first preview and to the result, memory, and many visitors at the same time.

    python eval/page_load.py                                   512x512, 12 megapixels, 20 visitors, on the shipped checkpoint
    python eval/page_load.py --sizes 512x512 --visitors 0 --device cuda

The program starts a new page for every size and for the visitors, and sends the same requests as a browser. Everything except
the image has the defaults of the page, including noise and number of steps. The photographs are an enlarged example of the
page, as JPEG. Memory is the peak of the page's process since its start; without a request it is called "at rest". The program
writes results.json and report.md after every part.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from page_visitor import PROGRAM, PageError, Server, Visit, Visitor, served
from PIL import Image

from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.core.arguments import named_path, number
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.provenance import provenance
from ebt_vision.models.checkpoint import program_device

EXAMPLE = PROGRAM.parent / "examples" / "chelsea.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 success, 2 bad input or a page that failed, 130 interrupted."""
    settings = _parser().parse(arguments)
    settings.command = sys.argv[1:] if arguments is None else list(arguments)
    try:
        run(settings)
    except ValueError as error:
        print(f"page_load: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("page_load: interrupted", file=sys.stderr)
        return 130
    return 0


def run(settings: argparse.Namespace) -> None:
    """Measure every size, then the visitors; print and write the report after each, so that finished parts are kept."""
    settings.device = program_device(settings.device)
    options = ["--device", settings.device]
    options += ["--checkpoint", settings.checkpoint] if settings.checkpoint else []
    about: dict[str, Any] = provenance("eval/page_load.py", settings.command, settings.device)
    results: dict[str, Any] = {"about": about | {"note": settings.note}, "sizes": [], "visitors": None}

    def write() -> None:
        write_text(settings.output / "results.json", json.dumps(results, indent=1) + "\n")
        write_text(settings.output / "report.md", report(results))

    with tempfile.TemporaryDirectory() as folder:
        for size in settings.sizes:
            print(f"page_load: {size[0]}x{size[1]} ...", file=sys.stderr, flush=True)
            results["sizes"].append(one_photograph(options, photograph(size, Path(folder)), size, settings.requests))
            write()
        if settings.visitors:
            print(f"page_load: {settings.visitors} visitors ...", file=sys.stderr, flush=True)
            photo = photograph(settings.visitors_size, Path(folder))
            results["visitors"] = many_visitors(options, photo, settings.visitors_size, settings.visitors)
            write()
    print(report(results))


def photograph(size: tuple[int, int], folder: Path) -> Path:
    """Return the example enlarged to (width, height), as a JPEG file."""
    path = folder / f"{size[0]}x{size[1]}.jpg"
    with Image.open(EXAMPLE) as example:
        example.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
    return path


# --- Measuring


def one_photograph(options: Sequence[str], photo: Path, size: tuple[int, int], requests: int) -> dict[str, Any]:
    """Measure one visitor on a new page, several times; the first request includes loading on first use."""
    with served(options) as server:
        rest = server.peak_memory()
        rows = []
        for _ in range(requests):
            visitor = Visitor(server=server)
            begin = time.perf_counter()
            image = visitor.upload(photo)
            uploaded = time.perf_counter() - begin
            visitor.ask(image)
            rows.append(_seconds(visitor.wait()) | {"upload": uploaded, "peak": server.peak_memory()})
    return {"size": list(size), "memory_at_rest": rest, "requests": rows}


def _seconds(visit: Visit) -> dict[str, Any]:
    return {"first_preview": visit.first_preview, "total": visit.total, "facts": visit.facts}


def many_visitors(options: Sequence[str], photo: Path, size: tuple[int, int], count: int) -> dict[str, Any]:
    """Measure visitors at the same time, the first being served when the others come, and one more who should be refused."""
    with served(options) as server, ThreadPoolExecutor(count) as pool:
        visitors = [Visitor(server=server) for _ in range(count + 1)]
        images = [visitor.upload(photo) for visitor in visitors]
        begin = time.perf_counter()
        visitors[0].ask(images[0])
        visits = [pool.submit(visitors[0].wait)]
        _until_served(server)
        for visitor, image in zip(visitors[1:count], images[1:count], strict=True):
            visitor.ask(image)
            visits.append(pool.submit(visitor.wait))
        try:
            visitors[count].ask(images[count])
            message = ""
        except PageError as error:
            message = str(error)
        found, problems = [], []
        for visit in visits:
            try:
                found.append(visit.result())
            except PageError as error:
                problems.append(str(error))
        seconds = time.perf_counter() - begin
        peak = server.peak_memory()
    served_at = [visit.total for visit in found]
    return {
        "size": list(size),
        "count": count,
        "done": len(found),
        "problems": problems,
        "message_to_one_more": message,
        "seconds": seconds,
        "median_wait": median(served_at) if served_at else None,
        "longest_wait": max(served_at, default=None),
        "peak": peak,
    }


def _until_served(server: Server) -> None:
    """Wait until the worker has taken the request from the queue."""
    while Visitor(server=server).queue_size():
        time.sleep(0.02)


# --- The report


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    about = results["about"]
    lines = ["# The page under load", "", f"    {about['command']}", ""]
    lines += [
        f"Commit {about['commit']}, {about['hardware']}, torch {about['torch']}, {about['date']}. {about['note']}".rstrip()
    ]
    lines += ["", "| photograph | request | first preview, s | result, s | memory at rest | at most |", "|" + "---|" * 6]
    for row in results["sizes"]:
        width, height = row["size"]
        for number_of, found in enumerate(row["requests"], 1):
            seconds = f"{_number(found['first_preview'])} | {_number(found['total'])}"
            memory = f"{_gib(row['memory_at_rest'])} | {_gib(found['peak'])}"
            lines.append(f"| {width}x{height} ({width * height / 1e6:.1f} MP) | {number_of} | {seconds} | {memory} |")
    several = results["visitors"]
    if several:
        message = several["message_to_one_more"]
        one_more = f'one more got the message "{message}"' if message else "one more was accepted"
        lines += ["", f"{several['count']} visitors at once, {several['size'][0]}x{several['size'][1]} each: "]
        lines[-1] += (
            f"{several['done']} served in {_number(several['seconds'])} s, {len(several['problems'])} failed, {one_more}. "
            f"From pressing the button to the result: median {_number(several['median_wait'])} s, longest "
            f"{_number(several['longest_wait'])} s. Memory at most {_gib(several['peak'])}."
        )
        lines += [f"- failed: {problem}" for problem in several["problems"]]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"


def _gib(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 2**30:.2f} GiB"


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= 8):
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; use WIDTHxHEIGHT with sides of 8 or more, like 512x512")
    return int(width), int(height)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="page_load", description="The Gradio page under load: seconds, memory, many visitors.")
    add = parser.add_argument
    add("--sizes", type=_size, nargs="+", default=[(512, 512), (4000, 3000)], metavar="WIDTHxHEIGHT")
    add("--requests", type=number(int, 1), default=2, help="one after the other, for each size")
    add("--visitors", type=number(int, 0, 20), default=20, help="visitors at the same time; 0 disables this part")
    add("--visitors-size", type=_size, default=(512, 512), metavar="WIDTHxHEIGHT")
    add("--checkpoint", metavar="FOLDER", help="a model instead of the shipped one")
    add("--device", help="cpu, cuda, mps (default: the fastest available)")
    add("--note", default="", help="a sentence on the circumstances, for the report")
    add("--output", type=named_path, default=Path("results/page_load"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
