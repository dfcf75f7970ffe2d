"""DiT: the diffusion baseline (Peebles & Xie 2023, arXiv 2212.09748), on diffusers' DiTTransformer2DModel, in pixel space.

diffusers' model is made for loading published weights. For training from scratch, this module changes three things:

- It applies the initialisation of the paper (`initialize_weights` in its released code). diffusers drops even adaLN-zero.
- It uses one timestep and label embedder for the whole network, as in the paper. diffusers gives every block its own
 (`shared_embedder=False` keeps those: 9 % more parameters at the default size).
- It uses one null class and no label dropout. diffusers drops a tenth of the labels in training mode.

It also accepts images of any size whose sides the patch divides; diffusers' forward accepts only square images.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, LabelEmbedding
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from ebt_vision.models.diffusion import Diffusion
from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.models.patches import check_image_size, unpatchify


class DiT(Diffusion):
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

    def forward(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
        """See Diffusion; without learn_sigma there are no variance values. Raises ValueError for sides that the patch does not
        divide."""
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
