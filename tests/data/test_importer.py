"""Import: every kind of table, paths and bytes, shards; raw folders through the cache."""

import json
import multiprocessing
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import COLORS, picture, sample, write_tar
from PIL import ImageColor

from pinclip.data import importer
from pinclip.data.importer import Columns, import_pins, open_dataset
from pinclip.errors import DataError

WARM, COLD = [0, 3, 5], [1, 2, 4, 5]


def assert_is_raw(store):
    """The store holds the six pins and two boards of the fixture `raw`."""
    assert store.ids == [str(number) for number in range(6)]
    assert store.texts == [f"a {color} pin" for color in COLORS]
    for number, color in enumerate(COLORS):
        assert store.image(number).getpixel((0, 0)) == ImageColor.getrgb(color)
    assert store.board_ids == ["warm", "cold"]
    assert [store.graph.pins_of(board).tolist() for board in (0, 1)] == [WARM, COLD]
    assert not store.bad.any()


def pin_table(raw, image_type):
    rows = {"id": list(range(6)), "text": [f"a {color} pin" for color in COLORS]}
    paths = [f"pictures/{color}.png" for color in COLORS]
    data = [picture(color) for color in COLORS]
    if image_type == "path":
        rows["image"] = paths
    elif image_type == "struct":
        # As Hugging Face's datasets store images: bytes inside, or a path beside.
        rows["image"] = [{"bytes": None, "path": paths[0]}] + [{"bytes": d, "path": "x"} for d in data[1:]]
    else:
        rows["image"] = pa.array(data, image_type)
    return pa.table(rows)


def test_csv_with_paths(raw, tmp_path):
    assert_is_raw(import_pins(raw / "pins.csv", raw / "edges.tsv", tmp_path / "store"))


@pytest.mark.parametrize("image_type", ["path", "struct", pa.binary(), pa.large_binary()])
def test_parquet_with_integer_ids(raw, tmp_path, image_type):
    pq.write_table(pin_table(raw, image_type), raw / "pins.parquet")
    assert_is_raw(import_pins(raw / "pins.parquet", raw / "edges.tsv", tmp_path / "store"))


def test_jsonl(raw, tmp_path):
    rows = pin_table(raw, "path").to_pylist()
    (raw / "pins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_is_raw(import_pins(raw / "pins.jsonl", raw / "edges.tsv", tmp_path / "store"))


def test_a_folder_of_parts(raw, tmp_path):
    parts = raw / "parts"
    parts.mkdir()
    table = pin_table(raw, pa.binary())
    pq.write_table(table.slice(0, 4), parts / "part-0.parquet")
    pq.write_table(table.slice(4), parts / "part-1.parquet")
    assert_is_raw(import_pins(parts, raw / "edges.tsv", tmp_path / "store"))


@pytest.mark.parametrize("as_pattern", [False, True])
def test_shards(raw, tmp_path, as_pattern):
    shards = tmp_path / "shards"
    shards.mkdir()
    members = [sample(f"{n:04d}", color, f"a {color} pin", id=n) for n, color in enumerate(COLORS)]
    write_tar(shards / "0.tar", [member for one in members[:4] for member in one])
    write_tar(shards / "1.tar", [member for one in members[4:] for member in one])
    (shards / "0.parquet").write_bytes(b"img2dataset's own statistics")
    pins = shards / "*.tar" if as_pattern else shards
    assert_is_raw(import_pins(pins, raw / "edges.tsv", tmp_path / "store"))


def test_texts_of_several_columns(tmp_path):
    rows = {
        "sku": ["a", "b", "c"],
        "title": ["Chair ", None, "Lamp"],
        "price": pa.array([3, 4, None], pa.int64()),
        "brand": ["", "ACME", None],
    }
    pq.write_table(pa.table(rows), tmp_path / "p.parquet")
    columns = Columns(id="sku", texts=("title", "price", "brand"))
    store = import_pins(tmp_path / "p.parquet", None, tmp_path / "s", columns=columns)
    assert store.texts == ["Chair\n3", "4\nACME", "Lamp"]
    assert store.graph.num_boards == 0


def test_pins_without_image_or_without_text_are_good(tmp_path):
    (tmp_path / "red.png").write_bytes(picture("red"))
    (tmp_path / "p.csv").write_text("id,image,text\na,,only text\nb,red.png,\n")
    store = import_pins(tmp_path / "p.csv", None, tmp_path / "s")
    assert store.has_image.tolist() == [False, True]
    assert store.has_text.tolist() == [True, False]
    assert not store.bad.any()


def test_an_absolute_path_is_taken_as_it_is(tmp_path):
    (tmp_path / "red.png").write_bytes(picture("red"))
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "p.csv").write_text(f"id,image\na,{tmp_path / 'red.png'}\n")
    assert import_pins(tmp_path / "far" / "p.csv", None, tmp_path / "s").has_image.all()


