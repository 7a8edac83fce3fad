"""Exact evaluation on held-out pins: text to image, image to text, pin to related pins.

`evaluate` is the whole of it; `evaluate_queries` and `summarize` are its two halves, for callers that also
want the per-query numbers (paired comparisons, worst misses).  docs/evaluation.md defines every number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pinclip.graph.board_graph import BoardGraph
from pinclip.retrieval.metrics import QueryMetrics
from pinclip.retrieval.spaces import Space, Task, dense_space, rank_queries
from pinclip.retrieval.tfidf import tfidf_space

RELATED = ("fused", "image", "text", "tfidf")


@dataclass(frozen=True)
class EmbeddingTable:
    """The embeddings of all P pins of a data set, and which of them exist.

    image, text, fused   float32 [P, D], L2-normalised rows; numpy arrays or tensors, kept as tensors on
                         their device. The row of a lacking modality is never looked at.
    has_image, has_text  bool [P]
    bad                  bool [P], pins that could not be read: they are neither asked for nor found
    Raises `ValueError` for shapes that disagree, and for a number that is not finite in a row that counts.
    """

    image: torch.Tensor
    text: torch.Tensor
    fused: torch.Tensor
    has_image: np.ndarray
    has_text: np.ndarray
    bad: np.ndarray

    def __post_init__(self):
        for name in ("has_image", "has_text", "bad"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), bool))
        shape = (len(self.bad), np.shape(self.fused)[-1])
        for name in ("image", "text", "fused"):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float32).detach()
            if value.shape != shape:
                raise ValueError(f"{name} embeddings have shape {tuple(value.shape)}, not [P, D] = {shape}")
            object.__setattr__(self, name, value)
            broken = ~torch.isfinite(value).all(1).cpu().numpy() & self.has(name)
            if broken.any():
                raise ValueError(f"{name} embedding of pin {int(broken.argmax())} is not finite")

    def __len__(self) -> int:
        return len(self.bad)

    @property
    def dim(self) -> int:
        return self.fused.shape[1]

    def has(self, kind: str) -> np.ndarray:
        """bool [P]: the pins that are not bad and have a vector of `kind` (image, text or fused)."""
        present = {"image": self.has_image, "text": self.has_text, "fused": self.has_image | self.has_text}
        return present[kind] & ~self.bad

    def prefix(self, dim: int) -> EmbeddingTable:
        """The Matryoshka prefix: the first `dim` numbers of every vector, L2-normalised again."""
        if not 1 <= dim <= self.dim:
            raise ValueError(f"prefix of {dim} numbers of an embedding that has {self.dim}")
        cut = [torch.nn.functional.normalize(x[:, :dim], dim=1) for x in (self.image, self.text, self.fused)]
        return EmbeddingTable(*cut, self.has_image, self.has_text, self.bad)

    def space(self, query: str, corpus: str) -> Space:
        """Dot products of the `query` vector of one pin and the `corpus` vector of another."""
        return dense_space(getattr(self, query), getattr(self, corpus), self.has(query), self.has(corpus))


def evaluate(
    embeddings: EmbeddingTable,
    graph: BoardGraph,
    cold: np.ndarray,
    texts: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    batch: int | None = None,
    dims: Sequence[int] = (),
) -> dict:
    """Evaluate on the held-out pins `cold`, exactly; plain numbers, ready for JSON.

    embeddings  of all pins    graph  the full graph, held-out edges included
    cold        int64 pin numbers, each once    texts  of all pins, "" where there is none
    bootstrap, seed   resamples behind each `ci95`, see `bootstrap_ci`
    batch       queries per tile, see `rank_queries`; does not change the result
    dims        Matryoshka prefixes to evaluate as well

    Returns, where M = {"recall@1", "recall@10", "mrr", "ndcg@10", "chance@10", "ci95", "queries", "corpus"}:
        text_to_image, image_to_text  M; queries and corpus are the cold pins that have both modalities;
                         all pins with the query's own text (as an equal string) are relevant
        pin_to_related   {fused, image, text, tfidf: M}; queries are the cold pins that share a board with
                         some pin of the corpus, corpus is all other pins, relevant = shares a board
        strata           {head, torso, tail: {degree, pins, text_to_image, ...}} of the cold pins
        matryoshka       only with dims: {text_to_image@d, image_to_text@d: M, pin_to_related: {fused@d: M}}
        skipped          how many pins were not asked about or could only miss, and why
    A bad pin is in no corpus. Raises `ValueError` for arguments that do not fit together.
    Time and memory: see `rank_queries`.
    """
    queries = evaluate_queries(embeddings, graph, cold, texts, dims=dims, batch=batch)
    return summarize(queries, embeddings, graph, cold, bootstrap=bootstrap, seed=seed)


def evaluate_queries(
    embeddings: EmbeddingTable,
    graph: BoardGraph,
    cold: np.ndarray,
    texts: Sequence[str],
    *,
    dims: Sequence[int] = (),
    batch: int | None = None,
) -> dict[str, QueryMetrics]:
    """The first half of `evaluate`: every query's metrics, by task.

    Keys: text_to_image, image_to_text, pin_to_related/{fused,image,text,tfidf}, and for each of `dims`
    text_to_image@d, image_to_text@d, pin_to_related/fused@d. All pin_to_related tasks have the same queries
    in the same order, whatever the embeddings; so have text_to_image and image_to_text.
    """
    cold = _check(embeddings, graph, cold, texts)
    same_text = _same_text_task(embeddings, cold, texts)
    related = _related_task(embeddings, graph, cold)

    def rank(space: Space, task: Task) -> QueryMetrics:
        return rank_queries(space, task, batch=batch)

    result = {
        "text_to_image": rank(embeddings.space("text", "image"), same_text),
        "image_to_text": rank(embeddings.space("image", "text"), same_text),
    }
    for kind in ("fused", "image", "text"):
        result[f"pin_to_related/{kind}"] = rank(embeddings.space(kind, kind), related)
    result["pin_to_related/tfidf"] = rank(tfidf_space(list(texts), ~embeddings.bad), related)
    for dim in dims:
        prefix = embeddings.prefix(dim)
        result[f"text_to_image@{dim}"] = rank(prefix.space("text", "image"), same_text)
        result[f"image_to_text@{dim}"] = rank(prefix.space("image", "text"), same_text)
        result[f"pin_to_related/fused@{dim}"] = rank(prefix.space("fused", "fused"), related)
    return result


def summarize(
    queries: Mapping[str, QueryMetrics],
    embeddings: EmbeddingTable,
    graph: BoardGraph,
    cold: np.ndarray,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """The second half of `evaluate`: means, intervals, strata and counts of `evaluate_queries`' result."""
    cold = np.asarray(cold, np.int64)

    def nested(names: list[str], keep: np.ndarray | None = None) -> dict:
        result: dict = {}
        for name in names:
            metrics = queries[name] if keep is None else queries[name].select(keep[queries[name].pins])
            *group, last = name.split("/")
            place = result.setdefault(group[0], {}) if group else result
            place[last] = metrics.summary(bootstrap=bootstrap, seed=seed)
        return result

    whole = [name for name in queries if "@" not in name]
    prefixes = [name for name in queries if "@" in name]
    result = nested(whole)
    result["strata"] = {
        name: {"degree": bounds, "pins": int(member.sum()), **nested(whole, member)}
        for name, (bounds, member) in degree_strata(graph, cold).items()
    }
    if prefixes:
        result["matryoshka"] = nested(prefixes)
    result["skipped"] = _skipped(queries, embeddings, cold)
    return result


