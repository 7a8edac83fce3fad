"""`pinclip graph build | stats`: what is printed, and every kind of bad input as one line and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinclip.cli import main
from pinclip.cli.graph import _bytes
from pinclip.data import synthetic
from pinclip.errors import DataError
from pinclip.graph.folder import GraphFolder

ROWS = [("a", "x"), ("b", "x"), ("c", "x"), ("b", "y"), ("c", "y"), ("b", "y"), ("d", "z")]
DAYS = [
    "2024-01-01",
    "2024-02-01",
    "2024-03-01",
    "2024-03-01T10:00:00",
    "2024-05-01",
    "2024-06-01",
    "2024-07-01",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def csv(path, rows=ROWS, header="pin,board", separator=","):
    lines = [header, *(separator.join(row) for row in rows)]
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


def build(*arguments):
    return main(["graph", "build", *arguments, "--out", "g"])


def edges(where="g"):
    graph = GraphFolder.open(where)
    pins, boards = graph.pin_ids.to_pylist(), graph.board_ids.to_pylist()
    return {(pins[p], boards[b]) for p in range(len(pins)) for b in graph.graph.boards_of(p)}


def test_build_and_stats(here, capsys):
    csv("e.csv")
    assert build("e.csv") == 0
    built = capsys.readouterr().out
    assert built.splitlines() == [
        "g",
        "  4 pins, 1 of them isolated",
        "  2 boards, 0 of them empty",
        "  5 edges, 123.20 bytes each on disk, and 0.0 MB of ids",
        "                           min     median       mean        p90        p99        max",
        "  boards of a pin            0          1        1.2          2          2          2",
        "  pins of a board            2          2        2.5          3          3          3",
        "  1 components; the largest has 3 pins and 2 boards",
        "  of 7 rows, left out: 1 duplicates, 1 boards under min",
    ]
    assert main(["graph", "stats", "g"]) == 0
    assert capsys.readouterr().out == f"{built}  proven: nothing is withheld\n"
    assert edges() == set(ROWS[:5])
    assert sorted(os.listdir("g")) == [
        "board_indptr.npy",
        "board_pins.npy",
        "boards.parquet",
        "degrees.png",
        "graph.json",
        "pin_boards.npy",
        "pin_indptr.npy",
        "pins.parquet",
        "split.json",
        "stats.json",
    ]


def test_every_kind_of_table_gives_the_same_graph(here):
    pins, boards = zip(*ROWS)
    csv("e.csv")
    csv("e.tsv", header="board\tpin", rows=[row[::-1] for row in ROWS], separator="\t")
    csv("headerless.tsv", header="x\ta", rows=[row[::-1] for row in ROWS[1:]], separator="\t")
    Path("e.jsonl").write_text("".join(json.dumps({"pin": p, "board": b}) + "\n" for p, b in ROWS))
    parquet("e.parquet", pin=pins, board=boards)
    parquet(
        "large.parquet", pin=pa.array(pins, pa.large_string()), board=pa.array(boards).dictionary_encode()
    )
    parquet("named.parquet", save=pins, into=boards)
    Path("parts").mkdir()
    for part in range(2):
        csv(f"parts/{part}.csv", ROWS[part::2])
    seen = set()
    for arguments in (
        ["e.csv"],
        ["e.tsv"],
        ["headerless.tsv"],
        ["e.jsonl"],
        ["e.parquet"],
        ["large.parquet"],
        ["named.parquet", "--pin-column", "save", "--board-column", "into"],
        ["parts"],
        ["parts/*.csv"],
        ["parts/1.csv", "parts/0.csv", "parts/1.csv"],
    ):
        assert build(*arguments, "--threads", "1", "--memory", "500MiB") == 0
        assert json.loads(Path("g/stats.json").read_text())["input"]["rows"] == 7
        seen.add(tuple(file.read_bytes() for file in sorted(Path("g").iterdir())))
    assert len(seen) == 1


def test_a_pin_store_is_a_source_of_edges(here, capsys):
    store = synthetic.build("s", pins=120, seed=1, progress=False)
    assert build("s", "--withhold-pins", "0.2") == 0
    graph = GraphFolder.open("g")
    assert graph.graph.num_edges + graph.withheld.num_edges == store.graph.num_edges
    for pin in range(graph.graph.num_pins):
        there = store.ids.index(graph.pin_ids[pin].as_py())
        boards = {store.board_ids[board] for board in store.graph.boards_of(there)}
        kept = [*graph.graph.boards_of(pin), *graph.withheld.boards_of(pin)]
        assert {graph.board_ids[board].as_py() for board in kept} == boards
    assert build("s", "s") == 2
    assert "alone" in capsys.readouterr().err
    assert build("s", "--since", "3") == 2
    assert "its edges have no time" in capsys.readouterr().err


def test_withholding(here, capsys):
    csv("e.csv", [(*row, day) for row, day in zip(ROWS, DAYS)], "pin,board,when")
    assert build("e.csv", "--withhold-since", "2024-03-01T00:00Z", "--time-column", "when") == 0
    # (b, y) is older than its second row, and its first one is late as well.
    assert edges() == {("a", "x"), ("b", "x")}
    printed = capsys.readouterr().out
    assert "withheld: 3 edges of 2 pins and 2 boards" in printed
    split = json.loads(Path("g/split.json").read_text())
    assert split == {
        "format": 1,
        "kind": "time",
        "fraction": None,
        "seed": None,
        "since": "2024-03-01T00:00Z",
        "counts": {"edges": 3, "pins": 2, "boards": 2},
    }
    assert main(["graph", "stats", "g", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["split"] == split
    assert record["proven"] == ["none of the 3 withheld edges is in the lists of a pin or of a board"]
    assert record["training"]["edges"] == 2
    assert build("e.csv", "--withhold-edges", "0.5", "--split-seed", "7") == 0
    split = json.loads(Path("g/split.json").read_text())
    assert (split["kind"], split["fraction"], split["seed"], split["since"]) == ("edges", 0.5, 7, None)


TIMES = {
    "integers": (pa.array([1, 2, 3, 4, 5, 6, 7]), "4", 3),
    "integers and a fraction": (pa.array([1, 2, 3, 4, 5, 6, 7], pa.uint8()), "3.5", 3),
    "integers beyond floats": (pa.array([2**60 + step for step in range(7)]), str(2**60 + 3), 3),
    "floats": (pa.array([1.0, 2, 3, 4, 5, 6, 7]), "4", 3),
    "text numbers": (pa.array(["1", "2", "3.0", "4", "5", "6e0", "7"]), "4", 3),
    "seconds": (pa.array(range(7), pa.timestamp("s")), "1970-01-01T00:00:02.5", 3),
    "nanoseconds": (pa.array(range(7), pa.timestamp("ns")), "1970-01-01T00:00:00.000001", 7),
    "a zone": (
        pa.array(range(7), pa.timestamp("ms", "America/New_York")),
        "1970-01-01T00:00:00.003+00:00",
        3,
    ),
    "another zone": (pa.array(range(0, 7 * 3600, 3600), pa.timestamp("s")), "1970-01-01T02:00:00-01:00", 3),
    "days": (pa.array(range(7), pa.date32()), "1970-01-04", 3),
    "within a day": (pa.array(range(7), pa.date32()), "1970-01-03 12:00", 3),
    "64-bit days": (pa.array([day * 86_400_000 for day in range(7)], pa.date64()), "1970-01-04", 3),
    "text days": (pa.array(DAYS), "2024-03-01", 2),
    "text with Z": (pa.array([f"{day[:10]}T00:00:00Z" for day in DAYS]), "2024-03-01", 2),
    "text of all kinds": (
        pa.array([*DAYS[:5], "2024-06-01T00:00:00+02:00", "2024-07-01 00:00Z"]),
        "2024-03-01",
        2,
    ),
}


@pytest.mark.parametrize("name", TIMES)
def test_times_are_compared_in_their_own_unit(here, name):
    times, since, dropped = TIMES[name]
    pins, boards = zip(*ROWS)
    parquet("e.parquet", pin=pins, board=boards, time=times)
    assert build("e.parquet", "--since", since, "--min-board", "0") in (0, 2)
    if dropped == 7:
        assert not Path("g").exists()
    else:
        assert json.loads(Path("g/stats.json").read_text())["input"]["rows_before_since"] == dropped


GOOD = {"pin": ["a", "b"], "board": ["x", "x"]}


def truncated(path):
    parquet(path, **GOOD)
    Path(path).write_bytes(Path(path).read_bytes()[:-20])


def not_utf8(path, raw):
    return lambda: Path(path).write_bytes(raw)


BAD = {
    "no such file": (lambda: None, ["nowhere.csv"], "nowhere.csv: no such file"),
    "no match": (lambda: None, ["part-*.csv"], "part-*.csv: no such file"),
    "other file": (lambda: Path("e.txt").write_text("x"), ["e.txt"], "unknown kind of file"),
    "empty folder": (lambda: Path("parts").mkdir(), ["parts"], "file in this folder"),
    "empty file": (lambda: Path("e.parquet").write_text(""), ["e.parquet"], "the file is empty"),
    "empty text": (lambda: Path("e.csv").write_text(""), ["e.csv"], "the table is empty"),
    "header only": (lambda: csv("e.csv", []), ["e.csv"], "no edges"),
    "near column": (
        lambda: csv("e.csv", header="pins,board"),
        ["e.csv"],
        "no column 'pin'; the nearest is 'pins'",
    ),
    "named column": (
        lambda: csv("e.csv"),
        ["e.csv", "--board-column", "bord"],
        "no column 'bord'; the nearest is 'board'; it has 'pin', 'board' (choose with --board-column)",
    ),
    "no time": (lambda: csv("e.csv"), ["e.csv", "--since", "4"], "no column 'time'"),
    "one column": (lambda: csv("e.tsv", [("a",)], "x"), ["e.tsv"], "its first line has 1"),
    "no time column": (
        lambda: csv("e.tsv", separator="\t", header="x\ta"),
        ["e.tsv", "--since", "4"],
        "e.tsv: no header and no third column, so there is no time",
    ),
    "mixed types": (
        lambda: (parquet("e.parquet", **GOOD), parquet("f.parquet", pin=[1], board=["x"])),
        ["e.parquet", "f.parquet"],
        "mixed id types: the pins are text in e.parquet and integers in f.parquet",
    ),
    "mixed kinds": (
        lambda: (csv("e.csv"), parquet("f.parquet", pin=["a"], board=[1])),
        ["e.csv", "f.parquet"],
        "mixed id types: the boards are text in e.csv and integers in f.parquet",
    ),
    "null text": (
        lambda: parquet("e.parquet", pin=["a", None], board=["x", "x"]),
        ["e.parquet"],
        "e.parquet row 2: no 'pin'",
    ),
    "null integer": (
        lambda: parquet("e.parquet", pin=["a", "b"], board=[1, None]),
        ["e.parquet"],
        "e.parquet row 2: no 'board'",
    ),
    "only nulls": (
        lambda: parquet("e.parquet", pin=pa.nulls(2), board=[1, 2]),
        ["e.parquet"],
        "e.parquet row 1: no 'pin'",
    ),
    "empty cell": (lambda: csv("e.csv", [("a", "x"), ("", "x")]), ["e.csv"], "e.csv row 2: no 'pin'"),
    "empty key": (
        lambda: Path("e.jsonl").write_text('{"pin": "a", "board": "x"}\n{"pin": "a"}\n'),
        ["e.jsonl"],
        "e.jsonl row 2: no 'board'",
    ),
    "negative": (
        lambda: parquet("e.parquet", pin=[1, 2, -3], board=["x"] * 3),
        ["e.parquet"],
        "e.parquet row 3: 'pin' is -3, which is negative",
    ),
    "beyond int64": (
        lambda: parquet("e.parquet", pin=pa.array([1, 2**63], pa.uint64()), board=["x"] * 2),
        ["e.parquet"],
        "e.parquet row 2: 'pin' is 9223372036854775808, which is beyond int64",
    ),
    "floats": (
        lambda: parquet("e.parquet", pin=[1.5], board=["x"]),
        ["e.parquet"],
        "column 'pin' holds double",
    ),
    "booleans": (lambda: parquet("e.parquet", pin=["a"], board=[True]), ["e.parquet"], "'board' holds bool"),
    "bytes": (
        lambda: parquet("e.parquet", pin=[b"a"], board=["x"]),
        ["e.parquet"],
        "'pin' holds binary, not text",
    ),
    "truncated": (lambda: truncated("e.parquet"), ["e.parquet"], "e.parquet: cannot be read"),
    "not UTF-8 CSV": (not_utf8("e.csv", b"pin,board\na,x\n\xff,x\n"), ["e.csv"], "line 3 is not UTF-8"),
    "not UTF-8 header": (not_utf8("e.csv", b"p\xffn,board\na,x\n"), ["e.csv"], "line 1 is not UTF-8"),
    "not UTF-8 JSONL": (
        not_utf8("e.jsonl", b'{"pin": "a", "board": "x"}\n{"pin": "\xff", "board": "x"}\n'),
        ["e.jsonl"],
        "line 2 is not UTF-8",
    ),
    "not UTF-8 Parquet": (
        lambda: parquet(
            "e.parquet",
            pin=pa.array([b"a", b"\xff"]).view(pa.binary()).cast(pa.string(), safe=False),
            board=["x", "x"],
        ),
        ["e.parquet"],
        "e.parquet row 2: 'pin' is not UTF-8",
    ),
    "ragged CSV": (lambda: csv("e.csv", [("a", "x"), ("b",)]), ["e.csv"], "e.csv: cannot be read"),
    "nothing left": (
        lambda: csv("e.csv"),
        ["e.csv", "--min-board", "9"],
        "no edge is left after pruning (0 boards over max, 3 boards under min, 0 pins under min)",
    ),
    "all too old": (
        lambda: csv("e.csv", [("a", "x", "3")], "pin,board,time"),
        ["e.csv", "--since", "4"],
        "no edges: all are before 4",
    ),
    "all withheld": (lambda: csv("e.csv"), ["e.csv", "--withhold-pins", "1"], "all are withheld"),
    "negative bound": (lambda: csv("e.csv"), ["e.csv", "--min-pin", "-1"], "min_pin is -1"),
    "crossed bounds": (
        lambda: csv("e.csv"),
        ["e.csv", "--max-board", "1"],
        "max_board is 1, below min_board (2)",
    ),
    "large share": (
        lambda: csv("e.csv"),
        ["e.csv", "--withhold-edges", "1.5"],
        "is 1.5, want a value in [0, 1]",
    ),
    "no share": (lambda: csv("e.csv"), ["e.csv", "--withhold-pins", "nan"], "is nan, want a value in [0, 1]"),
    "bad seed": (
        lambda: csv("e.csv"),
        ["e.csv", "--withhold-pins", "0.5", "--split-seed", "-1"],
        "seed is -1",
    ),
    "no threads": (lambda: csv("e.csv"), ["e.csv", "--threads", "0"], "--threads is 0"),
    "no size": (lambda: csv("e.csv"), ["e.csv", "--memory", "much"], "--memory is 'much'"),
    "little memory": (lambda: csv("e.csv"), ["e.csv", "--memory", "50MB"], "50 MB of memory is too little"),
    "no moment": (
        lambda: csv("e.csv"),
        ["e.csv", "--since", "soon"],
        "time 'soon': neither a number nor an ISO",
    ),
    "no number": (
        lambda: csv("e.csv", [("a", "x", "3"), ("b", "x", "late")], "pin,board,time"),
        ["e.csv", "--since", "4"],
        "e.csv row 2: 'time' is 'late', not a number",
    ),
    "no date": (
        lambda: csv("e.csv", [("a", "x", "2024-01-01"), ("b", "x", "late")], "pin,board,time"),
        ["e.csv", "--withhold-since", "2024-01-01"],
        "e.csv row 2: 'time' is 'late', not an ISO-8601 date or time",
    ),
    "number against dates": (
        lambda: parquet("e.parquet", **GOOD, time=pa.array([1, 2], pa.timestamp("s"))),
        ["e.parquet", "--since", "4"],
        "holds timestamp[ms], which cannot be compared with a number (4)",
    ),
    "date against numbers": (
        lambda: parquet("e.parquet", **GOOD, time=[1, 2]),
        ["e.parquet", "--since", "2024-01-01"],
        "holds int64, which cannot be compared with a date or time (2024-01-01)",
    ),
    "null time": (
        lambda: parquet("e.parquet", **GOOD, time=[1, None]),
        ["e.parquet", "--withhold-since", "1"],
        "e.parquet row 2: no 'time'",
    ),
    "no time at all": (
        lambda: parquet("e.parquet", **GOOD, time=[1, float("nan")]),
        ["e.parquet", "--withhold-since", "1"],
        "e.parquet row 2: 'time' is not a number",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(here, capsys, name):
    prepare, arguments, message = BAD[name]
    prepare()
    before = sorted(here.rglob("*"))
    assert build(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(here.rglob("*")) == before


def test_bad_input_leaves_the_old_graph(here, capsys):
    csv("e.csv")
    assert build("e.csv") == 0
    before = {file: file.read_bytes() for file in Path("g").iterdir()}
    csv("e.csv", [("a", "x"), ("", "x")])
    assert build("e.csv") == 2
    assert {file: file.read_bytes() for file in Path("g").iterdir()} == before
    assert sorted(os.listdir()) == ["e.csv", "g"]


def test_outputs_that_are_refused(here, capsys):
    csv("e.csv")
    Path("file").write_text("")
    Path("mine").mkdir()
    Path("mine/diary").write_text("")
    for out, message in (
        ("file", "is a file, not a folder"),
        ("file/deep/g", "is a file, not a folder"),
        ("mine", "is not empty and is no graph"),
        ("x" * 300, "cannot write"),
    ):
        assert main(["graph", "build", "e.csv", "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert Path("mine/diary").exists()
    assert sorted(os.listdir()) == ["e.csv", "file", "mine"]


def test_stats_of_what_is_no_graph(here, capsys):
    assert main(["graph", "stats", "nowhere"]) == 2
    assert capsys.readouterr().err == "error: nowhere: not a graph folder (`pinclip graph build` makes one)\n"


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(here):
    """A bound on the size of files stands for the full disk: the same errors come from the same calls."""
    pins, boards = np.random.default_rng(0).integers(0, 3000, (2, 60_000))
    parquet("e.parquet", pin=pins, board=boards)
    code = """
