"""Speed, side by side in one run: our training steps against the paper's plainest ones and against a feed-forward step.

    python eval/speed.py                                                  images, tokens, inference and text at two-core sizes
    python eval/speed.py --parts image --compile --precision bf16 --device cuda --img-size 128 --patch-size 16 \\
        --embed-dim 1536 --depth 24 --num-heads 16 --mlp-ratio 1 --batch-size 64

Parts: `image` and `text` are training steps (thinking, loss, backward, clipping, AdamW); the plain ones are in plain_steps.py.
`inference` is denoising by 1, 2, 4 and 8 steps and a DiT by DDIM. `tokens` is our image step at 64..4096 tokens.
`generation` is text with the cache and without. Every part but the last says what share of the machine's own matrix rate it
reaches, by counted FLOPs. Only the ratios of one run mean something; see ebt_vision/benchmark/timing.py. Writes results.json
and report.md after every part.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from plain_steps import plain_image_update, plain_text_energy
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebt_vision.benchmark.options import OneLineParser, number
from ebt_vision.benchmark.timing import MatrixProduct, Timing, Version, time_side_by_side
from ebt_vision.checkpoint import pick_device
from ebt_vision.config import build_config
from ebt_vision.data.tokenizer import ByteTokenizer
from ebt_vision.denoiser import DenoiseOptions, Denoiser
from ebt_vision.generation import GenerateOptions, generate
from ebt_vision.model_denoisers import DiTDenoiser, EBTDenoiser, RegressorDenoiser
from ebt_vision.models.causal_text_ebt import CausalTextEBT, CausalTextEBTConfig
from ebt_vision.models.causal_transformer import CausalTransformer, CausalTransformerConfig
from ebt_vision.models.patch_trunk import TrunkConfig
from ebt_vision.objectives import ImageBatch
from ebt_vision.provenance import provenance
from ebt_vision.rng import sample_generators
from ebt_vision.text_objectives import (
    LanguageModelObjective,
    TextBatch,
    TextEBTObjective,
    TextObjectiveConfig,
    batch_loss,
    draw_candidates,
)
from ebt_vision.thinking import ThinkingConfig, think
from ebt_vision.training.build import build_model, build_objective
from ebt_vision.training.optim import build_optimizer
from ebt_vision.whole_files import write_text

PARTS = ("image", "inference", "tokens", "text", "generation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    settings = _parser().parse(arguments)
    settings.command = sys.argv[1:] if arguments is None else list(arguments)
    try:
        run(settings)
    except ValueError as error:
        print(f"speed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("speed: interrupted", file=sys.stderr)
        return 130
    return 0


def run(settings: argparse.Namespace) -> None:
    """Time every part; print and write the report after each, so that what is done stays."""
    settings.device = pick_device(settings.device)
    torch.manual_seed(settings.seed)
    about = provenance("eval/speed.py", settings.command, settings.device) | {"threads": torch.get_num_threads()}
    results: dict[str, Any] = {"about": about, "parts": {}}
    measure: dict[str, Callable[[argparse.Namespace], dict]] = {
        "image": image_training,
        "inference": inference,
        "tokens": growth_with_tokens,
        "text": text_training,
        "generation": generation,
    }
    for part in settings.parts:
        print(f"speed: {part} ...", file=sys.stderr, flush=True)
        results["parts"][part] = measure[part](settings)
        write_text(settings.output / "results.json", json.dumps(results, indent=1) + "\n")
        write_text(settings.output / "report.md", report(results))
    print(report(results))


# --- Training on images


def image_training(settings: argparse.Namespace) -> dict:
    """The plain step first, ours eager and compiled with both heads, and the feed-forward step of the same trunk."""
    sizes = _image_sizes(settings)
    torch.manual_seed(settings.seed)
    size = (settings.batch_size, 3, sizes.img_size, sizes.img_size)
    clean, noisy = torch.randn(2, *size, device=settings.device)

    def ours(model_type: str, *, compiled: bool, **model: Any) -> Callable[[], None]:
        return _image_update(settings, sizes, model_type, clean, compiled=compiled, **model)

    eager = {head: ours("patch_ebt", compiled=False, energy_head=head) for head in ("linear", "quadratic")}
    forward = ours("patch_regressor", compiled=False)
    calls: list[tuple[str, Callable[[], None], Callable[[], None] | None]]
    calls = [("plain, eager, float32", plain_image_update(sizes, noisy, clean), None)]
    calls += [(f"ours, {head} head, eager", call, None) for head, call in eager.items()]
    if settings.compile:
        calls += [
            (f"ours, {head} head, compiled", ours("patch_ebt", compiled=True, energy_head=head), call)
            for head, call in eager.items()
        ]
    calls += [("feed-forward, eager", forward, None)]
    if settings.compile:
        calls += [("feed-forward, compiled", ours("patch_regressor", compiled=True), forward)]
    versions = [Version(name=n, call=call, units=settings.batch_size, counted=counted) for n, call, counted in calls]
    return _timed_images(settings, versions, sizes, settings.batch_size, "images")


def _image_sizes(settings: argparse.Namespace) -> TrunkConfig:
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    return TrunkConfig(**{name: getattr(settings, name) for name in names})


def _image_update(
    settings: argparse.Namespace, sizes: TrunkConfig, model_type: str, clean: Tensor, *, compiled: bool, **model: Any
) -> Callable[[], None]:
    """One update of the project's own objective and optimiser."""
    config = build_config(
        {
            "name": "speed",
            "model_type": model_type,
            "model": asdict(sizes) | model,
            "data": {"path": "unused"},
            "train": {"compile": compiled},
        }
    )
    network = build_model(config).to(settings.device)
    objective, optimizer = build_objective(network, config), build_optimizer(network, config.optim)
    generators = sample_generators(0, range(len(clean)))
    batch = ImageBatch(clean=clean, noise=torch.randn_like(clean), generators=generators)
    return _update(settings, lambda: objective(batch)["loss"], optimizer, network)


