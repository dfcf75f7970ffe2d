"""Text generation, token by token, with a cache of keys and values.

The context does not depend on candidates, so the cache of an EBT is the same as for any transformer. Every thinking step works
only on the one new candidate. Every draw depends on (seed, position in the text, candidate). The candidates of a position are
therefore the same token by token or for all positions at once (`predict_all`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebt_vision.core.best_of import best_of
from ebt_vision.core.checks import check, check_whole
from ebt_vision.core.rng import make_generator
from ebt_vision.core.thinking_options import ThinkingOptions
from ebt_vision.core.thinking_results import ThinkingStep
from ebt_vision.data.tokenizer import Tokenizer
from ebt_vision.models.causal_text_ebt import CausalTextEBT
from ebt_vision.models.causal_transformer import CausalTransformer
from ebt_vision.models.causal_trunk import Cache
from ebt_vision.models.pretrained_model import CheckpointError

# Streams of make_generator.
_START, _LANGEVIN, _SAMPLE = 21, 22, 23


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions(ThinkingOptions):
    """How to choose tokens. The thinking options are only for an EBT, for every token; their noise is on the logits."""

    num_tokens: int = 200
    """Maximum number of new tokens; the end of the document stops earlier."""
    num_steps: int = 2
    temperature: float = 1.0
    """Divides the logits before a token is sampled; 0 selects the most likely token."""
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this much of the probability (Holtzman et al. 2020)."""
    explain: bool = False
    """Report for each token what thinking changed; only for an EBT."""

    def __post_init__(self) -> None:
        ThinkingOptions.__post_init__(self)  # super() does not work in a dataclass with slots
        check_whole("num_tokens", self.num_tokens)
        check(self.num_tokens >= 1, "num_tokens", self.num_tokens, "use 1 or more")
        check(self.temperature >= 0, "temperature", self.temperature, "use 0 (the most likely token) or more")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "use a number in (0, 1]")
        self.thinking()  # raises for a tolerance that a text model does not have


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One candidate before the first and after each of T steps."""

    logits: Tensor
    """(T + 1, P, vocab_size)."""
    energies: Tensor
    """(T + 1, P)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """The prediction of a model for the next token after each of P positions."""

    logits: Tensor
    """(P, vocab_size)."""
    energies: Tensor | None = None
    """Final energy of every candidate, (N, P); None for a model without energies."""
    num_forward: int = 1
    """Forward passes per position, over all candidates; those of an EBT include a gradient, except the last."""
    trajectories: tuple[Trajectory, ...] = ()
    """The trajectory of every candidate, if options.explain is set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What thinking changed at one token. Probabilities are at temperature 1."""

    energies: tuple[float, ...]
    """Energy of the candidate before the first and after every step, (T + 1)."""
    probability: float
    """Probability of the token after the last step."""
    first_probability: float
    """Probability of the token after the first step."""
    first_choice: int
    """The most likely token after the first step."""
    runner_up: int
    """The most likely token after the last step, other than the token itself."""
    runner_up_probability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedToken:
    """One new token."""

    token: int
    text: str
    """The characters that this token completes; may be empty."""
    energy: float | None
    """Energy of the chosen candidate."""
    num_forward: int
    explanation: Explanation | None = None
    """With options.explain, for an EBT."""


class Reader(ABC):
    """A model that reads tokens and predicts the next one."""

    def __init__(self) -> None:
        self.cache: Cache = ()

    @property
    def num_read(self) -> int:
        """Number of tokens in the cache."""
        return self.cache[0].shape[1] if self.cache else 0

    @abstractmethod
    def read(self, tokens: Tensor) -> None:
        """Read more tokens (1, N)."""

    @abstractmethod
    def guess(self, place: int, options: GenerateOptions) -> Guess:
        """Predict the token after the last one read, a Guess of one position. `place` is its position in the text, from 0."""


class EBTReader(Reader):
    """A causal EBT: thinking on one candidate with the cache."""

    def __init__(self, model: CausalTextEBT):
        super().__init__()
        self.model = model

    def read(self, tokens: Tensor) -> None:
        self.cache = self.model.context_of(tokens, past=self.cache)

    def guess(self, place: int, options: GenerateOptions) -> Guess:
        return _think(self.model, self.cache, [place], options)


class TransformerReader(Reader):
    """A language model: reading already gives its logits."""

    def __init__(self, model: CausalTransformer):
        super().__init__()
        self.model = model
        self._logits: Tensor | None = None

    def read(self, tokens: Tensor) -> None:
        logits, self.cache = self.model.extend(tokens, past=self.cache)
        self._logits = logits[0, -1:]

    def guess(self, place: int, options: GenerateOptions) -> Guess:
        if self._logits is None:
            raise ValueError("nothing was read yet; read at least one token")
        return Guess(logits=self._logits)


def make_reader(model: nn.Module) -> Reader:
    """Return the reader of a text model. Raises CheckpointError for a model of another modality."""
    if isinstance(model, CausalTextEBT):
        return EBTReader(model)
    if isinstance(model, CausalTransformer):
        return TransformerReader(model)
    kind = getattr(model, "model_type", type(model).__name__)
    raise CheckpointError(f"a {kind} model cannot generate text; use a causal_text_ebt or causal_transformer checkpoint")


