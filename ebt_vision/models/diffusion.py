"""What every diffusion model of images shares: the tables of the noise schedule, the training loss, DDIM sampling, recursion.

A subclass is a network that predicts the noise: DiT on diffusers' transformer, PatchDiffusion on the trunk of the EBT.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ebt_vision.models.image_features import ImageFeatures
from ebt_vision.noise.processes import NUM_TRAIN_TIMESTEPS, alphas_cumprod

CLEAN = -1
"""The "timestep" below 0: the clean image, alpha_bar = 1."""

StepCallback = Callable[[int, Tensor], object]
"""(index, sample (B, C, H, W)): index 0 is the start; a return value of True stops the sampling."""


class Diffusion(ImageFeatures):
    """Predicts the noise in VP-noised images (B, in_chans, H, W) in [-1, 1] at timesteps 0..999 (see noise.processes)."""

    def __init__(self) -> None:
        super().__init__()
        for name, table in _posterior_tables().items():
            self.register_buffer(name, table.float(), persistent=False)

    @abstractmethod
    def forward(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (noise estimate, variance values), both of the shape of `noisy` (B, in_chans, H, W), float32.

        `timesteps` is int64 (B,). The variance values are the v of Nichol & Dhariwal 2021, eq. 15, in -1..1 instead of 0..1;
        None for a network without them.
        """

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
