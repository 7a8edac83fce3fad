"""`pinclip data ...`: what is printed, and what happens on a machine without apt."""

import pytest

from pinclip.cli import main
from pinclip.data.store import PinStore


@pytest.fixture
def no_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_emoji_without_apt_are_synthetic_and_say_so(tmp_path, capsys, no_apt, monkeypatch):
    assert main(["data", "emoji", "--out", str(tmp_path / "s")]) == 0
    printed = capsys.readouterr()
    assert "cannot be had: apt-get is not on this machine" in printed.err
    assert "SYNTHETIC" in printed.err
    assert printed.out.startswith("synthetic emoji-shaped (SYNTHETIC")
    assert "1,870 pins" in printed.out
    store = PinStore.open(tmp_path / "s")
    assert store.synthetic
    assert len(store) == 1870


def test_openclipart_without_apt_is_an_error(tmp_path, capsys, no_apt):
    assert main(["data", "openclipart", "--out", str(tmp_path / "s")]) == 2
    assert "error: apt-get is not on this machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_somebodys_folder_is_refused_before_the_download(tmp_path, capsys, no_apt):
    (tmp_path / "photo").write_text("")
    for command in ("emoji", "openclipart"):
        assert main(["data", command, "--out", str(tmp_path)]) == 2
        assert "is no pin store" in capsys.readouterr().err


def test_import_and_info(raw, tmp_path, capsys):
    with open(raw / "edges.tsv", "a") as file:
        file.write("lonely\t1\nwarm\tunknown\n")
    (raw / "pictures" / "red.png").write_text("no picture")
    arguments = ["--pins", f"{raw}/pins.csv", "--edges", f"{raw}/edges.tsv", "--out", f"{tmp_path}/s"]
    more = ["--unknown-pins", "drop", "--max-bad", "0.5", "--name", "colours", "--text-columns", "text,id"]
    assert main(["data", "import", *arguments, *more]) == 0
    imported = capsys.readouterr().out
    assert main(["data", "info", str(tmp_path / "s")]) == 0
    assert capsys.readouterr().out == imported
    assert imported.splitlines() == [
        f"colours  {tmp_path}/s",
        "  6 pins: 5 with image, 6 with text",
        "  3 boards, 7 edges; 1 pins on no board",
        "  pins a board: 1 to 4, mean 2.3",
        f"  1 bad pins, listed in {tmp_path}/s/bad_pins.jsonl",
        "  1 boards of a single pin, which relate nothing",
        "  1 edges of bad pins left out",
        "  1 edges of unknown pins left out",
        f"  source: {raw}/pins.csv",
    ]
    assert PinStore.open(tmp_path / "s").texts[1] == "a green pin\n1"


def test_info_of_nothing(tmp_path, capsys):
    assert main(["data", "info", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/nowhere: no such folder\n"


def test_synthetic_with_seed(tmp_path, capsys):
    assert main(["data", "synthetic", "--out", str(tmp_path / "s"), "--pins", "40", "--seed", "3"]) == 0
    assert "SYNTHETIC" in capsys.readouterr().out
    assert PinStore.open(tmp_path / "s").info["source"] == "generated: 40 pins, seed 3"
