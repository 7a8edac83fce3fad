"""The pins that walks from a pin visit most, in plain torch: walk, sort, count, choose.

Shape legend: P pins, S starts, W walks per start, L hops per walk, K neighbors per start.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pinclip.reference.random_walk import random_walk

ROUND = 64


def walk_neighbors(
    pin_indptr: Tensor,
    pin_boards: Tensor,
    board_indptr: Tensor,
    board_pins: Tensor,
    board_alias: Tensor | None,
    pin_scale: Tensor | None,
    starts: Tensor,
    walks: int,
    length: int,
    restart: float,
    top_k: int,
    stop_visits: int,
    seed: int,
    walker: Callable[..., Tensor] = random_walk,
) -> tuple[Tensor, Tensor]:
    """Neighbors and weights: see `pinclip.ops.walk_neighbors.walk_neighbors`.

    walker: what makes the walks, with the arguments of `reference.random_walk.random_walk`.
    Extra memory: about ten int64 tensors [S, W L].
    """
    graph = (pin_indptr, pin_boards, board_indptr, board_pins, board_alias)
    pins = pin_indptr.numel() - 1
    rows = torch.arange(len(starts), device=starts.device)
    row = pin = starts.new_empty(0)
    count = starts.new_empty(0)
    step = ROUND if stop_visits > 0 else walks
    for done in range(0, walks, step):
        first_walk = torch.full_like(rows, done)
        made = min(step, walks - done)
        visited = walker(*graph, starts[rows], first_walk, made, length, restart, seed).flatten(1)
        place = rows[:, None].expand_as(visited)
        other = (visited >= 0) & (visited != starts[place])
        keys = torch.cat([row * pins + pin, place[other] * pins + visited[other]])
        ones = torch.cat([count, torch.ones_like(place[other])])
        keys, group = keys.unique(return_inverse=True)
        count = torch.zeros_like(keys).index_add_(0, group, ones)
        row, pin = (keys // pins, keys % pins) if len(keys) else (keys, keys)
        if stop_visits > 0:
            often = torch.bincount(row[count >= stop_visits], minlength=len(starts))
            rows = rows[often[rows] < top_k]
    weight = count.float() if pin_scale is None else count.float() * pin_scale[pin]
    return top_of_rows(row, pin, weight, len(starts), top_k)


def top_of_rows(row: Tensor, pin: Tensor, weight: Tensor, rows: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` heaviest pins of each row, heaviest first and of equal ones the lower first.

    row, pin: int64 [n], sorted by row and then pin, no pair twice; weight: float32 [n]. Weights that are not
    above zero are left out. Returns int64 and float32 [rows, top_k], filled up with -1 and 0.
    """
    kept = weight > 0
    row, pin, weight = row[kept], pin[kept], weight[kept]
    order = torch.sort(weight, descending=True, stable=True).indices
    order = order[torch.sort(row[order], stable=True).indices]
    row, pin, weight = row[order], pin[order], weight[order]
    begin = torch.searchsorted(row, torch.arange(rows, device=row.device))
    rank = torch.arange(len(row), device=row.device) - begin[row]
    first = rank < top_k
    neighbors = pin.new_full((rows, top_k), -1)
    weights = weight.new_zeros((rows, top_k))
    neighbors[row[first], rank[first]] = pin[first]
    weights[row[first], rank[first]] = weight[first]
    return neighbors, weights
