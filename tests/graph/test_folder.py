"""An opened graph folder: ids, split and proof; and folders damaged in every way we could think of."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinclip.errors import DataError
from pinclip.graph.board_graph import BoardGraph
from pinclip.graph.build import Holdout, build_graph
from pinclip.graph.edge_source import EdgeArrays
from pinclip.graph.folder import GraphFolder

PINS = [3, 5, 5, 9, 9, 9, 17, 17, 4000000000, 4000000000]
BOARDS = ["b", "a", "é", "a", "b", "é", "a", "é", "b", "é"]


def make(path, pins=PINS, **options):
    build_graph(EdgeArrays("arrays", pa.array(pins), pa.array(BOARDS)), path, progress=False, **options)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    for kind, share in (("none", None), ("pins", 0.4), ("edges", 0.3)):
        make(folder / kind, holdout=Holdout(kind, share, 5))
    make(folder / "text", [f"pin-{pin}" for pin in PINS])
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """A copy of all, to be damaged."""
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


def test_integer_ids(built):
    graph = GraphFolder.open(built / "none")
    assert graph.pin_ids.equals(pa.array([3, 5, 9, 17, 4000000000]))
    assert graph.board_ids.to_pylist() == ["a", "b", "é"]
    assert graph.pin_index(["17", 3, "4000000000"]).tolist() == [3, 0, 4]
    assert graph.pin_index([]).dtype == np.int64
    assert graph.withheld is None
    assert graph.split["kind"] == "none"
    assert graph.check_split() == ["nothing is withheld"]
    assert graph.stats["training"]["edges"] == graph.graph.num_edges == 10


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("4", "no pin '4'"),
        ("017", "no pin '017'; its pins are integers"),
        ("x", "no pin 'x'; its pins are integers"),
        ("-3", "no pin '-3'; its pins are integers"),
        (2**70, "its pins are integers"),
    ],
)
def test_unknown_integers(built, wanted, message):
    with pytest.raises(DataError) as error:
        GraphFolder.open(built / "none").pin_index(["3", wanted])
    assert message in str(error.value)


def test_text_ids(built):
    graph = GraphFolder.open(built / "text")
    assert graph.pin_ids.to_pylist() == ["pin-17", "pin-3", "pin-4000000000", "pin-5", "pin-9"]
    assert graph.pin_index(["pin-9", "pin-17"]).tolist() == [4, 0]
    for wanted, near in (("pin-18", "pin-17"), ("zpin-9", "pin-9"), ("Pin-5", "pin-5")):
        with pytest.raises(DataError, match=f"no pin '{wanted}'; the nearest is '{near}'"):
            graph.pin_index([wanted])
    with pytest.raises(DataError, match=r"no pin '\?\?'$"):
        graph.pin_index(["??"])


def test_the_proof_of_a_split(built):
    for kind, fact in (("pins", "has a training edge"), ("edges", "is on its side")):
        graph = GraphFolder.open(built / kind)
        assert graph.graph.num_edges + graph.withheld.num_edges == 10
        facts = graph.check_split()
        assert facts[0].startswith(f"none of the {graph.withheld.num_edges} withheld edges")
        assert fact in facts[1]


def swap_in(graph, edges, where):
    """Replace the arrays of a graph in its folder by those of other edges."""
    pins, boards = zip(*edges)
    new = BoardGraph.from_edges(pins, boards, graph.num_pins, graph.num_boards)
    for name in ("pin_indptr", "pin_boards", "board_indptr", "board_pins"):
        np.save(where / f"{name}.npy", getattr(new, name))
    (where / "graph.json").write_text(
        json.dumps({"format": 1, "pins": new.num_pins, "boards": new.num_boards, "edges": new.num_edges})
    )


def edge_list(graph):
    return [(pin, int(board)) for pin in range(graph.num_pins) for board in graph.boards_of(pin)]


@pytest.mark.parametrize("kind", ["pins", "edges"])
def test_a_leaking_edge_is_found(folder, kind):
    graph = GraphFolder.open(folder / kind)
    leak = edge_list(graph.withheld)[-1]
    swap_in(graph.graph, [*edge_list(graph.graph), leak], folder / kind)
    with pytest.raises(DataError, match=f"leak: the withheld edge of pin {leak[0]} and board {leak[1]} is"):
        GraphFolder.open(folder / kind).check_split()


@pytest.mark.parametrize("kind, message", [("pins", "leak: cold pin"), ("edges", "by its hash the training")])
def test_a_withheld_edge_moved_into_training_is_found(folder, kind, message):
    """The two graphs are disjoint, and only the ids tell that an edge is on the wrong side."""
    graph = GraphFolder.open(folder / kind)
    held = edge_list(graph.withheld)
    swap_in(graph.graph, [*edge_list(graph.graph), held[0]], folder / kind)
    swap_in(graph.withheld, held[1:], folder / kind / "withheld")
    edit_json("split.json", counts={"edges": len(held) - 1, "pins": 1})(folder / kind)
    with pytest.raises(DataError, match=message):
        GraphFolder.open(folder / kind).check_split()


@pytest.mark.parametrize("kind, message", [("pins", "leak: cold pin"), ("edges", "by its hash the withheld")])
def test_a_training_edge_moved_into_the_withheld_is_found(folder, kind, message):
    graph = GraphFolder.open(folder / kind)
    kept = edge_list(graph.graph)
    swap_in(graph.withheld, [*edge_list(graph.withheld), kept[0]], folder / kind / "withheld")
    swap_in(graph.graph, kept[1:], folder / kind)
    edit_json("split.json", counts={"edges": 11 - len(kept), "pins": 1})(folder / kind)
    with pytest.raises(DataError, match=message):
        GraphFolder.open(folder / kind).check_split()


def edit_json(name, **values):
    def damage(where):
        record = json.loads((where / name).read_text())
        (where / name).write_text(json.dumps(record | values))

    return damage


def write_ids(**columns):
    return lambda where: pq.write_table(pa.table(columns), where / "pins.parquet")


def cut(name):
    return lambda where: (where / name).write_bytes((where / name).read_bytes()[:-9])


DAMAGES = {
    "no folder": (lambda where: shutil.rmtree(where), "not a graph folder"),
    "no split": (lambda where: (where / "split.json").unlink(), "not a graph folder"),
    "no arrays": (lambda where: (where / "pin_indptr.npy").unlink(), "pin_indptr.npy"),
    "no ids": (lambda where: (where / "pins.parquet").unlink(), "pins.parquet: cannot be read"),
    "cut ids": (cut("boards.parquet"), "boards.parquet: cannot be read"),
    "other column": (write_ids(pins=[1, 2]), "no column 'pin'; the nearest is 'pins'"),
    "few ids": (write_ids(pin=[1, 2]), "pins.parquet: 2 ids, graph.json says 5"),
    "unsorted": (write_ids(pin=[1, 2, 2, 3, 4]), "pins.parquet row 3: the ids do not rise"),
    "a null": (write_ids(pin=[1, 2, None, 3, 4]), "pins.parquet row 3: no 'pin'"),
    "floats": (write_ids(pin=[1.0, 2, 3, 4, 5]), "holds double, not text"),
    "split is no JSON": (lambda where: (where / "split.json").write_text("{"), "split.json: not JSON"),
    "split is a list": (lambda where: (where / "split.json").write_text("[]"), "split.json: not a record"),
    "later split": (edit_json("split.json", format=2), "not a split of format 1"),
    "unknown split": (edit_json("split.json", kind="boards"), "kind is 'boards'"),
    "no counts": (edit_json("split.json", counts={"edges": "1"}), "want the withheld edges and pins"),
    "no seed": (edit_json("split.json", seed=None), "without its fraction and seed"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_open_refuses_a_damaged_folder(folder, name):
    damage, message = DAMAGES[name]
    damage(folder / "pins")
    with pytest.raises(DataError) as error:
        GraphFolder.open(folder / "pins")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


LATE_DAMAGES = {
    "no withheld": (lambda where: shutil.rmtree(where / "withheld"), "cannot read"),
    "other withheld": (
        lambda where: BoardGraph.from_edges([0], [0], 9, 9).save(where / "withheld"),
        "does not fit",
    ),
    "fewer withheld": (edit_json("split.json", counts={"edges": 1, "pins": 1}), "split.json says 1"),
    "no stats": (lambda where: (where / "stats.json").unlink(), "cannot read"),
    "later stats": (edit_json("stats.json", format=2), "not statistics of format 1"),
}


@pytest.mark.parametrize("name", LATE_DAMAGES)
def test_what_is_read_on_demand_is_checked_then(folder, name):
    damage, message = LATE_DAMAGES[name]
    damage(folder / "pins")
    graph = GraphFolder.open(folder / "pins")
    with pytest.raises(DataError, match=message):
        graph.check_split()
        graph.stats  # noqa: B018
