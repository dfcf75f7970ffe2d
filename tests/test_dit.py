"""The DiT baseline against diffusers' own model, scheduler and closed forms."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from ebt_vision.models.diffusion import CLEAN, ddim_step, ddim_timesteps
from ebt_vision.models.dit import DiT
from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.noise.processes import alphas_cumprod

TINY = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)


def tiny_dit(*, random_weights: bool = False, **overrides) -> DiT:
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{**TINY, **overrides}))
    if random_weights:  # adaLN-zero makes a fresh model give zeros
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_forward_is_the_one_of_diffusers_given_the_same_weights():
    model = tiny_dit(random_weights=True, shared_embedder=False).eval()
    x, t = images(2, 3, 16, 16), torch.tensor([0, 70])
    expected = model.transformer(x, timestep=t, class_labels=torch.zeros_like(t)).sample
    eps, values = model(x, t)
    torch.testing.assert_close(torch.cat([eps, values], dim=1), expected)


def test_a_shared_embedder_is_the_same_network_as_equal_embedders_in_every_block():
    shared = tiny_dit(random_weights=True).eval()
    own = tiny_dit(shared_embedder=False).eval()
    weights = shared.state_dict()
    for name in own.state_dict():
        _, emb, tail = name.partition(".norm1.emb.")
        if emb:
            weights[name] = weights[f"embedder.{tail}"]
    own.load_state_dict({name: weights[name] for name in own.state_dict()})
    x, t = images(2, 3, 16, 16), torch.tensor([3, 70])
    torch.testing.assert_close(shared(x, t), own(x, t))
    assert own.num_parameters - shared.num_parameters == sum(p.numel() for p in shared.embedder.parameters())


def test_parameters_are_counted_by_hand():
    # Embedder: 256 * d + d, d * d + d, one class. Block: attention 4 (d*d + d), MLP 8 d*d + 5 d, adaLN 6 (d*d + d).
    d = 32
    embedder = 256 * d + d + d * d + d + d
    block = 4 * (d * d + d) + 8 * d * d + 5 * d + 6 * (d * d + d)
    ends = 48 * d + d + 2 * (d * d + d) + d * 96 + 96
    assert tiny_dit().num_parameters == embedder + 2 * block + ends


def test_initialisation_is_the_papers():
    model = tiny_dit(embed_dim=64)
    block = model.transformer.transformer_blocks[1]
    for linear in (block.norm1.linear, model.transformer.proj_out_1, model.transformer.proj_out_2):
        assert not linear.weight.any() and not linear.bias.any()
    assert model.embedder.timestep_embedder.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.embedder.class_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.5)
    bounds = {  # xavier: sqrt(6 / (fan_in + fan_out)); q, k and v count as one matrix
        block.attn1.to_q: math.sqrt(6 / (64 + 3 * 64)),
        block.attn1.to_out[0]: math.sqrt(6 / (64 + 64)),
        block.ff.net[0].proj: math.sqrt(6 / (64 + 256)),
        model.transformer.pos_embed.proj: math.sqrt(6 / (48 + 64)),
    }
    for layer, bound in bounds.items():
        assert 0.95 * bound < layer.weight.abs().max().item() <= bound
        assert not layer.bias.any()
    x, t = images(1, 3, 16, 16), torch.tensor([5])
    assert not model(x, t)[0].any()


def test_training_mode_drops_no_label_and_draws_nothing():
    model = tiny_dit(random_weights=True).train()
    x, t = images(16, 3, 16, 16)[:1].repeat(16, 1, 1, 1), torch.full((16,), 9)
    state = torch.get_rng_state()
    eps, _ = model(x, t)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(eps, eps[:1].expand_as(eps))
    assert model.embedder.class_embedder.embedding_table.num_embeddings == 1


@pytest.mark.parametrize(("height", "width"), [(8, 16), (20, 12), (32, 32)])
def test_other_sizes_work_and_positions_tell_rows_from_columns(height, width):
    model = tiny_dit(random_weights=True).eval()
    x, t = images(1, 3, height, width), torch.tensor([9])
    eps, values = model(x, t)
    assert eps.shape == values.shape == x.shape
    turned, _ = model(x.transpose(2, 3), t)
    assert turned.shape == (1, 3, width, height)


def test_patches_come_back_at_their_own_place():
    # Zero the blocks and positions, and let the output copy the embedding: the network is then the identity on normed patches.
    model = tiny_dit(embed_dim=48, num_heads=4, learn_sigma=False).eval()
    transformer = model.transformer
    weight = transformer.pos_embed.proj.weight  # (48, 3, 4, 4), columns in C, p, p order
    with torch.no_grad():
        weight.copy_(torch.eye(48).reshape(48, 3, 4, 4))
        order = torch.arange(48).reshape(3, 4, 4).permute(1, 2, 0).reshape(-1)  # the output's p, p, C order
        transformer.proj_out_2.weight.copy_(torch.eye(48)[order])
        transformer.pos_embed.pos_embed.zero_()
    x = images(1, 3, 16, 16)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4)  # (1, C, 4, 4, p, p)
    mean, var = patches.mean((1, 4, 5), keepdim=True), patches.var((1, 4, 5), keepdim=True, correction=0)
    normed = ((patches - mean) / (var + 1e-6).sqrt()).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 16, 16)
    torch.testing.assert_close(model(x, torch.tensor([0]))[0], normed)


def test_a_size_the_patch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="18x16 is not divisible by patch_size=4"):
        tiny_dit()(images(1, 3, 18, 16), torch.tensor([0]))


def test_result_does_not_depend_on_the_batch():
    model = tiny_dit(random_weights=True).eval()
    x, t = images(5, 3, 16, 16), torch.tensor([0, 10, 40, 99, 7])
    together, _ = model(x, t)
    for i in range(5):
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1])[0], together[i : i + 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.ddim(x[:1], 9, 5), model.ddim(x, 9, 5)[:1], rtol=1e-5, atol=1e-5)


def test_features():
    model = tiny_dit(random_weights=True).eval()
    x, t = images(2, 3, 16, 16), torch.tensor([0, 0])
    every = model.forward_intermediates(x, t)
    assert [tuple(tokens.shape) for tokens in every] == [(2, 16, 32)] * 2
    torch.testing.assert_close(model.forward_intermediates(x, t, indices=[0])[0], every[0])
    features = model.forward_features(x, t)
    torch.testing.assert_close(features, nn.functional.layer_norm(every[1], (32,), eps=1e-6))


def test_save_and_load(tmp_path):
    model = tiny_dit(random_weights=True).eval()
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    x, t = images(1, 3, 16, 16), torch.tensor([9])
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(x, t), model(x, t), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (dict(img_size=30), "img_size=30 is not divisible by patch_size=4; use 28 or 32"),
        (dict(embed_dim=30), "multiple of 4"),
        (dict(num_heads=3), "not divisible by num_heads=3"),
        (dict(depth=0), "depth=0 must be 1 or more"),
    ],
)
def test_config_errors_name_the_field(field, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**{**TINY, **field})


# --- DDIM


def test_timesteps_are_explicit_distinct_and_complete():
    assert ddim_timesteps(99, 1) == [99, CLEAN]
    assert ddim_timesteps(99, 4) == [99, 74, 49, 24, CLEAN]
    assert ddim_timesteps(99, 100) == list(range(99, -2, -1))
    for num_steps in range(1, 101):
        pairs = ddim_timesteps(99, num_steps)
        gaps = [a - b for a, b in zip(pairs, pairs[1:], strict=False)]
        assert len(pairs) == num_steps + 1 and pairs[-1] == CLEAN
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
    for timestep, num_steps in ((99, 0), (99, 101), (1000, 5), (-1, 1)):
        with pytest.raises(ValueError, match=f"{timestep}"):
            ddim_timesteps(timestep, num_steps)


def test_ddim_is_exact_when_the_noise_is_known():
    clean, eps = images(1, 3, 8, 8).double(), images(1, 3, 8, 8, seed=1).double()
    alpha_bars = [float(alphas_cumprod()[t]) if t >= 0 else 1.0 for t in ddim_timesteps(99, 7)]
    sample = alpha_bars[0] ** 0.5 * clean + (1 - alpha_bars[0]) ** 0.5 * eps
    for now, following in zip(alpha_bars, alpha_bars[1:], strict=False):
        sample = ddim_step(sample, eps, now, following)
        torch.testing.assert_close(sample, following**0.5 * clean + (1 - following) ** 0.5 * eps)
    torch.testing.assert_close(sample, clean)


@pytest.mark.parametrize("num_steps", [1, 10, 100])
def test_ddim_agrees_with_the_scheduler_of_diffusers(num_steps):
    # With these numbers of steps the scheduler's own spacing happens to visit the same timesteps.
    model = tiny_dit(random_weights=True).eval()
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    scheduler.set_timesteps(10 * num_steps)
    x = images(2, 3, 16, 16)
    expected = x
    with torch.no_grad():
        for t in range(99, -1, -100 // num_steps):
            eps, _ = model(expected, torch.full((2,), t))
            expected = scheduler.step(eps, t, expected).prev_sample
    torch.testing.assert_close(model.ddim(x, 99, num_steps), expected, rtol=1e-4, atol=1e-4)


def test_one_call_and_recursion_are_made_of_ddim():
    model = tiny_dit(random_weights=True).eval()
    x = images(1, 3, 16, 16)
    eps, _ = model(x, torch.tensor([49]))
    alpha_bar = float(alphas_cumprod()[49])
    torch.testing.assert_close(model.predict_clean(x, 49), (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5)
    once = model.ddim(x, 4, 5)
    torch.testing.assert_close(model.recursion(x, 4, 2), model.ddim(once, 4, 5))
    with pytest.raises(ValueError, match="num_loops=0"):
        model.recursion(x, 4, 0)


def test_callback_sees_every_step_and_can_stop():
    model = tiny_dit(random_weights=True).eval()
    seen = []
    result = model.ddim(images(1, 3, 16, 16), 9, 5, lambda index, sample: seen.append((index, sample)))
    assert [index for index, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert torch.equal(seen[-1][1], result)
    stopped = model.ddim(images(1, 3, 16, 16), 9, 5, lambda index, _: index == 2)
    assert torch.equal(stopped, seen[2][1])


# --- Loss


def reference_term(clean, noisy, t, eps, values):
    """L_t in nats per dimension, from torch.distributions in float64 and the published formulas."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, 0)
    bar, previous = bars[t], bars[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
    tilde = betas[max(t, 1)] * (1 - bars[max(t, 1) - 1]) / (1 - bars[max(t, 1)])
    x0 = (noisy - (1 - bar).sqrt() * eps) / bar.sqrt()

    def posterior_mean(x):
        return (previous.sqrt() * betas[t] * x + (1 - betas[t]).sqrt() * (1 - previous) * noisy) / (1 - bar)

    variance = betas[t] ** ((values + 1) / 2) * tilde ** (1 - (values + 1) / 2)
    model = torch.distributions.Normal(posterior_mean(x0), variance.sqrt())
    if t:
        truth = torch.distributions.Normal(posterior_mean(clean), tilde.sqrt().expand_as(clean))
        return torch.distributions.kl_divergence(truth, model).mean()
    return -(model.cdf(clean + 1 / 255) - model.cdf(clean - 1 / 255)).log().mean()


@pytest.mark.parametrize("t", [0, 1, 50, 99])
def test_loss_agrees_with_torch_distributions(t):
    model = tiny_dit(random_weights=True).double()
    clean, noise = images(1, 3, 16, 16).double().clamp(-0.9, 0.9), images(1, 3, 16, 16, seed=1).double()
    bar = alphas_cumprod()[t]
    noisy = bar.sqrt() * clean + (1 - bar).sqrt() * noise
    eps, values = model(noisy, torch.tensor([t]))
    expected = (eps - noise).square().mean() + reference_term(clean, noisy, t, eps, values) / math.log(2)
    torch.testing.assert_close(model.loss(clean, noise, torch.tensor([t]))[0].double(), expected, rtol=2e-3, atol=1e-4)


def test_variational_term_trains_the_variance_alone():
    model = tiny_dit(random_weights=True)
    clean, noise, t = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1), torch.tensor([20, 60])
    loss = model.loss(clean, noise, t)
    assert loss.shape == (2,)
    loss.sum().backward()
    full = model.transformer.proj_out_2.bias.grad.reshape(16, 6)  # p * p, out_chans
    model.zero_grad()
    alpha_bar = alphas_cumprod()[t].float()[:, None, None, None]
    eps, _ = model(alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise, t)
    (eps - noise).square().flatten(1).mean(1).sum().backward()
    simple = model.transformer.proj_out_2.bias.grad.reshape(16, 6)
    torch.testing.assert_close(full[:, :3], simple[:, :3])
    assert full[:, 3:].abs().min() > 0 and not simple[:, 3:].any()


def test_loss_without_learned_variance_is_the_noise_error():
    model = tiny_dit(learn_sigma=False)
    noise = images(2, 3, 16, 16, seed=1)
    loss = model.loss(images(2, 3, 16, 16), noise, torch.tensor([0, 60]))
    torch.testing.assert_close(loss, noise.square().flatten(1).mean(1))  # a fresh model predicts zero


def test_a_few_updates_lower_the_loss():
    model = tiny_dit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clean, noise, t = images(4, 3, 16, 16).clamp(-1, 1), images(4, 3, 16, 16, seed=1), torch.tensor([20, 60, 90, 99])
    losses = []
    for _ in range(30):
        loss = model.loss(clean, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
