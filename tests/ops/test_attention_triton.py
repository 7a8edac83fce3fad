"""The attention kernels against fp64: in the interpreter (fp16), compiled, and on a GPU."""

from importlib import import_module
from itertools import pairwise
from unittest import mock

import pytest
import torch
from ops_helpers import assert_as_exact_as, assert_autocast, assert_same, assert_survives, normal, run
from rows_cases import assert_captured, assert_does_not_wait
from torch.library import opcheck
from torch.nn.attention import SDPBackend
from triton_cases import assert_within_budget, interpret

from pinclip.ops import _attention_dispatch as dispatch
from pinclip.ops.attention import QKNorm, _composed, _norm_and_rotate, attention, attention_plan
from pinclip.reference.attention import attention as reference

op = import_module("pinclip.ops.attention")  # the package has a function of that name

BACKENDS = op._backends

WIDTHS = [64, 72, 80, 88, 96, 128]
# Around tiles of 16, 64 and 128 rows; ViTs with and without CLS; the longest backward pass in one kernel, and
# one with a last token apart from its tiles.
TOKENS = [1, 16, 17, 63, 64, 65, 77, 128, 129, 196, 197, 256, 257, 258, 320]
# Empty segments first, inside and last; 64 rows that are one segment; two that share a tile with others.
SEGMENTS = torch.tensor([0, 0, 3, 10, 13, 13, 77, 100, 100, 101, 130, 130], dtype=torch.int32)


def tables(tokens, width):
    angle = torch.arange(tokens)[:, None] * 0.1 ** torch.linspace(0, 1, width // 2)
    return angle.cos(), angle.sin()


def lengths_of(*values, device="cpu"):
    return torch.tensor(values, device=device)


def plain(
    *tensors, cu_seqlens=None, max_seqlen=None, causal=False, key_lengths=None, qk_norm=None, rope=None
):
    """The same from torch's own attention, in the dtype of the tensors; on a GPU from another of its kernels
    than the table would choose."""
    q, k, v = tensors[0].unbind(-3) if len(tensors) == 1 else tensors
    q, k = _norm_and_rotate(q, k, cu_seqlens, qk_norm, rope)
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] if q.is_cuda else BACKENDS(0, False, 1)
    with mock.patch.object(op, "_backends", lambda *call: backends):
        return _composed((q, k, v), cu_seqlens, max_seqlen, key_lengths, causal, q.shape[-1] ** -0.5)


def compare(*tensors, weights=(), eps=1e-5, **options):
    """Kernels, plain torch and truth from the same inputs; weights: of the norm, which get gradients too."""

    def with_norm(function):
        if not weights:
            return lambda *t: function(*t, **options)
        return lambda *t: function(*t[:-2], qk_norm=QKNorm(*t[-2:], eps=eps), **options)

    assert_as_exact_as(*(with_norm(f) for f in (attention, plain, reference)), [*tensors, *weights])


def test_in_the_interpreter():
    interpret(__file__)


# In the interpreter ---------------------------------------------------------------------------------------


def use_kernels(monkeypatch, arch):
    """CPU tensors run the kernels with the launch table of `arch`; what is not written holds NaN."""
    from pinclip_kernels.triton import attention as launch

    ours = next(row for row in dispatch.TABLE if row.ours)
    monkeypatch.setattr(op, "_architecture", lambda *device: arch)
    monkeypatch.setattr(launch, "architecture", lambda device: arch)
    monkeypatch.setattr(op, "_choose", lambda *call: ours)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def kernels(monkeypatch):
    use_kernels(monkeypatch, 90)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[90, 80], ids=["sm_90", "sm_80"])
def both_tables(request, monkeypatch):
    use_kernels(monkeypatch, request.param)
    yield
    torch.use_deterministic_algorithms(False)


