"""Neighbors of the pins of a training batch: drawing them, knowing them, and how probable they are.

Shape legend: n rows (pins of a batch), m columns, k pairs, P pins, B boards, E edges.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property

import numpy as np
import torch
from scipy import sparse

from pinclip.graph.board_graph import BoardGraph
from pinclip.ops.random_walk import WalkGraph, random_walk

# A pin meets itself at most half of the time (on two-pin boards), so all tries fail once in 65,536.
_TRIES = 16


class NeighborSampler:
    """Draws a neighbor for each pin of a batch by a walk pin -> board -> other pin.

    A board b of s_b pins weighs w_b = s_b^-board_damping; a board of one pin, or of more than `max_board`,
    weighs nothing. With A_pb = 1 where pin p is on board b, the walk from i chooses b with probability
    A_ib w_b / sum_c A_ic w_c and then one of its pins uniformly, and does so again where that is i:

        P(j | i) = a_ij / sum_{l != i} a_il,    a_ij = sum_b A_ib A_jb w_b / s_b,    j != i.

    Args:
        graph: the training graph; withheld edges must not be in it (`Split.training_graph`).
        seed: in [0, 2^63).
        board_damping: 0 walks through each board of a pin equally often; more prefers small boards.
        max_board: the largest board walked through, or None for no bound.
        anchors: int64, the pins that `log_q` takes anchors to be drawn from, or None for every pin.

    Memory beside the graph: 4 bytes per edge where boards do not weigh the same.

    Source of the walk: Pixie (Eksombatchai et al., WWW 2018), PinSage (Ying et al., KDD 2018).
    """

    def __init__(
        self,
        graph: BoardGraph,
        seed: int,
        *,
        board_damping: float = 0.0,
        max_board: int | None = None,
        anchors: np.ndarray | None = None,
    ) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}, want a value in [0, 2^63)")
        if not math.isfinite(board_damping):
            raise ValueError(f"board_damping is {board_damping}, want a finite value")
        if max_board is not None and max_board < 2:
            raise ValueError(f"max_board is {max_board}, want at least 2: a smaller board has no pair")
        self.graph = graph
        self.seed = int(seed)
        self._anchors = np.arange(graph.num_pins) if anchors is None else np.asarray(anchors, np.int64)
        self._weights = _board_weights(graph.board_sizes, board_damping, max_board)
        lists = (graph.pin_indptr, graph.pin_boards, graph.board_indptr, graph.board_pins)
        uniform = len(np.unique(self._weights)) == 1 and self._weights[0] > 0
        cdf = None if uniform else torch.from_numpy(_board_cdf(graph, self._weights))
        self.walk_graph = WalkGraph(*(torch.from_numpy(values) for values in lists), cdf)

    def sample(self, pins: np.ndarray, step: int, first_slot: int = 0) -> np.ndarray:
        """One neighbor for each pin of a batch; a pure function of (seed, step, slot, pin).

        Args:
            pins: int64 [n]; -1 is an empty slot.
            step: the training step, in [0, 2^63).
            first_slot: slot of pins[0] in the whole batch, so that ranks that each draw their own part
                draw what one process would. Slots are below 2^28.

        Returns int64 [n]: a pin on a common board, never the pin itself; -1 where there is none (an
        isolated pin, or, at most once in 65,536 draws, a walk that kept coming home).
        """
        pins = np.ascontiguousarray(pins, np.int64)
        slots = np.arange(first_slot, first_slot + len(pins))
        visited = random_walk(
            self.walk_graph,
            torch.from_numpy(pins),
            walks=_TRIES,
            seed=_step_seed(self.seed, step),
            first_walk=torch.from_numpy(slots * _TRIES),
        ).numpy()[:, :, 0]
        away = visited != pins[:, None]
        first = away.argmax(axis=1)
        drawn = np.take_along_axis(visited, first[:, None], axis=1)[:, 0]
        return np.where(away.any(axis=1), drawn, -1)

    def known(
        self, row_pins: np.ndarray, col_pins: np.ndarray, *, min_shared: int = 1, max_board: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which columns are known neighbors of each row, and so must not be its negatives.

        Args:
            row_pins, col_pins: int64 [n], [m]; -1 is an empty slot and has no neighbors.
            min_shared: how many boards a pair must share.
            max_board: boards of more pins do not count, so that a giant board does not make all pins
                neighbors; None counts every board, also those the sampler does not walk through.

        Returns CSR (indptr int64 [n + 1], indices int64 [k], weights float32 [k]): increasing columns,
        without those of the row's own pin. The weight is a_ij (see the class), zero where the sampler never
        draws j for i; normalised over the columns of a row it is P(j | i) given that j is one of them.
        """
        rows, cols = np.asarray(row_pins, np.int64), np.asarray(col_pins, np.int64)
        row_indptr, row_boards = self._counted_boards(rows, max_board)
        col_indptr, col_boards = self._counted_boards(cols, max_board)
        # Renumbered boards keep the product's cost apart from the number of boards of the whole graph.
        boards, local = np.unique(np.concatenate([row_boards, col_boards]), return_inverse=True)
        row_local, col_local = local[: len(row_boards)], local[len(row_boards) :]
        # One product sums both: the real part counts the shared boards, the imaginary part is a_ij.
        values = 1 + 1j * self._pin_weights[row_boards]
        left = sparse.csr_matrix((values, row_local, row_indptr), shape=(len(rows), len(boards)))
        ones = np.ones(len(col_boards), values.dtype)
        right = sparse.csr_matrix((ones, col_local, col_indptr), shape=(len(cols), len(boards)))
        # Transposing sorts the columns of each row, in linear time.
        shared = (right @ left.T).T.tocsr()
        indptr, indices = shared.indptr.astype(np.int64), shared.indices.astype(np.int64)
        other = np.repeat(rows, np.diff(indptr)) != cols[indices]
        other &= shared.data.real >= min_shared
        return *_keep(indptr, indices, other), shared.data.imag[other].astype(np.float32)

    def log_q(self, pins: np.ndarray) -> np.ndarray:
        """log of the probability q(p) that a slot of a training batch holds pin p: float32 [n].

        Half of the slots hold anchors, uniform over `anchors` (u_p = 1 / |anchors| there, 0 elsewhere). The
        other half hold the anchors' neighbors as `sample` draws them, or one more anchor where a draw fails,
        which it does for anchor i with probability f_i:

            q(p) = 1/2 u_p + 1/2 sum_i u_i ((1 - f_i) P(p | i) + f_i u_p).

        Exact up to float rounding and the bias of the draws (at most 2^-31 each); -inf for a pin that no
        slot can hold. Computed for all pins at the first call.
        """
        with np.errstate(divide="ignore"):
            return np.log(self._slot_probability[np.asarray(pins, np.int64)]).astype(np.float32)

    @cached_property
    def _slot_probability(self) -> np.ndarray:
        graph = self.graph
        sizes = np.maximum(graph.board_sizes, 1)
        uniform = np.zeros(graph.num_pins)
        uniform[self._anchors] = 1 / max(len(np.unique(self._anchors)), 1)
        pin_of = np.repeat(np.arange(graph.num_pins), graph.pin_degrees)
        choice = _board_choice(graph, self._weights, pin_of)
        home = np.bincount(pin_of, choice / sizes[graph.pin_boards], graph.num_pins)
        # One try from i ends at p != i with probability t_ip and at home with h_i; so the first of T tries to
        # leave home ends at p with probability t_ip (1 + h_i + ... + h_i^(T-1)).
        tries = uniform * (1 - home**_TRIES) / (1 - home)
        mass = np.bincount(graph.pin_boards, tries[pin_of] * choice, graph.num_boards) / sizes
        reached = np.maximum(np.bincount(pin_of, mass[graph.pin_boards], graph.num_pins) - tries * home, 0)
        return 0.5 * uniform + 0.5 * (reached + (1 - reached.sum()) * uniform)

    @cached_property
    def _pin_weights(self) -> np.ndarray:
        """w_b / s_b of each board."""
        return self._weights / np.maximum(self.graph.board_sizes, 1)

    def _counted_boards(self, pins: np.ndarray, max_board: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The boards of each of `pins` that have at most `max_board` pins, as CSR."""
        graph = self.graph
        slots = np.flatnonzero(pins >= 0)
        counts = np.zeros(len(pins), np.int64)
        counts[slots] = graph.pin_degrees[pins[slots]]
        indptr = np.concatenate(([0], np.cumsum(counts)))
        offset = np.repeat(graph.pin_indptr[pins[slots]] - indptr[slots], counts[slots])
        boards = graph.pin_boards[offset + np.arange(indptr[-1])]
        if max_board is None:
            return indptr, boards
        return _keep(indptr, boards, graph.board_sizes[boards] <= max_board)


def _keep(indptr: np.ndarray, indices: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept_before = np.concatenate(([0], np.cumsum(mask)))
    return kept_before[indptr], indices[mask]


def _step_seed(seed: int, step: int) -> int:
    record = seed.to_bytes(8, "little") + int(step).to_bytes(8, "little")
    digest = hashlib.blake2b(record, digest_size=8, person=b"neighbor").digest()
    return int.from_bytes(digest, "little") >> 1


def _board_weights(sizes: np.ndarray, damping: float, max_board: int | None) -> np.ndarray:
    weights = np.maximum(sizes, 1) ** -float(damping)
    weights[sizes < 2] = 0
    if max_board is not None:
        weights[sizes > max_board] = 0
    return weights


def _board_choice(graph: BoardGraph, weights: np.ndarray, pin_of: np.ndarray) -> np.ndarray:
    """The probability of each edge among the edges of its pin: float64 [E]; zero where all weights are."""
    edge_weights = weights[graph.pin_boards]
    totals = np.bincount(pin_of, edge_weights, graph.num_pins)
    return edge_weights / np.where(totals > 0, totals, 1)[pin_of]


def _board_cdf(graph: BoardGraph, weights: np.ndarray) -> np.ndarray:
    """The table `board_cdf` of `WalkGraph`: int32 [E]."""
    pin_of = np.repeat(np.arange(graph.num_pins), graph.pin_degrees)
    # Integers of 2^-52: their running sum over all edges may wrap, and differences within a pin's list are
    # still exact, whatever the size of the graph.
    parts = (_board_choice(graph, weights, pin_of) * 2.0**52).astype(np.uint64)
    running = np.concatenate((np.zeros(1, np.uint64), np.cumsum(parts, dtype=np.uint64)))
    begin, end = running[graph.pin_indptr[:-1]], running[graph.pin_indptr[1:]]
    inside = running[1:] - begin[pin_of]
    total = (end - begin)[pin_of]
    cdf = ((inside + np.uint64(2**20)) >> np.uint64(21)).astype(np.int64) - 1
    cdf[(inside == total) & (total > 0)] = 2**31 - 1
    return np.minimum(cdf, 2**31 - 1).astype(np.int32)