@torch.no_grad()
def predict_all(model: nn.Module, tokens: Tensor, options: GenerateOptions) -> Guess:
    """Return the result of guess() after each of tokens (N,), for all N positions at once.

    With Langevin noise or a tolerance, the result differs from guess(): the noise is drawn for all positions together, and all
    positions stop together.
    """
    if isinstance(model, CausalTextEBT):
        return _think(model, model.context_of(tokens[None]), range(len(tokens)), options)
    reader = make_reader(model)
    assert isinstance(reader, TransformerReader)
    return Guess(logits=reader.model(tokens[None])[0])


def _think(model: CausalTextEBT, cache: Cache, places: Sequence[int], options: GenerateOptions) -> Guess:
    """Return the best of N candidates at the last len(places) positions of the cache."""
    weight = model.head.weight
    device, shape = weight.device, (model.config.vocab_size,)

    def start(candidate: int) -> Tensor:
        generators = (make_generator(options.seed, _START, place, candidate, device=device) for place in places)
        drawn = [torch.randn(shape, generator=g, device=g.device, dtype=weight.dtype) for g in generators]
        return torch.stack(drawn)[None].to(device)  # (1, P, vocab_size)

    steps: list[list[tuple[Tensor, Tensor]]] = []

    def keep(step: ThinkingStep) -> None:
        if step.index == 0:
            steps.append([])
        steps[-1].append((step.candidate[0].detach().clone(), step.energies[0].detach().clone()))

    result = best_of(
        model,
        (start(candidate) for candidate in range(options.num_candidates)),
        options.thinking(),
        context=cache,
        step_size=model.step_size.detach() * options.step_size_scale,
        generator=make_generator(options.seed, _LANGEVIN, places[0], device=device),
        callback=keep if options.explain else None,
    )
    return Guess(
        logits=result.final[0],
        energies=result.energies[:, 0],
        num_forward=int(result.num_forward[0]),
        trajectories=tuple(
            Trajectory(logits=torch.stack([y for y, _ in each]), energies=torch.stack([e for _, e in each])) for each in steps
        ),
    )


def explain(token: int, guess: Guess) -> Explanation | None:
    """Explain a token by the trajectory of its chosen candidate; `guess` has one position. None without a trajectory."""
    if not guess.trajectories or guess.energies is None:
        return None
    trajectory = guess.trajectories[int(guess.energies[:, 0].argmin())]
    first, last = (trajectory.logits[step, 0].double().softmax(0) for step in (1, -1))
    others = last.index_fill(0, torch.tensor([token], device=last.device), -1.0)
    return Explanation(
        energies=tuple(trajectory.energies[:, 0].tolist()),
        probability=float(last[token]),
        first_probability=float(first[token]),
        first_choice=int(first.argmax()),
        runner_up=int(others.argmax()),
        runner_up_probability=float(others.max()),
    )


def choose_token(logits: Tensor, options: GenerateOptions, generator: torch.Generator) -> int:
    """Sample a token from logits (vocab_size,) by the options; `generator` is on the CPU."""
    if options.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.cpu().double() / options.temperature).softmax(0)
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered  # total probability of the more likely tokens
    kept = ordered.where(before < options.top_p, torch.zeros_like(ordered))
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])


def encode_prompt(prompt: str, tokenizer: Tokenizer, model: nn.Module) -> list[int]:
    """Return the document boundary and the tokens of the prompt. Raises ValueError for a prompt that does not fit the model."""
    if not prompt:
        raise ValueError("the prompt is empty; give some text to continue")
    config = model.config
    if tokenizer.vocab_size != config.vocab_size:  # type: ignore[union-attr]
        raise ValueError(
            f"the model has {config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; "  # type: ignore[union-attr]
            "use the --tokenizer that the model was trained with"
        )
    tokens = [tokenizer.boundary, *tokenizer.encode(prompt)]
    limit: int = config.context_length  # type: ignore[union-attr, assignment]
    if len(tokens) > limit:
        raise ValueError(f"the prompt has {len(tokens) - 1} tokens, but the model accepts {limit - 1}; shorten it")
    return tokens


def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, options: GenerateOptions, *, use_cache: bool = True
) -> Iterator[GeneratedToken]:
    """Continue a prompt, token by token, until the end of the document or the maximum number of tokens.

    A full context is read again from its later half. `use_cache=False` reads everything again for every token. It gives the
    same tokens and serves to measure the gain of the cache. Raises ValueError for a prompt or model that does not fit, before
    the first token.
    """
    make_reader(model)  # refuses a model of another modality
    tokens = encode_prompt(prompt, tokenizer, model)
    return _generate(model, tokenizer, tokens, options, use_cache)


def _generate(
    model: nn.Module, tokenizer: Tokenizer, tokens: list[int], options: GenerateOptions, use_cache: bool
) -> Iterator[GeneratedToken]:
    limit: int = model.config.context_length  # type: ignore[union-attr, assignment]
    device = next(model.parameters()).device
    add = tokenizer.stream()
    first, reader = 0, make_reader(model)  # the reader has read tokens[first:...]
    for _ in range(options.num_tokens):
        with torch.no_grad():
            if len(tokens) - first > limit:
                first, reader = len(tokens) - max(limit // 2, 1), make_reader(model)
            if not use_cache:
                reader = make_reader(model)
            reader.read(torch.tensor([tokens[first + reader.num_read :]], device=device))
            place = len(tokens) - 1
            guess = reader.guess(place, options)
        token = choose_token(guess.logits[0], options, make_generator(options.seed, _SAMPLE, place))
        if token == tokenizer.boundary:
            return
        tokens.append(token)
        energy = None if guess.energies is None else float(guess.energies.min())
        yield GeneratedToken(
            token=token,
            text=add(token),
            energy=energy,
            num_forward=guess.num_forward,
            explanation=explain(token, guess),
        )
