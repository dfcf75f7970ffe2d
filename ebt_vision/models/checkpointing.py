"""Activation checkpointing that also works for a gradient inside the loss.

torch.utils.checkpoint computes a block again for the gradient of thinking. The graph of this gradient then keeps the recomputed
activations until the loss is differentiated. Here the vector-Jacobian product of a block is checkpointed as well. Until the
backward pass of the loss, only the input of each block and the gradient of its output are kept. The cost is twice the
arithmetic: three more forward passes, one more product, and one backward pass each for the block and its product.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def checkpoint_block(block: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Compute block(x, rope); compute it again if a first or second derivative needs its activations.

    x (B, N, dim) and the parameters of the block get gradients, `rope` does not. The block must not draw random numbers.
    """
    return _Forward.apply(Recompute(block, x.device.type, rope), x, *block.parameters())


class Recompute:
    """Compute a block again under the autocast settings of the first time, with attention that has a second derivative."""

    def __init__(self, block: nn.Module, device_type: str, rope: tuple[Tensor, Tensor]):
        self.block, self.device_type, self.rope = block, device_type, rope
        self.autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def product(
        self, x: Tensor, parameters: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor, *, create_graph: bool
    ) -> tuple[Tensor, ...]:
        """Return the gradients of the `wanted` tensors of (x, *parameters), from the gradient of the output."""
        enabled, dtype = self.autocast
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(self.device_type, dtype, enabled=enabled):
            output = self.block(x, self.rope)
            inputs = [tensor for tensor, needed in zip((x, *parameters), wanted, strict=True) if needed]
            return torch.autograd.grad(output, inputs, grad, create_graph=create_graph)


class _Forward(torch.autograd.Function):
    """The block."""

    @staticmethod
    def forward(ctx: Any, again: Recompute, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(x, *parameters)
        return again.block(x, again.rope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Thinking's own gradient needs no gradients of the weights; the engine knows which tensors this pass needs.
        wanted = [node is not None and torch._C._will_engine_execute_node(node) for node, _ in ctx.next_functions]
        found = iter(_Product.apply(ctx.again, wanted, grad, *ctx.saved_tensors))
        return (None, *(next(found) if needed else None for needed in wanted))


class _Product(torch.autograd.Function):
    """The vector-Jacobian product of the block; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, again: Recompute, wanted: list[bool], grad: Tensor, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.again, ctx.wanted = again, wanted
        ctx.save_for_backward(grad, x, *parameters)
        with torch.enable_grad():
            return again.product(x.detach().requires_grad_(), parameters, wanted, grad, create_graph=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            grad, x = grad.detach().requires_grad_(), x.detach().requires_grad_()
            products = ctx.again.product(x, parameters, ctx.wanted, grad, create_graph=True)
        needed = ctx.needs_input_grad[2:]
        inputs = [tensor for tensor, wanted in zip((grad, x, *parameters), needed, strict=True) if wanted]
        found = iter(torch.autograd.grad(products, inputs, grads, allow_unused=True))
        return (None, None, *(next(found) if wanted else None for wanted in needed))