def degree_strata(graph: BoardGraph, cold: np.ndarray) -> dict[str, tuple[list[int] | None, np.ndarray]]:
    """The cold pins by how many boards they are on in the full graph: head, torso and tail.

    A pin goes by its degree alone. Of the distinct degrees, tail ends at the one up to which nearest to a
    third of the cold pins lie, torso at the one (above that) nearest to two thirds; so no part is empty as
    long as there are three distinct degrees. With two, torso is empty; with one, head as well.
    Returns {name: ([lowest, highest degree] or None if empty, bool [P] membership)}.
    """
    degree = graph.pin_degrees
    is_cold = np.zeros(len(degree), bool)
    is_cold[cold] = True
    values, counts = np.unique(degree[cold], return_counts=True)
    share = counts.cumsum() / max(1, len(cold))
    tail = int(np.argmin(abs(share[: max(1, len(values) - 2)] - 1 / 3))) if len(values) else 0
    torso = tail
    if len(values) > 2:
        torso = tail + 1 + int(np.argmin(abs(share[tail + 1 : -1] - 2 / 3)))
    low, high = (values[tail], values[torso]) if len(values) else (0, 0)
    members = {
        "head": is_cold & (degree > high),
        "torso": is_cold & (degree > low) & (degree <= high),
        "tail": is_cold & (degree <= low),
    }
    return {name: (_bounds(degree[member]), member) for name, member in members.items()}


