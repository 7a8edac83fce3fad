"""Rates of the Pin-Board graph on the CPU: walking (bench/random_walk.py has the details) and building."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.registry import Arm, Job, Shape, Unsupported, Work

MEMORY = 2_000_000_000  # bytes that a build may take, where it can be told
CHUNK = 16_384  # starts that a rival walks at once: its best size at this graph


class Walk:
    """Walks from every pin of the power-law graph, by one of three walkers."""

    def __init__(self, shape: Shape, who: str):
        from bench import random_walk as walks

        self.graph, self.who, self.walks = walks.power_law_graph(), who, walks
        pins = np.arange(self.graph.num_pins)[: shape.pins]
        self.starts, self.count = pins, shape.walks
        lists = [self.graph.pin_indptr, self.graph.pin_boards, self.graph.board_indptr, self.graph.board_pins]
        self.lists = [*map(torch.from_numpy, [*lists, self.graph.pin_degrees, self.graph.board_sizes])]
        self.rng = np.random.default_rng(0)
        if who == "pinclip":
            from pinclip_kernels import extension

            try:
                extension.load()
            except RuntimeError as error:
                raise Unsupported(f"not built: {error}") from None

    def __call__(self):
        if self.who == "pinclip":
            return self.ours(torch.from_numpy(self.starts))
        starts = np.repeat(self.starts, self.count)
        parts = (starts[first : first + CHUNK] for first in range(0, len(starts), CHUNK))
        if self.who == "NumPy":
            return [self.walks.numpy_walk(self.graph, part, self.rng) for part in parts]
        return [self.walks.torch_walk(self.lists, torch.from_numpy(part)) for part in parts]

    def ours(self, starts: torch.Tensor):
        from pinclip.graph.neighbors import walk_graph
        from pinclip.ops.random_walk import random_walk

        graph = walk_graph(self.graph, np.ones(self.graph.num_boards))
        settings = {"length": self.walks.LENGTH, "restart": self.walks.RESTART, "seed": 1}
        self.ours = lambda starts: [
            random_walk(graph, part, walks=self.count, **settings) for part in starts.split(256)
        ]
        return self.ours(starts)


def check_walk(shape: Shape, arm: Arm, step: Walk) -> str:
    """Every step of a walk is an edge to a board and an edge back, and pins are visited by their degree.

    Ours must besides be the reference's walk, number for number.
    """
    graph = step.graph
    if step.who == "pinclip":
        from pinclip.reference.random_walk import random_walk as reference

        few = torch.from_numpy(step.starts[:20])
        lists = (*step.lists[:4], None)
        length, restart = step.walks.LENGTH, step.walks.RESTART
        want = reference(*lists, few, None, step.count, length, restart, 1)
        return "" if torch.equal(step.ours(few)[0], want) else "differs from the reference"
    starts = np.repeat(step.starts[:50], 4)
    if step.who == "NumPy":
        visited = step.walks.numpy_walk(graph, starts, step.rng)
    else:
        visited = step.walks.torch_walk(step.lists, torch.from_numpy(starts)).numpy()
    for start, pin in zip(starts, visited[0]):
        boards = graph.pin_boards[graph.pin_indptr[start] : graph.pin_indptr[start + 1]]
        near = [graph.board_pins[graph.board_indptr[b] : graph.board_indptr[b + 1]] for b in boards]
        if not near or pin not in np.concatenate(near):
            return f"from pin {start} it steps to pin {pin}, which shares no board"
    return ""


def work_walk(shape: Shape, mode: str) -> Work:
    from bench.random_walk import LENGTH

    return Work(0.0, 0.0, float(shape.pins * shape.walks * LENGTH), "hops")


def walker(name: str, role: str = "rival") -> Arm:
    return Arm(name, lambda shape, problem: Walk(shape, name), role)


class Build:
    """A Parquet table of edges to a graph on disk, by one of the arms of bench/graph_build.py."""

    def __init__(self, shape: Shape, who: str):
        from bench.graph_build import ARMS, edge_table

        if who in ("duckdb", "polars"):
            importlib.import_module(who)
        self.build, self.folder = ARMS[who], tempfile.TemporaryDirectory()
        self.parts = edge_table(Path(self.folder.name) / "edges", shape.edges)

    def __call__(self) -> dict:
        out = Path(self.folder.name) / "out"
        shutil.rmtree(out, ignore_errors=True)
        return self.build(self.parts, out, MEMORY)


def check_build(shape: Shape, arm: Arm, step: Build) -> str:
    """As many edges as there are distinct ones; ours leaves out boards of a single pin."""
    import pyarrow.parquet as pq

    table = pq.read_table(step.parts)
    pins, boards = (np.unique(table[name], return_inverse=True)[1] for name in ("pin", "board"))
    keys = np.unique(pins << 32 | boards)
    if arm.role == "ours":
        board = keys & 0xFFFFFFFF
        keys = keys[np.bincount(board)[board] > 1]
    found = step()["edges"]
    return "" if found == len(keys) else f"{found} edges, not {len(keys)}"


def builder(name: str, role: str = "rival") -> Arm:
    return Arm(name, lambda shape, problem: Build(shape, name), role)


def _walk_shape(pins: int, walks: int, **options) -> Shape:
    return Shape(f"{pins} pins x {walks} walks", {"pins": pins, "walks": walks}, dtype="int64", **options)


def _build_shape(edges: int, **options) -> Shape:
    return Shape(f"{edges:,} edges", {"edges": edges}, dtype="int64", **options)


ENTRIES = (
    Job(
        "random_walk",
        (walker("pinclip", "ours"), walker("NumPy"), walker("torch")),
        (_walk_shape(9_800, 10, on=("cpu",), quick=True), _walk_shape(60, 2, on=(), tiny=True)),
        work_walk,
        check_walk,
    ),
    Job(
        "graph_build",
        (builder("pinclip", "ours"), builder("duckdb"), builder("scipy"), builder("polars")),
        (
            _build_shape(2_000_000, on=("cpu",)),
            _build_shape(500_000, on=("cpu",), quick=True),
            _build_shape(2_000, on=(), tiny=True),
        ),
        lambda shape, mode: Work(0.0, 0.0, float(shape.edges), "edges"),
        check_build,
    ),
)
