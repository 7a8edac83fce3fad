"""The count-min sketch: never too low, its bound, and merging and resuming."""

import numpy as np
import pytest

from pinclip.graph.frequency import CountMinSketch


def stream(seed=0, count=20_000):
    """Ids of a wide space, with popular ones among them."""
    rng = np.random.default_rng(seed)
    return (rng.zipf(1.3, count).clip(max=2**40) * 0x9E3779B97F4A7) % 2**62


def test_estimates_are_never_too_low_and_seldom_too_high():
    ids, sketch = stream(), CountMinSketch(1024, depth=4)
    for part in np.array_split(ids, 7):
        sketch.add(part)
    every, counts = np.unique(ids, return_counts=True)
    estimates = sketch.estimate(every)
    assert (estimates >= counts).all()
    assert sketch.total == len(ids)
    # The docstring's bound: above n + 4 N / width with probability at most 2^-4 for each id.
    assert (estimates > counts + 4 * len(ids) / 1024).mean() < 2**-4
    popular = counts > 500
    np.testing.assert_allclose(estimates[popular], counts[popular], rtol=0.15)


def test_the_bound_of_a_hostile_stream():
    """Ids that are consecutive, or multiples of the width, do not all fall into one counter."""
    for ids in (np.arange(100_000), np.arange(100_000) * 1024, np.arange(100_000) << 30):
        sketch = CountMinSketch(1024, depth=4, seed=3)
        sketch.add(ids)
        assert (sketch.estimate(ids) > 1 + 4 * 100_000 / 1024).mean() < 2**-4


def test_log_q_is_the_share_of_the_stream():
    sketch = CountMinSketch(2**16)
    sketch.add(np.array([5, 5, 5, -7, 2**62, -1]))  # -1 is an empty slot
    log_q = sketch.log_q(np.array([5, -7, 2**62, 8]))
    assert log_q.dtype == np.float32
    np.testing.assert_allclose(np.exp(log_q), [0.6, 0.2, 0.2, 0], rtol=1e-6)
    assert np.isneginf(CountMinSketch(4).log_q(np.array([1]))).all()


def test_ranks_merge_and_a_run_resumes():
    ids = stream()
    whole, left, right = (CountMinSketch(256, 3, seed=9) for _ in range(3))
    whole.add(ids)
    left.add(ids[:5000])
    state = left.state_dict()
    left.add(ids[:10])  # the state is a copy
    left.load_state_dict(state)
    right.add(ids[5000:])
    left.merge(right)
    np.testing.assert_array_equal(left.counts, whole.counts)
    assert left.total == whole.total
    with pytest.raises(ValueError, match="differ in width, depth or seed"):
        left.merge(CountMinSketch(256, 3, seed=8))
    with pytest.raises(ValueError, match="want"):
        left.load_state_dict(CountMinSketch(512, 3).state_dict())


@pytest.mark.parametrize("options", [{"width": 100}, {"width": 1}, {"width": 4, "depth": 0}])
def test_refusals(options):
    with pytest.raises(ValueError, match=r"(width|depth) is"):
        CountMinSketch(**options)
