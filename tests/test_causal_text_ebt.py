"""CausalTextEBT and its baseline: no leak, a plain 2S-token reference, second-order gradients, the cache, documents."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_vision.core.energy_functions import CompiledEnergy
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.models.blocks import apply_rope
from ebt_vision.models.causal_blocks import rope_1d
from ebt_vision.models.causal_text_ebt import CausalTextEBT, CausalTextEBTConfig
from ebt_vision.models.causal_transformer import CausalTransformer, CausalTransformerConfig
from ebt_vision.models.checkpoint import load_pretrained

SIZE = dict(vocab_size=11, context_length=16, embed_dim=16, depth=2, num_heads=2)
HEADS = ["linear", "quadratic", "quadratic, last token, gate"]


def ebt(head: str = "quadratic", **options) -> CausalTextEBT:
    """A float64 model with random weights, its head included; `head` is one of HEADS."""
    torch.manual_seed(0)
    settings = dict(energy_head=head.split(",")[0], add_last_token="token" in head, init_gate=0.3 if "token" in head else None)
    model = CausalTextEBT(CausalTextEBTConfig(**(SIZE | settings | options)))
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.double()


def tokens_and_candidates(batch: int = 3, length: int = 7) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(SIZE["vocab_size"], (batch, length), generator=g)
    return tokens, torch.randn(batch, length, SIZE["vocab_size"], generator=g, dtype=torch.float64)


def thought(model: CausalTextEBT, tokens: Tensor, y0: Tensor, starts: Tensor | None = None, **config) -> Tensor:
    settings = ThinkingConfig(**(dict(num_steps=3) | config))
    return think(model, y0, settings, context=model.context_of(tokens, starts), step_size=0.3).final


def plain_energies(model: CausalTextEBT, tokens: Tensor, candidates: Tensor) -> Tensor:
    """The paper's implementation: 2S tokens through every block, one mask, scores of (2S, 2S)."""
    S, heads = tokens.shape[1], model.config.num_heads
    own_stream = candidates.softmax(-1) @ model.trunk.embed.weight
    if model.config.init_gate is not None:
        own_stream = own_stream * model.gate
    if model.config.add_last_token:
        own_stream = own_stream + model.trunk.embed(tokens)
    x = torch.cat([model.trunk.embed(tokens), own_stream], dim=1)
    context, own = torch.ones(S, S).tril().bool(), torch.eye(S).bool()
    mask = torch.cat([torch.cat([context, torch.zeros(S, S).bool()], 1), torch.cat([context, own], 1)], 0)
    cos, sin = rope_1d(0, S + 1, model.config.embed_dim // heads)
    rope = torch.cat([cos[:S], cos[1:]]), torch.cat([sin[:S], sin[1:]])
    for block in model.trunk.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    output = model.head(model.trunk.norm(x[:, S:]))
    return (output if model.config.energy_head == "linear" else 0.5 * (candidates - output) ** 2).sum(-1)


@pytest.mark.parametrize("head", HEADS)
def test_energies_and_second_order_gradients_equal_those_of_two_s_tokens(head: str):
    model = ebt(head)
    tokens, y = tokens_and_candidates()
    results = []
    for energies in (lambda y: model(y, *model.context_of(tokens)), lambda y: plain_energies(model, tokens, y)):
        candidate = y.clone().requires_grad_()
        energy = energies(candidate)
        (gradient,) = torch.autograd.grad(energy.sum(), candidate, create_graph=True)
        loss = F.cross_entropy((y - 0.3 * gradient).flatten(0, 1), tokens.flatten())
        parameters = [p for n, p in model.named_parameters() if n != "log_step_size"]
        results.append([energy, gradient, *torch.autograd.grad(loss, parameters, allow_unused=True)])
    assert results[0][0].shape == tokens.shape and results[0][1].abs().max() > 1e-3
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("head", HEADS)
def test_no_prediction_sees_its_own_or_a_later_token_or_another_candidate(head: str):
    model = ebt(head)
    tokens, y0 = tokens_and_candidates(batch=1)
    before = thought(model, tokens, y0)
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % SIZE["vocab_size"]
        after = thought(model, changed, y0)
        # Candidate i predicts token i + 1: those of tokens 1..t are candidates 0..t-1.
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-9
        other = y0.clone()
        other[:, t] += torch.linspace(0, 1, SIZE["vocab_size"])
        moved = (thought(model, tokens, other) - before).abs().amax(-1)[0]
        assert [i for i, m in enumerate(moved.tolist()) if m > 0] == [t]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("head", HEADS)
def test_second_order_gradients_match_finite_differences(head: str):
    model = ebt(head)
    tokens, y0 = tokens_and_candidates(batch=2, length=4)

    def loss() -> Tensor:
        result = think(
            model,
            y0,
            ThinkingConfig(num_steps=2, detach_between_steps=False),
            context=model.context_of(tokens),
            step_size=model.step_size,
            create_graph=True,
        )
        return F.cross_entropy(result.final.flatten(0, 1), tokens.flatten())

    loss().backward()
    g = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        assert parameter.grad is not None, name
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(sign * 1e-5 * direction)
                values.append(loss().item())
                parameter.sub_(sign * 1e-5 * direction)
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-5, abs=1e-9), name


def test_a_sample_does_not_depend_on_its_batch():
    model = ebt()
    tokens, y0 = tokens_and_candidates()
    together = thought(model, tokens, y0)
    for i in range(len(tokens)):
        torch.testing.assert_close(thought(model, tokens[i : i + 1], y0[i : i + 1])[0], together[i], rtol=1e-12, atol=1e-12)


