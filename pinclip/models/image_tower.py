"""The image tower: a Vision Transformer with SigLIP's blocks and names, funnel stages, and a pooling head.

A *funnel* averages the tokens 2 x 2 on the patch grid between two blocks, so that the later blocks run on a
quarter of the tokens.  Each stage leaves a map of tokens of its own granularity, which the fusion may read.
That PinCLIP's image tower is a "Funnel ViT" is known second-hand only; where and how to pool is our choice.

Suffixes: B images, S image size, N_s tokens of stage s, D width, E embedding width.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pinclip.models.layers import AttentionPoolHead, Encoder, EncoderConfig, PatchEmbedding, Projection
from pinclip.ops.funnel_pool import funnel_pool


class ImageTowerConfig(EncoderConfig):
    """Sizes of the image tower.

    `funnel`: after how many blocks the tokens are pooled; (2, 4) pools after the second and the fourth block.
    `pool`: "attention" is SigLIP's head with a learned probe; "mean" averages the last tokens.
    """

    image_size: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    funnel: tuple[int, ...] = Field(default=(), strict=False)
    pool: Literal["attention", "mean"] = "attention"

    @model_validator(mode="after")
    def _grid_fits(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if list(self.funnel) != sorted(set(self.funnel)):
            raise ValueError(f"funnel {self.funnel} does not increase")
        if self.funnel and not 0 < self.funnel[0] <= self.funnel[-1] < self.depth:
            raise ValueError(f"funnel {self.funnel} must lie between 1 and depth - 1 = {self.depth - 1}")
        if self.grid % 2 ** len(self.funnel):
            raise ValueError(f"a grid of {self.grid} patches cannot be halved {len(self.funnel)} times")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def stage_tokens(self) -> tuple[int, ...]:
        """Number of tokens of each stage, finest first."""
        return tuple((self.grid // 2**stage) ** 2 for stage in range(len(self.funnel) + 1))


class ImageFeatures(NamedTuple):
    """`pooled` [B, E]; `stages`: tokens [B, N_s, D] of each stage, finest first.

    The last stage is normalised (`post_layernorm`); the earlier ones are the residual stream as it stands.
    """

    pooled: Tensor
    stages: tuple[Tensor, ...]


class ImageEmbeddings(nn.Module):
    """Patch projection plus learned positions, `[B, 3, S, S]` -> `[B, N_0, D]`."""

    def __init__(self, config: ImageTowerConfig):
        super().__init__()
        self.patch_embedding = PatchEmbedding(config.patch_size, config.width)
        self.position_embedding = nn.Embedding(config.grid**2, config.width)
        nn.init.normal_(self.position_embedding.weight, std=1 / math.sqrt(config.width))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images)
        return patches + self.position_embedding(torch.arange(patches.shape[1], device=patches.device))


class ImageTower(nn.Module):
    """`images` [B, 3, S, S], floating, normalised as the weights expect -> `ImageFeatures`.

    With pool "attention" and width equal to `embed_dim` the head's output is the embedding, as in SigLIP;
    else a linear `projection` follows.  B = 0 is allowed.

    Errors: ValueError if the images' shape is not the configured one.
    Extra memory: each stage's tokens stay alive for the fusion.
    """

    def __init__(self, config: ImageTowerConfig, embed_dim: int):
        super().__init__()
        self.config = config
        self.embeddings = ImageEmbeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.head = AttentionPoolHead(config) if config.pool == "attention" else None
        direct = self.head is not None and config.width == embed_dim
        self.projection = None if direct else Projection(config.width, embed_dim)

    def forward(self, images: Tensor) -> ImageFeatures:
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be [B, 3, {size}, {size}], got {list(images.shape)}")
        x = self.embeddings(images.to(self.post_layernorm.weight.dtype))
        stages = []
        start, grid = 0, self.config.grid
        for stop in self.config.funnel:
            x = self.encoder(x, start=start, stop=stop)
            stages.append(x)
            x = funnel_pool(x, grid)
            start, grid = stop, grid // 2
        tokens = self.post_layernorm(self.encoder(x, start=start))
        pooled = tokens.mean(1) if self.head is None else self.head(tokens)
        if self.projection is not None:
            pooled = self.projection(pooled)
        return ImageFeatures(pooled, (*stages, tokens))
