"""Speed on text: a training step against the plain one that re-runs 2S tokens, and generation with and without the cache.

    python eval/text_speed.py --context-length 256 --embed-dim 384 --depth 6 --steps 2
    python eval/text_speed.py --generate 64 256 1024 --rounds 3

The plain training step is the paper's layout on the same blocks and weights: at every thinking step S context tokens and S
candidates run through all blocks together, with one (2S, 2S) mask. Ours reads the context once. Both make the same update (a
test compares their gradients); rounds alternate, so that what else the machine does touches both, and the figure is the
ratio of the medians. The generation ratio is recomputing everything for every token against the cache.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebt_vision.benchmark.options import OneLineParser, number
from ebt_vision.data.tokenizer import ByteTokenizer
from ebt_vision.generation import GenerateOptions, generate
from ebt_vision.models.causal_blocks import rope_1d
from ebt_vision.models.causal_text_ebt import CausalTextEBT, CausalTextEBTConfig
from ebt_vision.rng import sample_generators
from ebt_vision.text_objectives import TextBatch, TextEBTObjective, TextObjectiveConfig, batch_loss, draw_candidates
from ebt_vision.thinking import ThinkingConfig, think


def plain_energy(model: CausalTextEBT) -> Callable[..., Tensor]:
    """The energy (B, S) of candidates (B, S, V) after tokens (B, S), by 2S tokens through every block."""

    def energy(candidate: Tensor, tokens: Tensor) -> Tensor:
        S = tokens.shape[1]
        x = torch.cat([model.trunk.embed(tokens), candidate.softmax(-1) @ model.trunk.embed.weight], dim=1)
        causal, own = torch.ones(S, S, dtype=torch.bool).tril(), torch.eye(S, dtype=torch.bool)
        mask = torch.cat([torch.cat([causal, torch.zeros_like(causal)], 1), torch.cat([causal, own], 1)], 0).to(x.device)
        cos, sin = rope_1d(0, S + 1, model.config.embed_dim // model.config.num_heads, device=x.device)
        rope = torch.cat([cos[:S], cos[1:]]), torch.cat([sin[:S], sin[1:]])
        for block in model.trunk.layers:
            q, k, v = block.project(x, rope)
            x = block.context(x, q, k, v, mask)
        output = model.head(model.trunk.norm(x[:, S:]))
        return (0.5 * (candidate - output).square() if model.config.energy_head == "quadratic" else output).sum(-1)

    return energy


def updates(settings: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """One update of each version, from the same weights; each returns its loss."""
    names = ("context_length", "embed_dim", "depth", "num_heads", "energy_head")
    config = CausalTextEBTConfig(**{name: getattr(settings, name) for name in names})
    tokens = torch.randint(256, (settings.batch_size, settings.context_length))
    batch = TextBatch(
        tokens=tokens,
        targets=tokens.roll(-1, 1),
        starts=torch.zeros_like(tokens),
        generators=sample_generators(0, range(len(tokens))),
        start=draw_candidates(tokens, config.vocab_size, torch.float32, sample_generators(0, range(len(tokens)))),
    )
    thinking = ThinkingConfig(num_steps=settings.steps)

    def make(loss_of: Callable[[CausalTextEBT], Callable[[], Tensor]]) -> Callable[[], Tensor]:
        torch.manual_seed(0)
        model = CausalTextEBT(config)
        nn.init.normal_(model.head.weight, std=0.02)
        loss, optimizer = loss_of(model), torch.optim.AdamW(model.parameters(), lr=1e-4)

        def update() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            return value.detach()

        return update

    def ours(model: CausalTextEBT) -> Callable[[], Tensor]:
        objective = TextEBTObjective(model, TextObjectiveConfig(thinking=thinking))
        return lambda: objective(batch)["loss"]

    def plain(model: CausalTextEBT) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                result = think(
                    plain_energy(model),
                    batch.start,  # type: ignore[arg-type]
                    thinking,
                    context=(batch.tokens,),
                    step_size=model.step_size,
                    create_graph=True,
                    evaluate_final=False,
                )
            return torch.stack([batch_loss(p, batch.targets) for p in result.predictions]).mean()

        return loss

    return {"plain, 2S tokens a step": make(plain), "context read once": make(ours)}


def time_training(settings: argparse.Namespace) -> list[str]:
    """A line for each version: seconds an update and the ratio to the plain one."""
    torch.manual_seed(0)
    versions = updates(settings)
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    losses = [float(update()) for update in versions.values()]  # warm up, and see that they do the same
    if not torch.isclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4):
        raise RuntimeError(f"the two versions disagree: losses {losses}")
    for _ in range(settings.rounds):
        for name, update in versions.items():
            begin = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - begin)
    plain = statistics.median(seconds["plain, 2S tokens a step"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [f"{name:28} {median:8.3f} s/update   {plain / median:.2f} x plain" for name, median in medians.items()]


def time_generation(settings: argparse.Namespace, num_tokens: int) -> str:
    """One line: seconds with the cache and without, and the ratio."""
    torch.manual_seed(0)
    sizes = dict(embed_dim=settings.embed_dim, depth=settings.depth, num_heads=settings.num_heads)
    model = CausalTextEBT(CausalTextEBTConfig(context_length=num_tokens + 8, **sizes)).eval()
    nn.init.normal_(model.head.weight, std=0.02)
    model.head.weight.data[256] = 0.0
    options = GenerateOptions(num_tokens=num_tokens, num_steps=settings.steps, temperature=0.0)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    written: dict[bool, list[int]] = {}
    for _ in range(settings.rounds):
        for cached in (True, False):
            begin = time.perf_counter()
            tokens = generate(model, ByteTokenizer(), "to be", options, use_cache=cached)
            written[cached] = [token.token for token in tokens]
            seconds[cached].append(time.perf_counter() - begin)
    cached_time, recomputed = statistics.median(seconds[True]), statistics.median(seconds[False])
    same = "same text" if written[True] == written[False] else "texts differ"
    return (
        f"{len(written[True]):5} tokens: cache {cached_time:.2f} s, recomputing {recomputed:.2f} s, "
        f"{recomputed / cached_time:.2f} x, {same}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the training table, or with --generate a line for each length."""
    settings = _parse(arguments)
    try:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {settings.rounds} rounds")
        for num_tokens in settings.generate:
            print(time_generation(settings, num_tokens), flush=True)
        if not settings.generate:
            print("\n".join(time_training(settings)))
    except ValueError as error:
        print(f"text_speed: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="text_speed", description="Speed of training and generation on text.")
    add, count = parser.add_argument, number(int, 1)
    add("--context-length", type=count, default=256)
    add("--embed-dim", type=count, default=384)
    add("--depth", type=count, default=6)
    add("--num-heads", type=count, default=6)
    add("--energy-head", choices=("linear", "quadratic"), default="quadratic")
    add("--batch-size", type=count, default=4)
    add("--steps", type=count, default=2, help="thinking steps")
    add("--rounds", type=count, default=10)
    add("--generate", type=count, nargs="*", default=[], metavar="N", help="time generating N tokens instead")
    return parser.parse(arguments)


if __name__ == "__main__":
    sys.exit(main())
