"""The parts of eval/speed.py on text: training, and generation with and without the cache."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from plain_steps import plain_text_energy
from speed_rounds import timed, update_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebt_vision.benchmark.timing import Version
from ebt_vision.core.rng import sample_generators
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.data.tokenizer import ByteTokenizer
from ebt_vision.models.causal_text_ebt import CausalTextEBT, CausalTextEBTConfig
from ebt_vision.models.causal_transformer import CausalTransformer, CausalTransformerConfig
from ebt_vision.objectives.text import (
    LanguageModelObjective,
    TextBatch,
    TextEBTObjective,
    TextObjectiveConfig,
    batch_loss,
    draw_candidates,
)
from ebt_vision.text.generation import GenerateOptions, generate


def text_training(settings: argparse.Namespace) -> dict:
    """Time the plain step on 2S tokens, ours on the same weights, and the feed-forward Transformer++ of the same trunk.

    Raises ValueError if the two steps differ in their loss.
    """
    names = ("context_length", "energy_head")
    trunk = {name: getattr(settings, f"text_{name}") for name in ("embed_dim", "depth", "num_heads")}
    config = CausalTextEBTConfig(**{name: getattr(settings, name) for name in names}, **trunk)
    tokens = torch.randint(256, (settings.text_batch_size, config.context_length), device=settings.device)
    generators = sample_generators(0, range(len(tokens)), device=tokens.device)
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
    found = [loss().item() for loss in losses.values()] if settings.peak_of is None else [0.0, 0.0]
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
            call=update_of(settings, loss, torch.optim.AdamW(model.parameters(), lr=1e-4), model),
            units=tokens.numel(),
        )
        for name, loss, model in rows
    ]
    return timed(settings, versions, (tokens.numel(), config.embed_dim, 4 * config.embed_dim), "tokens")


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
    """Return seconds for this number of tokens with the cache and by recomputing. Raises ValueError if the texts differ."""
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
            raise ValueError(f"with the cache {num_tokens} tokens differ from those without it")
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
