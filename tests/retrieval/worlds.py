"""Small random catalogues with everything that a real one has: ties, gaps, bad pins, equal texts."""

from dataclasses import dataclass

import numpy as np
import torch

from pinclip.graph.board_graph import BoardGraph
from pinclip.retrieval.evaluate import EmbeddingTable

WORDS = ["red", "blue", "cat", "dog", "tall tree", "house", "old boat", "1", "é"]


@dataclass
class World:
    table: EmbeddingTable
    graph: BoardGraph
    cold: np.ndarray
    texts: list[str]


def make_world(seed: int, pins: int = 60, boards: int = 12, edges: int = 110, dim: int = 8) -> World:
    """Coarse embeddings (many exact ties), lacking modalities, bad pins, pins without board, equal texts."""
    rng = np.random.default_rng(seed)
    graph = BoardGraph.from_edges(
        rng.integers(pins, size=edges), rng.integers(boards, size=edges), pins, boards
    )

    def vectors() -> torch.Tensor:
        return torch.nn.functional.normalize(
            torch.from_numpy(rng.integers(-1, 2, size=(pins, dim)).astype(np.float32)), dim=1
        )

    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(pins)]
    has_image, has_text = rng.random(pins) < 0.9, rng.random(pins) < 0.85
    has_image |= ~has_text
    bad = rng.random(pins) < 0.06
    texts = [text if there else "" for text, there in zip(texts, has_text, strict=True)]
    table = EmbeddingTable(vectors(), vectors(), vectors(), has_image, has_text, bad)
    cold = np.sort(rng.choice(pins, pins // 3, replace=False))
    return World(table, graph, cold, texts)


def naive_rank_metrics(scores, relevant, own=-1) -> dict[str, float]:
    """Metrics of one query by sorting: falling score, irrelevant first among equals, `own` taken out."""
    columns = [c for c in range(len(scores)) if c != own]
    order = sorted(columns, key=lambda c: (-scores[c], relevant[c]))
    places = [place for place, c in enumerate(order, 1) if relevant[c]]
    count = len(places)
    ideal = sum(1 / np.log2(1 + i) for i in range(1, min(10, count) + 1))
    return {
        "recall_1": float(places[0] == 1),
        "recall_10": sum(place <= 10 for place in places) / min(10, count),
        "mrr": 1 / places[0],
        "ndcg_10": sum(1 / np.log2(1 + place) for place in places if place <= 10) / ideal,
        "relevant": count,
    }
