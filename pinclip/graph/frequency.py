"""How often ids come by in a stream, in memory that does not grow with the number of ids."""

from __future__ import annotations

import math

import numpy as np


class CountMinSketch:
    """Counts of int64 ids: `depth` rows of `width` counters, an id in one counter of each row.

    Of n_x occurrences of x in a stream of N the estimate min_r C[r, h_r(x)] is never below n_x, and is above
    n_x + (4 / width) N with probability at most 2^-depth.

    Args:
        width: a power of two, at least 2.
        depth: rows, each with a hash function of its own.
        seed: of the hash functions.

    Where the graph fits one machine, `NeighborSampler.log_q` is exact and needs none of this; the sketch is
    for streams of pairs whose pins nobody can list. Text ids are hashed to int64 first. Memory:
    8 width depth bytes.

    Source: Cormode and Muthukrishnan, "An improved data stream summary: the count-min sketch", J. Algorithms
    55(1), 2005; the hash is multiply-shift, Dietzfelbinger et al., J. Algorithms 25(1), 1997; the use for
    logQ, Yi et al., RecSys 2019.
    """

    def __init__(self, width: int, depth: int = 4, seed: int = 0) -> None:
        if width < 2 or width & (width - 1):
            raise ValueError(f"width is {width}, want a power of two, at least 2")
        if depth < 1:
            raise ValueError(f"depth is {depth}, want at least 1")
        rng = np.random.Generator(np.random.Philox(key=seed))
        self._multipliers = rng.integers(0, 2**64, depth, np.uint64) | np.uint64(1)
        self._offsets = rng.integers(0, 2**64, depth, np.uint64)
        self._shift = np.uint64(64 - int(math.log2(width)))
        self.counts = np.zeros((depth, width), np.int64)
        self.total = 0

    def add(self, ids: np.ndarray) -> None:
        """Count each of `ids` once for each time that it is there; -1 is an empty slot and does not count."""
        ids = np.asarray(ids, np.int64)
        ids = ids[ids != -1]
        for row, counts in enumerate(self.counts):
            counts += np.bincount(self._place(row, ids), minlength=len(counts))
        self.total += len(ids)

    def estimate(self, ids: np.ndarray) -> np.ndarray:
        """How often each of `ids` has come by, int64, never too few."""
        ids = np.ascontiguousarray(ids, np.int64)
        rows = [counts[self._place(row, ids)] for row, counts in enumerate(self.counts)]
        return np.minimum.reduce(rows)

    def log_q(self, ids: np.ndarray) -> np.ndarray:
        """log of the estimated share of each of `ids` in the stream, float32; -inf for an id never seen."""
        with np.errstate(divide="ignore"):
            return np.log(self.estimate(ids) / max(self.total, 1)).astype(np.float32)

    def merge(self, other: CountMinSketch) -> None:
        """Take over what `other`, of the same width, depth and seed, has counted (of another rank, say)."""
        same = self.counts.shape == other.counts.shape
        if not same or (self._multipliers != other._multipliers).any():
            raise ValueError("the sketches differ in width, depth or seed")
        self.counts += other.counts
        self.total += other.total

    def state_dict(self) -> dict:
        """What `load_state_dict` needs to go on counting."""
        return {"counts": self.counts.copy(), "total": self.total}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict` of a sketch of the same width, depth and seed."""
        if state["counts"].shape != self.counts.shape:
            raise ValueError(f"counts are {state['counts'].shape}, want {self.counts.shape}")
        self.counts[:] = state["counts"]
        self.total = int(state["total"])

    def _place(self, row: int, ids: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            mixed = ids.view(np.uint64) * self._multipliers[row] + self._offsets[row]
        return (mixed >> self._shift).astype(np.int64)
