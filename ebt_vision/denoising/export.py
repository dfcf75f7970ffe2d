"""Export of networks for other programs: ONNX files and torch.export programs.

Two parts of a network can be exported:

   proposal   images -> N(images): the prediction of a regressor, or the reconstruction of an EBT with the quadratic head. It
              needs one forward pass. Batch, height and width are dynamic.
   step       candidate -> (next candidate, energy): one thinking step of an EBT, y - step_size * dE/dy. The gradient is traced
              into plain operations, at one size. With observation_context the noisy image is a second input.

Inputs and outputs of both are images in [0, 1], like photographs; the scaling for the network is inside.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebt_vision.core.atomic_files import write_atomically
from ebt_vision.core.checks import MissingExtraError
from ebt_vision.denoising.network import signal_scale_of
from ebt_vision.models.patch_ebt import PatchEBT, patch_energy_mean
from ebt_vision.models.pretrained_model import PretrainedModel
from ebt_vision.models.regressor import PatchRegressor
from ebt_vision.noise.processes import to_image_range, to_model_range

Part = Literal["proposal", "step"]
SUFFIXES = (".onnx", ".pt2")
"""The suffixes of ONNX and of torch.export's own format."""


class Proposal(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> denoised images, clamped; H and W are multiples of the patch size."""

    def __init__(self, model: PatchEBT | PatchRegressor):
        super().__init__()
        self.model, self.scale = model, signal_scale_of(model)

    def forward(self, images: Tensor) -> Tensor:
        x = to_model_range(images) * self.scale
        output = self.model.reconstruct(x, *self.model.context_of(x)) if isinstance(self.model, PatchEBT) else self.model(x)
        return to_image_range(output).clamp(0.0, 1.0)


class Step(nn.Module):
    """Candidates (B, 3, H, W) -> candidates after one thinking step, and their energies before it, mean over patches, (B,).

    Candidates are in [0, 1], or outside if they are still noisy. They are not clamped, so that steps can follow one another.
    The first candidate is the noisy image; a network of the VP process returns images of full signal from the first step on. A
    model with observation_context takes the noisy images (B, 3, H, W) as its second input in every step.
    """

    def __init__(self, model: PatchEBT):
        super().__init__()
        self.model = model

    def forward(self, candidates: Tensor, *noisy: Tensor) -> tuple[Tensor, Tensor]:
        y = to_model_range(candidates)
        context = [to_model_range(images) for images in noisy]

        def total(candidate: Tensor) -> tuple[Tensor, Tensor]:
            energy = self.model(candidate, *context)
            return energy.sum(), energy

        gradient, energy = torch.func.grad(total, has_aux=True)(y)
        shown = patch_energy_mean(energy, y.shape, self.model.config.patch_size)
        return to_image_range(y - self.model.step_size * gradient), shown


def export_model(
    model: PretrainedModel, path: Path, *, part: Part = "proposal", size: tuple[int, int] | None = None, batch_size: int = 1
) -> None:
    """Write `part` of a PatchEBT or PatchRegressor to `path`, as ONNX or torch.export program by its suffix (.onnx, .pt2).

    `size` (height, width) and `batch_size` are for a step, which has fixed shapes. A proposal accepts any size in multiples of
    the patch size. Raises ValueError for a part that the model does not have, a size that does not fit and an unknown suffix,
    MissingExtraError for ONNX without the package onnxscript, OSError if the file cannot be written. A file is complete or
    unchanged.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"output {path} must end with {' or '.join(SUFFIXES)}: ONNX, or a torch.export program")
    if path.suffix == ".onnx":
        check_onnx()
    module = _part(model, part)
    patch_size: int = model.config.patch_size
    if part == "step":
        if size is None:
            raise ValueError("a step has a fixed size; set height and width, for example 256x256")
        if min(size) < patch_size or any(side % patch_size for side in size):
            raise ValueError(
                f"size={size[0]}x{size[1]} does not fit; both sides must be multiples of {patch_size}, the patch size"
            )
        num_inputs = 2 if getattr(model.config, "observation_context", False) else 1
        program = _traced(module, tuple(torch.zeros(batch_size, 3, *size) for _ in range(num_inputs)))
    else:
        # Two images of 3x5 patches: torch.export keeps different sizes apart, and would treat a size of 1 as a constant.
        example = torch.zeros(2, 3, 3 * patch_size, 5 * patch_size)
        automatic = torch.export.Dim.AUTO
        program = torch.export.export(module, (example,), dynamic_shapes=({0: automatic, 2: automatic, 3: automatic},))
    if path.suffix == ".pt2":
        write_atomically(path, lambda file: torch.export.save(program, file))
        return
    inputs, outputs = ["images"], ["denoised"]
    if part == "step":
        inputs, outputs = ["candidates", "noisy"][:num_inputs], ["next_candidates", "energies"]
    onnx_program = torch.onnx.export(program, (), dynamo=True, input_names=inputs, output_names=outputs, verbose=False)
    assert onnx_program is not None
    onnx_program.model.metadata_props.update(
        {"source": f"ebt_vision {model.model_type}", "part": part, "patch_size": str(patch_size), "range": "[0, 1], RGB"}
    )
    model_bytes = onnx_program.model_proto.SerializeToString()
    write_atomically(path, lambda file: file.write(model_bytes))


def check_onnx() -> None:
    """Raise MissingExtraError, with the installation command, if ONNX files cannot be written."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingExtraError('onnx is not installed; run: pip install "ebt_vision[onnx]"') from None


def _part(model: PretrainedModel, part: Part) -> nn.Module:
    if part not in get_args(Part):
        raise ValueError(f"part={part!r} is unknown; use one of {', '.join(get_args(Part))}")
    if not isinstance(model, PatchEBT | PatchRegressor):
        raise ValueError(f"a {model.model_type!r} model cannot be exported; use a patch_ebt or a patch_regressor")
    model = model.eval().requires_grad_(False)
    if part == "proposal":
        if isinstance(model, PatchEBT) and model.config.energy_head != "quadratic":
            raise ValueError("an EBT with the linear head has no proposal; export its step with --part step")
        return Proposal(model)
    if not isinstance(model, PatchEBT):
        raise ValueError("a regressor has no energy and no step; export its proposal")
    return Step(model)


def _traced(module: nn.Module, examples: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Trace the module with its inner gradients written out as plain operations, at the shapes of the examples."""
    table: dict[Any, Callable[..., Any]] = {torch.ops.aten.convolution_backward.default: _convolution_backward}
    with sdpa_kernel(SDPBackend.MATH):  # other programs do not know the backward operator of fused attention
        graph = make_fx(module, decomposition_table=table)(*examples)
    return torch.export.export(graph, examples)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """The gradient of a convolution's input, as a convolution, because ONNX has no operator for convolution_backward."""
    assert not output_mask[1] and not output_mask[2], "the weights are constants"
    if transposed:
        return F.conv2d(grad, weight, None, stride, padding, dilation, groups), None, None
    extra = [
        x.shape[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1)
        for i in range(2)
    ]
    return F.conv_transpose2d(grad, weight, None, stride, padding, extra, groups, dilation), None, None
