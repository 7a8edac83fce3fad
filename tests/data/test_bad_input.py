"""Users' mistakes at the command line: exit code 2, one clear line, no traceback, nothing half-written."""

import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import noise, sample, write_tar

from pinclip.cli import main
from pinclip.data.store import PinStore


@pytest.fixture
def run(raw, tmp_path, capsys):
    """Import `raw` with more arguments; return (exit code, what was printed as error)."""

    def run(*more, pins=raw / "pins.csv", edges=raw / "edges.tsv", out=tmp_path / "store"):
        arguments = ["--pins", str(pins), "--edges", str(edges), "--out", str(out), *more]
        code = main(["data", "import", *arguments])
        return code, capsys.readouterr().err

    return run


def assert_refused(result, *parts, out=None):
    code, error = result
    assert code == 2
    lines = [line for line in error.splitlines() if not line.startswith(("\r", "pins:"))]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    if out is not None:
        left = [path.name for path in out.parent.iterdir() if out.name in path.name]
        assert left == []


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.unlink(), "image 'pictures/red.png': No such file or directory"),
        (lambda file: file.write_bytes(b""), "the image has no bytes"),
        (lambda file: file.write_text("<html>"), "not an image in a known format"),
        (lambda file: file.write_bytes(noise(1)[:2000]), "damaged or truncated image"),
        (lambda file: (file.unlink(), file.mkdir()), "image 'pictures/red.png': Is a directory"),
    ],
)
def test_a_bad_image_is_a_bad_pin_up_to_the_bound(raw, run, tmp_path, damage, reason):
    damage(raw / "pictures" / "red.png")
    assert_refused(run(), "1 of 6 pins are bad, more than the bound of 5%", reason, out=tmp_path / "store")
    code, _ = run("--max-bad", "0.2")
    assert code == 0
    store = PinStore.open(tmp_path / "store")
    assert store.bad.tolist() == [True] + [False] * 5
    assert reason in (store.root / "bad_pins.jsonl").read_text()
    assert store.graph.pin_degrees[0] == 0


def test_a_pin_of_nothing_is_a_bad_pin(raw, run, tmp_path):
    edit(raw / "pins.csv", "0,pictures/red.png,a red pin", "0,,")
    assert_refused(run(), "'0': neither image nor text", out=tmp_path / "store")


def test_an_edge_of_an_unknown_pin(raw, run, tmp_path):
    edit(raw / "edges.tsv", "warm\t3", "warm\t33")
    assert_refused(run(), "edges.tsv row 2: unknown pin '33'", out=tmp_path / "store")
    assert run("--unknown-pins", "drop")[0] == 0
    assert PinStore.open(tmp_path / "store").info["edges_of_unknown_pins"] == 1


def test_duplicate_ids(raw, run, tmp_path):
    edit(raw / "pins.csv", "4,pic", "1,pic")
    pins = raw / "pins.csv"
    message = f"duplicate pin id '1': {pins} row 2 and {pins} row 5"
    assert_refused(run(), message, out=tmp_path / "store")


def test_duplicate_ids_in_two_shards(raw, run, tmp_path):
    write_tar(raw / "0.tar", sample("k", text="x"))
    write_tar(raw / "1.tar", sample("k", text="y"))
    assert_refused(run(pins=raw), "duplicate pin id 'k': ", "0.tar key 'k' and ", "1.tar key 'k'")


def test_a_board_with_one_pin_is_harmless(raw, run, tmp_path):
    with open(raw / "edges.tsv", "a") as file:
        file.write("lonely\t2\n")
    assert run()[0] == 0
    store = PinStore.open(tmp_path / "store")
    assert store.info["single_pin_boards"] == 1
    assert store.graph.num_boards == 3


@pytest.mark.parametrize("size", [300, 2000, 3000])
def test_a_corrupt_tar(raw, run, tmp_path, size):
    tar = write_tar(raw / "0.tar", [*sample("0", text="a", id=0), *sample("1", text="b", id=1)])
    tar.write_bytes(tar.read_bytes()[:size])
    assert_refused(run(pins=tar), "0.tar: ", "truncated tar archive", out=tmp_path / "store")


def test_a_table_that_is_not_utf8(raw, run, tmp_path):
    data = (raw / "pins.csv").read_bytes().replace(b"a blue pin", "a blüe pin".encode("latin-1"))
    (raw / "pins.csv").write_bytes(data)
    assert_refused(run(), "pins.csv: line 4 is not UTF-8 (byte 24)", out=tmp_path / "store")


