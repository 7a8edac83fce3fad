"""The pin store: what was put in comes out, bad pins take part in nothing, damage is named."""

import json
import pickle

import numpy as np
import pytest
from data_samples import noise, picture

from pinclip.data.store import Links, Pin, PinStore, links_from_boards, write_store
from pinclip.errors import DataError

INFO = {"name": "test", "source": "here", "synthetic": False}


def no_links(ids):
    return Links(np.zeros(0, np.int64), np.zeros(0, np.int64), [], [])


def four_pins():
    return [
        Pin("a", "first", picture("red"), "row 1"),
        Pin("b", "", picture("blue"), "row 2"),
        Pin("c", "only text", None, "row 3"),
        Pin("d", "broken", b"no picture", "row 4"),
    ]


@pytest.fixture
def store(tmp_path):
    boards = {"x": ("The X", ["a", "b", "d"]), "y": ("The Y", ["b", "c"]), "z": ("The Z", ["d"])}
    return write_store(
        tmp_path / "store", four_pins(), lambda ids: links_from_boards(boards, ids), info=INFO, max_bad=0.5
    )


def test_what_was_put_in_comes_out(store):
    assert store.ids == ["a", "b", "c", "d"]
    assert store.texts == ["first", "", "only text", "broken"]
    assert store.has_image.tolist() == [True, True, False, False]
    assert store.has_text.tolist() == [True, False, True, True]
    assert store.image_bytes(0) == picture("red")
    assert store.image_bytes(1) == picture("blue")
    assert store.image_bytes(2) == b""
    assert store.image(1).getpixel((0, 0)) == (0, 0, 255)
    assert (store.board_ids, store.board_titles) == (["x", "y", "z"], ["The X", "The Y", "The Z"])
    assert (store.name, store.synthetic, len(store)) == ("test", False, 4)


def test_bad_pins_keep_their_place_but_have_no_image_and_no_edge(store):
    assert store.bad.tolist() == [False, False, False, True]
    assert store.image_bytes(3) == b""
    assert store.graph.pins_of(0).tolist() == [0, 1]
    assert store.graph.boards_of(3).tolist() == []
    (line,) = (store.root / "bad_pins.jsonl").read_text().splitlines()
    assert json.loads(line) == {"pin": "d", "reason": "not an image in a known format", "place": "row 4"}


def test_counts(store):
    expected = {"pins": 4, "boards": 3, "edges": 4, "images": 2, "texts": 3, "bad": 1, "edges_of_bad_pins": 2}
    assert {key: store.info[key] for key in expected} == expected


def test_a_board_with_one_pin_is_kept_and_counted(tmp_path):
    boards = {"lonely": ("Lonely", ["a"]), "pair": ("Pair", ["a", "b"])}
    store = write_store(
        tmp_path / "s", four_pins()[:2], lambda ids: links_from_boards(boards, ids), info=INFO
    )
    assert store.info["single_pin_boards"] == 1
    assert store.graph.pins_of(0).tolist() == [0]


def test_order_is_kept_through_the_threads(tmp_path):
    pins = [Pin(str(number), "", noise(number, 8 + number % 50), "") for number in range(200)]
    store = write_store(tmp_path / "s", pins, no_links, info=INFO, progress=False)
    assert store.ids == [str(number) for number in range(200)]
    assert all(store.image_bytes(number) == pins[number].image for number in range(200))


def test_a_store_of_texts_alone(tmp_path):
    store = write_store(tmp_path / "s", [Pin("a", "text", None, "")], no_links, info=INFO)
    assert store.image_bytes(0) == b""
    assert store.graph.num_boards == 0


def test_pickle_opens_it_anew(store):
    copy = pickle.loads(pickle.dumps(store))
    assert copy.ids == store.ids
    assert copy.image_bytes(1) == store.image_bytes(1)


def test_an_image_that_is_not_there_is_named(store):
    with pytest.raises(DataError, match="pin 'c': the image has no bytes"):
        store.image(2)


def test_a_duplicate_id_names_both_places(tmp_path):
    pins = [Pin("a", "x", None, "pins.csv row 1"), Pin("a", "y", None, "more.csv row 7")]
    with pytest.raises(DataError, match=r"duplicate pin id 'a': pins.csv row 1 and more.csv row 7"):
        write_store(tmp_path / "s", pins, no_links, info=INFO)
    assert list(tmp_path.iterdir()) == []


def test_too_many_bad_pins_stop_with_count_and_first_offenders(tmp_path):
    pins = [Pin(str(number), "ok", None, "") for number in range(15)]
    pins += [Pin(f"bad{number}", "", None, "") for number in range(5)]
    with pytest.raises(DataError) as caught:
        write_store(tmp_path / "s", pins, no_links, info=INFO, max_bad=0.2)
    assert str(caught.value) == (
        "here: 5 of 20 pins are bad, more than the bound of 20% ('bad0': neither image nor text; "
        "'bad1': neither image nor text; 'bad2': neither image nor text; ...)"
    )
    assert list(tmp_path.iterdir()) == []
    assert write_store(tmp_path / "s", pins, no_links, info=INFO, max_bad=0.25).info["bad"] == 5


def test_no_pins_is_an_error(tmp_path):
    with pytest.raises(DataError, match="here: no pins"):
        write_store(tmp_path / "s", [], no_links, info=INFO)


def test_a_store_is_replaced_but_another_folder_is_not(tmp_path, store):
    again = write_store(store.root, four_pins()[:1], no_links, info=INFO)
    assert again.ids == ["a"]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "dear.jpg").write_bytes(b"...")
    with pytest.raises(DataError, match="not empty and is no pin store"):
        write_store(photos, four_pins()[:1], no_links, info=INFO)
    assert (photos / "dear.jpg").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "dataset.json").unlink(), "not a pin store"),
        (lambda root: (root / "dataset.json").write_text("{"), "dataset.json: not valid JSON"),
        (lambda root: (root / "dataset.json").write_text('{"format": 9}'), "format 9 is not the format 1"),
        (lambda root: (root / "images.bin").write_bytes(b"short"), "images.bin: 5 bytes where"),
        (lambda root: (root / "images.bin").unlink(), "images.bin: cannot be read"),
        (lambda root: (root / "pins.parquet").write_bytes(b"PAR1"), "pins.parquet: cannot be read"),
        (lambda root: (root / "pins.parquet").unlink(), "pins.parquet: cannot be read"),
    ],
)
def test_a_damaged_store_is_named(store, damage, message):
    damage(store.root)
    with pytest.raises(DataError, match=message):
        PinStore.open(store.root)