def half(*shape, **options):
    return normal(*shape, dtype=torch.float16, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def check_sizes(kernels, tokens, causal):
    compare(half(2 if tokens < 128 else 1, tokens, 3, 1, 64), causal=causal)


@pytest.mark.parametrize("tokens", [50, 77, 129, 256, 257])
@pytest.mark.parametrize("width", WIDTHS)
def check_head_dims(both_tables, width, tokens):
    compare(half(1, tokens, 3, 2 if tokens == 50 else 1, width), causal=tokens == 129)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width,tokens", [(64, 70), (64, 150), (88, 150)])
def check_key_lengths(kernels, width, tokens, causal):
    compare(half(4, tokens, 3, 1, width), key_lengths=lengths_of(0, 64, tokens, 65), causal=causal)


@pytest.mark.parametrize("tokens", [70, 140])  # both forms of the backward pass
def check_padding_does_not_leak(kernels, tokens):
    lengths = lengths_of(5, 0, 65)
    qkv = half(3, tokens, 3, 1, 72)
    padding = torch.arange(tokens) >= lengths[:, None]
    poisoned = qkv.clone()
    poisoned[:, :, 1:][padding] = torch.nan
    for causal in (False, True):
        call = lambda t, c=causal: attention(t, key_lengths=lengths, causal=c)  # noqa: E731
        (out,), (grad,) = results = run(call, [poisoned])
        assert_same(results, run(call, [qkv]))
        assert (grad[:, :, 1:][padding] == 0).all()
        assert (out[1] == 0).all() and (grad[1] == 0).all() and (out[[0, 2]] != 0).all()


@pytest.mark.parametrize("tokens", [70, 140])
def check_lengths_outside_of_the_tokens(kernels, tokens):
    """Stand for none and for all; nothing before or behind the gradients is written."""
    qkv = half(3, tokens, 3, 1, 64)
    wrong, right = lengths_of(-500, tokens + 500, 7), lengths_of(0, tokens, 7)
    call = lambda lengths: run(lambda t: attention(t, key_lengths=lengths), [qkv])  # noqa: E731
    assert_same(call(wrong), call(right))


def check_padding_does_not_leak_through_the_norm(kernels):
    lengths = lengths_of(0, 40)
    qkv, ones = half(2, 70, 3, 1, 72), torch.ones(72, dtype=torch.float16)
    poisoned = qkv.clone()
    poisoned[:, :, 1:][torch.arange(70) >= lengths[:, None]] = torch.nan
    options = {"key_lengths": lengths, "rope": tables(70, 72)}
    call = lambda t, a, b: attention(t, qk_norm=QKNorm(a, b), **options)  # noqa: E731
    assert_same(run(call, [poisoned, ones, ones]), run(call, [qkv, ones, ones]))


@pytest.mark.parametrize("causal", [False, True])
# Tiles of 64 and of 128 rows; a segment each, most of them much shorter than the longest may be.
@pytest.mark.parametrize("longest", [64, 100, 150, 300])
@pytest.mark.parametrize("width", [64, 88])
def check_varlen(both_tables, width, longest, causal):
    compare(half(130, 3, 1, width), cu_seqlens=SEGMENTS, max_seqlen=longest, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width,sizes", [(64, (140, 0, 150)), (88, (131, 250)), (64, (300, 257))])
def check_long_segments(kernels, width, sizes, causal):
    """The queries of one are two or three groups."""
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).int()
    compare(half(sum(sizes), 3, 1, width), cu_seqlens=cu_seqlens, max_seqlen=max(sizes), causal=causal)


@pytest.mark.parametrize("longest", [64, 150])
def check_varlen_is_padded_is_a_loop(kernels, longest):
    qkv, sizes = half(130, 3, 1, 64), SEGMENTS.diff()
    inside = torch.arange(64) < sizes[:, None]

    def padded(t):
        dense = t.new_zeros(len(sizes), 64, 3, 1, 64).masked_scatter(inside[:, :, None, None, None], t)
        return attention(dense, key_lengths=sizes)[inside]

    def loop(t):
        return torch.cat([attention(t[None, a:b])[0] for a, b in pairwise(SEGMENTS.tolist())])

    varlen = run(lambda t: attention(t, cu_seqlens=SEGMENTS, max_seqlen=longest), [qkv])
    for other in (padded, loop):
        assert_same(varlen, run(other, [qkv]), atol=4e-3)


def check_nan_stays_in_its_tile(kernels):
    """NaN in one segment stays in the tile that it shares: masked values are multiplied by zero."""
    qkv = half(130, 3, 1, 64)
    call = lambda t: attention(t, cu_seqlens=SEGMENTS, max_seqlen=64)  # noqa: E731
    (right,), (right_grad,) = run(call, [qkv])
    qkv[3:10] = torch.nan
    (out,), (grad,) = run(call, [qkv])
    assert out[3:10].isnan().all()
    assert torch.equal(out[13:], right[13:]) and torch.equal(grad[13:], right_grad[13:])


@pytest.mark.parametrize("queries,keys", [(1, 77), (64, 5), (130, 33), (16, 16)])
def check_cross_attention(kernels, queries, keys):
    tensors = half(3, queries, 2, 72), *half(2, 3, keys, 2, 72, seed=1)
    compare(*tensors)
    compare(*tensors, key_lengths=lengths_of(keys, 0, keys // 2))


@pytest.mark.parametrize("case", ["norm", "rope", "both"])
@pytest.mark.parametrize("width,tokens", [(64, 50), (72, 77), (128, 130)])
def check_norm_and_rope(kernels, width, tokens, case):
    weights = (half(width, seed=5), half(width, seed=6)) if case != "rope" else ()
    options = {"rope": tables(tokens, width)} if case != "norm" else {}
    compare(half(1, tokens, 3, 2, width), weights=weights, causal=width == 72, **options)


@pytest.mark.parametrize("tokens", [50, 140])
def check_norm_without_eps(kernels, tokens):
    """Rows of a tile that are no tokens have no length to be divided by."""
    compare(half(1, tokens, 3, 1, 64), weights=(half(64, seed=5), half(64, seed=6)), eps=0.0)


@pytest.mark.parametrize("longest", [64, 150])
def check_norm_and_rope_of_segments(kernels, longest):
    weights = half(64, seed=5), half(64, seed=6)
    options = {"cu_seqlens": SEGMENTS, "max_seqlen": longest, "rope": tables(longest, 64)}
    compare(half(130, 3, 2, 64), weights=weights, **options)


def check_norm_and_rope_of_separate_heads(kernels):
    weights = half(80, seed=5), half(80, seed=6)
    options = {"key_lengths": lengths_of(70, 0), "rope": tables(90, 80)}
    compare(half(2, 40, 2, 80), *half(2, 2, 70, 2, 80, seed=1), weights=weights, **options)


@pytest.mark.parametrize("tokens", [65, 192])
def check_logits_near_minus_120(both_tables, tokens):
    qkv = half(2, tokens, 3, 1, 64, scale=0.3)
    qkv[:, :, 0] += 120**0.5
    qkv[:, :, 1] -= 120**0.5 / 8
    q, k, _ = qkv.double().unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 8
    assert scores.max() < -100 and scores.min() > -140
    compare(qkv)
    compare(qkv, key_lengths=lengths_of(tokens, tokens - 1))


def check_empty(kernels):
    none = torch.zeros(1, dtype=torch.int32)
    for shape in ((0, 5, 3, 2, 64), (2, 0, 3, 2, 64)):
        (out,), (grad,) = run(attention, [half(*shape)])
        assert out.shape == (*shape[:2], 128) and grad.shape == shape
    for cu_seqlens in (none, none.repeat(4)):
        (out,), _ = run(lambda t, cu=cu_seqlens: attention(t, cu_seqlens=cu), [half(0, 3, 2, 64)])
        assert out.shape == (0, 128)
    for queries, keys in ((3, 0), (0, 3)):
        tensors = half(2, queries, 2, 64), *half(2, 2, keys, 2, 64)
        results, gradients = run(attention, tensors)
        assert all((t == 0).all() for t in (*results, *gradients))


def check_nan_propagates(kernels):
    qkv = half(1, 70, 3, 1, 64)
    qkv[0, 3, 1] = torch.nan  # a key, which every query sees
    (out,), (grad,) = run(attention, [qkv])
    assert out.isnan().all() and grad[:, :, 0].isnan().all()


CHOOSE = op._choose
OPTIONS = {
    "lengths": ((2, 70, 3, 1, 72), {"key_lengths": lengths_of(0, 66), "causal": True}),
    "varlen and rope": (
        (130, 3, 1, 64),
        {"cu_seqlens": SEGMENTS, "max_seqlen": 64, "rope": tables(64, 64)},
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def check_compile_checkpoint_strides_repeat(kernels, monkeypatch, case):
    """With the choice of the kernel inside what is compiled."""
    monkeypatch.setattr(op, "_choose", CHOOSE)
    shape, options = OPTIONS[case]
    assert_survives(lambda t: attention(t, **options), [half(*shape)])


def _planned(qkv, cu_seqlens, longest):
    plan = attention_plan(cu_seqlens, qkv.shape[0], longest)
    return attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=longest, plan=plan)


def _sizes(kind, n):
    """A call, and its arguments for a size."""
    if kind == "plan":
        bounds = torch.tensor([0, n, n + 1], dtype=torch.int32)
        return _planned, (half(n + 1, 3, 1, 64), bounds, n)
    q, k, v = half(3, 2, n, 1, 64).unbind()
    if kind == "separate":
        return lambda q, k, v: attention(q, k, v, causal=True), (q, k, v)
    return lambda q, k, v, *rope: attention(q, k, v, rope=rope), (q, k, v, *tables(60, 64))


@pytest.mark.parametrize("kind", ["plan", "separate", "rope"])
def check_sizes_share_a_graph(kernels, monkeypatch, kind):
    """torch.compile(fullgraph=True) of one function begins anew for a second size, but not for ten."""
    monkeypatch.setattr(op, "_choose", CHOOSE)
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    call, _ = _sizes(kind, 20)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for n in range(20, 30):
        arguments = _sizes(kind, n)[1]
        assert torch.equal(compiled(*arguments), call(*arguments))
    assert len(graphs) <= 3


def check_separate_heads_of_any_strides(kernels):
    packed = half(2, 70, 3, 2, 64)
    q, k, v = packed.unbind(2)
    expected = run(attention, [packed])[0][0]
    for tensors in (
        (q, k, v),
        (q, k.contiguous(), v),
        (q.transpose(1, 2).contiguous().transpose(1, 2), k, v),
    ):
        assert torch.equal(attention(*tensors), expected)
    shifted = half(2 * 70 * 3 * 2 * 64 + 1)[1:].view_as(packed).copy_(packed)  # no head on 16 bytes
    assert torch.equal(attention(shifted), expected)
    few = (attention(packed, key_lengths=each) for each in (lengths_of(40, 40), lengths_of(40).expand(2)))
    assert torch.equal(*few)


def check_opcheck(kernels):
    weights = normal(2, 64, dtype=torch.float32).unbind()
    norm = *weights, 1e-6, *tables(80, 64)
    for call, tensors, rest in (
        (op._attention, (half(2, 70, 3, 1, 64),), (*[None] * 4, lengths_of(3, 70), True, 0.3)),
        (
            op._attention,
            (half(130, 3, 1, 64),),
            (SEGMENTS, 64, *attention_plan(SEGMENTS, 130, 64)[:2], None, False, 0.3, *norm),
        ),
        (op._cross_attention, (half(2, 5, 1, 64), *half(2, 2, 70, 1, 64)), (None, False, 0.3, *norm)),
    ):
        opcheck(call, (*(t.requires_grad_() for t in tensors), *rest))
    for longest in (64, 100, 150):
        opcheck(op._attention_plan, (SEGMENTS, 130, longest))


def check_autocast(kernels):
    qkv = normal(1, 20, 3, 1, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(attention(qkv), attention(qkv.half()))


@pytest.mark.parametrize("segments,longest", [(1, 64), (31, 20), (32, 64), (33, 1), (100, 20), (100, 64)])
def check_plan(segments, longest):
    """Tiles of whole segments, none above 64 rows, none of which could take the next tile's first segment."""
    from pinclip_kernels.triton import _attention_plan as plan

    generator = torch.Generator().manual_seed(segments)
    sizes = torch.randint(0, longest + 1, (segments,), generator=generator, dtype=torch.int32)
    cu_seqlens = torch.cat((sizes.new_zeros(1), sizes.cumsum(0, dtype=torch.int32)))
    total = int(cu_seqlens[-1])
    bounds, starts = plan.plan(cu_seqlens, total, 64)
    assert len(bounds) <= segments + 1
    expected = [0]
    for first in range(0, segments, 32):
        ends = cu_seqlens[first + 1 : first + 33].tolist()
        while expected[-1] < ends[-1]:
            expected.append(max(end for end in ends if end <= expected[-1] + 64))
    assert bounds.tolist() == expected + [total] * (len(bounds) - len(expected))
    assert starts.tolist() == cu_seqlens[:-1].repeat_interleave(sizes).tolist()


@pytest.mark.parametrize("longest", [64, 100, 150])
def check_a_plan_changes_nothing(kernels, longest):
    qkv, options = half(130, 3, 1, 64), {"cu_seqlens": SEGMENTS, "rope": tables(longest, 64)}
    made = attention_plan(SEGMENTS, 130, longest)
    expected = run(lambda t: attention(t, **options, max_seqlen=longest), [qkv])
    for given in ({}, {"max_seqlen": longest}):
        assert_same(run(lambda t, g=given: attention(t, **options, plan=made, **g), [qkv]), expected)
    for tensor, wrong, message in (
        (qkv, {"cu_seqlens": SEGMENTS, "max_seqlen": longest + 1}, "max_seqlen"),
        (qkv[:129], {"cu_seqlens": SEGMENTS}, r"\[T\]"),
        (qkv[None], {}, "without cu_seqlens"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(tensor, **wrong, plan=made)


def check_nothing_is_planned_where_the_kernels_do_not_run(monkeypatch):
    monkeypatch.setattr(op, "_architecture", lambda *device: 120)
    assert attention_plan(SEGMENTS, 130, 64) is None


# Compiled for a GPU that is not there ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,arch",
    [
        ("attention_forward/64x64/tails/64/bf16/sm_90", 90),
        ("attention_backward/256x64/plain/64/bf16/sm_90", 90),
        ("attention_backward/64x64/norm/64/bf16/sm_90", 90),
        ("attention_backward_keys/32x32/packed/64/bf16/sm_80", 80),
    ],
)
def test_compiles_within_budget(name, arch):
    from pinclip_kernels.triton.attention import compile_cases

    (case,) = (each for each in compile_cases() if each.name == name)
    assert_within_budget(case, arch)


def test_heads_too_far_apart_for_int32_are_copied():
    from pinclip_kernels.triton.attention import _near

    inside = torch.empty(257, 4000, 3, 12, 64, device="meta").transpose(0, 1).select(2, 0)  # the batch inside
    assert not inside.is_contiguous() and _near(inside).is_contiguous()
    assert _near(inside[:, :100]).stride() == inside.stride()


@pytest.mark.parametrize("arch", [80, 90])
def test_the_plan_compiles(arch):
    from pinclip_kernels.triton import _attention_plan as plan

    for case in plan.compile_cases():
        assert_within_budget(case, arch)


def test_cases_cover_the_launch_table():
    from pinclip_kernels.triton import attention as launch

    cases = launch.compile_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert set(case.signature) == set(case.kernel.arg_names)
        assert {k for k, v in case.signature.items() if v == "constexpr"} == set(case.constexprs)
    listed = {row[:3] for row in launch._ROWS}
    for arch in (90, 80):
        for width in WIDTHS:
            for n in range(1, launch.LONGEST + 1):
                for norm in (False, launch.fuses_norm(arch)):
                    forward = launch.forward_config(n, width, norm, arch)
                    assert (launch.attention_forward, forward, arch) in listed
                    for plain, sparse in ((False, False), (True, False), (False, True)):
                        backward = launch.backward_config(n, width, norm, arch, plain, sparse)
                        if isinstance(backward, launch.Config):
                            assert n <= backward.groups * backward.rows + (plain and not norm)
                            assert (launch.attention_backward, backward, arch) in listed
                        else:
                            queries, keys = backward
                            assert (launch.attention_backward_queries, queries, arch) in listed
                            assert (launch.attention_backward_keys, keys, arch) in listed


# Which kernel runs ----------------------------------------------------------------------------------------


def call(**changes):
    usual = {"dtype": torch.bfloat16, "arch": 90, "width": 64, "queries": 197, "keys": 197}
    flags = dict.fromkeys(("causal", "varlen", "padded", "normed"), False)
    return dispatch.Call(**{**usual, **flags, **changes})


@pytest.mark.parametrize(
    "changes,ours",
    [
        ({}, True),
        ({"queries": 257, "keys": 257}, True),
        ({"queries": 257, "keys": 257, "causal": True}, False),
        ({"queries": 257, "keys": 256}, False),
        ({"queries": 258, "keys": 258}, False),
        ({"width": 72, "queries": 256, "keys": 256}, True),
        ({"width": 128}, False),
        ({"width": 72, "queries": 77, "keys": 77}, True),
        ({"queries": 577, "keys": 577, "padded": True}, False),
        ({"queries": 320, "keys": 320, "varlen": True}, True),
        ({"queries": 64, "keys": 64, "varlen": True, "arch": 80}, True),
        ({"queries": 320, "keys": 320, "normed": True}, True),
        ({"queries": 320, "keys": 320, "normed": True, "arch": 80}, False),
        ({"dtype": torch.float32}, False),
        ({"arch": 86}, False),
        ({"arch": 100}, False),
        ({"width": 32}, False),
    ],
)
def test_the_table_chooses(changes, ours):
    assert dispatch.choose(call(**changes)).ours == ours


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_backward_of_a_dense_call_of_ours_is_one_kernel(width, arch):
    from pinclip_kernels.triton import attention as launch

    for n in range(1, launch.LONGEST + 1):
        one = isinstance(launch.backward_config(n, width, False, arch, plain=True), launch.Config)
        assert one or not dispatch.choose(call(arch=arch, width=width, queries=n, keys=n)).ours


def test_every_row_has_a_reason_and_is_reached():
    from pinclip_kernels.triton import attention as launch

    assert dispatch._HEAD_DIMS == launch.HEAD_DIMS and dispatch._LONGEST == launch.LONGEST
    assert launch.tile_rows(dispatch.SHARED) and not launch.tile_rows(dispatch.SHARED + 1)
    calls = [
        call(arch=arch, width=width, queries=n, keys=n, dtype=dtype, **{flag: True})
        for arch in (80, 90)
        for width in (32, 64, 72)
        for n in (64, 200, 320, 1024)
        for dtype in (torch.float32, torch.bfloat16)
        for flag in ("varlen", "padded", "normed")
    ]
    calls += [call(queries=n, keys=n) for n in (64, 320)]
    assert {dispatch.choose(each).name for each in calls} == {row.name for row in dispatch.TABLE}
    for row in dispatch.TABLE:
        assert row.reason.split(":")[0].split(" by")[0] in ("By design", "Not measured", "Measured")


@pytest.mark.parametrize(
    "arch,masked,queries,first",
    [
        (90, False, 577, SDPBackend.CUDNN_ATTENTION),
        (90, True, 576, SDPBackend.FLASH_ATTENTION),
        (90, False, 1, SDPBackend.FLASH_ATTENTION),
        (80, False, 577, SDPBackend.FLASH_ATTENTION),
        (100, False, 577, SDPBackend.FLASH_ATTENTION),
    ],
)
def test_the_peer_that_is_wrong_at_times_is_preferred_elsewhere(arch, masked, queries, first):
    backends = BACKENDS(arch, masked, queries)
    assert backends[0] == first
    assert (SDPBackend.CUDNN_ATTENTION in backends) == (first == SDPBackend.CUDNN_ATTENTION)
    assert backends[-1] == SDPBackend.MATH


def test_the_preference_of_a_peer_is_compiled_too(monkeypatch):
    """In one graph; on a CPU, where all of these are one kernel."""
    monkeypatch.setattr(op, "_backends", lambda *call: BACKENDS(90, False, 2))
    tensors = normal(3, 1, 70, 2, 64, dtype=torch.float32).unbind()
    call = lambda *t: _composed(t, None, None, None, False, 0.125)  # noqa: E731
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors), call(*tensors))


# On a GPU -------------------------------------------------------------------------------------------------


class TestGpu:
    pytestmark = pytest.mark.gpu

    @pytest.fixture(autouse=True)
    def exact_products(self):
        torch.backends.cuda.matmul.allow_tf32 = False

    @pytest.fixture
    def ours(self, monkeypatch):
        """Every shape that the kernels take, also where the table prefers the peer."""
        row = next(row for row in dispatch.TABLE if row.ours)
        monkeypatch.setattr(op, "_choose", lambda *call: row)

    @staticmethod
    def heads(*shape, dtype=torch.bfloat16, **options):
        return normal(*shape, dtype=dtype, **options).cuda()

    @pytest.mark.usefixtures("ours")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("tokens", [*TOKENS, 50, 255, 384])
    @pytest.mark.parametrize("width", WIDTHS)
    def test_sizes(self, width, tokens, dtype):
        for causal in (False, True):
            compare(self.heads(3, tokens, 3, 4, width, dtype=dtype), causal=causal)

    @pytest.mark.parametrize("tokens", [197, 257, 576, 577, 729, 1024])
    def test_sizes_as_dispatched(self, tokens):
        compare(self.heads(2, tokens, 3, 4, 64))
        compare(self.heads(2, tokens, 3, 4, 72), key_lengths=lengths_of(tokens // 2, tokens, device="cuda"))

    @pytest.mark.usefixtures("ours")
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("width", WIDTHS)
    def test_key_lengths(self, width, causal):
        for tokens in (70, 150, 320):
            lengths = lengths_of(5, 0, 64, tokens, 65, device="cuda")
            compare(self.heads(5, tokens, 3, 4, width), key_lengths=lengths, causal=causal)

    @pytest.mark.usefixtures("ours")
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("longest", [12, 20, 64, 100, 128, 200, 320])
    @pytest.mark.parametrize("width", WIDTHS)
    def test_varlen(self, width, longest, causal):
        for shortest in (0, longest * 3 // 4):
            draw = torch.Generator().manual_seed(longest)
            sizes = torch.randint(shortest, longest + 1, (70,), generator=draw)
            cu_seqlens = torch.cat((sizes.new_zeros(1), sizes.cumsum(0))).int().cuda()
            qkv = self.heads(int(sizes.sum()), 3, 4, width)
            compare(qkv, cu_seqlens=cu_seqlens, max_seqlen=longest, causal=causal)

    @pytest.mark.usefixtures("ours")
    @pytest.mark.parametrize("tokens", [50, 77, 128, 197, 256, 320])
    @pytest.mark.parametrize("width", WIDTHS)
    def test_norm_and_rope(self, width, tokens):
        weights = self.heads(width, seed=5), self.heads(width, seed=6)
        rope = tuple(table.cuda() for table in tables(tokens, width))
        compare(self.heads(3, tokens, 3, 4, width), weights=weights, rope=rope)

    @pytest.mark.usefixtures("ours")
    @pytest.mark.parametrize("queries,keys", [(1, 77), (1, 320), (64, 5), (130, 33), (320, 16)])
    def test_cross_attention(self, queries, keys):
        tensors = self.heads(3, queries, 4, 72), *self.heads(2, 3, keys, 4, 72, seed=1)
        compare(*tensors)
        compare(*tensors, key_lengths=lengths_of(keys, 0, keys // 2, device="cuda"))

    @pytest.mark.parametrize("tokens", [64, 192, 320, 576])  # N % 128 == 64: where cuDNN's dq is NaN
    def test_logits_near_minus_120(self, tokens):
        qkv = self.heads(2, tokens, 3, 2, 64, scale=0.3)
        qkv[:, :, 0] += 120**0.5
        qkv[:, :, 1] -= 120**0.5 / 8
        compare(qkv)
        compare(qkv, key_lengths=lengths_of(tokens, tokens - 1, device="cuda"))

    @pytest.mark.usefixtures("ours")
    @pytest.mark.parametrize("tokens", [70, 256, 320])
    def test_padding_does_not_leak(self, tokens):
        lengths = lengths_of(5, 0, 65, device="cuda")
        qkv = self.heads(3, tokens, 3, 2, 64)
        padding = torch.arange(tokens, device="cuda") >= lengths[:, None]
        poisoned = qkv.clone()
        poisoned[:, :, 1:][padding] = torch.nan
        results = self.run(poisoned, key_lengths=lengths)
        assert all(torch.equal(a, b) for a, b in zip(results, self.run(qkv, key_lengths=lengths)))
        assert (results[1][:, :, 1:][padding] == 0).all() and (results[1][1] == 0).all()

    def run(self, *tensors, **options):
        return self.call(attention, *tensors, **options)

    @staticmethod
    def call(function, *tensors, **options):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        out = function(*leaves, **options)
        seed = normal(*out.shape, seed=90, dtype=out.dtype).cuda()
        return [out.detach(), *torch.autograd.grad(out, leaves, seed)]

    @pytest.mark.parametrize("tokens,width", [(197, 64), (257, 80), (77, 72)])
    def test_repeats_bit_for_bit(self, tokens, width):
        qkv = self.heads(16, tokens, 3, 4, width)
        first = self.run(qkv)
        for _ in range(1000):
            assert all(torch.equal(a, b) for a, b in zip(first, self.run(qkv)))

    def text(self):
        sizes = torch.randint(0, 41, (300,), generator=torch.Generator().manual_seed(0))
        cu_seqlens = torch.cat((sizes.new_zeros(1), sizes.cumsum(0))).int().cuda()
        return self.heads(int(sizes.sum()), 3, 4, 64), {"cu_seqlens": cu_seqlens, "max_seqlen": 64}

    def test_a_plan_made_once(self):
        qkv, options = self.text()
        made = attention_plan(options["cu_seqlens"], len(qkv), options["max_seqlen"])
        planned = torch.compile(attention, fullgraph=True)
        for call in (attention, planned):
            results = zip(self.run(qkv, **options), self.call(call, qkv, **options, plan=made))
            assert all(torch.equal(a, b) for a, b in results)

    def test_cuda_graph_without_waiting(self):
        qkv, options = self.text()
        assert_captured(lambda t: attention(t, **options), [qkv])
        assert_does_not_wait(lambda t: attention(t, **options), [qkv])

    def test_autocast(self):
        qkv = self.heads(2, 197, 3, 4, 64)
        result = assert_autocast(attention, [qkv], torch.bfloat16)
        assert torch.equal(result, attention(qkv))

    @pytest.mark.parametrize("tokens", [77, 197])
    def test_compiles_as_one_graph(self, tokens):
        torch.compiler.reset()
        qkv = self.heads(2, tokens, 3, 4, 64).requires_grad_()
        out = torch.compile(attention, fullgraph=True)(qkv)
        (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
        expected = attention(qkv)
        assert torch.equal(out, expected)
        assert torch.equal(grad, torch.autograd.grad(expected, qkv, torch.ones_like(out))[0])
