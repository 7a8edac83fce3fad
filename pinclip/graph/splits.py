"""Splits that withhold whole pins, so that evaluation meets pins training has never seen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pinclip.errors import DataError
from pinclip.graph.board_graph import BoardGraph

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Split:
    """A partition of the pins: `train` and `cold`, both int64 and increasing.

    A cold pin is withheld with all its edges; its image and text are not trained on either.
    """

    train: np.ndarray
    cold: np.ndarray

    @property
    def num_pins(self) -> int:
        return len(self.train) + len(self.cold)

    def training_graph(self, graph: BoardGraph) -> BoardGraph:
        """`graph` with every edge of a cold pin withdrawn (indices stay), checked for leaks.

        Raises ValueError where the graph has another number of pins.
        """
        if graph.num_pins != self.num_pins:
            raise ValueError(f"the split is of {self.num_pins} pins, the graph has {graph.num_pins}")
        training = graph.without_pins(self.cold)
        check_no_leak(training, self.cold)
        return training

    def to_dict(self, ids: Sequence[str]) -> dict:
        """A JSON-ready record: the cold ids, and a digest of all ids (which does not see their order)."""
        if len(ids) != self.num_pins:
            raise ValueError(f"the split is of {self.num_pins} pins, {len(ids)} ids were given")
        return {
            "format": _FORMAT,
            "pins": self.num_pins,
            "digest": _digest(ids),
            "cold": [str(ids[pin]) for pin in self.cold],
        }

    @classmethod
    def from_dict(cls, record: dict, ids: Sequence[str]) -> Split:
        """The split of `to_dict`, for the same set of ids in whatever order they stand now.

        Raises DataError where the record is no split, or is one of another set of pins.
        """
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise DataError(f"not a split of format {_FORMAT}")
        try:
            pins, digest, cold_ids = record["pins"], record["digest"], list(record["cold"])
        except (KeyError, TypeError) as error:
            raise DataError(f"damaged split: {error}") from error
        if pins != len(ids) or digest != _digest(ids):
            raise DataError(f"the split was made for another set of pins ({pins} then, {len(ids)} now)")
        where = {str(id_): pin for pin, id_ in enumerate(ids)}
        unknown = next((id_ for id_ in cold_ids if id_ not in where), None)
        if unknown is not None:
            raise DataError(f"damaged split: cold pin {unknown!r} is not among the pins")
        return cls._of_cold(np.array([where[id_] for id_ in cold_ids], np.int64), pins)

    @classmethod
    def _of_cold(cls, cold: np.ndarray, num_pins: int) -> Split:
        mask = np.zeros(num_pins, bool)
        mask[cold] = True
        return cls(np.flatnonzero(~mask).astype(np.int64), np.flatnonzero(mask).astype(np.int64))


def cold_split(ids: Sequence[str], fraction: float, seed: int, eligible=None) -> Split:
    """Withhold every eligible pin whose hash of (seed, id), as a share of 2^64, is below `fraction`.

    So the side of a pin depends on its own id and the seed alone: not on the order of the ids, and not on
    which other pins there are. A graph, a table of pairs and a run that name the same fraction and seed agree
    on every pin. About fraction * n pins are withheld, with a standard deviation below sqrt(n) / 2.

    Args:
        ids: n distinct ids.
        fraction: in [0, 1].
        eligible: bool [n] or None (all); a pin that is not eligible is a training pin.

    Raises ValueError for a fraction out of range or a mask of another length, DataError for an id
    that is there twice.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, want a value in [0, 1]")
    names = [str(id_) for id_ in ids]
    _check_distinct(names)
    cold = np.array([is_withheld(name, fraction, seed) for name in names], bool)
    if eligible is not None:
        eligible = np.asarray(eligible, bool)
        if eligible.shape != cold.shape:
            raise ValueError(f"eligible has shape {eligible.shape}, want ({len(names)},)")
        cold &= eligible
    return Split._of_cold(np.flatnonzero(cold), len(names))


def is_withheld(name: str, fraction: float, seed: int) -> bool:
    """Whether `cold_split` withholds the pin of this id."""
    return _hash(name, seed) < fraction * 2.0**64


def check_no_leak(training_graph: BoardGraph, cold) -> None:
    """Prove that no edge of a cold pin is in the training graph, looking at both directions.

    Args:
        cold: integer pin indices.

    Raises DataError that names the first cold pin found.
    """
    mask = np.zeros(training_graph.num_pins, bool)
    mask[np.asarray(cold, np.int64)] = True
    leaking = np.flatnonzero(mask & (training_graph.pin_degrees > 0))
    if len(leaking):
        raise DataError(
            f"leak: cold pin {leaking[0]} has {training_graph.pin_degrees[leaking[0]]} training edges"
        )
    reached = np.flatnonzero(mask[training_graph.board_pins])
    if len(reached):
        board = np.searchsorted(training_graph.board_indptr, reached[0], side="right") - 1
        raise DataError(
            f"leak: cold pin {training_graph.board_pins[reached[0]]} is on training board {board}"
        )


def _check_distinct(names: list[str]) -> None:
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"pin id {name!r} is there twice")
        seen.add(name)


def _hash(name: str, seed: int) -> int:
    key = int(seed).to_bytes(16, "little", signed=True)
    raw = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=key).digest(), "little")


def _digest(ids: Sequence[str]) -> str:
    return f"{sum(_hash(str(id_), 0) for id_ in ids) % 2**64:016x}"
