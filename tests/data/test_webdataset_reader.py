"""WebDataset shards: grouping, ids and texts as img2dataset writes them, and every damaged archive found."""

import json

import pytest
import webdataset
from data_samples import picture, sample, write_tar

from pinclip.data.webdataset_reader import read_shards
from pinclip.errors import DataError


def read(path, text_keys=None):
    return list(read_shards([path], text_keys))


@pytest.fixture
def shard(tmp_path):
    members = [*sample("000", text="first", id="one"), *sample("001", text="second"), *sample("002")]
    return write_tar(tmp_path / "s.tar", members)


def test_samples(shard):
    pins = read(shard)
    assert [(pin.id, pin.text, pin.image) for pin in pins] == [
        ("one", "first", picture("red")),
        ("001", "second", picture("red")),
        ("002", "", picture("red")),
    ]
    assert pins[1].place == f"{shard} key '001'"


def test_the_basename_up_to_the_first_dot_groups(tmp_path):
    members = [
        ("v1.0/a.b.jpg", b"other extension"),
        ("v1.0/a.JPG", b"image"),
        ("v1.0/b.png", b"b"),
        ("v1.0/a.txt", b"text"),  # not next to its image
        ("v1.0/a.cls", b"7"),
        ("v1.0/a.seg.png", b"mask"),
        ("README", b"no dot"),
        (".hidden.jpg", b"no stem"),
        ("c.npy", b"unknown extensions only"),
    ]
    pins = read(write_tar(tmp_path / "s.tar", members))
    assert [(pin.id, pin.text, pin.image) for pin in pins] == [
        ("v1.0/a", "text", b"image"),
        ("v1.0/b", "", b"b"),
    ]


def test_keys_are_those_of_the_webdataset_library(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"x/{number:03d}", "jpg": b"image", "txt": f"text {number}"})
    theirs = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False))
    pins = read(tmp_path / "s.tar")
    assert [(pin.id, pin.text, pin.image) for pin in pins] == [
        (item["__key__"], item["txt"].decode(), item["jpg"]) for item in theirs
    ]


@pytest.mark.parametrize(("value", "expected"), [(17, "17"), ("a b", "a b"), (None, "k"), ("", "k")])
def test_the_id_of_the_json_counts(tmp_path, value, expected):
    (pin,) = read(write_tar(tmp_path / "s.tar", sample("k", id=value, other=1)))
    assert pin.id == expected


def test_text_from_the_json(tmp_path):
    members = sample("k", text="caption", title=" Title ", description=None, year=1999)
    (pin,) = read(write_tar(tmp_path / "s.tar", members), ("title", "description", "missing", "year"))
    assert pin.text == "Title\n1999"


def test_text_that_is_not_utf8_makes_a_bad_pin(tmp_path):
    (pin,) = read(write_tar(tmp_path / "s.tar", [("k.txt", b"caf\xe9")]))
    assert pin.bad == "its text is not UTF-8 (byte 3)"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.json", b"{")], "s.tar: 'k.json' is not valid JSON"),
        ([("k.json", b'"\xff"')], "s.tar: 'k.json' is not valid JSON"),
        ([("k.json", b"[]")], "'k.json': a JSON object was expected, not a list"),
        (
            [("k.json", json.dumps({"id": 1.5}).encode())],
            "key 'k': the id 1.5 is neither a string nor an int",
        ),
        ([("k.json", json.dumps({"id": True}).encode())], "key 'k': the id True is neither"),
        ([("k.jpg", b"1"), ("k.jpg", b"2")], "two members 'k.jpg' and 'k.jpg', at bytes 0 and 1024"),
    ],
)
def test_bad_members(tmp_path, members, message):
    path = write_tar(tmp_path / "s.tar", members)
    with pytest.raises(DataError, match=message):
        read(path)


def test_an_archive_cut_anywhere_is_an_error(shard):
    data = shard.read_bytes()
    end = data.rstrip(b"\0")  # tarfile pads to 10,240 bytes; two blocks of zeros are enough
    needed = -(-len(end) // 512) * 512 + 1024
    shard.write_bytes(data[:needed])
    assert len(read(shard)) == 3
    for size in [0, 1, 511, 512, 513, 700, *range(1024, needed, 256), needed - 1]:
        shard.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"s.tar: (damaged or )?truncated tar archive"):
            read(shard)


@pytest.mark.parametrize("member", range(6))
def test_a_damaged_header_is_an_error(shard, member):
    data = bytearray(shard.read_bytes())
    starts = [start for start in range(0, len(data), 512) if data[start + 257 : start + 262] == b"ustar"]
    assert len(starts) == 6
    data[starts[member] + 100] ^= 0x40
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"s.tar: damaged"):
        read(shard)


def test_archives_that_were_concatenated_are_an_error(shard):
    shard.write_bytes(2 * shard.read_bytes())
    with pytest.raises(DataError, match="more data after its end mark at byte 6144"):
        read(shard)


def test_what_is_no_archive_is_an_error(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"not a tar " * 1000)
    with pytest.raises(DataError, match=r"s.tar: damaged or truncated tar archive"):
        read(tmp_path / "s.tar")
    with pytest.raises(DataError, match=r"t.tar: cannot be read \(No such file"):
        read(tmp_path / "t.tar")


def test_an_archive_of_nothing_has_no_pins(tmp_path):
    assert read(write_tar(tmp_path / "s.tar", [])) == []