import resource, sys
from pinclip.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(["graph", "build", "e.parquet", "--out", "g"]))
"""
    for size in (1_000, 30_000, 200_000):
        done = run(code, size)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1] == "error: cannot write g: file too large"
        assert os.listdir() == ["e.parquet"]


FUZZ = """
import collections, json, random, sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from pinclip.errors import DataError
from pinclip.graph.edge_source import EdgeTables, Moment

folder, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
pins, boards, times = [f"p{i % 7}é" for i in range(40)], [f"b{i % 5}" for i in range(40)], list(range(40))

def parquet(columns, **options):
    table = pa.table([pa.array(values) for values in columns], ["pin", "board", "time"])
    pq.write_table(table, folder / "sample", row_group_size=15, **options)
    return (folder / "sample").read_bytes()

def lines(separator, header):
    rows = [header] * bool(header) + [*zip(pins, boards, map(str, times))]
    return "".join(separator.join(row) + "\\n" for row in rows).encode()

stamps = pa.array(times, pa.timestamp("us"))
floats = [float(time) for time in times]
integers = [int(pin[1]) for pin in pins]
records = [json.dumps(dict(pin=p, board=b, time=t)) + "\\n" for p, b, t in zip(pins, boards, times)]
SAMPLES = [
    ("text.parquet", parquet([pins, boards, times])),
    ("integers.parquet", parquet([integers, [0] * 40, times])),
    ("dictionary.parquet", parquet([pa.array(pins).dictionary_encode(), boards, stamps], compression="zstd")),
    ("pages.parquet", parquet([pins, integers, floats], use_dictionary=False, data_page_version="2.0")),
    ("plain.parquet", parquet([pins, integers, floats], use_dictionary=False, compression="none")),
    ("e.csv", lines(",", ("pin", "board", "time"))),
    ("e.tsv", lines("\\t", ("pin", "board", "time"))),
    ("headerless.tsv", lines("\\t", ())),
    ("e.jsonl", "".join(records).encode()),
]

