"""`pinclip graph mine` and `pinclip graph neighbors`: what they print and write, and how they refuse."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from pinclip.cli import main
from pinclip.data.synthetic import build

SMALL = ["--walks", "20", "--length", "3", "--top-k", "4"]


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    edges = [(board, pin) for board in range(8) for pin in range(board * 3, board * 3 + 6)]
    table = "board\tpin\n" + "".join(f"b{board}\t{pin}\n" for board, pin in edges)
    (folder / "edges.tsv").write_text(table)
    out = str(folder / "built")
    assert main(["graph", "build", str(folder / "edges.tsv"), "--out", out, "--withhold-pins", "0.1"]) == 0
    return out


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("method", ["walk", "cooccurrence"])
def test_mine_writes_pairs_and_says_how_many(capsys, graph, tmp_path, method):
    out = tmp_path / "pairs.parquet"
    code, printed, _ = run(capsys, "graph", "mine", graph, "--out", out, "--method", method, *SMALL)
    table = pq.read_table(out)
    assert code == 0
    assert re.match(rf"{out}: {table.num_rows:,} pairs of \d+ of 27 pins in \d", printed)
    record = json.loads(table.schema.metadata[b"pinclip"])
    assert record["mining"]["method"] == method and record["mining"]["walks"] == 20
    assert record["split"]["kind"] == "pins"
    withheld = set(map(str, range(27))) - set(table["pin"].to_pylist())
    assert withheld and not withheld & set(table["neighbor"].to_pylist())


def test_shards_and_threads(capsys, graph, tmp_path):
    options = (*SMALL, "--board-cap", 4, "--stop-visits", 2, "--seed", 3)
    for name, extra in (("whole", ()), ("a", ("--shard", "0/2", "--threads", 1)), ("b", ("--shard", "1/2"))):
        out = tmp_path / f"{name}.parquet"
        assert run(capsys, "graph", "mine", graph, "--out", out, *options, *extra)[0] == 0
    rows = {name: pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("whole", "a", "b")}
    assert rows["a"] + rows["b"] == rows["whole"] and rows["a"] and rows["b"]


def test_neighbors_are_printed_and_drawn(capsys, graph, tmp_path):
    pairs, page = tmp_path / "pairs.parquet", tmp_path / "page.html"
    run(capsys, "graph", "mine", graph, "--out", pairs, *SMALL)
    rows = [row for row in pq.read_table(pairs).to_pylist() if row["pin"] == "7"]
    assert rows
    for options in (("--pairs", pairs), ()):  # read, or mined now
        code, printed, _ = run(capsys, "graph", "neighbors", graph, "7", *SMALL, *options, "--html", page)
        assert code == 0
        lines = printed.splitlines()
        assert re.fullmatch(r"7  \(\d boards\)", lines[0])
        assert [line.split()[-1] for line in lines[1:]] == [row["neighbor"] for row in rows]
        assert float(lines[1].split()[0]) == pytest.approx(rows[0]["weight"], rel=1e-3)
        assert page.read_text().count('class="pin"') == len(rows)
    code, printed, _ = run(capsys, "graph", "neighbors", graph, "--random", 5, *SMALL)
    assert code == 0 and len(re.findall(r"boards\)", printed)) == 5


def test_neighbors_with_the_images_of_a_store(capsys, tmp_path):
    graph, page = tmp_path / "graph", tmp_path / "page.html"
    store = build(tmp_path / "store", pins=60, seed=1)
    assert run(capsys, "graph", "build", store.root, "--out", graph)[0] == 0
    pin = int(np.argmax(store.graph.pin_degrees))
    shown = ("--pins", store.root, "--html", page)
    code, printed, _ = run(capsys, "graph", "neighbors", graph, store.ids[pin], *SMALL, *shown)
    assert code == 0
    assert printed.startswith(f"{store.ids[pin]} {store.texts[pin]}")
    assert page.read_text().count("data:image/webp;base64,") == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mine", "GRAPH", "--out", "OUT", "--walks", "0"), "walks is 0, want a value in [1,"),
        (("mine", "GRAPH", "--out", "OUT", "--restart", "2"), "restart is 2.0"),
        (("mine", "nowhere", "--out", "OUT"), "nowhere: not a graph folder"),
        (("mine", "GRAPH", "--out", "/proc/nowhere/pairs.parquet"), "cannot write /proc/nowhere"),
        (("neighbors", "GRAPH", "999"), "no pin '999'"),
        (("neighbors", "GRAPH"), "name pins, or give --random N"),
        (("neighbors", "GRAPH", "1", "--pairs", "nothing.parquet"), "nothing.parquet: no such file"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(capsys, graph, tmp_path, arguments, message):
    place = {"GRAPH": graph, "OUT": tmp_path / "pairs.parquet"}
    code, printed, error = run(capsys, "graph", *(place.get(word, word) for word in arguments))
    assert code == 2 and printed == ""
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard", ["2/2", "x", "1/", "-1/2"])
def test_a_shard_that_is_none(capsys, graph, shard):
    with pytest.raises(SystemExit) as stop:
        main(["graph", "mine", graph, "--out", "p.parquet", f"--shard={shard}"])
    assert stop.value.code == 2
    assert "is not I/N with 0 <= I < N" in capsys.readouterr().err
