"""Tables: the same rows from every format, one form of ids, and errors that name file, row and column."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinclip import tables
from pinclip.errors import DataError

ROWS = [
    {"id": "1", "title": 'red, "quoted"', "note": "two\nlines"},
    {"id": "x2", "title": "", "note": "ünïcode"},
    {"id": "007", "title": "plain", "note": "z"},
]


def write(path, rows):
    names = list(rows[0])
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        quoted = [[str(row[name]).replace('"', '""') for name in names] for row in rows]
        lines = [",".join(names)] + [",".join(f'"{cell}"' for cell in row) for row in quoted]
        path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    else:
        flat = [[str(row[name]).replace("\n", " ") for name in names] for row in rows]
        path.write_text("\n".join("\t".join(row) for row in [names, *flat]))
    return path


def read_all(path, columns, names=None):
    batches = list(tables.read(path, columns, names))
    return [list(row) for _, batch in batches for row in zip(*(batch[name].to_pylist() for name in columns))]


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = write(tmp_path / f"t{suffix}", ROWS)
    assert tables.column_names(path) == ["id", "title", "note"]
    rows = [[row["note"], row["id"], row["title"]] for row in ROWS]
    if suffix == ".tsv":  # no quoting, so no line breaks inside
        rows[0][0] = "two lines"
    assert read_all(path, ["note", "id", "title"]) == rows


def test_quotes_mean_nothing_in_a_tsv(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('id\ttext\na\t"half\nb\t"whole"\n')
    assert read_all(path, ["id", "text"]) == [["a", '"half'], ["b", '"whole"']]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_row_numbers_go_on_from_batch_to_batch(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(tables, "_BATCH", 10)
    monkeypatch.setattr(tables, "_CSV_BLOCK", 200)
    path = write(tmp_path / f"t{suffix}", [{"id": f"row-{number}"} for number in range(1, 101)])
    batches = [(first, batch["id"].to_pylist()) for first, batch in tables.read(path, ["id"])]
    assert len(batches) > 3
    assert all(ids[0] == f"row-{first}" for first, ids in batches)
    assert sum(len(ids) for _, ids in batches) == 100


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_integer_and_string_ids_of_the_same_digits_are_equal(numbers):
    path = tables.Path("t")
    from_integers = tables.canonical_ids(pa.array(numbers, pa.int64()), path, 1, "id")
    from_strings = tables.canonical_ids(pa.array(list(map(str, numbers))), path, 1, "id")
    assert from_integers.equals(from_strings)


def test_ids_from_categories_and_large_strings():
    path = tables.Path("t")
    for values in (
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array(["a", "b", "a"], pa.large_string()),
    ):
        assert tables.canonical_ids(values, path, 1, "id").to_pylist() == ["a", "b", "a"]
    assert tables.canonical_ids(pa.array(["007"]), path, 1, "id").to_pylist() == ["007"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array(["a", None]), "t row 12: no 'id'"),
        (pa.array(["a", ""]), "t row 12: no 'id'"),
        (pa.array([1, None]), "t row 12: no 'id'"),
        (pa.array([1.5]), "holds double; an id is a string or an integer"),
        (pa.array([True]), "holds bool"),
        (pa.array([["a"]]), "holds list"),
    ],
)
def test_what_is_no_id(values, message):
    with pytest.raises(DataError, match=message):
        tables.canonical_ids(values, tables.Path("t"), 11, "id")


def test_the_nearest_column_is_named():
    with pytest.raises(DataError) as caught:
        tables.require(tables.Path("t.csv"), ["pin_id", "title"], "pinid", "--id")
    assert str(caught.value) == (
        "t.csv: no column 'pinid'; the nearest is 'pin_id'; it has 'pin_id', 'title' (choose with --id)"
    )


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("line", [1, 3])
def test_a_table_that_is_not_utf8_names_the_line(tmp_path, suffix, line):
    path = write(tmp_path / f"t{suffix}", [{"id": "a", "note": "b"}, {"id": "c", "note": "d"}])
    lines = path.read_bytes().splitlines(keepends=True)
    if suffix == ".jsonl":
        lines.append(b'{"id": "e", "note": "f"}\n')
    # The last quote or letter of the line becomes Latin-1.
    lines[line - 1] = lines[line - 1].rstrip() + b"\xe9\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=rf"t{suffix}: line {line} is not UTF-8 \(byte \d+\)"):
        tables.column_names(path)
        read_all(path, ["id", "note"])


def test_a_parquet_string_that_is_not_utf8_names_the_row(tmp_path):
    path = tmp_path / "t.parquet"
    bad = pa.array([b"a", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"id": bad}), path)
    ((first, batch),) = tables.read(path, ["id"])
    with pytest.raises(DataError, match=r"t.parquet row 2: 'id' is not UTF-8 \(byte 3\)"):
        tables.strings(batch["id"], path, first, "id")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_parquet_is_named(tmp_path, share):
    path = write(tmp_path / "t.parquet", ROWS)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"t.parquet: (cannot be read|the file is empty)"):
        read_all(path, ["id"])


def test_damage_inside_a_parquet_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": [f"pin {number}" for number in range(5000)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[100:2000] = bytes(1900)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"t.parquet: cannot be read"):
        read_all(path, ["id"])


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_an_empty_file_is_named(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"t{suffix}: .*empty"):
        tables.column_names(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            "id,text\na,b\nc\n",
            r"t.csv: cannot be read \(CSV parse error: .*Expected 2 columns, got 1",
        ),
        ("t.tsv", "id\ttext\na\tb\tc\n", r"t.tsv: cannot be read \(.*Expected 2 columns, got 3"),
        ("t.jsonl", '{"id": 1, "text": "a"}\n{"id": 2,\n', "t.jsonl: line 2 is not valid JSON"),
        ("t.jsonl", '{"id": 1, "text": "a"}\n[1]\n', "t.jsonl row 2: a JSON object was expected, not a list"),
        ("t.jsonl", '{"id": 1, "text": "a"}\n{"id": [2]}\n', "t.jsonl row 2: 'id' is a list"),
        ("t.jsonl", '{"id": 1.5, "text": "a"}\n', "t.jsonl row 1: 'id' is a float"),
    ],
)
def test_malformed_rows_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        tables.column_names(path)
        read_all(path, ["id", "text"])


def test_json_rows_may_lack_keys_and_mix_integers_with_strings(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": 1, "text": "a"}\n\n{"id": "2"}\n{"text": null, "id": 3}\n')
    assert read_all(path, ["id", "text"]) == [["1", "a"], ["2", None], ["3", None]]


def test_files_of_a_path(tmp_path):
    for name in ("b.csv", "a.csv", "notes.md"):
        (tmp_path / name).write_text("x")
    both = [tmp_path / "a.csv", tmp_path / "b.csv"]
    assert tables.find_files(tmp_path, tables.SUFFIXES) == both
    assert tables.find_files(tmp_path / "*.csv", tables.SUFFIXES) == both
    assert tables.find_files(tmp_path / "b.csv", tables.SUFFIXES) == both[1:]
    with pytest.raises(DataError, match=r"nothing.csv: no such file"):
        tables.find_files(tmp_path / "nothing.csv", tables.SUFFIXES)
    with pytest.raises(DataError, match=r"notes.md: unknown kind of file; known are .parquet"):
        tables.find_files(tmp_path / "notes.md", tables.SUFFIXES)
    (tmp_path / "c.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"both .jsonl and .csv files"):
        tables.find_files(tmp_path, tables.SUFFIXES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no .parquet, .jsonl, .csv, .tsv file in this folder"):
        tables.find_files(tmp_path / "empty", tables.SUFFIXES)
