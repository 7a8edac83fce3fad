"""PinCLIP: an image tower, a text tower, and a fusion of their tokens into one vector per pin.

Suffixes: B pins, Bi images, Bt texts of the batch, L text length, E embedding width, D Matryoshka prefix.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pinclip.models import siglip
from pinclip.models.fusion import Fusion, FusionConfig
from pinclip.models.image_tower import ImageTower, ImageTowerConfig
from pinclip.models.layers import FrozenConfig
from pinclip.models.text_tower import TextTower, TextTowerConfig
from pinclip.ops._host import to_device
from pinclip.ops.fusion_pack import FusionLayout
from pinclip.ops.l2_normalize import l2_normalize


class PinCLIPConfig(FrozenConfig):
    """The whole model. `dims`: Matryoshka prefixes, increasing; empty means the full width only."""

    image: ImageTowerConfig
    text: TextTowerConfig
    fusion: FusionConfig = FusionConfig()
    embed_dim: int = Field(gt=0)
    dims: tuple[int, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _dims_are_prefixes(self):
        if list(self.dims) != sorted(set(self.dims)) or any(
            not 0 < dim <= self.embed_dim for dim in self.dims
        ):
            raise ValueError(
                f"dims {self.dims} must increase and lie between 1 and embed_dim {self.embed_dim}"
            )
        return self


class Embeddings(NamedTuple):
    """Unit vectors [B, E] of a batch of pins, fp32 (fp64 for fp64 weights).

    A pin without image has a zero image vector, one without text a zero text vector, one without both a zero
    fused vector; zero rows pass no gradient on.
    """

    image: Tensor
    text: Tensor
    fused: Tensor

    def prefix(self, dim: int) -> Embeddings:
        """The first `dim` numbers of each vector, normalised again: a Matryoshka embedding."""
        return Embeddings(*(l2_normalize(x[:, :dim]) for x in self))


class PinCLIP(nn.Module):
    """`PinCLIP(config)(images, tokens, ...) -> Embeddings`; see `forward`."""

    def __init__(self, config: PinCLIPConfig):
        super().__init__()
        self.config = config
        self.image_tower = ImageTower(config.image, config.embed_dim)
        self.text_tower = TextTower(config.text, config.embed_dim)
        self.fusion = Fusion(
            config.fusion,
            config.image.width,
            config.image.stage_tokens,
            config.text.width,
            config.text.max_length,
            config.embed_dim,
        )

    @classmethod
    def from_siglip(
        cls,
        directory: str | os.PathLike,
        fusion: FusionConfig | None = None,
        *,
        dims: tuple[int, ...] = (),
        attend_padding: bool = True,
    ) -> PinCLIP:
        """Both towers from a Hugging Face `SiglipModel` saved in `directory`, with a new fusion on top.

        SigLIP and fixed-resolution SigLIP 2 (`model_type` "siglip"). `encode_image` and `encode_text` equal
        transformers' `image_embeds` and `text_embeds`.  `attend_padding` True is how SigLIP was trained (text
        padded to `max_length`, no mask); False masks padding where `token_lengths` are given, as transformers
        does with an `attention_mask`.  `fusion` None: two blocks with the image tower's width, heads and MLP.
        The checkpoint's logit scale and bias: `pinclip.models.siglip.read_siglip(directory)`.

        Errors: CheckpointError naming a missing file, missing or unexpected weight, a shape that does not
        fit, or a configuration value that is not supported.
        """
        checkpoint = siglip.read_siglip(directory, attend_padding=attend_padding)
        if fusion is None:
            image = checkpoint.image
            fusion = FusionConfig(width=image.width, depth=2, heads=image.heads, mlp_width=image.hidden_width)
        model = cls(
            PinCLIPConfig(
                image=checkpoint.image,
                text=checkpoint.text,
                fusion=fusion,
                embed_dim=checkpoint.image.width,
                dims=dims,
            )
        )
        siglip.load_towers(model.image_tower, model.text_tower, checkpoint)
        return model

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor | None,
        *,
        token_lengths: Tensor | Sequence[int] | None = None,
        image_rows: Tensor | Sequence[int] | None = None,
        text_rows: Tensor | Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> Embeddings:
        """Embed B pins, each with an image, a text, both or neither.

        `images` [Bi, 3, S, S] floating or None; `tokens` [Bt, L] int64 or None; `token_lengths` [Bt], real
        tokens of each text (None: all L).  `image_rows` [Bi] and `text_rows` [Bt] say which pin of the batch
        each image and text belongs to (None: one for each pin, in order); `batch_size` is B, needed only
        where neither modality is there for every pin.  These four live on the host, so nothing waits for the
        device.  `images` or `tokens` with zero rows run their tower on nothing: with ZeRO-3 every rank must
        run the same modules, also a rank whose pins all lack an image.

        A pin's embeddings do not depend on the other pins of the batch.  Errors: ValueError for rows that are
        repeated, out of range, on a device, or do not match their tensor.
        """
        batch_size = _batch_size(images, tokens, image_rows, text_rows, batch_size)
        image_rows = _host_rows("image_rows", image_rows, images, batch_size)
        text_rows = _host_rows("text_rows", text_rows, tokens, batch_size)
        lengths = _host_lengths(token_lengths)
        if self.config.text.pool == "mean" and tokens is not None and lengths is not None:
            tokens = tokens[:, : max([1, *lengths.tolist()])]
        device = (tokens if images is None else images).device
        layout = self._layout(batch_size, tokens, lengths, image_rows, text_rows).to(device)

        image_features = None if images is None else self.image_tower(images)
        text_features = None if tokens is None else self.text_tower(tokens, lengths)
        dtype = _loss_dtype(next(self.parameters()).dtype)
        nothing = torch.zeros(batch_size, self.config.embed_dim, device=device, dtype=dtype)
        image = nothing if images is None else _at_rows(image_features.pooled, image_rows, nothing)
        text = nothing if tokens is None else _at_rows(text_features.pooled, text_rows, nothing)
        fused = self.fusion(
            None if images is None else image_features.stages,
            None if tokens is None else text_features.tokens,
            layout,
            image,
            text,
        )
        present = _present(image_rows, text_rows, batch_size)
        if present is not None:
            fused = fused * to_device(present, device).to(fused.dtype)[:, None]
        return Embeddings(image, text, _unit(fused))

    def _layout(self, batch_size: int, tokens, lengths, image_rows, text_rows) -> FusionLayout:
        """Where each pin's tokens stand in the fusion's packed buffer; built on the host."""
        num_texts, num_text = (0, 1) if tokens is None else tokens.shape
        if lengths is None or tokens is None:
            lengths = torch.full((num_texts,), num_text)
        num_fusion, num_image = self.config.fusion.fusion_tokens, self.fusion.num_image_tokens
        return FusionLayout.build(batch_size, num_fusion, num_image, num_text, image_rows, text_rows, lengths)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit image vectors [Bi, E] of `images` [Bi, 3, S, S]."""
        return _unit(self.image_tower(images).pooled)

    def encode_text(self, tokens: Tensor, token_lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Unit text vectors [Bt, E] of `tokens` [Bt, L]; `token_lengths` as in `forward`."""
        return _unit(self.text_tower(tokens, _host_lengths(token_lengths)).pooled)

    @torch.no_grad()
    def embed(
        self, images: Tensor | None, tokens: Tensor | None, *, dim: int | None = None, **rows
    ) -> Embeddings:
        """`forward` without gradients; `dim` keeps a Matryoshka prefix. `rows`: keywords of `forward`."""
        embeddings = self(images, tokens, **rows)
        return embeddings if dim is None else embeddings.prefix(dim)


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 at the loss boundary; fp64 stays."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _unit(x: Tensor) -> Tensor:
    return l2_normalize(x.to(_loss_dtype(x.dtype)))


def _at_rows(pooled: Tensor, rows: Tensor | None, nothing: Tensor) -> Tensor:
    """Unit vectors of `pooled` [R, E] in the places `rows` of `nothing` [B, E]; `rows` None: every pin."""
    unit = _unit(pooled)
    return unit if rows is None else nothing.index_copy(0, to_device(rows, unit.device), unit)


def _batch_size(images, tokens, image_rows, text_rows, batch_size: int | None) -> int:
    if images is None and tokens is None:
        raise ValueError("images and tokens are both None")
    if batch_size is not None:
        return batch_size
    for values, rows in ((images, image_rows), (tokens, text_rows)):
        if values is not None and rows is None:
            return values.shape[0]
    raise ValueError("batch_size must be given where no modality is there for every pin")


def _host_rows(name: str, rows, values: Tensor | None, batch_size: int) -> Tensor | None:
    """Which pins have this modality, as a host tensor; None for all of them."""
    if values is None:
        if rows is not None and len(rows):
            raise ValueError(f"{name} names {len(rows)} pins, but their tensor is None")
        return torch.empty(0, dtype=torch.int64)
    if rows is None:
        if values.shape[0] != batch_size:
            raise ValueError(f"{name} is needed: {values.shape[0]} rows for {batch_size} pins")
        return None
    rows = _host(name, rows)
    if rows.shape != values.shape[:1]:
        raise ValueError(f"{name} names {rows.numel()} pins for {values.shape[0]} rows")
    return rows


def _host(name: str, values) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.int64)
    if values.device.type != "cpu":
        raise ValueError(
            f"{name} must be on the host, got {values.device}: reading it would wait for the device"
        )
    return values


def _host_lengths(token_lengths) -> Tensor | None:
    return None if token_lengths is None else _host("token_lengths", token_lengths)


def _present(image_rows: Tensor | None, text_rows: Tensor | None, batch_size: int) -> Tensor | None:
    """bool [B], which pins have a modality at all; None if every pin has one."""
    if image_rows is None or text_rows is None:
        return None
    present = torch.zeros(batch_size, dtype=torch.bool)
    present[image_rows] = True
    present[text_rows] = True
    return None if bool(present.all()) else present
