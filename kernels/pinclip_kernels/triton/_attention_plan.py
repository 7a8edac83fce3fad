"""Tiles of whole consecutive segments, planned on the device: short texts share a tile of ROWS rows.

Segments are contiguous in memory, so a tile is a window of at most ROWS rows. Groups of 32 segments are
packed side by side, each by taking segments into a tile as long as they fit; two neighbouring tiles of a
group have more than ROWS rows together, which bounds the number of tiles by the shapes alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from pinclip_kernels.triton._launch import CompileCase

_GROUP = 32
_BLOCK = 1024
_INTEGERS = ["segments", "rows", "groups", "size"]


@triton.jit(do_not_specialize=_INTEGERS)
def attention_pack(bounds, tiles, counts, segments, rows, GROUP: tl.constexpr):
    """First rows of the tiles of one group [groups, GROUP], and how many they are."""
    first = tl.program_id(0) * GROUP
    ends = tl.load(bounds + tl.minimum(first + 1 + tl.arange(0, GROUP), segments))
    last = tl.load(bounds + tl.minimum(first + GROUP, segments))
    start = tl.load(bounds + first)
    count = 0
    while start < last:
        tl.store(tiles + first + count, start)
        longest = tl.max(tl.where(ends <= start + rows, ends, 0))
        start = tl.maximum(longest, tl.min(tl.where(ends > start, ends, last)))
        count += 1
    tl.store(counts + tl.program_id(0), count)


@triton.jit(do_not_specialize=_INTEGERS)
def attention_join(
    bounds, tiles, counts, joined, segments, groups, size, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """The tiles of all groups in one list [size], which the number of rows fills up."""
    group = tl.program_id(0)
    before = 0
    for first in tl.range(0, group, BLOCK):
        earlier = first + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(counts + earlier, mask=earlier < group, other=0))
    count = tl.load(counts + group)
    at = tl.arange(0, GROUP)
    tl.store(joined + before + at, tl.load(tiles + group * GROUP + at, mask=at < count), mask=at < count)
    if group == groups - 1:
        total = tl.load(bounds + segments)
        for first in tl.range(before + count, size, BLOCK):
            rest = first + tl.arange(0, BLOCK)
            tl.store(joined + rest, tl.zeros_like(rest) + total, mask=rest < size)


@triton.jit
def attention_starts(bounds, starts, BLOCK: tl.constexpr):
    """First row of the segment of every row."""
    first = tl.load(bounds + tl.program_id(0))
    end = tl.load(bounds + tl.program_id(0) + 1)
    for row in tl.range(first, end, BLOCK):
        rows = row + tl.arange(0, BLOCK)
        tl.store(starts + rows, tl.zeros_like(rows) + first, mask=rows < end)


def tile_rows(max_seqlen: int) -> int:
    """Rows of a tile of whole segments; 0 where segments are too long to share one."""
    return 0 if max_seqlen > 128 else 64 if max_seqlen <= 64 else 128


def plan_sizes(segments: int, total: int, max_seqlen: int) -> tuple[int, int, int]:
    """What a plan takes: groups of segments, most tiles, rows of a tile (0: none are made)."""
    rows = tile_rows(max_seqlen)
    groups = triton.cdiv(segments, _GROUP)
    return groups, min(segments, 2 * total // rows + groups) if rows else 0, rows


def plan(cu_seqlens: Tensor, total: int, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Bounds of tiles of whole segments, in order, int32 [at most min(S, 2T / rows + S / 32 + 1) + 1] (those
    after the last one are empty), and the first row of every row's segment, int32 [T].

    No segment may be longer than max_seqlen. Segments too long to share a tile: no bounds.
    """
    cu_seqlens = cu_seqlens.contiguous()
    segments = len(cu_seqlens) - 1
    groups, most, rows = plan_sizes(segments, total, max_seqlen)
    joined = cu_seqlens.new_empty(most + 1 if rows else 0)
    if rows:
        tiles, counts = (cu_seqlens.new_empty(n) for n in (groups * _GROUP, groups))
        attention_pack[(groups,)](cu_seqlens, tiles, counts, segments, rows, _GROUP, num_warps=1)
        attention_join[(groups,)](
            cu_seqlens, tiles, counts, joined, segments, groups, most + 1, _GROUP, _BLOCK
        )
    starts = cu_seqlens.new_empty(total)
    attention_starts[(segments,)](cu_seqlens, starts, 128)
    return joined, starts


def compile_cases() -> list[CompileCase]:
    constexprs = {"GROUP": _GROUP, "BLOCK": _BLOCK}
    cases = []
    for kernel, warps in ((attention_pack, 1), (attention_join, 4), (attention_starts, 4)):
        mine = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
        if kernel is attention_starts:
            mine = {"BLOCK": 128}
        tensors = dict.fromkeys(("bounds", "tiles", "counts", "joined", "starts"), "*i32")
        kinds = {**dict.fromkeys(_INTEGERS, "i32"), **tensors, **dict.fromkeys(mine, "constexpr")}
        signature = {name: kinds[name] for name in kernel.arg_names}
        cases.append(CompileCase(kernel.__name__, kernel, signature, mine, warps, 3, needs_dot=False))
    return cases
