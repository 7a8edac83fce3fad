"""Hybrid fusion: a transformer over each pin's [fusion tokens; image tokens; text tokens], without padding.

That PinCLIP fuses image and text tokens at several granularities in a transformer is the paper's; everything
else here (which stages enter, learned fusion tokens that are read out, gates, the residual from the pin's
own vectors, sizes) is our choice.

Suffixes: B pins, F fusion tokens, N image tokens over the stages read, L text tokens, T packed tokens,
D fusion width, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pinclip.models.layers import (
    MLP,
    EncoderConfig,
    GatedResidualNorm,
    Projection,
    SelfAttention,
    Sequences,
    run,
)
from pinclip.ops.fusion_pack import FusionLayout, fusion_pack

# Length of the fusion transformer's first contribution beside the unit image and text vectors.
_INITIAL_CORRECTION = 0.5


class FusionConfig(EncoderConfig):
    """Sizes and options of the fusion.

    `fusion_tokens`: learned tokens that gather the pin; all of them are read out.
    `image_stages`: "last" reads the image tower's last stage, "all" reads every funnel stage.
    `gate`: "channel" scales each block's output by one number per channel, "tanh" by one number per block;
    `gate_init` is its first value.  A channel gate of 1 is a plain pre-norm transformer, which trains fastest
    from scratch; a tanh gate of 0 starts as the identity, for a fusion put on weights that should not move.
    `residual`: add the pin's own image and text vectors, each with a learned weight, before normalisation.
    """

    width: int = Field(default=256, gt=0)
    depth: int = Field(default=2, gt=0)
    heads: int = Field(default=4, gt=0)
    fusion_tokens: int = Field(default=1, gt=0)
    image_stages: Literal["last", "all"] = "last"
    gate: Literal["channel", "tanh"] = "channel"
    gate_init: float = 1.0
    residual: bool = True


class FusionEmbeddings(nn.Module):
    """Project each source to the fusion width, add type and position, normalise, pack: -> [T, D].

    Earlier image stages are a raw residual stream, so each has a LayerNorm of its own before its projection.
    """

    def __init__(
        self,
        config: FusionConfig,
        image_width: int,
        stage_tokens: Sequence[int],
        text_width: int,
        text_length: int,
    ):
        super().__init__()
        width = config.width
        self.eps = config.layer_norm_eps
        self.stage_norms = nn.ModuleList(nn.LayerNorm(image_width, eps=self.eps) for _ in stage_tokens[:-1])
        self.image_projections = nn.ModuleList(Projection(image_width, width) for _ in stage_tokens)
        self.text_projection = Projection(text_width, width)
        self.fusion_tokens = nn.Parameter(torch.empty(config.fusion_tokens, width))
        self.type_embedding = nn.Parameter(torch.empty(3, width))
        self.image_position = nn.Parameter(torch.empty(sum(stage_tokens), width))
        self.text_position = nn.Parameter(torch.empty(text_length, width))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        for embedding in (self.fusion_tokens, self.type_embedding, self.image_position, self.text_position):
            nn.init.normal_(embedding, std=1 / math.sqrt(width))

    def forward(self, stages: Sequence[Tensor] | None, text: Tensor | None, layout: FusionLayout) -> Tensor:
        width = self.fusion_tokens.shape[1]
        if stages is None:
            image = self.fusion_tokens.new_zeros(0, self.image_position.shape[0], width)
        else:
            normed = [norm(stage) for norm, stage in zip(self.stage_norms, stages)] + [stages[-1]]
            image = torch.cat([project(x) for project, x in zip(self.image_projections, normed)], dim=1)
        text = self.fusion_tokens.new_zeros(0, 1, width) if text is None else self.text_projection(text)
        return fusion_pack(
            self.fusion_tokens,
            image,
            text,
            self.type_embedding,
            self.image_position,
            self.text_position[: text.shape[1]],
            self.weight,
            self.bias,
            layout,
            self.eps,
        )


class FusionBlock(nn.Module):
    """One pre-norm block on (residual, normed) pairs; its last norm is the next block's first.

    `rows` keeps only these packed tokens after the attention: the last block needs the fusion tokens alone,
    so the other tokens cost it neither `out_proj` nor `mlp`.
    """

    def __init__(self, config: FusionConfig):
        super().__init__()
        gated = (config.width, config.gate, config.gate_init, config.layer_norm_eps)
        self.self_attn = SelfAttention(config.width, config.heads)
        self.attention_residual = GatedResidualNorm(*gated)
        self.mlp = MLP(config.width, config.hidden_width)
        self.mlp_residual = GatedResidualNorm(*gated)

    def forward(
        self, residual: Tensor, normed: Tensor, sequences: Sequences, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mixed = self.self_attn(normed, sequences, rows)
        if rows is not None:
            residual = residual.index_select(0, rows)
        residual, normed = self.attention_residual(residual, mixed)
        return self.mlp_residual(residual, self.mlp(normed))


class Fusion(nn.Module):
    """Fuse a pin's tokens into one vector [B, E], not yet normalised.

        z_b = projection(LayerNorm(blocks(pack)))[fusion tokens of b]
        fused_b = z_b + w_image image_b + w_text text_b                      (the sum only with `residual`)

    `stages`: image tokens [Bi, N_s, image width] of the stages read, or None where the batch has no image;
    `text`: [Bt, L, text width] or None; `layout` says which rows belong to which pin; `image_vector`,
    `text_vector` [B, E]: the pins' own unit vectors, zero rows where missing.

    Extra memory: O(T * D) per block for the backward pass, or O(T * D) in all plus one block's with
    `activation_checkpointing`.
    """

    def __init__(
        self,
        config: FusionConfig,
        image_width: int,
        stage_tokens: Sequence[int],
        text_width: int,
        text_length: int,
        embed_dim: int,
    ):
        super().__init__()
        self.config = config
        read = tuple(stage_tokens if config.image_stages == "all" else stage_tokens[-1:])
        self.num_image_tokens = sum(read)
        self.embeddings = FusionEmbeddings(config, image_width, read, text_width, text_length)
        self.layers = nn.ModuleList(FusionBlock(config) for _ in range(config.depth))
        self.projection = Projection(config.fusion_tokens * config.width, embed_dim)
        self.residual_weight = None
        if config.residual:
            self.residual_weight = nn.Parameter(torch.ones(2))
            std = _INITIAL_CORRECTION / math.sqrt(self.projection.weight.numel())
            nn.init.normal_(self.projection.weight, std=std)

    def forward(
        self,
        stages: Sequence[Tensor] | None,
        text: Tensor | None,
        layout: FusionLayout,
        image_vector: Tensor,
        text_vector: Tensor,
    ) -> Tensor:
        if stages is not None and self.config.image_stages == "last":
            stages = stages[-1:]
        residual = normed = self.embeddings(stages, text, layout)
        sequences = Sequences.packed(layout.cu_seqlens, layout.max_seqlen, normed.shape[0])
        fusion_rows = layout.fusion_index().flatten()
        for layer in self.layers:
            rows = fusion_rows if layer is self.layers[-1] else None
            residual, normed = run(
                layer, residual, normed, sequences, rows, recompute=self.config.activation_checkpointing
            )
        fused = self.projection(normed.view(-1, self.projection.in_features))
        if self.residual_weight is not None:
            w_image, w_text = self.residual_weight
            fused = fused + w_image * image_vector + w_text * text_vector
        return fused
