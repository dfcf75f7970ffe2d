"""DiT: the diffusion baseline (Peebles & Xie 2023, arXiv 2212.09748), on diffusers' DiTTransformer2DModel, in pixel space.

diffusers' model is made for loading published weights. For training from scratch, this module changes three things:

- It applies the initialisation of the paper (`initialize_weights` in its released code). diffusers drops even adaLN-zero.
- It uses one timestep and label embedder for the whole network, as in the paper. diffusers gives every block its own
 (`shared_embedder=False` keeps those: 9 % more parameters at the default size).
- It uses one null class and no label dropout. diffusers drops a tenth of the labels in training mode.

It also accepts images of any size whose sides the patch divides; diffusers' forward accepts only square images.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, LabelEmbedding
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.models.image_features import ImageFeatures
from ebt_vision.models.patches import check_image_size, unpatchify
from ebt_vision.noise.processes import NUM_TRAIN_TIMESTEPS, alphas_cumprod

CLEAN = -1
"""The "timestep" below 0: the clean image, alpha_bar = 1."""

StepCallback = Callable[[int, Tensor], object]
"""(index, sample (B, C, H, W)): index 0 is the start; a return value of True stops the sampling."""


class DiT(ImageFeatures):
    """Predicts the noise in VP-noised images (B, in_chans, H, W) in [-1, 1] at timesteps 0..999 (see noise.processes)."""

    model_type = "dit"
    blocks_name = "transformer.transformer_blocks"
    config_class = DiTConfig

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.embed_dim // config.num_heads,
            in_channels=config.in_chans,
            out_channels=config.in_chans * (2 if config.learn_sigma else 1),
            num_layers=config.depth,
            sample_size=config.img_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=1,
            norm_eps=1e-6,  # the paper's; diffusers' default differs between the norms of a block
        )
        for block in self.transformer.transformer_blocks:
            # diffusers sets the dropout of labels to 0.1 and adds a second row to the table for dropped labels.
            block.norm1.emb.class_embedder = LabelEmbedding(1, config.embed_dim, dropout_prob=0.0)
        self.embedder: CombinedTimestepLabelEmbeddings | None = None
        if config.shared_embedder:
            self.embedder = self.transformer.transformer_blocks[0].norm1.emb
            for block in self.transformer.transformer_blocks:
                block.norm1.emb = PassThroughEmbedder()
        _initialize(self)
        for name, table in _posterior_tables().items():
            self.register_buffer(name, table.float(), persistent=False)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (noise estimate, variance values), both of the shape of `noisy` (B, in_chans, H, W), float32.

        `timesteps` is int64 (B,). The variance values are the v of Nichol & Dhariwal 2021, eq. 15, in -1..1 instead of 0..1;
        None without learn_sigma. Raises ValueError for sides that the patch does not divide.
        """
        x, conditioning = self._tokens(noisy, timesteps, [self.config.depth - 1])
        # Final layer: adaLN, then one linear map to patches.
        shift, scale = self.transformer.proj_out_1(F.silu(conditioning)).chunk(2, dim=1)
        x = self.transformer.norm_out(x[0]) * (1 + scale[:, None]) + shift[:, None]
        x = self.transformer.proj_out_2(x).float()  # (B, N, p * p * out_chans)
        output = unpatchify(x, self.config.patch_size, *noisy.shape[-2:])
        if not self.config.learn_sigma:
            return output, None
        eps, variance_values = output.chunk(2, dim=1)
        return eps, variance_values

    def block_tokens(self, *inputs: Tensor, indices: list[int]) -> list[Tensor]:
        """See ImageFeatures; the inputs are the noisy images and their timesteps, int64 (B,)."""
        if len(inputs) != 2:
            raise ValueError(f"a DiT needs images and timesteps, got {len(inputs)} inputs; use model(images, timesteps)")
        return self._tokens(inputs[0], inputs[1], indices)[0]

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See ImageFeatures; without the modulation of the final layer."""
        return self.transformer.norm_out(tokens)

    def _tokens(self, noisy: Tensor, timesteps: Tensor, indices: list[int]) -> tuple[list[Tensor], Tensor]:
        """Return the tokens after the blocks in `indices`, and the conditioning (B, embed_dim) of the final layer."""
        check_image_size(noisy, self.config.patch_size)
        # Embed without autocast: diffusers casts the sum with the positions, and so the whole residual stream, to the dtype of
        # the convolution. In the dtype of the weights, the stream is as precise as in PatchTrunk.
        with torch.autocast(noisy.device.type, enabled=False):
            x = self.transformer.pos_embed(noisy.to(self.transformer.pos_embed.proj.weight.dtype))  # NCHW -> NLC
        labels = torch.zeros_like(timesteps)  # the one null class
        blocks = self.transformer.transformer_blocks
        embedder = blocks[0].norm1.emb if self.embedder is None else self.embedder
        conditioning = embedder(timesteps, labels, hidden_dtype=x.dtype)
        # Blocks.
        outputs = []
        for i, block in enumerate(blocks[: max(indices) + 1]):
            x = block(x, timestep=timesteps if self.embedder is None else conditioning, class_labels=labels)
            if i in indices:
                outputs.append(x)
        return outputs, conditioning

    def loss(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Training loss of each image, (B,): L_hybrid of Nichol & Dhariwal 2021, eq. 16, as in DiT.

        `clean` is (B, in_chans, H, W) in [-1, 1], `noise` is standard normal of the same shape, `timesteps` is int64 (B,).
        L_simple is the mean squared error of the noise. L_vlb = T * E_t[L_t], in bits per dimension, has weight 0.001; with T =
        1000 this is L_t itself, as with MSE and RESCALED_MSE in the released code. The mean of L_t is detached, so that this
        term trains only the variance.
        """
        noisy = self._table("signal_scale", timesteps) * clean + self._table("noise_scale", timesteps) * noise
        eps, variance_values = self(noisy, timesteps)
        loss = (eps - noise).square().flatten(1).mean(1)
        if variance_values is None:
            return loss
        term = self._variational_term(clean, noisy, timesteps, eps.detach(), variance_values)
        return loss + 0.001 * NUM_TRAIN_TIMESTEPS * term

    def noise_error(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error of the predicted noise, (B,): L_simple of each image. Arguments as in `loss`."""
        noisy = self._table("signal_scale", timesteps) * clean + self._table("noise_scale", timesteps) * noise
        return (self(noisy, timesteps)[0] - noise).square().flatten(1).mean(1)

    def _variational_term(self, clean: Tensor, noisy: Tensor, timesteps: Tensor, eps: Tensor, values: Tensor) -> Tensor:
        """Return L_t of Ho et al. 2020, eq. 5, in bits per dimension, (B,): a KL divergence, or at t = 0 the decoder's
        likelihood."""

        def at_t(name: str) -> Tensor:
            return self._table(name, timesteps)

        # Posterior means for the true and the predicted clean image (Ho et al. 2020, eq. 7).
        predicted = (noisy - at_t("noise_scale") * eps) / at_t("signal_scale")
        true_mean = at_t("posterior_clean") * clean + at_t("posterior_noisy") * noisy
        mean = at_t("posterior_clean") * predicted + at_t("posterior_noisy") * noisy
        # Variance: interpolated between beta-tilde and beta in the log domain (Nichol & Dhariwal 2021, eq. 15).
        share = (values + 1.0) / 2.0
        low, high = at_t("log_posterior_variance"), at_t("log_beta")
        log_variance = share * high + (1.0 - share) * low
        kl = 0.5 * (log_variance - low + (low - log_variance).exp() - 1.0)
        kl = kl + 0.5 * (true_mean - mean).square() * (-log_variance).exp()
        decoder = -_discretized_log_likelihood(clean, mean, 0.5 * log_variance)
        term = torch.where((timesteps == 0).reshape(-1, 1, 1, 1), decoder, kl)
        return term.flatten(1).mean(1) / math.log(2.0)

    def _table(self, name: str, timesteps: Tensor) -> Tensor:
        """Look up one of the tables below for each image, (B, 1, 1, 1)."""
        return self.get_buffer(name)[timesteps].reshape(-1, 1, 1, 1)

    @torch.no_grad()
    def predict_clean(self, noisy: Tensor, timestep: int) -> Tensor:
        """Predict the clean image (B, in_chans, H, W) in one call, not clamped: x0 of Ho et al. 2020, eq. 15."""
        return self.ddim(noisy, timestep, 1)

    @torch.no_grad()
    def ddim(self, noisy: Tensor, timestep: int, num_steps: int, callback: StepCallback | None = None) -> Tensor:
        """Deterministic DDIM from `timestep` to the clean image in `num_steps` passes, not clamped (Song et al. 2021).

        The steps are eq. 12 with sigma = 0 between the timesteps of `ddim_timesteps`. diffusers' DDIMScheduler does not accept
        pairs of timesteps. Raises ValueError like `ddim_timesteps`.
        """
        alpha_bars = alphas_cumprod()
        timesteps = ddim_timesteps(timestep, num_steps)
        sample = noisy
        if callback is not None and callback(0, sample) is True:
            return sample
        for index, (t, t_next) in enumerate(zip(timesteps, timesteps[1:], strict=False), start=1):
            eps, _ = self(sample, torch.full((len(sample),), t, dtype=torch.int64, device=sample.device))
            alpha_bar = float(alpha_bars[t])
            alpha_bar_next = 1.0 if t_next == CLEAN else float(alpha_bars[t_next])
            sample = ddim_step(sample, eps, alpha_bar, alpha_bar_next)
            if callback is not None and callback(index, sample) is True:
                break
        return sample

    @torch.no_grad()
    def recursion(
        self, noisy: Tensor, timestep: int, num_loops: int, num_steps: int | None = None, callback: StepCallback | None = None
    ) -> Tensor:
        """Apply the whole DDIM loop `num_loops` times to its own output without new noise (Gladstone et al. 2025, code).

        Each loop visits every timestep unless `num_steps` is given. `callback` gets the start and the end of each loop.
        """
        if num_loops < 1:
            raise ValueError(f"num_loops={num_loops} must be 1 or more")
        sample = noisy
        if callback is not None and callback(0, sample) is True:
            return sample
        for index in range(1, num_loops + 1):
            sample = self.ddim(sample, timestep, num_steps or timestep + 1)
            if callback is not None and callback(index, sample) is True:
                break
        return sample


def ddim_timesteps(timestep: int, num_steps: int) -> list[int]:
    """Return num_steps + 1 evenly spaced timesteps from `timestep` to CLEAN (-1), without repetition; num_steps = timestep + 1
    gives all of them. Raises ValueError outside 1 <= num_steps <= timestep + 1."""
    if not 0 <= timestep < NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"timestep={timestep} is not in 0..{NUM_TRAIN_TIMESTEPS - 1}")
    if not 1 <= num_steps <= timestep + 1:
        raise ValueError(f"num_steps={num_steps} does not fit timestep={timestep}; use 1..{timestep + 1}")
    return [timestep - i * (timestep + 1) // num_steps for i in range(num_steps + 1)]


def ddim_step(sample: Tensor, eps: Tensor, alpha_bar: float, alpha_bar_next: float) -> Tensor:
    """One DDIM step on samples (B, C, H, W), from alpha_bar to alpha_bar_next with the noise estimate `eps`.

    Song et al. 2021, eq. 12 with sigma = 0.
    """
    clean = (sample - math.sqrt(1.0 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    return math.sqrt(alpha_bar_next) * clean + math.sqrt(1.0 - alpha_bar_next) * eps


class PassThroughEmbedder(nn.Module):
    """Replaces the embedders in diffusers' blocks: returns the conditioning (B, embed_dim) that is passed as timestep."""

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype) -> Tensor:
        """The "timestep" (B, embed_dim), which is the conditioning already."""
        return timestep.to(hidden_dtype)