def test_name_source_and_titles_are_kept(raw, tmp_path):
    (raw / "boards.csv").write_text("id,title\nwarm,Warm colours\n")
    store = import_pins(
        raw / "pins.csv", raw / "edges.tsv", tmp_path / "s", boards=raw / "boards.csv", synthetic=True
    )
    assert (store.name, store.synthetic, store.info["source"]) == ("pins", True, str(raw / "pins.csv"))
    assert store.board_titles == ["Warm colours", "cold"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pinclip"


def test_a_raw_folder_is_imported_once(raw, cache, monkeypatch):
    first = open_dataset(raw, progress=False)
    assert_is_raw(first)
    assert first.name == "raw"
    assert first.root.parent == cache
    monkeypatch.setattr(importer, "import_pins", lambda *_, **__: pytest.fail("imported again"))
    assert_is_raw(open_dataset(raw))
    assert_is_raw(open_dataset(first.root))


def test_a_changed_raw_folder_is_imported_anew(raw, cache):
    first = open_dataset(raw, progress=False)
    with open(raw / "edges.tsv", "a") as file:
        file.write("new\t0\n")
    second = open_dataset(raw, progress=False)
    assert second.root != first.root
    assert second.board_ids == ["warm", "cold", "new"]
    os.utime(raw / "pins.csv", ns=(0, 0))
    assert open_dataset(raw, progress=False).root not in (first.root, second.root)


def test_a_raw_folder_of_shards(raw, cache, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    members = [sample(f"{n:04d}", color, f"a {color} pin", id=n) for n, color in enumerate(COLORS)]
    write_tar(folder / "0.tar", [member for one in members for member in one])
    (folder / "edges.tsv").write_bytes((raw / "edges.tsv").read_bytes())
    (folder / "boards.jsonl").write_text('{"id": "cold", "title": "Cold colours"}\n')
    store = open_dataset(folder, progress=False)
    assert_is_raw(store)
    assert store.board_titles == ["warm", "Cold colours"]


def _open_in_process(path, queue):
    queue.put(str(open_dataset(path, progress=False).root))


def test_of_several_processes_one_imports_a_raw_folder(raw, cache, tmp_path, monkeypatch):
    real = importer.import_pins

    def slow(*arguments, **options):
        with open(tmp_path / "imports", "a") as log:
            log.write("one\n")
        time.sleep(0.3)
        return real(*arguments, **options)

    monkeypatch.setattr(importer, "import_pins", slow)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_open_in_process, args=(raw, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    roots = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(roots) == 1
    assert (tmp_path / "imports").read_text() == "one\n"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda raw: (raw / "edges.tsv").unlink(), r"no table edges"),
        (lambda raw: (raw / "pins.csv").unlink(), r"no shards \(\*.tar\) or table pins"),
        (lambda raw: (raw / "pins.jsonl").write_text("{}"), r"both pins.jsonl and pins.csv; keep one"),
    ],
)
def test_what_is_no_raw_folder(raw, cache, prepare, message):
    prepare(raw)
    with pytest.raises(DataError, match=message):
        open_dataset(raw)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_dataset(tmp_path / "nowhere")
