"""Muon (Jordan et al. 2024) for matrices and AdamW for all other parameters, in one optimiser.

timm and torch always run the Newton-Schulz steps of Muon in bfloat16. A CPU without bfloat16 instructions emulates it at a
hundredth of the speed of float32. The update is therefore built here from parts of timm. On a CPU it runs in the dtype of the
parameter unless the caller asks for bfloat16; on other devices it runs in bfloat16.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor
from torch.optim.adamw import adamw

_QUINTIC = [(3.4445, -4.7750, 2.0315)]
"""Coefficients of the Newton-Schulz step (Jordan et al. 2024)."""
_NUM_NEWTON_SCHULZ = 5


class Muon(torch.optim.Optimizer):
    """Groups with `orthogonal: True` use Muon (matrices, and convolutions as matrices), the other groups use AdamW.

    The update of Muon is the orthogonalised Nesterov momentum, times 0.2 * sqrt(larger side). Its root mean square then equals
    that of AdamW, so one learning rate serves both (Liu et al. 2025, arXiv 2502.16982, eq. 4). `bfloat16` runs the
    Newton-Schulz steps in bfloat16 on a CPU too: half the time with AVX512-BF16 or AMX, but very slow without them.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        bfloat16: bool = False,
    ):
        self._bfloat16 = bfloat16
        defaults = dict(lr=lr, momentum=momentum, betas=betas, weight_decay=weight_decay, eps=1e-8, orthogonal=False)
        super().__init__(groups, defaults)
        for group in self.param_groups:
            if group["orthogonal"] and any(p.ndim < 2 for p in group["params"]):
                raise ValueError("Muon's orthogonal groups accept only matrices; put vectors into another group")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._orthogonal_update if group["orthogonal"] else self._adamw_update)(parameters, group)
        return loss

    def _orthogonal_update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            average = state["momentum_buffer"].lerp_(p.grad, 1.0 - group["momentum"])
            update = zeropower_via_newtonschulz(
                p.grad.lerp(average, group["momentum"]).flatten(1),
                _NUM_NEWTON_SCHULZ,
                _QUINTIC,
                dtype=torch.bfloat16 if self._bfloat16 or p.device.type != "cpu" else p.dtype,
            )
            scale = get_lr_scale(update.shape, "match_rms_adamw")
            p.mul_(1.0 - group["lr"] * group["weight_decay"])
            p.add_(update.view_as(p).to(p.dtype), alpha=-group["lr"] * scale)

    def _adamw_update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p].update(zeros, step=torch.zeros((), dtype=torch.float32))
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
