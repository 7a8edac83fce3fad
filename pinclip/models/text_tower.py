"""The text tower: a bidirectional transformer with SigLIP's blocks and names.

Suffixes: B texts, L tokens of the padded batch, T real tokens of the whole batch, D width, E embedding width.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pinclip.models.layers import DENSE, Encoder, EncoderConfig, Projection, Sequences
from pinclip.ops._host import to_device


class TextTowerConfig(EncoderConfig):
    """Sizes of the text tower.

    `pool`: "mean" averages the real tokens, and padding costs nothing; "last" reads the last position of the
    padded sequence, as SigLIP does (every text then must be padded to the same length, usually `max_length`).
    `attend_padding`: attend to padding tokens although lengths are known.  SigLIP's weights were trained so;
    only meaningful with pool "last".
    """

    vocab_size: int = Field(gt=0)
    max_length: int = Field(gt=0)
    pool: Literal["last", "mean"] = "mean"
    attend_padding: bool = False

    @model_validator(mode="after")
    def _padding_is_read(self):
        if self.attend_padding and self.pool != "last":
            raise ValueError('attend_padding needs pool = "last"')
        return self


class TextFeatures(NamedTuple):
    """`pooled` [B, E]; `tokens` [B, L, D], normalised (`final_layer_norm`).

    Rows of `tokens` at padding are zero with pool "mean" and unspecified with pool "last".
    """

    pooled: Tensor
    tokens: Tensor


class TextEmbeddings(nn.Module):
    """Token embedding plus learned positions."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=1 / math.sqrt(config.width))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding(positions)


class TextTower(nn.Module):
    """`tokens` [B, L] int64, `lengths` int64 [B] on the host or None (all L are real) -> `TextFeatures`.

    With pool "mean" and given lengths the real tokens are packed into [T, D]: the blocks never see padding.
    `lengths` are read on the host: the device is not waited for.  B = 0 is allowed.

    Errors: ValueError if L exceeds `max_length`, or if a length is not in 1..L.
    """

    def __init__(self, config: TextTowerConfig, embed_dim: int):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.head = Projection(config.width, embed_dim)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> TextFeatures:
        self._check(tokens, lengths)
        if self.config.pool == "mean" and lengths is not None and bool((lengths < tokens.shape[1]).any()):
            return self._packed(tokens, lengths)
        return self._padded(tokens, lengths)

    def _check(self, tokens: Tensor, lengths: Tensor | None) -> None:
        if tokens.ndim != 2 or not 0 < tokens.shape[1] <= self.config.max_length:
            raise ValueError(
                f"tokens must be [B, L] with L in 1..{self.config.max_length}, got {list(tokens.shape)}"
            )
        if lengths is None:
            return
        if lengths.device.type != "cpu" or lengths.shape != tokens.shape[:1]:
            shape, device = list(lengths.shape), lengths.device
            raise ValueError(f"lengths must be [{tokens.shape[0]}] on the host, got {shape} on {device}")
        wrong = (lengths < 1) | (lengths > tokens.shape[1])
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(f"length {int(lengths[row])} of text {row} is not in 1..{tokens.shape[1]}")

    def _padded(self, tokens: Tensor, lengths: Tensor | None) -> TextFeatures:
        sequences = DENSE
        if lengths is not None and not self.config.attend_padding:
            sequences = Sequences(key_lengths=to_device(lengths, tokens.device))
        x = self.embeddings(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        x = self.final_layer_norm(self.encoder(x, sequences))
        return TextFeatures(self.head(x[:, -1] if self.config.pool == "last" else x.mean(1)), x)

    def _packed(self, tokens: Tensor, lengths: Tensor) -> TextFeatures:
        batch, padded_length = tokens.shape
        real = torch.arange(padded_length) < lengths[:, None]
        host_index = real.flatten().nonzero().squeeze(1)
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
        torch.cumsum(lengths, 0, out=cu_seqlens[1:])
        device = tokens.device
        index = to_device(host_index, device)
        sequences = Sequences.packed(to_device(cu_seqlens, device), int(lengths.max()), len(host_index))

        x = self.embeddings(tokens.flatten().index_select(0, index), index % padded_length)
        x = self.final_layer_norm(self.encoder(x, sequences))
        padded = x.new_zeros(batch * padded_length, x.shape[1]).index_copy(0, index, x)
        padded = padded.view(batch, padded_length, -1)
        mean = padded.sum(1) / to_device(lengths, device).to(x.dtype)[:, None]
        return TextFeatures(self.head(mean), padded)
