"""Features of the image models with the names and contract of timm, so that programs for timm's encoders can use them.

Two things differ from timm. `forward_intermediates` returns only tokens by default (intermediates_only=True, output_fmt="NLC").
There is no classifier: num_classes is 0. A DiT also needs timesteps, and a PatchEBT with observation_context also needs the
observation. timm's FeatureGetterNet passes only images, so it cannot wrap these two.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, overload

from torch import Tensor

from ebt_vision.models.pretrained_model import PretrainedModel


def take_indices(num_blocks: int, indices: int | Sequence[int] | None) -> list[int]:
    """Select blocks like timm's feature_take_indices: None means all, n the last n; list entries may be negative.

    The result is in the order of the blocks, each once, as in timm. Raises ValueError for a block that does not exist and for
    an empty list.
    """
    if indices is None:
        return list(range(num_blocks))
    if isinstance(indices, int):
        if not 1 <= indices <= num_blocks:
            raise ValueError(f"indices={indices} asks for the last {indices} blocks of {num_blocks}; use 1..{num_blocks}")
        return list(range(num_blocks - indices, num_blocks))
    if not indices:
        raise ValueError("indices=[] names no block; use None for all of them")
    if wrong := [i for i in indices if not -num_blocks <= i < num_blocks]:
        raise ValueError(f"indices={list(indices)}: there is no block {wrong[0]}; use {-num_blocks}..{num_blocks - 1}")
    return sorted({i % num_blocks for i in indices})


class ImageFeatures(PretrainedModel):
    """A model of images whose tokens lie on one grid of patches; its config uses timm's field names."""

    num_classes = 0
    num_prefix_tokens = 0
    blocks_name: ClassVar[str]
    """Return the module list of the blocks."""

    @abstractmethod
    def block_tokens(self, *inputs: Tensor, indices: list[int]) -> list[Tensor]:
        """Return tokens (B, N, embed_dim) after the blocks `indices`, ascending, before the final norm."""

    @abstractmethod
    def final_norm(self, tokens: Tensor) -> Tensor:
        """Apply the final norm to tokens (B, N, embed_dim)."""

    def forward_features(self, *inputs: Tensor) -> Tensor:
        """Return the final normed tokens (B, N, embed_dim)."""
        return self.final_norm(self.block_tokens(*inputs, indices=[self.config.depth - 1])[0])

    @overload
    def forward_intermediates(
        self,
        *inputs: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NLC",
        intermediates_only: Literal[True] = True,
    ) -> list[Tensor]: ...

    @overload
    def forward_intermediates(
        self,
        *inputs: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NLC",
        intermediates_only: Literal[False],
    ) -> tuple[Tensor, list[Tensor]]: ...

    def forward_intermediates(
        self,
        *inputs: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NLC",
        intermediates_only: bool = True,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return tokens after the blocks of take_indices, (B, N, embed_dim); (B, embed_dim, rows, columns) with output_fmt
        "NCHW".

        `norm` applies the final norm to them. Without `intermediates_only` the result is (final normed tokens (B, N,
        embed_dim), intermediates). Blocks after the last selected block are never run, with any `stop_early`. Raises ValueError
        for an unknown format and for blocks that do not exist.
        """
        if wrong := [value for value in inputs if not isinstance(value, Tensor)]:
            raise ValueError(f"forward_intermediates accepts tensors, then options by name; use indices={wrong[0]!r}")
        if output_fmt not in ("NLC", "NCHW"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown; use 'NLC' or 'NCHW'")
        taken, last = take_indices(self.config.depth, indices), self.config.depth - 1
        run = taken if intermediates_only or last in taken else [*taken, last]
        tokens = self.block_tokens(*inputs, indices=run)
        outputs = [self.final_norm(x) for x in tokens[: len(taken)]] if norm else tokens[: len(taken)]
        if output_fmt == "NCHW":
            grid = [side // self.config.patch_size for side in inputs[0].shape[-2:]]
            outputs = [x.transpose(1, 2).unflatten(2, grid).contiguous() for x in outputs]  # NLC -> NCHW
        return outputs if intermediates_only else (self.final_norm(tokens[-1]), outputs)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the mean of tokens (B, N, embed_dim), (B, embed_dim); without a classifier `pre_logits` has no effect."""
        return tokens.mean(1)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Accept num_classes=0. Raises ValueError for a classifier and for another pooling than "avg"."""
        if num_classes != 0:
            raise ValueError(
                f"num_classes={num_classes}: {type(self).__name__} has no classifier; use 0 and add a layer after forward_head"
            )
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r} is unknown here; use 'avg', or pool forward_features yourself")

    @property
    def num_features(self) -> int:
        """Width of a token."""
        return int(self.config.embed_dim)

    @property
    def head_hidden_size(self) -> int:
        """Width of the output of forward_head."""
        return self.num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each block: its module, its channels and the width of a token in pixels."""
        chans, reduction = self.config.embed_dim, self.config.patch_size
        names = (f"{self.blocks_name}.{i}" for i in range(self.config.depth))
        return [{"module": name, "num_chs": chans, "reduction": reduction} for name in names]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Data config for timm.data.resolve_model_data_config: images in [-1, 1], shorter side resized to img_size."""
        chans, size = self.config.in_chans, self.config.img_size
        return {
            "input_size": (chans, size, size),
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": (0.5,) * chans,
            "std": (0.5,) * chans,
            "num_classes": 0,
        }
