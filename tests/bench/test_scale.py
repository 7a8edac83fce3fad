"""The cost model: its formulas by hand, and its bytes against bytes that were really sent."""

import pytest

from bench import scale

JOB = scale.Job(local=1024, width=512, parameters=1e8)


def test_operations_bytes_and_memory_by_hand():
    b, n, d = 1024, 4096, 512
    assert scale.loss_flops("pinclip", 1, JOB) == 8 * b * b * d
    assert scale.loss_flops("pinclip", 4, JOB) == 8 * b * n * d
    assert scale.loss_flops("open_clip", 4, JOB) == 12 * n * n * d
    assert scale.loss_flops("open_clip local_loss", 4, JOB) == 12 * b * n * d
    # A gather, an exchange of gradients, two of statistics.
    assert scale.loss_bytes("pinclip", 4, JOB) == 3 * b * (2 * d * 4 + 2 * 8)
    assert scale.loss_bytes("open_clip", 4, JOB) == 3 * b * d * 4 * 2
    assert scale.loss_bytes("pinclip", 1, JOB) == 0
    assert scale.loss_memory("open_clip", 4, JOB) == 2 * n * d * 4 + 8 * n * n
    assert scale.loss_memory("pinclip", 4, JOB) == n * d * 4 + 4 * b * d * 4 + 8 * n


def test_a_step_is_its_parts_and_says_what_does_not_fit():
    gpu, links = scale.Gpu(images=2048.0, gemm=500.0), scale.Links()
    found = {row["schedule"]: row for row in scale.predictions(JOB, gpu, links, [1024])}
    for row in found.values():
        parts = row["towers_s"] + row["loss_s"] + row["exchange_s"] + row["all_reduce_shown_s"]
        assert row["step_s"] == pytest.approx(parts)
        assert row["towers_s"] == 0.5 and row["batch"] == 2**20
    assert found["pinclip"]["fits"] and not found["open_clip"]["fits"]
    # 12 N² D on every rank against 8 N² D / W.
    ratio = found["open_clip"]["loss_s"] / found["pinclip"]["loss_s"]
    assert ratio == pytest.approx(12 / 8 * 1024)
    assert found["pinclip"]["exchange_s"] < found["open_clip local_loss"]["exchange_s"]


@pytest.mark.parametrize("schedule,ranks", [("pinclip", 3), ("open_clip local_loss", 2)])
def test_the_bytes_are_those_that_are_sent(schedule, ranks):
    if schedule != "pinclip":
        pytest.importorskip("open_clip")
    counted, predicted = scale.check(ranks, scale.Job(1024, 256, 0.0), schedule)
    assert counted == pytest.approx(predicted, rel=0.1)
