"""The entries: formulas by hand, shapes that a run takes, and one file as all that an op needs."""

import pytest

from bench import registry
from bench.__main__ import chosen, main
from bench.registry import BOTH, FORWARD

GPU_OPS = (
    "contrastive",
    "sigmoid",
    "attention",
    "attention_pool",
    "fusion_pack",
    "gated_residual_norm",
    "l2_normalize",
)


def work(op, shape, mode):
    entry = registry.find(op)
    return entry.work(next(each for each in entry.shapes if each.name.startswith(shape)), mode)


def test_pair_losses_by_hand():
    n, d = 32768, 512
    softmax = work("contrastive", "32768x32768x512 s100", BOTH)
    assert softmax.flops == 8 * n * n * d == 4398046511104
    assert softmax.flops / 790e12 == pytest.approx(5.6e-3, rel=0.02)  # kernels' table: 5.6 ms
    assert work("contrastive", "32768x32768x512 s100", FORWARD).flops == 2 * n * n * d
    assert softmax.bytes == 2 * 2 * n * d * 2  # x and y in bf16, read, and their gradients
    assert work("sigmoid", "32768x32768x512 s100", BOTH).flops == 6 * n * n * d
    assert work("contrastive", "4096x32768x512", BOTH).flops == 8 * 4096 * n * d
    assert work("contrastive", "32768x32768x512 s100 matryoshka", BOTH).flops == 8 * n * n * (
        64 + 128 + 256 + 512
    )


@pytest.mark.parametrize(
    "shape,forward_us,backward_us",
    [
        ("B/16-224 B1024", 290, 579),
        ("B/16-256 B1024", 377, 752),
        ("So400m B512", 283, 564),
        ("H/14", 158, 314),
    ],
)
def test_attention_floors_by_hand(shape, forward_us, backward_us):
    """At 4.3 TB/s: 4 u forward, 8 u backward."""
    forward, both = work("attention", shape, FORWARD), work("attention", shape, BOTH)
    assert forward.bytes / 4.3e12 * 1e6 == pytest.approx(forward_us, rel=0.02)
    assert (both.bytes - forward.bytes) / 4.3e12 * 1e6 == pytest.approx(backward_us, rel=0.02)
    assert both.flops == 3.5 * forward.flops


def test_attention_counts_by_kind():
    b, h, n, dh = 1024, 12, 64, 64
    assert work("attention", "text B1024 H12 N64 D64", FORWARD).flops == 4 * b * h * n * n * dh
    assert work("attention", "text B1024 H12 N77 D64 causal", FORWARD).flops == 2 * b * h * 77 * 77 * dh
    packed = work("attention", "text B1024 H12 N64 D64 packed mean 20", FORWARD)
    tokens = packed.bytes / (4 * h * dh * 2)
    assert tokens / b == pytest.approx(20, rel=0.1)
    padded = work("attention", "text B1024 H12 N64 D64 padded", FORWARD)
    assert padded.flops == pytest.approx(4 * h * dh * n * tokens)


def test_memory_bound_ops_by_hand():
    rows, d = 131072, 1024
    norm = work("gated_residual_norm", "131072x1024 channel", FORWARD)
    assert norm.bytes == 4 * rows * d * 2
    assert norm.bytes / 4.3e12 * 1e6 == pytest.approx(250, rel=0.01)
    assert work("gated_residual_norm", "131072x1024 channel", BOTH).bytes == 10 * rows * d * 2
    assert work("l2_normalize", "131072x512", BOTH).bytes == 5 * rows * 512 * 2
    pool = work("attention_pool", "So400m B512 N256 D1152 P1", FORWARD)
    assert pool.bytes == 512 * 256 * 1152 * 2
    assert pool.flops == 4 * 512 * 256 * 1152 * 16 + 2 * 512 * 1152 * 1152


def test_a_train_step_by_hand():
    from bench.train_step import Model, flops, text_lengths

    model = Model(8, 4, (2, 1, 1, 3), (2, 1, 1, 3), 5, 3, 10, 2)
    lengths = text_lengths(model, 2).tolist()
    weights = 4 * 2 * 2 + 2 * 2 * 3  # qkv and out, and the MLP's two
    image = 6 * weights * 8 + 12 * 2 * 2 * 16 + 6 * 2 * 4 * 3 * 16 * 2  # 2 images of 4 tokens
    text = 6 * weights * sum(lengths) + 12 * 2 * sum(n * n for n in lengths)
    assert flops(model, 2) == image + text + 8 * 2 * 2 * 2


def test_every_op_has_gpu_shapes_quick_shapes_and_tiny_ones():
    for name in GPU_OPS:
        entry = registry.find(name)
        assert registry.select(entry, "cuda", quick=True)
        assert len(registry.select(entry, "cuda")) >= len(registry.select(entry, "cuda", quick=True))
        assert registry.select(entry, "cpu", tiny=True)
        assert [arm.name for arm in entry.arms if arm.role == "ours"]
        names = [shape.name for shape in entry.shapes]
        assert len(set(names)) == len(names)
    assert registry.broken() == {}


def test_the_rivals_of_the_pair_losses_and_attention_are_all_there():
    arms = {arm.name for arm in registry.find("contrastive").arms}
    assert {
        "open_clip",
        "open_clip compiled",
        "memeff",
        "inf-cl",
        "cut-cross-entropy",
        "liger",
        "quack",
    } <= arms
    arms = {arm.name for arm in registry.find("attention").arms}
    assert {"SDPA cuDNN", "SDPA flash", "SDPA efficient", "FlexAttention compiled", "xformers"} <= arms


def test_dense_rivals_do_not_fit_where_they_would_not():
    entry = registry.find("contrastive")
    eager = next(arm for arm in entry.arms if arm.name == "open_clip")
    shapes = {shape.name: shape for shape in entry.shapes}
    assert eager.memory(shapes["131072x131072x512 s100"], BOTH) > 70e9
    assert eager.memory(shapes["65536x65536x256 s14.3"], BOTH) == 4.1 * 65536**2 * 4


def test_a_file_of_one_entry_is_all_that_is_needed():
    import planted

    registry.add(planted)
    assert registry.find("planted") is planted.OP
    assert registry.home(planted.OP) == "planted"
    with pytest.raises(ValueError, match="is an entry of"):
        registry.add(type("Other", (), {"__name__": "other", "ENTRIES": (planted.OP,)}))


def test_an_unknown_name_is_refused_by_name(capsys):
    assert main(["run", "no_such_op", "--out", "unused.json"]) == 2
    assert "no_such_op" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no shape 'nothing'"):
        chosen(["contrastive=nothing"], "cpu", (), {})


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*GPU_OPS, "random_walk", "graph_build", "train_step", "memeff"))


def test_a_block_and_a_tower_by_hand():
    width, hidden, depth, n, b = 768, 3072, 12, 256, 256
    block = 6 * (4 * width * width + 2 * width * hidden) * b * n + 12 * width * b * n * n
    found = work("block", "ViT-B/16-256 image batch 256", "forward+backward")
    assert found.flops == block and found.items == b
    assert work("tower", "ViT-B/16-256 image batch 256", "forward+backward").flops == depth * block