def test_edges_that_are_not_utf8(raw, run, tmp_path):
    (raw / "edges.tsv").write_bytes((raw / "edges.tsv").read_bytes().replace(b"cold\t2", b"c\xf6ld\t2"))
    assert_refused(run(), "edges.tsv: line 5 is not UTF-8 (byte 1)", out=tmp_path / "store")


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--id-column", "identity"], ["pins.csv: no column 'identity'", "--id-column"]),
        (["--image-column", "images"], ["no column 'images'; the nearest is 'image'", "--image-column"]),
        (["--text-columns", "text,title"], ["no column 'title'", "--text-columns"]),
        (["--board-column", "list"], ["edges.tsv: no column 'list'", "--board-column"]),
    ],
)
def test_wrong_column_names(run, tmp_path, more, parts):
    assert_refused(run(*more), *parts, out=tmp_path / "store")


def test_neither_image_nor_text(raw, run, tmp_path):
    edit(raw / "pins.csv", "id,image,text", "id,picture,caption")
    assert_refused(run(), "neither a column 'image' nor 'text'; it has 'id', 'picture', 'caption'")


def test_empty_tables(raw, run, tmp_path):
    (raw / "empty.csv").write_text("")
    (raw / "header.csv").write_text("id,image,text,board,pin\n")
    pq.write_table(
        pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), raw / "p.parquet"
    )
    assert_refused(run(pins=raw / "empty.csv"), "empty.csv: the table is empty", out=tmp_path / "store")
    assert_refused(run(pins=raw / "header.csv"), "header.csv: no pins", out=tmp_path / "store")
    assert_refused(run(pins=raw / "p.parquet"), "p.parquet: no pins", out=tmp_path / "store")
    assert_refused(run(edges=raw / "empty.csv"), "empty.csv: the table is empty", out=tmp_path / "store")
    assert_refused(run(edges=raw / "header.csv"), "header.csv: no edges", out=tmp_path / "store")
    write_tar(raw / "none.tar", [])
    assert_refused(run(pins=raw / "none.tar"), "none.tar: no pins", out=tmp_path / "store")


def test_a_truncated_parquet(raw, run, tmp_path):
    pq.write_table(pa.table({"id": np.arange(6), "text": list("abcdef")}), raw / "pins.parquet")
    data = (raw / "pins.parquet").read_bytes()
    (raw / "pins.parquet").write_bytes(data[: len(data) // 2])
    assert_refused(run(pins=raw / "pins.parquet"), "pins.parquet: cannot be read", out=tmp_path / "store")


def test_files_that_are_not_there(raw, run, tmp_path):
    assert_refused(run(pins=raw / "pins.parquet"), "pins.parquet: no such file")
    assert_refused(run(edges=raw / "more.tsv"), "more.tsv: no such file")
    assert_refused(run(pins=raw / "pictures" / "red.png"), "red.png: unknown kind of file")


def test_an_output_that_cannot_be_written(raw, run, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "store", tmp_path / "file" / "deep" / "store"):
        assert_refused(run(out=out), f"cannot write {out}: {tmp_path / 'file'} is a file, not a folder")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission(run, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_refused(run(out=tmp_path / "locked" / "store"), "permission denied")


# A limit on the size of files stands in for a full disk: write() fails in the same places with EFBIG.
_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from pinclip.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [0, 200, 1000, 3000, 10000])
def test_a_full_disk(tmp_path, limit):
    """The limits stop at the images, the tables, and the graph's arrays in turn."""
    (tmp_path / "pins.jsonl").write_text(
        "".join(f'{{"id": {number}, "text": "pin"}}\n' for number in range(1000))
    )
    edges = "".join(f"{number % 7}\t{number}\n" for number in range(1000))
    (tmp_path / "edges.tsv").write_text(edges)
    arguments = ["--pins", "pins.jsonl", "--edges", "edges.tsv", "--out", "store"]
    run = [sys.executable, "-c", _LIMITED, str(limit), "data", "import", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if limit == 10000:  # enough for this set: the smaller limits did stop it
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"error: cannot write store(/graph)?: (file too large|no space left on the device)", last
    )
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edges.tsv", "pins.jsonl"]
