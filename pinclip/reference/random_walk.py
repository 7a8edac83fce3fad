"""Random walks with restart over the Pin-Board graph, in plain torch: the truth the C++ walker is held to.

Shape legend: P pins, B boards, E edges, S starts, W walks per start, L hops per walk.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit random words from a 128-bit counter and a 64-bit key.

    Args:
        counter: four int64 tensors of one shape, values in [0, 2^32).
        seed: the key; its low 32 bits are the first key word.

    Returns four int64 tensors, values in [0, 2^32).

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 wraps, so the masked halves are those of the unsigned 64-bit product.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def walk_words(hop: int, walk: Tensor, start: Tensor, seed: int) -> tuple[Tensor, ...]:
    """The random words of one hop, for restart, board, pin and alias: int64, shaped as `walk` and `start`."""
    counter = (torch.full_like(walk, hop), walk, start & _MASK, start >> 32)
    return philox4x32(counter, seed)


def random_walk(
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
    """Pins visited by W walks of L hops from each start: see `pinclip.ops.random_walk.random_walk`.

    Extra memory: about 20 int64 tensors [S, W].
    """
    offset = starts.new_zeros(len(starts)) if first_walk is None else first_walk
    walk = (offset[:, None] + torch.arange(walks, device=starts.device)).reshape(-1)
    start = starts[:, None].expand(-1, walks).reshape(-1)
    degree, place = _lists(pin_indptr)
    size, board_place = _lists(board_indptr)
    threshold = int(restart * 2.0**32)
    visited = starts.new_full((len(start), length), -1)
    alive = start >= 0
    alive[alive.clone()] = degree[start[alive]] > 0
    pin = torch.where(alive, start, 0)
    if not alive.any():
        return visited.view(len(starts), walks, length)
    home = pin
    for hop in range(length):
        back, board_word, pin_word, alias_word = walk_words(hop, walk, home, seed)
        pin = torch.where(back < threshold, home, pin)
        edge = place[pin] + ((board_word * degree[pin]) >> 32)
        if board_alias is not None:
            entry = board_alias[torch.where(alive, edge, 0)]
            edge = torch.where(alias_word < (entry & _MASK), edge, place[pin] + (entry >> 32))
            alive = alive & (entry >= 0)
        board = pin_boards[torch.where(alive, edge, 0)].long()
        other = board_pins[board_place[board] + ((pin_word * size[board]) >> 32)].long()
        pin = torch.where(alive, other, home)
        visited[:, hop] = torch.where(alive, other, -1)
    return visited.view(len(starts), walks, length)


def _lists(indptr: Tensor) -> tuple[Tensor, Tensor]:
    return indptr[1:] - indptr[:-1], indptr[:-1]
