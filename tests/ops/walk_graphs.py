"""Small graphs for the tests of walks and of mining."""

import torch

from pinclip.ops.random_walk import WalkGraph, board_alias


def graph_of(adjacency, weights=None, index=torch.int32):
    """WalkGraph of a dense 0/1 matrix [P, B]; `weights` [B] makes boards unequally likely."""
    adjacency = torch.as_tensor(adjacency)
    boards = adjacency.nonzero(as_tuple=True)[1]
    board_pins = adjacency.T.nonzero(as_tuple=True)[1]
    lists = offsets(adjacency.sum(1)), boards.to(index), offsets(adjacency.sum(0)), board_pins.to(index)
    if weights is None:
        return WalkGraph(*lists)
    return WalkGraph(*lists, board_alias(*lists[:2], torch.as_tensor(weights).double()))


def offsets(counts):
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(counts, 0)])


def random_adjacency(num_pins, num_boards, density, seed=0):
    return (torch.rand(num_pins, num_boards, generator=torch.Generator().manual_seed(seed)) < density).long()


def exact_steps(adjacency, weights=None):
    """T[i, j]: the probability of one hop from i to j, in fp64."""
    adjacency = adjacency.double()
    choice = adjacency if weights is None else adjacency * torch.as_tensor(weights).double()
    choice = choice / choice.sum(1, keepdim=True)
    return (choice / adjacency.sum(0)) @ adjacency.T


def wide_graph(num_pins=140_000, num_boards=2_000, num_edges=60_000, index=torch.int32):
    """More pins than the miners keep a plain array for (csrc/top_neighbors.h), few of them with boards."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(num_pins * num_boards, (num_edges,), generator=generator).unique()
    pins, boards = edges // num_boards, edges % num_boards
    by_board = torch.sort(boards, stable=True).indices
    counts = torch.bincount(pins, minlength=num_pins), torch.bincount(boards, minlength=num_boards)
    return WalkGraph(offsets(counts[0]), boards.to(index), offsets(counts[1]), pins[by_board].to(index))