def test_stopped_samples_leave_the_batch_and_keep_their_context():
    model = ebt()
    tokens, y0 = tokens_and_candidates()
    result = think(model, y0, ThinkingConfig(num_steps=20, tolerance=0.05), context=model.context_of(tokens), step_size=0.3)
    assert len(set(result.num_steps.tolist())) > 1 or result.num_steps.max() < 20
    for i in range(len(tokens)):
        alone = thought(model, tokens[i : i + 1], y0[i : i + 1], num_steps=20, tolerance=0.05)
        torch.testing.assert_close(alone[0], result.final[i], rtol=1e-12, atol=1e-12)


def test_documents_of_one_sequence_do_not_see_each_other():
    model, language_model = ebt(), transformer()
    tokens, y0 = tokens_and_candidates(batch=1, length=8)
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3]])
    together = thought(model, tokens, y0, starts)
    torch.testing.assert_close(together[:, :3], thought(model, tokens[:, :3], y0[:, :3]), rtol=1e-10, atol=1e-10)
    # The second document alone, at other places: rotary positions are relative.
    torch.testing.assert_close(together[:, 3:], thought(model, tokens[:, 3:], y0[:, 3:]), rtol=1e-5, atol=1e-5)
    logits = language_model(tokens, starts)
    torch.testing.assert_close(logits[:, 3:], language_model(tokens[:, 3:]), rtol=1e-5, atol=1e-5)
    assert (together - thought(model, tokens, y0)).abs().max() > 1e-3


def transformer() -> CausalTransformer:
    torch.manual_seed(0)
    model = CausalTransformer(CausalTransformerConfig(**SIZE))
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.double()


@pytest.mark.parametrize("head", HEADS)
def test_one_candidate_on_a_growing_cache_equals_all_of_them_at_once(head: str):
    model, language_model = ebt(head), transformer()
    tokens, y0 = tokens_and_candidates(batch=2)
    config = ThinkingConfig(num_steps=3)
    parallel = think(model, y0, config, context=model.context_of(tokens), step_size=0.3)
    logits = language_model(tokens)
    cache, lm_cache = (), ()
    for t in range(tokens.shape[1]):
        cache = model.context_of(tokens[:, t : t + 1], past=cache)
        one = think(model, y0[:, t : t + 1], config, context=cache, step_size=0.3)
        torch.testing.assert_close(one.final[:, 0], parallel.final[:, t], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one.energies[..., 0], parallel.energies[..., t], rtol=1e-10, atol=1e-10)
        step, lm_cache = language_model.extend(tokens[:, t : t + 1], past=lm_cache)
        torch.testing.assert_close(step[:, 0], logits[:, t], rtol=1e-10, atol=1e-10)


def test_the_transformer_sees_no_later_token():
    model = transformer()
    tokens, _ = tokens_and_candidates(batch=1)
    before = model(tokens)
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % SIZE["vocab_size"]
        assert torch.equal(model(changed)[:, :t], before[:, :t])
        assert (model(changed)[:, t] - before[:, t]).abs().max() > 1e-6


def test_the_two_models_have_the_same_parameters_but_the_step_size():
    assert ebt("quadratic").num_parameters == transformer().num_parameters + 1
    assert ebt(init_gate=0.1).num_parameters == transformer().num_parameters + 1 + SIZE["embed_dim"]


def test_landscapes_change_with_the_step_and_the_last_one_stays():
    model = ebt(num_landscapes=2)
    torch.nn.init.normal_(model.landscapes, std=1.0)
    tokens, y0 = tokens_and_candidates()
    context = model.context_of(tokens)
    result = think(model, y0, ThinkingConfig(num_steps=3), context=context, step_size=0.3)
    expected = [model(y0, *context, landscape=0)]
    expected += [model(y, *context, landscape=1) for y in result.predictions]
    torch.testing.assert_close(result.energies, torch.stack(expected))
    assert (model(y0, *context, landscape=1) - expected[0]).abs().max() > 1e-3


def test_a_compiled_gradient_trains_the_same():
    model = ebt()
    tokens, y0 = tokens_and_candidates()
    gradients = []
    for energy_fn in (model, CompiledEnergy(model, backend="eager")):
        model.zero_grad()
        config = ThinkingConfig(num_steps=2)
        context = model.context_of(tokens)
        result = think(energy_fn, y0, config, context=context, step_size=0.3, create_graph=True, evaluate_final=False)
        F.cross_entropy(result.final.flatten(0, 1), tokens.flatten()).backward()
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if n != "log_step_size"])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("model", [ebt(), transformer()], ids=["ebt", "transformer"])
def test_a_saved_model_comes_back(model, tmp_path):
    model = model.float()
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path))
    assert loaded.config == model.config
    tokens, y0 = tokens_and_candidates()
    run = (lambda m: m(tokens)) if isinstance(model, CausalTransformer) else lambda m: thought(m, tokens, y0.float())
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (dict(embed_dim=18, num_heads=4), "multiple of 2"),
        (dict(vocab_size=1), "vocab_size=1"),
        (dict(energy_head="cubic"), "'linear' or 'quadratic'"),
        (dict(num_landscapes=0), "num_landscapes=0"),
        (dict(mlp_ratio=0.0), "mlp_ratio"),
        (dict(depth=0), "depth=0"),
    ],
)
def test_a_wrong_size_is_one_line(options: dict, answer: str):
    with pytest.raises(ValueError, match=answer):
        CausalTextEBTConfig(**(SIZE | options))


def test_more_candidates_than_context_are_refused():
    model = ebt()
    tokens, y0 = tokens_and_candidates()
    with pytest.raises(ValueError, match="as many context tokens"):
        model(y0, *model.context_of(tokens[:, :3]))
    with pytest.raises(ValueError, match=r"\(B, N\)"):
        model.context_of(tokens[0])
