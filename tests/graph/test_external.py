"""Arrays on disk, sorted runs and their merge, against NumPy and sorted()."""

import threading
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinclip.graph import external
from pinclip.graph.external import DiskArray, DiskTexts, Runs, factorize, number, ordered_map

WORDS = st.text("ab\x00é\U0001f600", max_size=4)


def text(values):
    return pa.array(values, pa.large_string())


@given(st.lists(st.lists(st.integers(-(2**40), 2**40), max_size=9), max_size=6), st.data())
def test_a_disk_array_is_an_array(tmp_path_factory, parts, data):
    path = tmp_path_factory.mktemp("disk") / "array.npy"
    array = DiskArray(path, np.int64)
    for part in parts:
        array.append(np.array(part, np.int64))
    want = np.array([value for part in parts for value in part], np.int64)
    if len(want):
        start = data.draw(st.integers(0, len(want)))
        array.put(start, want[start:][::-1])
        want[start:] = want[start:][::-1].copy()
    a, b = (data.draw(st.none() | st.integers(-12, 60)) for _ in range(2))
    np.testing.assert_array_equal(array[a:b], want[a:b])
    assert len(array) == len(want)
    array.finish().close()
    loaded = np.load(path)
    np.testing.assert_array_equal(loaded, want)
    assert loaded.dtype == np.int64


@given(st.lists(st.lists(WORDS, max_size=5), max_size=5), st.data())
def test_disk_texts_are_texts(tmp_path_factory, parts, data):
    texts = DiskTexts(tmp_path_factory.mktemp("disk") / "texts")
    for part in parts:
        texts.append(text(["before", *part, "after"]).slice(1, len(part)))
    want = [word for part in parts for word in part]
    a, b = (data.draw(st.none() | st.integers(-9, 30)) for _ in range(2))
    found = texts[a:b]
    found.validate(full=True)
    assert found.to_pylist() == want[a:b]
    assert len(texts) == len(want)


@given(st.lists(st.integers(0, 2**64 - 1)) | st.lists(WORDS))
def test_factorize(values):
    strings = bool(values) and isinstance(values[0], str)
    distinct, codes = factorize(text(values) if strings else np.array(values, np.uint64))
    assert distinct.tolist() == sorted(set(values))  # Python's order of str is that of the UTF-8 bytes
    assert [distinct[int(code)] for code in codes] == list(distinct.take(codes))
    assert [distinct.tolist()[code] for code in codes] == values


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=30), min_size=1, max_size=6)
    | st.lists(st.lists(WORDS, min_size=1, max_size=30), min_size=1, max_size=6),
    st.integers(1, 60),
    st.sampled_from([1, 3, 1024]),
)
def test_runs_are_cut_into_ranges_and_numbered(tmp_path_factory, monkeypatch, lists, rows, samples):
    monkeypatch.setattr(external, "_SAMPLES", samples)
    folder = tmp_path_factory.mktemp("runs")
    runs = Runs(folder / "runs")
    sorted_runs = [sorted(set(values)) for values in lists]
    for run in sorted_runs:
        runs.append(text(run) if isinstance(run[0], str) else np.array(run))
    last, count, steps = None, 0, sum(max(len(run) // samples, 1) for run in sorted_runs)
    for slices in runs.ranges(rows):
        values = sorted(runs.read(slices).tolist())
        assert len(values) <= max(rows, 2 * steps)
        assert last is None or last < values[0]  # no value is in two ranges
        last = values[-1]
        count += len(values)
    assert count == len(runs) == sum(map(len, sorted_runs))
    ids, ranks = runs.disk_like(folder / "ids"), DiskArray(folder / "ranks", np.int32)
    want = sorted({value for run in sorted_runs for value in run})
    done = []
    assert number(runs, ids, ranks, rows, 2, done.append) == len(want)
    assert ids[:].tolist() == want
    assert sum(done) == count
    for place, run in enumerate(sorted_runs):
        assert [want[rank] for rank in ranks[runs.span(place)]] == run


def test_ranges_are_parted_where_they_are_told(tmp_path):
    runs = Runs(tmp_path / "runs")
    for start in range(4):
        runs.append(np.arange(start, 400, 4))
    for slices in runs.ranges(7, align=lambda value: value // 10 * 10):
        values = np.sort(runs.read(slices))
        assert values[0] % 10 == 0
        assert values[-1] % 10 == 9


def test_ordered_map_keeps_the_order_and_few_items_at_a_time():
    taken, lock = [], threading.Lock()

    def items():
        for item in range(40):
            with lock:
                taken.append(item)
            yield item

    def slow(item):
        time.sleep(0.002 * (item % 3))
        return item

    for at, result in enumerate(ordered_map(slow, items(), 3)):
        assert result == at
        assert len(taken) <= at + 5


def test_ordered_map_raises_what_a_thread_raised():
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(lambda item: 1 // item, [2, 1, 0, 1, 2], 2))
