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

from pinclip.graph.board_graph import BoardGraph, indptr_of
from pinclip.graph.pairs import NeighborPairs
from pinclip.ops.random_walk import WalkGraph, board_alias, random_walk

# A pin meets itself at most half of the time (on two-pin boards), so all tries fail once in 65,536.
_TRIES = 16


class NeighborSampler:
    """Draws a neighbor for each pin of a batch: by a walk pin -> board -> other pin, or from mined pairs.

    Walks: a board b of s_b pins weighs w_b = s_b^-board_damping; a board of one pin, or of more than
    `max_board`, weighs nothing. With A_pb = 1 where pin p is on board b, the walk from i chooses b with
    probability A_ib w_b / sum_c A_ic w_c and then one of its pins uniformly, and again where that is i:

        P(j | i) = a_ij / sum_{l != i} a_il,    a_ij = sum_b A_ib A_jb w_b / s_b,    j != i.

    Pairs: P(j | i) = w_ij / sum_l w_il over the listed neighbors of i.

    Args:
        graph: the training graph; withheld edges must not be in it (`Split.training_graph`).
        seed: in [0, 2^63).
        board_damping: 0 walks through each board of a pin equally often; more prefers small boards.
        max_board: the largest board walked through, or None for no bound.
        pairs: draw from these, in the numbering of the graph, and do not walk. They must have been mined
            without the withheld edges (`NeighborPairs.check_split`).
        anchors: int64, the pins that `log_q` takes anchors to be drawn from, or None for every pin.

    Memory beside the graph: 8 bytes per edge where boards do not weigh the same, or 16 bytes per pair.

    Source of the walk: Pixie (Eksombatchai et al., WWW 2018), PinSage (Ying et al., KDD 2018).
    """

    def __init__(
        self,
        graph: BoardGraph,
        seed: int,
        *,
        board_damping: float = 0.0,
        max_board: int | None = None,
        pairs: NeighborPairs | None = None,
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
        self._source = (
            _Walks(graph, board_damping, max_board) if pairs is None else _Mined(pairs, graph.num_pins)
        )

    def sample(self, pins: np.ndarray, step: int, first_slot: int = 0) -> np.ndarray:
        """One neighbor for each pin of a batch; a pure function of (seed, step, slot, pin).

        So data workers need no state, and a resumed run draws what the uninterrupted one would have.

        Args:
            pins: int64 [n]; -1 is an empty slot.
            step: the training step, in [0, 2^63).
            first_slot: slot of pins[0] in the whole batch, so that ranks that each draw their own part
                draw what one process would. Slots are below 2^28.

        Returns int64 [n]: a neighbor, never the pin itself; -1 where there is none (an isolated pin or one
        without pairs; or, at most once in 65,536 draws, a walk that kept coming home).
        """
        pins = np.ascontiguousarray(pins, np.int64)
        return self._source.draw(pins, _step_seed(self.seed, step), first_slot)

    def known(
        self, row_pins: np.ndarray, col_pins: np.ndarray, *, min_shared: int = 1, max_board: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which columns are known neighbors of each row, and so must not be its negatives.

        Those are the pins that share a board with the row's pin, and the pins that `sample` can draw for it.

        Args:
            row_pins, col_pins: int64 [n], [m]; -1 is an empty slot and has no neighbors.
            min_shared: how many boards a pair must share.
            max_board: boards of more pins do not count, so that a giant board does not make all pins
                neighbors; None counts every board, also those the sampler does not walk through.

        Returns CSR (indptr int64 [n + 1], indices int64 [k]): increasing columns, without those of the row's
        own pin.
        """
        rows, cols = np.asarray(row_pins, np.int64), np.asarray(col_pins, np.int64)
        boards_of_rows = self._counted_boards(rows, max_board)
        shared = _common(*boards_of_rows, *self._counted_boards(cols, max_board))
        if min_shared > 1:
            shared.data[shared.data < min_shared] = 0
            shared.eliminate_zeros()
        if isinstance(self._source, _Mined):
            itself = np.arange(len(cols) + 1), cols
            shared = (shared + _common(*self._source.neighbors_of(rows), *itself)).tocsr()
        shared.sort_indices()
        indptr, indices = shared.indptr.astype(np.int64), shared.indices.astype(np.int64)
        return _keep(indptr, indices, np.repeat(rows, np.diff(indptr)) != cols[indices])

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
        uniform = np.zeros(self.graph.num_pins)
        uniform[self._anchors] = 1 / max(len(np.unique(self._anchors)), 1)
        reached = self._source.reached(uniform)
        return 0.5 * uniform + 0.5 * (reached + (1 - reached.sum()) * uniform)

    def _counted_boards(self, pins: np.ndarray, max_board: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The boards of each of `pins` that have at most `max_board` pins, as CSR."""
        indptr, boards = _rows_of(self.graph.pin_indptr, self.graph.pin_boards, pins)
        if max_board is None:
            return indptr, boards
        return _keep(indptr, boards, self.graph.board_sizes[boards] <= max_board)


class _Walks:
    """Neighbors by walks of one hop."""

    def __init__(self, graph: BoardGraph, board_damping: float, max_board: int | None) -> None:
        self._graph = graph
        self._weights = _board_weights(graph.board_sizes, board_damping, max_board)
        self._walks = walk_graph(graph, self._weights)

    def draw(self, pins: np.ndarray, seed: int, first_slot: int) -> np.ndarray:
        slots = np.arange(first_slot, first_slot + len(pins))
        visited = random_walk(
            self._walks,
            torch.from_numpy(pins),
            walks=_TRIES,
            seed=seed,
            first_walk=torch.from_numpy(slots * _TRIES),
        ).numpy()[:, :, 0]
        away = visited != pins[:, None]
        first = away.argmax(axis=1)
        drawn = np.take_along_axis(visited, first[:, None], axis=1)[:, 0]
        return np.where(away.any(axis=1), drawn, -1)

    def reached(self, anchors: np.ndarray) -> np.ndarray:
        """The probability that each pin is drawn, for an anchor drawn from `anchors`, float64 [P]."""
        graph = self._graph
        sizes = np.maximum(graph.board_sizes, 1)
        pin_of = np.repeat(np.arange(graph.num_pins), graph.pin_degrees)
        choice = _board_choice(graph, self._weights, pin_of)
        home = np.bincount(pin_of, choice / sizes[graph.pin_boards], graph.num_pins)
        # One try from i ends at p != i with probability t_ip and at home with h_i; so the first of T tries to
        # leave home ends at p with probability t_ip (1 + h_i + ... + h_i^(T-1)).
        tries = anchors * (1 - home**_TRIES) / (1 - home)
        mass = np.bincount(graph.pin_boards, tries[pin_of] * choice, graph.num_boards) / sizes
        return np.maximum(np.bincount(pin_of, mass[graph.pin_boards], graph.num_pins) - tries * home, 0)


class _Mined:
    """Neighbors from a list of pairs."""

    def __init__(self, pairs: NeighborPairs, num_pins: int) -> None:
        if pairs.num_pins != num_pins:
            raise ValueError(f"the pairs are of {pairs.num_pins} pins, the graph has {num_pins}")
        self._pairs = pairs
        self._running = np.concatenate(([0.0], np.cumsum(pairs.weights, dtype=np.float64)))

    def draw(self, pins: np.ndarray, seed: int, first_slot: int) -> np.ndarray:
        # A number for each slot of the batch up to ours, so that it does not matter who draws which part.
        generator = np.random.Generator(np.random.Philox(key=seed))
        share = generator.random(first_slot + len(pins))[first_slot:]
        indptr = self._pairs.indptr
        begin, end = indptr[pins], indptr[pins + 1]
        low, high = self._running[begin], self._running[end]
        place = np.searchsorted(self._running, low + share * (high - low), side="right") - 1
        some = (pins >= 0) & (end > begin)
        drawn = np.full(len(pins), -1)
        drawn[some] = self._pairs.neighbors[np.clip(place[some], begin[some], end[some] - 1)]
        return drawn

    def reached(self, anchors: np.ndarray) -> np.ndarray:
        """The probability that each pin is drawn, for an anchor drawn from `anchors`, float64 [P]."""
        pairs = self._pairs
        totals = np.diff(self._running[pairs.indptr])
        share = np.repeat(anchors / np.where(totals > 0, totals, 1), np.diff(pairs.indptr))
        return np.bincount(pairs.neighbors, share * pairs.weights, pairs.num_pins)

    def neighbors_of(self, pins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The listed neighbors of each of `pins`, as CSR."""
        return _rows_of(self._pairs.indptr, self._pairs.neighbors, pins)


def _common(row_indptr, row_items, col_indptr, col_items) -> sparse.csr_matrix:
    """How many items each row has in common with each column, both lists of items in CSR."""
    # Renumbered items keep the product's cost apart from the number of items of the whole graph.
    items, local = np.unique(np.concatenate([row_items, col_items]), return_inverse=True)
    ones, split = np.ones(len(local), np.int32), len(row_items)
    left = (ones[:split], local[:split], row_indptr)
    right = (ones[split:], local[split:], col_indptr)
    rows = sparse.csr_matrix(left, shape=(len(row_indptr) - 1, len(items)))
    cols = sparse.csr_matrix(right, shape=(len(col_indptr) - 1, len(items)))
    # Transposing sorts the columns of each row, in linear time.
    return (cols @ rows.T).T.tocsr()


def _rows_of(indptr: np.ndarray, items: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CSR of some rows of a CSR; a row of -1 is empty."""
    slots = np.flatnonzero(rows >= 0)
    counts = np.zeros(len(rows), np.int64)
    counts[slots] = indptr[rows[slots] + 1] - indptr[rows[slots]]
    begin = indptr_of(counts)
    offset = np.repeat(indptr[rows[slots]] - begin[slots], counts[slots])
    return begin, items[offset + np.arange(begin[-1])]


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


def walk_graph(graph: BoardGraph, board_weights: np.ndarray) -> WalkGraph:
    """`graph` for walks that choose a pin's boards in proportion to `board_weights`, float64 [B]."""
    lists = [graph.pin_indptr, graph.pin_boards, graph.board_indptr, graph.board_pins]
    tensors = [torch.from_numpy(values) for values in lists]
    if len(np.unique(board_weights)) == 1 and board_weights[0] > 0:
        return WalkGraph(*tensors)
    return WalkGraph(*tensors, board_alias(*tensors[:2], torch.from_numpy(board_weights)))
