"""The table of edges: formats, header or none, and edges that name pins nobody knows."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinclip.data.edges import read_edges
from pinclip.errors import DataError

IDS = ["10", "11", "x"]
EDGES = [("b", "11"), ("a", "10"), ("b", "x"), ("b", "11")]


def write(path, edges, header=True):
    separator = "," if path.suffix == ".csv" else "\t"
    rows = [("board", "pin"), *edges] if header else edges
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    return path


def read(path, **columns):
    return read_edges(path, columns.get("board", "board"), columns.get("pin", "pin"), columns.get("boards"))


def as_pairs(links):
    return [(links.board_ids[board], IDS[pin]) for board, pin in zip(links.boards, links.pins)]


@pytest.mark.parametrize(("name", "header"), [("e.csv", True), ("e.tsv", True), ("e.tsv", False)])
def test_text_tables(tmp_path, name, header):
    links = read(write(tmp_path / name, EDGES, header)).link(IDS)
    assert as_pairs(links) == EDGES
    assert links.board_ids == ["b", "a"]
    assert (links.pins.dtype, links.boards.dtype) == (np.int64, np.int64)


@pytest.mark.parametrize("pin_type", [pa.int32(), pa.uint64(), pa.string(), pa.large_string()])
def test_integer_pins_match_string_ids(tmp_path, pin_type):
    pins = [11, 10] if pa.types.is_integer(pin_type) else ["11", "10"]
    table = pa.table({"pin": pa.array(pins, pin_type), "when": [1.0, 2.0], "board": pa.array([7, 7])})
    pq.write_table(table, tmp_path / "e.parquet")
    links = read(tmp_path / "e.parquet").link(IDS)
    assert as_pairs(links) == [("7", "11"), ("7", "10")]


def test_a_third_column_without_header_is_a_time(tmp_path):
    (tmp_path / "e.tsv").write_text("a\t10\t2024-01-01\nb\tx\t2024-01-02\n")
    assert as_pairs(read(tmp_path / "e.tsv").link(IDS)) == [("a", "10"), ("b", "x")]


def test_named_columns_in_any_order(tmp_path):
    (tmp_path / "e.csv").write_text("item,when,list\n10,3,a\nx,4,b\n")
    assert as_pairs(read(tmp_path / "e.csv", board="list", pin="item").link(IDS)) == [("a", "10"), ("b", "x")]


def test_titles_come_from_the_table_of_boards(tmp_path):
    (tmp_path / "boards.jsonl").write_text('{"id": "a", "title": "The A"}\n{"id": "unused", "title": "U"}\n')
    links = read(write(tmp_path / "e.csv", EDGES), boards=tmp_path / "boards.jsonl").link(IDS)
    assert links.board_titles == ["b", "The A"]


def test_an_unknown_pin_names_file_row_and_id(tmp_path):
    folder = tmp_path / "edges"
    folder.mkdir()
    write(folder / "1.csv", EDGES)
    for row in (1, 2, 3):
        edges = [("a", "10")] * (row - 1) + [("a", "nobody"), ("a", "else")]
        write(folder / "2.csv", edges)
        with pytest.raises(DataError, match=rf"2.csv row {row}: unknown pin 'nobody' \(2 such edges;"):
            read(folder).link(IDS)


def test_unknown_pins_may_be_dropped_and_are_counted(tmp_path):
    table = read(write(tmp_path / "e.csv", [("z", "nobody"), *EDGES]))
    links = table.link(IDS, "drop")
    assert as_pairs(links) == EDGES
    assert links.dropped == 1
    assert links.board_ids == ["b", "a"]  # z had unknown pins only
    with pytest.raises(DataError, match=r"e.csv: no edge names a pin of the table of pins"):
        table.link(["other"], "drop")


def test_a_header_with_other_names_is_suspected(tmp_path):
    (tmp_path / "e.tsv").write_text("board_id\tpin_id\na\t10\n")
    with pytest.raises(
        DataError, match=r"row 1: unknown pin 'pin_id'.* if this row is a header, name its col"
    ):
        read(tmp_path / "e.tsv").link(IDS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.csv", "board_id,pin\na,10\n", "no column 'board'; the nearest is 'board_id'.*--board-column"),
        ("e.tsv", "board\tpin_id\na\t10\n", "no column 'pin'; the nearest is 'pin_id'.*--pin-column"),
        ("e.tsv", "boards\tpin\na\t10\n", "no column 'board'; the nearest is 'boards'"),
        ("e.tsv", "a\tb\tc\td\n", "two or three columns board, pin.*; its first line has 4"),
        ("e.csv", "board,pin\n", "no edges"),
        ("e.tsv", "", "the table is empty"),
        ("e.tsv", "a\t10\nb\n", "cannot be read .*Expected 2 columns, got 1"),
        ("e.csv", "board,pin\na,10\n,x\n", "e.csv row 2: no 'board'"),
        ("e.tsv", "a\t10\nb\t\n", "e.tsv row 2: no 'pin'"),
    ],
)
def test_bad_edges(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name).link(IDS)


def test_columns_that_were_named_need_a_header(tmp_path):
    (tmp_path / "e.tsv").write_text("a\t10\n")
    with pytest.raises(DataError, match="no column 'list'"):
        read(tmp_path / "e.tsv", board="list", pin="item")


def test_duplicate_boards(tmp_path):
    (tmp_path / "boards.csv").write_text("id,title\na,A\nb,B\na,C\n")
    with pytest.raises(DataError, match=r"boards.csv row 3: duplicate board id 'a'"):
        read(write(tmp_path / "e.csv", EDGES), boards=tmp_path / "boards.csv")
