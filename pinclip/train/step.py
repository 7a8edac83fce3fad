"""One training step, with gradient accumulation that is exact for losses which couple the whole batch.

A contrastive loss of k micro-batches is not the mean of k smaller losses.  GradCache (Gao et al. 2021,
arXiv 2101.06983) runs the towers twice instead: once without a graph to embed the whole batch; the loss
gives dL/d(embedding) for all of it; then each micro-batch is embedded again, with a graph, and those
gradients are pushed through.  Values and gradients equal the single large batch; memory is that of one
micro-batch's activations plus the embeddings; the extra cost is one forward pass.
"""

from __future__ import annotations

import torch

from pinclip.data.batches import PinBatch
from pinclip.models import Embeddings
from pinclip.train.engine import Engine
from pinclip.train.objective import Objective, Temperatures


def forward_backward(
    engine: Engine, objective: Objective, batch: PinBatch, micro_batches: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Accumulate the gradients of one global batch; the caller ends the last micro-batch.

    Returns this rank's loss and its parts, detached, on the device.
    """
    if micro_batches == 1:
        loss, parts = objective(*engine.forward(batch), batch)
        engine.backward(loss)
        return loss.detach(), parts

    micros = [batch.micro(index, micro_batches) for index in range(micro_batches)]
    with torch.no_grad():
        outputs = [engine.forward(micro) for micro in micros]
    whole = Embeddings(*(torch.cat(tensors) for tensors in zip(*(embeddings for embeddings, _ in outputs))))
    leaves = Embeddings(*(tensor.detach().requires_grad_() for tensor in whole))
    temperatures = {
        name: tuple(None if value is None else value.detach().requires_grad_() for value in pair)
        for name, pair in outputs[0][1].items()
    }
    loss, parts = objective(leaves, temperatures, batch)
    loss.backward()

    size = len(batch) // micro_batches
    for index, micro in enumerate(micros):
        if index:
            engine.end_micro_batch()
        embeddings, again = engine.forward(micro)
        rows = slice(index * size, (index + 1) * size)
        surrogate = sum(
            (value * leaf.grad[rows]).sum()
            for value, leaf in zip(embeddings, leaves)
            if leaf.grad is not None
        )
        engine.backward(surrogate + _temperature_part(again, temperatures, 1.0 if index == 0 else 0.0))
    return loss.detach(), parts


def _temperature_part(outputs: Temperatures, leaves: Temperatures, weight: float) -> torch.Tensor:
    """The scales and biases enter the loss once, not once per micro-batch, so one of them carries it all.

    The others carry a zero: every rank and micro-batch then touches the same parameters, as ZeRO wants.
    """
    return weight * sum(
        value * leaf.grad
        for name, pair in outputs.items()
        for value, leaf in zip(pair, leaves[name])
        if leaf is not None and leaf.grad is not None
    )
