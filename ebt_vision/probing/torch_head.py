"""The probe for large sets: batch norm without affine and a linear layer, SGD 0.9 or LARS, cosine, many learning rates at once.

The recipe follows MAE (He et al. 2022, app. A.1) with a grid as in DINOv2 (Oquab et al. 2024): every learning rate trains its
own classifier on the same batches, so that a sweep reads the features once. For features of tokens the pooling is trained: each
of a few learned queries attends over the tokens and pools its part of the channels (Psomas et al. 2025).
"""

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from ebt_vision.core.rng import make_generator
from ebt_vision.probing.feature_cache import FeatureRows
from ebt_vision.probing.heads import Head, ProbeSet, Trial
from ebt_vision.probing.scores import top_k_accuracy

LEARNING_RATES = {
    "sgd": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "lars": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
}
"""For a batch of 256; scaled by batch_size / 256."""
NUM_QUERIES = 8

_WEIGHT_STREAM, _ORDER_STREAM = 0x70776774, 0x706F7264


class TorchHead(Head):
    """Trained batch by batch from the mapped features; the learning rate is the hyper-parameter.

    With several views, each epoch trains on the next random crop; measuring uses the centred squares.
    """

    name = "torch"

    def __init__(
        self,
        *,
        optimizer: str = "sgd",
        learning_rates: Sequence[float] = (),
        epochs: int = 30,
        batch_size: int = 1024,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        if optimizer not in LEARNING_RATES:
            raise ValueError(f"optimizer={optimizer!r} is unknown; use {' or '.join(LEARNING_RATES)}")
        rates = tuple(learning_rates) or LEARNING_RATES[optimizer]
        if min(rates) <= 0:
            raise ValueError(f"learning rates {list(rates)} must be positive")
        if epochs < 1 or batch_size < 2:
            raise ValueError(f"epochs={epochs} must be 1 or more, batch_size={batch_size} 2 or more (batch norm)")
        self._optimizer, self._rates, self._epochs, self._batch_size = optimizer, rates, epochs, batch_size
        self._seed, self._device = seed, device
        settings = {"optimizer": optimizer, "learning_rates": list(rates), "epochs": epochs, "batch_size": batch_size}
        self.settings = {**settings, "seed": seed}

    def accepts(self, pool: str) -> bool:
        return True

    def check_size(self, num_images: int, num_values: int) -> None:
        pass  # reads batch by batch

    def sweep(self, data: ProbeSet, fit: np.ndarray, held_out: np.ndarray) -> list[Trial]:
        begin = time.perf_counter()
        probe = self._train(data, fit, self._rates)
        scores = self._scores(probe, data.views[0], held_out)  # (rates, n, num_classes)
        seconds, labels = (time.perf_counter() - begin) / len(self._rates), data.labels[held_out]
        trials = []
        for rate, of_rate in zip(self._rates, scores, strict=True):
            top1, top5 = (top_k_accuracy(of_rate, labels, k) for k in (1, 5))
            finite = bool(np.isfinite(of_rate).all())
            trials.append(Trial(hyper={"lr": rate}, top1=top1, top5=top5, seconds=seconds, converged=finite))
        return trials

    def predict(self, data: ProbeSet, fit: np.ndarray, hyper: dict, queries: FeatureRows, indices: np.ndarray) -> np.ndarray:
        return self._scores(self._train(data, fit, (hyper["lr"],)), queries, indices)[0]

    def _train(self, data: ProbeSet, fit: np.ndarray, rates: Sequence[float]) -> "_Probes":
        probe = _Probes(data.views[0].shape, data.num_classes, len(rates), self._seed).to(self._device).train()
        scale = self._batch_size / 256.0
        groups = [{"params": [*head.parameters()], "lr": lr * scale} for head, lr in zip(probe.heads, rates, strict=True)]
        optimizer: torch.optim.Optimizer
        if self._optimizer == "lars":
            # A bias of norm 0 has no relative step. On centred features it only represents the class frequencies.
            for head in probe.heads:
                head.bias.requires_grad_(False)
            # Without weight decay, LARS adapts the learning rate only with always_adapt.
            optimizer = Lars(groups, momentum=0.9, always_adapt=True)
        else:
            optimizer = torch.optim.SGD(groups, momentum=0.9)
        starts = _batch_starts(len(fit), self._batch_size)
        total = self._epochs * len(starts)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / total)))
        labels = torch.from_numpy(data.labels)
        for epoch in range(self._epochs):
            view = data.views[1 + epoch % (len(data.views) - 1)] if len(data.views) > 1 else data.views[0]
            order = fit[torch.randperm(len(fit), generator=make_generator(self._seed, _ORDER_STREAM, epoch)).numpy()]
            for start, stop in zip(starts, [*starts[1:], len(fit)], strict=True):
                batch = np.sort(order[start:stop])
                target = labels[torch.from_numpy(batch)].to(self._device)
                logits = probe(torch.from_numpy(view.rows(batch)).to(self._device))
                optimizer.zero_grad()
                # The heads share no weights, so the gradient of the sum is each head's own; a diverging head does not affect
                # others.
                torch.stack([F.cross_entropy(of_head, target) for of_head in logits]).sum().backward()
                optimizer.step()
                schedule.step()
        return probe.eval()

    @torch.no_grad()
    def _scores(self, probe: "_Probes", features: FeatureRows, indices: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(indices), self._batch_size):
            x = torch.from_numpy(features.rows(indices[start : start + self._batch_size])).to(self._device)
            parts.append(torch.stack(probe(x)).cpu().numpy())  # (rates, b, num_classes)
        return np.concatenate(parts, axis=1)


class _Probes(nn.Module):
    """One shared batch norm without weights, and one head per learning rate; all heads start equal."""

    def __init__(self, shape: tuple[int, ...], num_classes: int, count: int, seed: int) -> None:
        """`shape` is (n, D), or (n, N, D) for tokens."""
        super().__init__()
        self.norm = nn.BatchNorm1d(shape[-1], affine=False)
        head = _AttentiveHead if len(shape) == 3 else _LinearHead
        self.heads = nn.ModuleList(head(shape[-1], num_classes, make_generator(seed, _WEIGHT_STREAM)) for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return [head(x) for head in self.heads]


class _LinearHead(nn.Module):
    """(B, D) -> (B, num_classes)."""

    def __init__(self, dim: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(num_classes, dim, generator=generator))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _AttentiveHead(_LinearHead):
    """(B, N, D) -> (B, num_classes): the attention of each query pools its part of the channels."""

    def __init__(self, dim: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__(dim, num_classes, generator)
        count = math.gcd(NUM_QUERIES, dim)
        self.queries = nn.Parameter(0.02 * torch.randn(count, dim, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        B, N, dim = x.shape
        count = len(self.queries)
        attention = (x @ self.queries.T / math.sqrt(dim)).softmax(1)  # (B, N, count)
        parts = x.reshape(B, N, count, dim // count)
        return super().forward(torch.einsum("bnq,bnqd->bqd", attention, parts).reshape(B, dim))


def _batch_starts(count: int, batch_size: int) -> list[int]:
    """Return the start of each batch; a last batch of one image, which batch norm does not accept, joins the previous one."""
    starts = list(range(0, count, batch_size))
    return starts[:-1] if len(starts) > 1 and count - starts[-1] == 1 else starts