def damaged(raw):
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        at, kind = rng.randrange(len(raw) or 1), rng.randrange(6)
        if kind < 3 and raw:
            raw[at] = rng.randrange(256) if kind else raw[at] ^ 1 << rng.randrange(8)
        elif kind == 3:
            del raw[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            raw[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif rng.random() < 0.3:
            del raw[at:]
    return bytes(raw)

count = collections.Counter()
for name, raw in SAMPLES:
    for trial in range(int(sys.argv[3])):
        (folder / name).write_bytes(damaged(raw))
        bounds = [[Moment("20")], [Moment("2020-01-01")], []][trial % 3]
        try:
            for batch in EdgeTables([folder / name]).batches(bounds):
                for ids in (batch.pins, batch.boards):
                    ids.validate(full=True)
            count["read"] += 1
        except DataError as error:
            assert "\\n" not in str(error), repr(str(error))
            count["refused"] += 1
print(count["read"], count["refused"])
"""


def test_damaged_files_are_read_or_refused(tmp_path):
    """In a process of its own, so that a crash of the library would be seen."""
    done = run(FUZZ, tmp_path, 0, 300)
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused = map(int, done.stdout.split())
    assert read > 100
    assert refused > 1000


def test_sizes():
    sizes = {
        "2GB": 2 * 10**9,
        "1.5 GiB": 3 * 2**29,
        "300mb": 3 * 10**8,
        "2000": 2000,
        "1T": 10**12,
        "5KiB": 5120,
    }
    for text, size in sizes.items():
        assert _bytes(text) == size
    for text in ("", "GB", "-1GB", "2XB", "1iB", "nan", "1e9GB"):
        with pytest.raises(DataError, match="--memory is"):
            _bytes(text)


def test_build_and_stats_load_no_torch():
    """It alone takes half a gigabyte, of which --memory would have to be."""
    code = """
import sys
from pinclip.cli import main
main(["graph", "stats", "."])
print("torch" in sys.modules)
"""
    assert run(code).stdout.strip() == "False"
