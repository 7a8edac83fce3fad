"""The clip art: licences, names, themes, copies and boards, on a library of a few drawings."""

import numpy as np
import pytest
from data_samples import picture
from PIL import Image

from pinclip.data import openclipart
from pinclip.data.openclipart import Drawing, file_words, make_boards, name_drawings, read_metadata, thin
from pinclip.errors import DataError

SVG = """<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{tags}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator>
{license}</cc:Work></rdf:RDF></metadata></svg>"""
PUBLIC = '<cc:license rdf:resource="http://web.resource.org/cc/PublicDomain"/>'


def svg(title="A frog", description="", tags=(), author="Ann Artist", license=PUBLIC):
    items = "".join(f"<rdf:li>{tag}</rdf:li>" for tag in tags)
    text = SVG.format(title=title, description=description, tags=items, author=author, license=license)
    return text.encode()


def drawing(path, title="", description="", author="", tags=(), directories=None):
    directories = [path.rpartition("/")[0]] if directories is None else directories
    return Drawing(path, title, description, author, list(tags), directories)


def test_metadata():
    found = read_metadata(
        svg("A  frog ", "Green.", ["Frog", "hash", "", "frog", "pond life"]), "animals/frog"
    )
    assert (found.title, found.description, found.author) == ("A frog", "Green.", "Ann Artist")
    assert found.tags == ["frog", "pond life"]
    assert found.id == "animals__frog"


@pytest.mark.parametrize(
    "license",
    [
        "",
        '<cc:license rdf:resource=""/>',
        '<cc:license rdf:resource="http://creativecommons.org/licenses/GPL/2.0/"/>',
        PUBLIC + '<cc:license rdf:resource="http://creativecommons.org/licenses/by/3.0/"/>',
    ],
)
def test_what_is_not_dedicated_to_the_public_domain_is_left_out(license):
    assert read_metadata(svg(license=license), "x") is None


@pytest.mark.parametrize("data", [b"<svg>", b"<svg/>", b"\xff\xfe"])
def test_files_without_metadata_are_left_out(data):
    assert read_metadata(data, "x") is None


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Clipart by Nicu Buculei - red_jigsaw", "red jigsaw"),
        ("Flat Icons (Wed Aug 25 23:31:03 2004)", "Flat Icons"),
        ("Trumpet (B and W)", "Trumpet (B and W)"),
    ],
)
def test_titles_are_cleaned(title, expected):
    assert read_metadata(svg(title), "x").title == expected


@pytest.mark.parametrize(
    ("path", "author", "words"),
    [
        ("a/emperor_penguin_ralf_ste_01", "Ralf Steinmetz", "emperor penguin"),
        ("a/gnome-mime-x-svg", "Andy", "gnome mime x svg"),
        ("a/ann", "Ann Artist", "ann"),  # the name is all there is
        ("a/home12", "", "home"),
    ],
)
def test_words_of_file_names(path, author, words):
    assert file_words(path, author) == words


def test_a_title_of_many_is_a_theme_and_no_text():
    icons = [drawing(f"icons/thing_{letter}", "Lemon theme", "same") for letter in "abcd"]
    other = [drawing("animals/f", "Frog", "Frog. "), drawing("animals/g", "", "A toad...")]
    name_drawings([*icons, *other])
    assert [item.text for item in icons] == [f"thing {letter}" for letter in "abcd"]
    assert {item.theme for item in icons} == {"Lemon theme"}
    assert [item.text for item in other] == ["Frog. Frog", "g. A toad"]
    assert [item.theme for item in other] == [None, None]


def test_series_are_thinned(monkeypatch):
    monkeypatch.setattr(openclipart, "PINS_PER_THEME", 5)
    items = [drawing(f"x/{number}") for number in range(20)]
    for number, item in enumerate(items):
        item.text = "Star" if number % 2 else "star"
    assert thin(items) == items[:3]
    for number, item in enumerate(items):
        item.text, item.theme = str(number), "theme" if number < 10 else None
    assert thin(items) == items[:5] + items[10:]


def test_boards():
    items = [
        drawing("animals/frog", author="Ann", tags=["green"], directories=["animals", "food"]),
        drawing("animals/toad", author="Ann", tags=["green"]),
        drawing("food/pea", author="Ann", tags=["green", "small"]),
    ]
    items[0].theme = items[1].theme = "Lemon"
    assert make_boards(items, sizes=(2, 2)) == {
        "by:Ann|animals": ("Ann animals", ["animals__frog", "animals__toad"]),
        "dir:animals": ("animals", ["animals__frog", "animals__toad"]),
        "dir:food": ("food", ["animals__frog", "food__pea"]),
        "set:lemon": ("Lemon", ["animals__frog", "animals__toad"]),
    }


def test_build_from_unpacked_packages(tmp_path):
    root = tmp_path / "openclipart"
    names = ["copy", "ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kite", "lynx"]
    names += ["mole", "newt", "owl", "pig", "rat", "seal", "toad"]
    for name in ["frog", "white", *names]:
        path = "pond/copies" if name == "copy" else "pond"
        color = {"white": "white", "frog": "red", "copy": "red"}.get(
            name, (0, 0, 10 * len(names) - ord(name[0]))
        )
        for kind in ("svg", "png"):
            (root / kind / path).mkdir(parents=True, exist_ok=True)
        (root / "svg" / path / f"{name}.svg").write_bytes(svg(name, tags=["animal"]))
        (root / "png" / path / f"{name}.png").write_bytes(picture(color, (30, 10)))
    (root / "svg" / "pond" / "lonely.svg").write_bytes(svg("no picture"))
    store = openclipart.build_from(root, tmp_path / "store", "here", progress=False)
    assert store.ids == ["pond__ant", "pond__bee", "pond__cat", "pond__copies__copy"] + [
        f"pond__{name}" for name in names[4:]
    ]
    assert store.texts == ["ant", "bee", "cat", "copy", *names[4:]]
    assert (store.info["unusable_pictures"], store.info["bad"]) == (1, 0)  # the blank one
    assert store.board_ids == ["by:Ann Artist|pond", "dir:pond", "kw:animal"]
    assert store.graph.pins_of(1).tolist() == list(range(20))  # the copy too, as its twin is filed in pond
    assert "public domain" in store.info["license"]


def test_pictures_are_trimmed_and_fitted_into_a_white_square(tmp_path):
    image = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    image.paste("blue", (50, 40, 250, 140))
    image.save(tmp_path / "x.png")
    pixels = np.asarray(openclipart.decode(openclipart._shrink(tmp_path / "x.png")), int)
    assert pixels.shape == (128, 128, 3)
    blue = (pixels[..., 2] > 200) & (pixels[..., 0] < 60)
    rows, columns = np.flatnonzero(blue.any(1)), np.flatnonzero(blue.any(0))
    assert (columns[0], columns[-1]) == (0, 127)
    assert abs(rows[0] - 32) <= 1
    assert abs(rows[-1] - 95) <= 1


def test_no_drawings(tmp_path):
    with pytest.raises(DataError, match="no svg with public-domain metadata"):
        openclipart.build_from(tmp_path, tmp_path / "store", "here")
