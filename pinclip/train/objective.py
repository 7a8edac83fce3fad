"""What one step minimises, and the module that DeepSpeed wraps.

    L = w_it  ImageText(image, text)
      + w_own [ImageText(fused, image) + ImageText(fused, text)] / 2      each pin with itself
      + w_ff  Neighbor(fused, fused') + w_if Neighbor(image, fused') + w_tf Neighbor(text, fused')

where ' marks the sampled neighbor of a pin.  Embeddings come from the engine, losses are computed
outside of it: that is what lets GradCache run the towers twice and the losses once.
"""

from __future__ import annotations

import torch
from torch import nn

from pinclip.data.batches import PinBatch
from pinclip.data.transforms import to_float
from pinclip.distributed import GatheredRows, world_size
from pinclip.losses import ImageTextLoss, NeighborLoss, Temperature
from pinclip.models import Embeddings, PinCLIP
from pinclip.train.config import LossConfig, ObjectiveConfig

Temperatures = dict[str, tuple[torch.Tensor, torch.Tensor | None]]


class Trainee(nn.Module):
    """Everything with parameters: model and temperatures. One forward gives what the losses need."""

    def __init__(self, model: PinCLIP, objective: ObjectiveConfig, precision: str):
        super().__init__()
        self.model = model
        self.temperatures = nn.ModuleDict({"image_text": _temperature(objective.image_text)})
        if objective.uses_neighbors or objective.own_fused_weight:
            self.temperatures["neighbor"] = _temperature(objective.neighbor)
        self.autocast = precision == "bf16" or (precision == "auto" and _multiplies_bf16())

    def forward(self, batch: PinBatch) -> tuple[Embeddings, Temperatures]:
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.autocast):
            embeddings = embed(self.model, batch)
        return embeddings, {name: temperature() for name, temperature in self.temperatures.items()}


def embed(model: PinCLIP, batch: PinBatch) -> Embeddings:
    """The embeddings of a batch's pins, in slot order."""
    return model(
        to_float(batch.images),
        batch.tokens,
        token_lengths=batch.token_lengths,
        image_rows=batch.image_rows,
        text_rows=batch.text_rows,
        batch_size=len(batch),
    )


class Objective:
    """The weighted sum of pair losses over one rank's embeddings (its share of the global loss).

    dtype: that in which embeddings are gathered and multiplied; sums and the loss are fp32 in any case. None
    leaves them in fp32.
    """

    def __init__(self, config: ObjectiveConfig, dims: tuple[int, ...], dtype: torch.dtype | None = None):
        self.config, self.dtype = config, dtype
        self._image_text = ImageTextLoss(config.image_text.kind, dims=dims or None)
        self._own = ImageTextLoss(config.neighbor.kind, dims=dims or None)
        self._neighbor = NeighborLoss(config.neighbor.kind, dims=dims or None)

    def __call__(
        self, embeddings: Embeddings, temperatures: Temperatures, batch: PinBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to differentiate and its unweighted parts, detached."""
        parts = dict(self._parts(embeddings, temperatures, batch))
        total = sum(weight * part for weight, part in parts.values())
        return total, {name: part.detach() for name, (_, part) in parts.items()}

    def _parts(self, embeddings: Embeddings, temperatures: Temperatures, batch: PinBatch):
        config = self.config
        image, text, fused = (
            each if self.dtype is None else each.to(self.dtype)
            for each in (embeddings.image, embeddings.text, embeddings.fused)
        )
        # Every rank has as many slots; each kind of embedding is gathered once, whichever losses read it.
        counts = (len(batch),) * world_size()
        images, texts, fuseds = (GatheredRows(each, counts) for each in (image, text, fused))
        has_image, has_text = batch.has_image.to(image.device), batch.has_text.to(image.device)
        log_q = batch.log_q if config.log_q and config.uses_neighbors else None
        if config.image_text_weight:
            scale, bias = temperatures["image_text"]
            loss = self._image_text(
                image, texts, scale, bias, ids=batch.pins, valid=has_image & has_text, log_q=log_q
            )
            yield "image_text", (config.image_text_weight, loss)
        if config.own_fused_weight:
            scale, bias = temperatures["neighbor"]
            for name, own, has in (("own_image", images, has_image), ("own_text", texts, has_text)):
                loss = self._own(fused, own, scale, bias, ids=batch.pins, valid=has, log_q=log_q)
                yield name, (config.own_fused_weight / 2, loss)
        known = (batch.known_indptr, batch.known_indices) if config.mask_known else None
        for name, weight, own, has in (
            ("fused_fused", config.fused_fused_weight, fused, has_image | has_text),
            ("image_fused", config.image_fused_weight, image, has_image),
            ("text_fused", config.text_fused_weight, text, has_text),
        ):
            if weight:
                scale, bias = temperatures["neighbor"]
                loss = self._neighbor(
                    own,
                    fuseds,
                    scale,
                    bias,
                    ids=batch.pins,
                    partner=batch.partner,
                    known=known,
                    log_q=log_q,
                    valid_x=has,
                    valid_y=has_image | has_text,
                )
                yield name, (weight, loss)


def _temperature(config: LossConfig) -> Temperature:
    bias = config.init_bias if config.kind == "sigmoid" else None
    return Temperature(config.init_scale, bias, config.max_scale)


def _multiplies_bf16() -> bool:
    """Whether bf16 products are done in hardware here; where they are emulated, fp32 is faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