def _update(
    settings: argparse.Namespace, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, network: nn.Module
) -> Callable[[], None]:
    kind = torch.device(settings.device).type
    precision = torch.autocast(kind, torch.bfloat16) if settings.precision == "bf16" else nullcontext()

    def update() -> None:
        optimizer.zero_grad()
        with precision:
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return update


def growth_with_tokens(settings: argparse.Namespace) -> dict:
    """Our step as it is trained, at each number of tokens; the batch shrinks as they grow."""
    rows: list[dict] = []
    rate = 0.0
    for tokens in settings.tokens:
        side = round(tokens**0.5)
        if side * side != tokens:
            raise ValueError(f"--tokens {tokens} is no square; use numbers such as 64, 256, 1024, 4096")
        sizes = replace(_image_sizes(settings), img_size=settings.patch_size * side)
        batch = max(1, settings.batch_size * 64 // tokens)
        clean = torch.randn(batch, 3, sizes.img_size, sizes.img_size, device=settings.device)
        eager = _image_update(settings, sizes, "patch_ebt", clean, compiled=False)
        call = _image_update(settings, sizes, "patch_ebt", clean, compiled=True) if settings.compile else eager
        version = Version(name=f"{tokens} tokens, batch {batch}", call=call, units=batch * tokens, counted=eager)
        found = _timed_images(settings, [version], sizes, batch, "tokens")
        rows, rate = rows + found["rows"], found["matrix_rate"]
    for row in rows:
        row["ratio"] = row["rate"] / rows[0]["rate"]
    return {"unit": "tokens", "matrix_rate": rate, "rows": rows}


def _timed_images(settings: argparse.Namespace, versions: Sequence[Version], sizes: TrunkConfig, batch: int, unit: str) -> dict:
    rows = batch * (sizes.img_size // sizes.patch_size) ** 2
    return _timed(settings, versions, (rows, sizes.embed_dim, round(sizes.embed_dim * sizes.mlp_ratio)), unit)


def _timed(settings: argparse.Namespace, versions: Sequence[Version], product: tuple[int, int, int], unit: str) -> dict:
    rows, inner, columns = product
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    matrix = MatrixProduct(rows=rows, inner=inner, columns=columns, dtype=dtype)
    timings, rate = time_side_by_side(versions, matrix, rounds=settings.rounds, device=settings.device)
    return {"unit": unit, "matrix_rate": rate, "rows": [asdict(timing) for timing in timings]}


# --- Denoising


def inference(settings: argparse.Namespace) -> dict:
    """An EBT by 1, 2, 4, 8 steps, the regressor once, a DiT of about the same size by DDIM; all with fresh weights."""
    sizes = _image_sizes(settings)
    noisy = torch.rand(settings.batch_size, 3, sizes.img_size, sizes.img_size, device=settings.device)

    def network(model_type: str, model: dict) -> Any:
        raw = {"name": "speed", "model_type": model_type, "model": model, "data": {"path": "unused"}}
        return build_model(build_config(raw)).to(settings.device).eval()

    dit_sizes = {"img_size": sizes.img_size, "patch_size": sizes.patch_size, "embed_dim": settings.dit_dim}
    dit_sizes |= {"depth": settings.dit_depth, "num_heads": settings.dit_heads}
    ebt = EBTDenoiser(network("patch_ebt", asdict(sizes)), name="ebt")
    regressor = RegressorDenoiser(network("patch_regressor", asdict(sizes)), name="regressor")
    dit = DiTDenoiser(network("dit", dit_sizes), mode="ddim", name="dit")
    print(f"speed: EBT {ebt.num_parameters:,} parameters, DiT {dit.num_parameters:,}", file=sys.stderr)
    runs: list[tuple[str, Denoiser, int]]
    runs = [(f"DiT, DDIM, {settings.dit_passes} passes", dit, settings.dit_passes)]
    runs += [(f"EBT, {steps} steps", ebt, steps) for steps in (1, 2, 4, 8)] + [("regressor, once", regressor, 1)]
    versions = []
    for name, denoiser, steps in runs:
        options = DenoiseOptions(num_steps=steps, noise_level=0.1)
        versions.append(Version(name=name, call=_denoising(denoiser, noisy, options), units=settings.batch_size))
    return _timed_images(settings, versions, sizes, settings.batch_size, "images")


def _denoising(denoiser: Denoiser, noisy: Tensor, options: DenoiseOptions) -> Callable[[], object]:
    return lambda: denoiser.denoise(noisy, options)


# --- Text


def text_training(settings: argparse.Namespace) -> dict:
    """The plain step on 2S tokens, ours on the same weights, and the feed-forward Transformer++ of the same trunk.

    ValueError if the two steps do not have the same loss.
    """
    names = ("context_length", "energy_head")
    trunk = {name: getattr(settings, f"text_{name}") for name in ("embed_dim", "depth", "num_heads")}
    config = CausalTextEBTConfig(**{name: getattr(settings, name) for name in names}, **trunk)
    tokens = torch.randint(256, (settings.text_batch_size, config.context_length), device=settings.device)
    generators = sample_generators(0, range(len(tokens)))
    batch = TextBatch(
        tokens=tokens,
        targets=tokens.roll(-1, 1),
        starts=torch.zeros_like(tokens),
        generators=generators,
        start=draw_candidates(tokens, config.vocab_size, torch.float32, generators),
    )
    objective_config = TextObjectiveConfig(thinking=ThinkingConfig(num_steps=settings.text_steps))

    def fresh() -> CausalTextEBT:
        torch.manual_seed(settings.seed)
        model = CausalTextEBT(config).to(settings.device)
        nn.init.normal_(model.head.weight, std=0.02)
        return model

    models = {"plain": fresh(), "ours": fresh()}
    objective = TextEBTObjective(models["ours"], objective_config)
    losses = {
        "plain": lambda: _plain_text_loss(models["plain"], batch, objective_config.thinking),
        "ours": lambda: objective(batch)["loss"],
    }
    found = [loss().item() for loss in losses.values()]
    if not torch.isclose(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4):
        raise ValueError(f"the plain step and ours disagree: losses {found}")
    transformer = CausalTransformer(CausalTransformerConfig(context_length=config.context_length, **trunk)).to(settings.device)
    forward = LanguageModelObjective(transformer, TextObjectiveConfig())
    rows: list[tuple[str, Callable[[], Tensor], nn.Module]]
    rows = [(f"plain, {2 * config.context_length} tokens a step", losses["plain"], models["plain"])]
    rows += [("ours, context read once", losses["ours"], models["ours"])]
    rows += [("feed-forward Transformer++", lambda: forward(batch)["loss"], transformer)]
    versions = [
        Version(
            name=name,
            call=_update(settings, loss, torch.optim.AdamW(model.parameters(), lr=1e-4), model),
            units=tokens.numel(),
        )
        for name, loss, model in rows
    ]
    return _timed(settings, versions, (tokens.numel(), config.embed_dim, 4 * config.embed_dim), "tokens")


def _plain_text_loss(model: CausalTextEBT, batch: TextBatch, thinking: ThinkingConfig) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        result = think(
            plain_text_energy(model),
            batch.start,  # type: ignore[arg-type]
            thinking,
            context=(batch.tokens,),
            step_size=model.step_size,
            create_graph=True,
            evaluate_final=False,
        )
    return torch.stack([batch_loss(p, batch.targets) for p in result.predictions]).mean()


def generation(settings: argparse.Namespace) -> dict:
    """Seconds for so many tokens with the cache and recomputing, which must write the same text (ValueError if not)."""
    rows = []
    for num_tokens in settings.generate:
        torch.manual_seed(settings.seed)
        trunk = {name: getattr(settings, f"text_{name}") for name in ("embed_dim", "depth", "num_heads")}
        model = CausalTextEBT(CausalTextEBTConfig(context_length=num_tokens + 8, **trunk)).to(settings.device).eval()
        nn.init.normal_(model.head.weight, std=0.02)
        model.head.weight.data[256] = 0.0  # the end of a document
        options = GenerateOptions(num_tokens=num_tokens, num_steps=settings.text_steps, temperature=0.0)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        written: dict[bool, list[int]] = {}
        for _ in range(settings.rounds):
            for cached in (True, False):
                begin = time.perf_counter()
                tokens = generate(model, ByteTokenizer(), "to be", options, use_cache=cached)
                written[cached] = [token.token for token in tokens]
                seconds[cached].append(time.perf_counter() - begin)
        if written[True] != written[False]:
            raise ValueError(f"with the cache {num_tokens} tokens are others than without it")
        with_cache, recomputing = statistics.median(seconds[True]), statistics.median(seconds[False])
        rows.append(
            {
                "tokens": len(written[True]),
                "cache_seconds": with_cache,
                "recomputing_seconds": recomputing,
                "ratio": recomputing / with_cache,
            }
        )
    return {"rows": rows}


# --- The report


def report(results: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    about = results["about"]
    made = ", ".join([f"commit {about['commit']}", about["hardware"], f"{about['threads']} threads", f"torch {about['torch']}"])
    lines = [
        "# Speed",
        "",
        f"    {about['command']}",
        "",
        f"{made}, {about['date']}. Medians; ± is half the quartile distance.",
        "",
    ]
    for part, found in results["parts"].items():
        lines += [f"## {part}", ""]
        lines += _generation_table(found) if part == "generation" else _table(found)
        lines += [""]
    return "\n".join(lines)


def _table(found: dict[str, Any]) -> list[str]:
    unit = found["unit"]
    lines = [f"The machine's matrix rate in these rounds: {found['matrix_rate'] / 1e9:,.1f} GFLOP/s.", ""]
    lines += [
        f"| version | {unit}/s | times the first | s a call | first call, s | MFLOPs of one | of the matrix rate | memory |"
    ]
    lines += ["|" + "---|" * 8]
    for row in (Timing(**row) for row in found["rows"]):
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB"
        times = f"{row.seconds:.4f} ± {row.spread:.4f} | {row.first_seconds:.1f}"
        work = f"{row.flops_per_unit / 1e6:,.1f} | {100 * row.share_of_matrix_rate:.0f} %"
        lines.append(f"| {row.name} | {row.rate:,.1f} | {row.ratio:.2f} | {times} | {work} | {peak} |")
    return lines


def _generation_table(found: dict[str, Any]) -> list[str]:
    lines = ["| tokens | with the cache, s | recomputing, s | ratio |", "|---|---|---|---|"]
    return lines + [
        f"| {row['tokens']} | {row['cache_seconds']:.2f} | {row['recomputing_seconds']:.2f} | {row['ratio']:.2f} |"
        for row in found["rows"]
    ]


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="speed", description="Training and inference speed, side by side.")
    add, count = parser.add_argument, number(int, 1)
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--rounds", type=count, default=8)
    add("--seed", type=number(int, 0), default=0)
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of our steps and of the matrix rate; plain is float32")
    add("--no-compile", dest="compile", action="store_false", help="leave out the compiled versions")
    add("--output", type=Path, default=Path("results/speed"))
    images = parser.add_argument_group("image models")
    for name, kind, value in [
        ("--img-size", count, 64),
        ("--patch-size", count, 8),
        ("--embed-dim", count, 256),
        ("--depth", count, 4),
        ("--num-heads", count, 4),
        ("--mlp-ratio", number(float, 0), 2.0),
        ("--batch-size", count, 32),
        ("--dit-dim", count, 192),
        ("--dit-depth", count, 3),
        ("--dit-heads", count, 3),
        ("--dit-passes", count, 100),
    ]:
        images.add_argument(name, type=kind, default=value)
    images.add_argument("--tokens", type=count, nargs="+", default=[64, 256, 1024, 4096])
    text = parser.add_argument_group("text models")
    for name, value in [
        ("--context-length", 256),
        ("--text-embed-dim", 384),
        ("--text-depth", 6),
        ("--text-num-heads", 6),
        ("--text-batch-size", 4),
        ("--text-steps", 2),
    ]:
        text.add_argument(name, type=count, default=value)
    text.add_argument("--energy-head", choices=("linear", "quadratic"), default="quadratic")
    text.add_argument("--generate", type=count, nargs="+", default=[64, 256, 1024], metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