def _initialize(model: DiT) -> None:
    """Apply the initialisation of the paper's released code; positions are already fixed sine-cosine."""
    transformer = model.transformer
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, CombinedTimestepLabelEmbeddings):
            nn.init.normal_(module.class_embedder.embedding_table.weight, std=0.02)
    # Initialise the patch embedding as a linear layer.
    nn.init.xavier_uniform_(transformer.pos_embed.proj.weight.view(model.config.embed_dim, -1))
    nn.init.zeros_(transformer.pos_embed.proj.bias)
    for module in model.modules():
        if isinstance(module, CombinedTimestepLabelEmbeddings):
            nn.init.normal_(module.timestep_embedder.linear_1.weight, std=0.02)
            nn.init.normal_(module.timestep_embedder.linear_2.weight, std=0.02)
    for block in transformer.transformer_blocks:
        for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            # The paper's code has one matrix with three times the fan-out: 6 / (d + 3d) instead of 6 / (d + d).
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(0.5))
        nn.init.zeros_(block.norm1.linear.weight)  # adaLN-zero; the biases are already zero
    nn.init.zeros_(transformer.proj_out_1.weight)
    nn.init.zeros_(transformer.proj_out_2.weight)


def _posterior_tables() -> dict[str, Tensor]:
    """Tables of the loss by timestep, float64 (1000,): Ho et al. 2020, eq. 4, 6 and 7."""
    alpha_bar = alphas_cumprod()
    previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    alpha = alpha_bar / previous
    beta = 1.0 - alpha
    variance = beta * (1.0 - previous) / (1.0 - alpha_bar)
    variance[0] = variance[1]  # the posterior at t = 0 has no variance; clipped as in Nichol & Dhariwal's code
    return {
        "signal_scale": alpha_bar.sqrt(),
        "noise_scale": (1.0 - alpha_bar).sqrt(),
        "posterior_clean": previous.sqrt() * beta / (1.0 - alpha_bar),
        "posterior_noisy": alpha.sqrt() * (1.0 - previous) / (1.0 - alpha_bar),
        "log_posterior_variance": variance.log(),
        "log_beta": beta.log(),
    }


def _discretized_log_likelihood(clean: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log likelihood, in nats, of 8-bit values scaled to [-1, 1] under a Gaussian, elementwise (Ho et al. 2020, eq. 13)."""
    normal = torch.distributions.Normal(0.0, 1.0)
    scaled = (clean - mean) * (-log_std).exp()
    half_bin = (-log_std).exp() / 255.0
    upper, lower = normal.cdf(scaled + half_bin), normal.cdf(scaled - half_bin)
    probability = torch.where(clean < -0.999, upper, torch.where(clean > 0.999, 1.0 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
