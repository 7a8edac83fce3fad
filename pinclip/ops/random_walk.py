"""Random walks with restart over the Pin-Board graph.

Shape legend: P pins, B boards, E edges, S starts, W walks per start, L hops per walk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pinclip_kernels.cpu import random_walk as cpu
from pinclip_kernels.cuda import random_walk as cuda
from torch import Tensor

from pinclip.reference.random_walk import random_walk as reference_random_walk

# Edges that a check looks at together: 128 MB of integers.
_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class WalkGraph:
    """A bipartite graph in compressed sparse rows both ways, checked once so that walks need no checks.

    Args:
        pin_indptr: int64 [P + 1].
        pin_boards: int32 or int64 [E], the boards of each pin.
        board_indptr: int64 [B + 1].
        board_pins: [E], the dtype of `pin_boards`, the pins of each board.
        board_alias: int64 [E] or None. Without it the boards of a pin are equally likely. With it, entry k of
            a pin's list holds a threshold t_k in its low 32 bits and a place a_k < n in the list above them:
            a walk that draws k goes to board k with probability t_k / 2^32, else to board a_k. An entry -1 is
            one that no walk leaves. Make it with `board_alias`.

    All tensors are contiguous and on one device; a list has fewer than 2^31 entries.

    Raises ValueError for what is not such a graph (one pass over the edges).
    """

    pin_indptr: Tensor
    pin_boards: Tensor
    board_indptr: Tensor
    board_pins: Tensor
    board_alias: Tensor | None = None

    def __post_init__(self) -> None:
        edges = self.pin_boards.numel()
        for name in ("pin_indptr", "board_indptr"):
            _check_indptr(name, getattr(self, name), edges)
        for name, other in (("pin_boards", "board_indptr"), ("board_pins", "pin_indptr")):
            _check_lists(name, getattr(self, name), getattr(self, other), edges)
        _check("board_pins", self.board_pins.dtype, self.board_pins.dtype == self.pin_boards.dtype)
        if self.board_alias is not None:
            _check("board_alias", self.board_alias.dtype, self.board_alias.dtype == torch.int64)
            _check("board_alias", tuple(self.board_alias.shape), self.board_alias.shape == (edges,))
            _check_alias(self.board_alias, self.pin_indptr)
        for name, tensor in vars(self).items():
            if tensor is not None:
                _check(name, "strided", tensor.is_contiguous())
                _check(name, tensor.device, tensor.device == self.pin_indptr.device)

    @property
    def num_pins(self) -> int:
        return self.pin_indptr.numel() - 1


def random_walk(
    graph: WalkGraph,
    starts: Tensor,
    *,
    walks: int = 1,
    length: int = 1,
    restart: float = 0.0,
    seed: int = 0,
    first_walk: Tensor | None = None,
) -> Tensor:
    """W random walks of L hops pin -> board -> pin from each start, with restart.

    Hop t of walk w from pin s draws the words r of Philox4x32-10 at counter (t, w, s mod 2^32, s div 2^32)
    under the key `seed`. If r0 < floor(2^32 restart) it first jumps back to s. Then it takes entry
    k = floor(r1 n / 2^32) of the n boards of its pin (or, with `board_alias`, its entry a_k where r3 >= t_k),
    and entry floor(r2 n / 2^32) of the n pins of that board. So a walk depends on (seed, s, w) only, not on
    threads, batch or device. Of n equally likely outcomes each has probability 1/n with a relative error of
    at most n 2^-32; with `board_alias` the absolute error of each of n boards is at most n 2^-32.

    Args:
        starts: int64 [S], pins, or -1 for none.
        walks, length: W >= 1 and L >= 1, each below 2^32.
        restart: probability in [0, 1].
        seed: in [0, 2^63).
        first_walk: int64 [S] or None (0): the number w of each start's first walk, so that parts of a
            larger job, or repeats of a start, have walks of their own. w < 2^32.

    Returns int64 [S, W, L], the pin after each hop; -1 from where the walk was stuck on (a start without
    boards, or of -1). No gradient. Extra memory: none beside the result. On the CPU it runs on
    torch.get_num_threads() threads, without the GIL; on a GPU in the CUDA walker, or, where the extension was
    built without nvcc, as the reference. All three give the same numbers.

    Raises ValueError for an argument out of range, RuntimeError where the C++ extension is not built.

    Source: Eksombatchai et al., "Pixie", WWW 2018; Ying et al., "PinSage", KDD 2018; the generator is
    Salmon et al., SC 2011.
    """
    check_walks(starts, walks, length, restart, seed)
    if first_walk is not None:
        _check("first_walk", first_walk.dtype, first_walk.dtype == torch.int64)
        _check("first_walk", tuple(first_walk.shape), first_walk.shape == starts.shape)
    return torch.ops.pinclip.random_walk(
        graph.pin_indptr,
        graph.pin_boards,
        graph.board_indptr,
        graph.board_pins,
        graph.board_alias,
        starts.contiguous(),
        None if first_walk is None else first_walk.contiguous(),
        walks,
        length,
        restart,
        seed,
    )


@torch.library.custom_op("pinclip::random_walk", mutates_args=())
def _random_walk(
    pin_indptr: Tensor,
    pin_boards: Tensor,
    board_indptr: Tensor,
    board_pins: Tensor,
    board_alias: Tensor | None,
    starts: Tensor,
    first_walk: Tensor | None,
    walks: int,
    length: int,
    restart: float,
    seed: int,
) -> Tensor:
    _check_values("starts", starts, -1, pin_indptr.numel() - 1)
    if first_walk is not None:
        _check_values("first_walk", first_walk, 0, 2**32 - walks + 1)
    return backend(starts)(
        pin_indptr,
        pin_boards,
        board_indptr,
        board_pins,
        board_alias,
        starts,
        first_walk,
        walks,
        length,
        restart,
        seed,
    )


def backend(starts: Tensor) -> Callable[..., Tensor]:
    """The walker for tensors on the device of `starts`."""
    if starts.device.type == "cpu":
        return cpu.random_walk
    return cuda.random_walk if starts.is_cuda and cuda.is_built() else reference_random_walk


def board_alias(pin_indptr: Tensor, pin_boards: Tensor, board_weights: Tensor) -> Tensor:
    """The table of `WalkGraph` by which a pin's boards are chosen in proportion to their weights.

    Args:
        pin_indptr: int64 [P + 1]; pin_boards: int32 or int64 [E]; on the CPU.
        board_weights: float64 [B], finite, >= 0. A pin whose boards all weigh zero is left by no walk.

    Returns int64 [E]. Extra memory: 24 bytes an entry of the longest list.

    Raises ValueError for weights out of range, RuntimeError where the C++ extension is not built.

    Source: Walker 1977, built as in Vose, "A linear algorithm for generating random numbers with a given
    distribution", IEEE Trans. Software Eng. 17(9), 1991.
    """
    _check("board_weights", board_weights.dtype, board_weights.dtype == torch.float64)
    if board_weights.numel():
        low, high = (float(bound) for bound in board_weights.aminmax())
        _check("a weight of board_weights", low if not low >= 0 else high, low >= 0 and high < torch.inf)
    _check("the number of board_weights", board_weights.numel(), _max(pin_boards) < board_weights.numel())
    return cpu.board_alias(pin_indptr.contiguous(), pin_boards.contiguous(), board_weights.contiguous())


@_random_walk.register_fake
def _(
    pin_indptr,
    pin_boards,
    board_indptr,
    board_pins,
    board_alias,
    starts,
    first_walk,
    walks,
    length,
    restart,
    seed,
):
    return starts.new_empty((starts.shape[0], walks, length))


def check_walks(starts: Tensor, walks: int, length: int, restart: float, seed: int) -> None:
    """What `random_walk` asks of its arguments, but for the values of `starts`."""
    _check("starts", starts.dtype, starts.dtype == torch.int64)
    _check("starts", tuple(starts.shape), starts.dim() == 1)
    _check("walks", walks, 1 <= walks < 2**32)
    _check("length", length, 1 <= length < 2**32)
    _check("restart", restart, 0.0 <= restart <= 1.0)
    _check("seed", seed, 0 <= seed < 2**63)


def _check(name: str, value: object, holds: bool) -> None:
    if not holds:
        raise ValueError(f"random_walk: {name} cannot be {value}")


def _check_values(name: str, values: Tensor, low: int, high: int) -> None:
    if values.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in values.aminmax())
    _check(name, smallest, smallest >= low)
    _check(name, largest, largest < high)


def _check_indptr(name: str, indptr: Tensor, edges: int) -> None:
    _check(name, indptr.dtype, indptr.dtype == torch.int64)
    _check(name, tuple(indptr.shape), indptr.dim() == 1 and indptr.numel() >= 1)
    _check(
        name, f"[{int(indptr[0])}, ..., {int(indptr[-1])}]", int(indptr[0]) == 0 and int(indptr[-1]) == edges
    )
    counts = indptr.diff()
    if counts.numel():
        _check_values(f"the length of a list in {name}", counts, 0, 2**31)


def _check_lists(name: str, lists: Tensor, other_indptr: Tensor, edges: int) -> None:
    """The lists hold valid indices, each as often as its own list on the other side is long."""
    _check(name, lists.dtype, lists.dtype in (torch.int32, torch.int64))
    _check(name, tuple(lists.shape), lists.shape == (edges,))
    owners = other_indptr.numel() - 1
    _check_values(f"an index in {name}", lists, 0, owners)
    counts = torch.zeros(owners, dtype=torch.int64, device=lists.device)
    for part in lists.split(_CHUNK):
        counts += torch.bincount(part, minlength=owners)
    same = torch.equal(counts, other_indptr.diff())
    _check(name, "another set of edges than the other direction", same)


def _check_alias(table: Tensor, pin_indptr: Tensor) -> None:
    """No entry points beyond the list it stands in."""
    ends = pin_indptr[1:]
    for first in range(0, table.numel(), _CHUNK):
        part = table[first : first + _CHUNK]
        place = torch.arange(first, first + part.numel(), device=table.device)
        length = pin_indptr.diff()[torch.searchsorted(ends, place, right=True)]
        wrong = ((part >> 32) >= length) | (part < -1)
        _check("an entry of board_alias", "beyond its list", not bool(wrong.any()))


def _max(values: Tensor) -> int:
    return int(values.max()) if values.numel() else -1
