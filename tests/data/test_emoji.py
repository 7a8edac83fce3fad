"""The emoji: which are taken, their texts and boards, and how a glyph the font lacks is noticed."""

from pathlib import Path

import matplotlib
import pytest
from PIL import features

from pinclip.data import apt, emoji
from pinclip.data.images import decode

EMOJI_TEST = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600          ; fully-qualified     # 😀 E1.0 grinning face
1F603          ; fully-qualified     # 😃 E0.6 grinning face with big eyes
1F600 200D 1F603 ; fully-qualified     # 😀‍😃 E99.0 two faces
263A FE0F      ; fully-qualified     # ☺️ E0.6 smiling face
263A           ; unqualified         # ☺ E0.6 smiling face
# subgroup: hand-fingers-closed
1F44D          ; fully-qualified     # 👍 E0.6 thumbs up
1F44D 1F3FB    ; fully-qualified     # 👍🏻 E1.0 thumbs up: light skin tone
1F3FB          ; component           # 🏻 E1.0 light skin tone
# subgroup: country-flag
1F1E6 1F1E8    ; fully-qualified     # 🇦🇨 E2.0 flag: Ascension Island
"""
ANNOTATIONS = """<?xml version="1.0" encoding="UTF-8" ?>
<ldml><annotations>
 <annotation cp="😀">face | grin | Happy</annotation>
 <annotation cp="😀" type="tts">grinning face</annotation>
 <annotation cp="☺">face | happy</annotation>
 <annotation cp="☺" type="tts">smiling face, CLDR</annotation>
 <annotation cp="👍">face | thumb</annotation>
</annotations></ldml>
"""
DERIVED = """<ldml><annotations>
 <annotation cp="🇦🇨">flag</annotation>
 <annotation cp="🇦🇨" type="tts">flag: Ascension Island</annotation>
</annotations></ldml>
"""
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
needs_raqm = pytest.mark.skipif(not features.check("raqm"), reason="Pillow without Raqm (FriBiDi)")


@pytest.fixture
def annotations(tmp_path):
    (tmp_path / "en.xml").write_text(ANNOTATIONS)
    (tmp_path / "derived.xml").write_text(DERIVED)
    return emoji.read_annotations([tmp_path / "en.xml", tmp_path / "derived.xml"])


def test_fully_qualified_emoji_without_skin_tones():
    items = emoji.parse_emoji_test(EMOJI_TEST)
    assert [(item.id, item.name, item.subgroup) for item in items] == [
        ("1f600", "grinning face", "face-smiling"),
        ("1f603", "grinning face with big eyes", "face-smiling"),
        ("1f600-200d-1f603", "two faces", "face-smiling"),
        ("263a-fe0f", "smiling face", "face-smiling"),
        ("1f44d", "thumbs up", "hand-fingers-closed"),
        ("1f1e6-1f1e8", "flag: Ascension Island", "country-flag"),
    ]


def test_annotations(annotations):
    names, keywords = annotations
    assert names["☺"] == "smiling face, CLDR"
    assert keywords["😀"] == ["face", "grin", "happy"]
    assert keywords["🇦🇨"] == ["flag"]


def test_boards_are_subgroups_and_keywords_of_the_right_size(annotations):
    boards = emoji.make_boards(emoji.parse_emoji_test(EMOJI_TEST), annotations[1], sizes=(2, 4))
    assert boards == {
        "subgroup:face-smiling": ("face-smiling", ["1f600", "1f603", "1f600-200d-1f603", "263a-fe0f"]),
        "keyword:face": ("face", ["1f600", "263a-fe0f", "1f44d"]),
        "keyword:happy": ("happy", ["1f600", "263a-fe0f"]),
    }


@needs_raqm
def test_glyphs_that_are_missing_are_noticed():
    """DejaVu has the face; it draws joined faces side by side, and nothing for a joiner alone."""
    face, blank, several, partial = emoji.draw(FONT, ["😀", " ", "😀\u200d😃", "😀\u200d"])
    assert decode(face).size == (136, 136)
    assert decode(face).getextrema()[0] == (0, 255)
    assert (blank, several, partial) == (None, None, None)


@needs_raqm
def test_the_child_draws_the_same_in_order():
    sequences = [chr(code) for code in range(0x1F600, 0x1F600 + 70)]  # more than one chunk
    assert emoji.draw_in_child(FONT, sequences) == emoji.draw(FONT, sequences)


@needs_raqm
def test_build(tmp_path, monkeypatch):
    def fetch(packages, into):
        assert list(packages) == list(emoji.PACKAGES)
        for name, text in {
            "emoji/emoji-test.txt": EMOJI_TEST,
            "annotations/en.xml": ANNOTATIONS,
            "annotationsDerived/en.xml": DERIVED,
        }.items():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).write_text(text)
        (into / "NotoColorEmoji.ttf").write_bytes(FONT.read_bytes())
        return dict.fromkeys(packages, "1.0")

    monkeypatch.setattr(apt, "fetch", fetch)
    store = emoji.build(tmp_path / "store", progress=False)
    assert dict(zip(store.ids, store.texts)) == {
        "1f600": "grinning face",
        "1f603": "grinning face with big eyes",  # not in CLDR: the name of emoji-test.txt
        "263a-fe0f": "smiling face, CLDR",
        "1f44d": "thumbs up",
        "1f1e6-1f1e8": "flag: Ascension Island",
    }
    assert store.info["not_drawn"] == 1  # the two faces
    assert store.board_ids == ["subgroup:face-smiling", "keyword:face"]
    assert store.graph.pins_of(0).tolist() == [0, 1, 2]
    assert not store.synthetic
    assert "unicode-data 1.0" in store.info["source"]
    assert "Open Font License" in store.info["license"]
