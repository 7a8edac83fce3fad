"""The synthetic set: a function of its seed, of the emoji's shape, and honest about what it is."""

import re
import time

import numpy as np
import pytest

from pinclip.data import synthetic
from pinclip.errors import DataError


def build(path, **options):
    return synthetic.build(path, progress=False, **options)


def test_a_function_of_pins_and_seed(tmp_path):
    first, same, other = (build(tmp_path / str(n), pins=60, seed=seed) for n, seed in enumerate((1, 1, 2)))
    assert first.ids == same.ids
    assert all(first.image_bytes(pin) == same.image_bytes(pin) for pin in range(60))
    assert np.array_equal(first.graph.board_pins, same.graph.board_pins)
    assert first.ids != other.ids


def test_two_hundred_pins_in_a_second(tmp_path):
    start = time.process_time()
    store = build(tmp_path / "s", pins=200)
    assert time.process_time() - start < 1.5
    assert len(store) == 200
    assert store.graph.num_boards > 40


def test_it_says_synthetic(tmp_path):
    store = build(tmp_path / "s", pins=30)
    assert store.synthetic
    assert store.name == "synthetic emoji-shaped"


def test_texts_and_boards_are_composed_of_what_is_drawn(tmp_path):
    store = build(tmp_path / "s", pins=1000)
    assert len(set(store.texts)) == 1000
    words = [f"(?:{'|'.join(names)})" for names in (synthetic.COUNTS, synthetic.PATTERNS, synthetic.COLORS)]
    shapes, grounds = "|".join(synthetic.SHAPES), "|".join(synthetic.BACKGROUNDS)
    pattern = re.compile(rf"{' '.join(words)} (?:{shapes})s? on (?:{grounds})")
    assert all(pattern.fullmatch(text) for text in store.texts)
    sizes = store.graph.board_sizes
    assert (sizes.min(), sizes.max() <= 150) == (3, True)
    board = store.board_titles.index("red on sky")
    for pin in store.graph.pins_of(board):
        assert " red " in store.texts[pin]
        assert store.texts[pin].endswith(" on sky")
        pixels = np.asarray(store.image(pin)).reshape(-1, 3).tolist()
        assert [207, 232, 253] in pixels
        assert [214, 39, 40] in pixels


def test_every_shape_and_pattern_is_drawn_apart(tmp_path):
    random = [np.random.default_rng(0) for _ in range(200)]
    drawn = {
        synthetic._draw(shape, "red", pattern, "white", "one", random.pop())
        for shape in synthetic.SHAPES
        for pattern in synthetic.PATTERNS
    }
    assert len(drawn) == len(synthetic.SHAPES) * len(synthetic.PATTERNS)


@pytest.mark.parametrize("pins", [2, synthetic.MOST_PINS + 1])
def test_too_few_or_too_many(tmp_path, pins):
    with pytest.raises(DataError, match=f"3 to {synthetic.MOST_PINS} pins, not {pins}"):
        build(tmp_path / "s", pins=pins)