def _same_text_task(embeddings: EmbeddingTable, cold: np.ndarray, texts: Sequence[str]) -> Task:
    pins = np.sort(cold[(embeddings.has("image") & embeddings.has("text"))[cold]])
    number: dict[str, int] = {}
    answer = np.full(len(embeddings), -1)
    for pin in pins:
        answer[pin] = number.setdefault(texts[pin], len(number))
    return Task(pins, pins, lambda rows: answer[rows][:, None] == answer[pins], without_self=False)


def _related_task(embeddings: EmbeddingTable, graph: BoardGraph, cold: np.ndarray) -> Task:
    usable = ~embeddings.bad
    corpus = np.flatnonzero(usable)
    position = np.full(len(usable), -1)
    position[corpus] = np.arange(len(corpus))

    def relevant(rows: np.ndarray) -> np.ndarray:
        mask = np.zeros((len(rows), len(corpus)), bool)
        for row, pin in enumerate(rows):
            for board in graph.boards_of(pin):
                columns = position[graph.pins_of(board)]
                mask[row, columns[columns >= 0]] = True
            mask[row, position[pin]] = False
        return mask

    def has_related(pin: int) -> bool:
        return any(usable[graph.pins_of(board)].sum() > 1 for board in graph.boards_of(pin))

    asked = [pin for pin in np.sort(cold[usable[cold]]) if has_related(pin)]
    return Task(np.array(asked, np.int64), corpus, relevant, without_self=True)


def _skipped(queries: Mapping[str, QueryMetrics], embeddings: EmbeddingTable, cold: np.ndarray) -> dict:
    good = cold[~embeddings.bad[cold]]
    counts = {
        "cold_pins": len(cold),
        "bad_cold_pins": len(cold) - len(good),
        "bad_pins": int(embeddings.bad.sum()),
        "cold_without_image": int((~embeddings.has_image[good]).sum()),
        "cold_without_text": int((~embeddings.has_text[good]).sum()),
        "cold_without_related_pin": len(good) - len(queries["pin_to_related/fused"]),
    }
    misses = {kind: int(queries[f"pin_to_related/{kind}"].missing.sum()) for kind in RELATED}
    return {**counts, "related_queries_without_vector": misses}


def _bounds(degree: np.ndarray) -> list[int] | None:
    return [int(degree.min()), int(degree.max())] if len(degree) else None


def _check(
    embeddings: EmbeddingTable, graph: BoardGraph, cold: np.ndarray, texts: Sequence[str]
) -> np.ndarray:
    cold = np.asarray(cold, np.int64)
    if not len(embeddings) == graph.num_pins == len(texts):
        raise ValueError(
            f"{len(embeddings)} embeddings, {graph.num_pins} pins in the graph and {len(texts)} texts: "
            "these must be one number"
        )
    if len(cold) and (cold.min() < 0 or cold.max() >= len(embeddings)):
        raise ValueError(f"cold pins reach from {cold.min()} to {cold.max()}, of {len(embeddings)} pins")
    if len(np.unique(cold)) != len(cold):
        raise ValueError("cold names a pin twice")
    return cold
