"""Embed every pin of a store and evaluate; shared by the training loop, `pinclip eval` and the ablation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from pinclip.data.batches import PinChunks
from pinclip.data.store import PinStore
from pinclip.data.tokenizer import Tokenizer
from pinclip.data.transforms import EvalTransform
from pinclip.models import PinCLIP
from pinclip.retrieval.evaluate import EmbeddingTable, evaluate_queries, summarize
from pinclip.retrieval.metrics import QueryMetrics
from pinclip.train.objective import embed


@dataclass(frozen=True)
class Evaluation:
    """Embeddings of all pins, every query's numbers, and their summary as `pinclip eval --json` prints it."""

    embeddings: EmbeddingTable
    queries: dict[str, QueryMetrics]
    summary: dict


@torch.no_grad()
def embed_store(
    model: PinCLIP, tokenizer: Tokenizer, store: PinStore, *, progress: bool = False
) -> EmbeddingTable:
    """Embed all pins of `store` in fp32, in order. Bad pins get zero rows."""
    device = next(model.parameters()).device
    model.eval()
    chunks = PinChunks(store, tokenizer, EvalTransform(model.config.image.image_size))
    parts = []
    for chunk in tqdm(chunks, desc="embedding", unit="chunk", disable=None if progress else True):
        parts.append([tensor.float().cpu() for tensor in embed(model, chunk.to(device))])
    image, text, fused = (torch.cat(tensors) for tensors in zip(*parts))
    has_text = (chunks.token_lengths > 0).numpy()
    return EmbeddingTable(image, text, fused, store.has_image, has_text, store.bad)


def evaluate_model(
    model: PinCLIP,
    tokenizer: Tokenizer,
    store: PinStore,
    cold: np.ndarray,
    *,
    bootstrap: int = 1000,
    progress: bool = False,
) -> Evaluation:
    """Embed all pins and evaluate on the pins `cold`, exactly and over the full corpus."""
    embeddings = embed_store(model, tokenizer, store, progress=progress)
    dims = [dim for dim in model.config.dims if dim < model.config.embed_dim]
    queries = evaluate_queries(embeddings, store.graph, cold, store.texts, dims=dims)
    summary = summarize(queries, embeddings, store.graph, cold, bootstrap=bootstrap)
    return Evaluation(embeddings, queries, summary)


def headline(summary: dict) -> dict[str, float]:
    """The few numbers that a progress line and a curve show."""
    related = summary["pin_to_related"]
    return {
        "text_to_image": summary["text_to_image"]["recall@10"],
        "image_to_text": summary["image_to_text"]["recall@10"],
        **{f"related/{kind}": related[kind]["recall@10"] for kind in related},
    }
