"""Attention over short sequences on a GPU: launch tables, launches, and the compilations they can cause.

Heads are read where they stand, in the packed projection or in separate tensors, and nothing is transposed
or padded in memory. A window (see `_attention_tile`) is a sequence, a segment, or a tile of short segments.

Forward: one program per tile of queries and head. Backward: one program per window and head where few or no
registers are spilled (reads 5 and writes 3 tensors of the size of q), else two passes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pinclip_kernels.triton._attention_backward import (
    attention_backward,
    attention_backward_keys,
    attention_backward_queries,
)
from pinclip_kernels.triton._attention_forward import attention_forward
from pinclip_kernels.triton._attention_norm import attention_norm_backward, norm_backward
from pinclip_kernels.triton._attention_plan import tile_rows
from pinclip_kernels.triton._launch import TYPES, CompileCase, architecture

HEAD_DIMS = (64, 72, 80, 88, 96, 128)
LONGEST = 384

# Launch table --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """ROWS queries and KEYS keys at a time; groups of as many queries that a backward program holds; the most
    registers of a thread."""

    rows: int
    keys: int
    warps: int
    stages: int
    reason: str
    groups: int = 1
    registers: int | None = None


_FORWARD_WIDE = Config(
    128,
    64,
    8,
    2,
    "Compiled: 106 registers at Dh 64. Reads the keys half as often as 64 rows; where that wastes no more.",
)
_FORWARD_WIDE_96 = Config(
    128,
    32,
    8,
    2,
    """Compiled: two programs an SM, where 64 keys take 162 registers and leave room for one. 27 numbers a
    thread are spilled at most, 4 of them in the loop.""",
    registers=128,
)
_FORWARD_WIDE_128 = Config(
    128, 64, 8, 2, "Compiled: 183 to 213 registers, one program an SM whatever the keys."
)
_FORWARD_NARROW = Config(
    64, 64, 4, 2, "Compiled: 122 registers at Dh 64, four programs an SM. Wastes least on short sequences."
)
_FORWARD_NORM = Config(
    64, 64, 8, 1, "Compiled: no spill; four warps spill at Dh 72 and 128, two stages take 160 KB at Dh 128."
)
_FORWARD_80 = Config(
    64, 32, 4, 2, "Compiled: at most 244 registers. 32 keys waste less than 64 of a short sequence."
)


def forward_config(n_q: int, width: int, norm: bool, arch: int) -> Config:
    if norm:
        return _FORWARD_NORM
    if arch < 90:
        return _FORWARD_80
    narrow, wide = (_rows_computed(n_q, rows) for rows in (64, 128))
    if wide > narrow:
        return _FORWARD_NARROW
    return {64: _FORWARD_WIDE, 128: _FORWARD_WIDE_128}.get(width, _FORWARD_WIDE_96)


def _rows_computed(n: int, rows: int) -> int:
    rest = n % rows
    return n - rest + (0 if rest == 0 else 16 if rest <= 16 else rows)


_SINGLE_64 = Config(
    64, 64, 4, 2, "Compiled: at most 234 registers with everything on, two programs an SM. Dh 64 only."
)
_SINGLE_64_WIDE = Config(64, 64, 8, 2, "Compiled: no spill; four warps spill at Dh > 64.")
_SINGLE_128 = Config(
    128,
    64,
    8,
    2,
    "Compiled: no spill; four warps spill. The next keys are copied while these are multiplied.",
)
_SINGLE_128_NORM = Config(128, 64, 8, 1, "Compiled: two stages with norm and rotation take 263 KB at Dh 128.")
_SINGLE_256 = Config(
    128,
    64,
    8,
    2,
    """Compiled: two groups of 128 queries; scores of 256 spill. No spill at Dh 64. At 72 and 80 22 to 32 of
    1,194 to 1,471 instructions of the loop are spills.""",
    groups=2,
)
_SINGLE_256_96 = Config(
    128,
    64,
    8,
    1,
    """Compiled: as above at 88 and 96, where with two stages the products would wait for one another; 58 to
    69 of 1,216 to 1,494 instructions of the loop are spills.""",
    groups=2,
)
_SINGLE_256_NORM = Config(
    128, 64, 8, 1, "Compiled: as above, but two stages spill with norm and rotation.", groups=2
)
_SINGLE_384 = Config(
    128,
    64,
    8,
    1,
    "Compiled: at Dh 64 14 to 60 of 1,123 to 1,577 instructions of the loop are spills; two stages: more.",
    groups=3,
)
_SINGLE_80 = Config(128, 32, 8, 1, "Compiled: operands lie in registers on sm_80; 64 keys spill.")
_QUERIES = Config(64, 64, 4, 2, "Compiled: 162 registers at Dh 72, three programs an SM.")
_KEYS = Config(64, 64, 4, 1, "Compiled: 202 registers at Dh 72, two programs an SM, where two stages spill.")
_TWICE_NORM = Config(64, 64, 8, 1, "Compiled: with norm and rotation at load four warps spill at Dh > 64.")
_QUERIES_80 = Config(64, 32, 4, 1, "Compiled: operands lie in registers on sm_80; 64 keys spill.")
_KEYS_80 = Config(
    32, 32, 4, 1, "Compiled: operands lie in registers on sm_80; 64 of either spill at Dh > 64."
)


def backward_config(
    n_q: int, width: int, norm: bool, arch: int, plain: bool = False, sparse: bool = False
) -> Config | tuple[Config, Config]:
    """One row for the single kernel; two, of the passes over queries and over keys, where it does not fit.

    plain: as many keys as queries, without masks; then one token more than the groups hold fits too. sparse:
    less than half of the groups' rows would be tokens; the passes end where a segment ends."""
    if arch < 90:
        return _SINGLE_80 if n_q <= 128 and width in (64, 128) else (_QUERIES_80, _KEYS_80)
    if n_q <= 64 and width < 128:
        return _SINGLE_64 if width == 64 else _SINGLE_64_WIDE
    if n_q <= 128:
        return _SINGLE_128_NORM if norm and width == 128 else _SINGLE_128
    if sparse:
        return (_TWICE_NORM, _TWICE_NORM) if norm else (_QUERIES, _KEYS)
    if n_q <= (257 if plain and not norm else 256) and width <= (80 if norm else 96):
        return _SINGLE_256_NORM if norm else _SINGLE_256 if width <= 80 else _SINGLE_256_96
    if width == 64 and not norm:
        return _SINGLE_384
    return (_TWICE_NORM, _TWICE_NORM) if norm else (_QUERIES, _KEYS)


def takes_tails(width: int, norm: bool, arch: int, backward: Config | None = None) -> bool:
    """Whether a last tile of 1 to 16 queries or keys is taken as one of 16, apart from the others.

    Compiled: not on sm_80, with norm and rotation, or backward with two groups or at 72, 80 and 128 features,
    where it spills.
    """
    if arch < 90 or norm:
        return False
    return backward is None or (backward.groups == 1 and width in (64, 88, 96))


def fuses_norm(arch: int) -> bool:
    """Whether norm and rotation are applied at load: on sm_80 that spills."""
    return arch >= 90


# Launch --------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """Of queries and keys at load: RMS norm (fp32 weights [Dh]) and rotation (fp32 tables [.., Dh/2])."""

    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 0.0
    cos: Tensor | None = None
    sin: Tensor | None = None


class Problem:
    """Heads [B, N, H, Dh] (varlen: [T, H, Dh] and cu_seqlens) and what the kernels need to know of them.

    q, k, v: bf16 or fp16, N at most LONGEST, Dh one of HEAD_DIMS. Copied only where a head does not stand on
    16 bytes. max_seqlen: of varlen segments, none of which may be longer. tiles, starts: of a plan of the
    segments, where `tile_rows` is not 0 or there is a rotation.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        tiles: Tensor | None,
        starts: Tensor | None,
        key_lengths: Tensor | None,
        causal: bool,
        scale: float,
        norm: Norm,
    ):
        assert q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in HEAD_DIMS
        self.causal, self.scale, self.norm = causal, scale, norm
        self.lengths = None if key_lengths is None else key_lengths.contiguous()
        self.varlen = cu_seqlens is not None
        if self.varlen:
            q, k, v = q[None], k[None], v[None]
        else:
            q, k, v = (_near(heads) for heads in (q, k, v))
        self.q, self.k, self.v = _aligned(q), _aligned(k), _aligned(v)
        if self.k.stride() != self.v.stride():
            self.k, self.v = self.k.contiguous(), self.v.contiguous()
        self.arch = architecture(q.device)
        assert max(q.shape[1], k.shape[1]) <= LONGEST or self.varlen
        self.n_q, self.n_k, self.windows = q.shape[1], k.shape[1], q.shape[0]
        self.bounds = self.starts = None
        self.firsts = starts  # of every token's segment, where positions are asked for
        if self.varlen:
            packs = tile_rows(max_seqlen)
            self.n_q = self.n_k = packs or max_seqlen
            self.bounds, self.starts = (tiles, starts) if packs else (cu_seqlens.contiguous(), None)
            self.windows = len(self.bounds) - 1

    def _fuses(self) -> bool:
        return self.norm.q_weight is not None or self.norm.cos is not None

    def _arguments(self, config: Config, tails: bool | None, apart: int = 0) -> dict:
        """What all kernels take. Without a tail, or with lengths known on the device only, all tiles are
        masked, unless they are whole. apart: keys that are in no tile."""
        rest = (self.n_k - apart) % config.keys if self.bounds is None and self.lengths is None else -1
        tail = 16 if tails and 0 < rest <= 16 else 0
        arguments = {
            "bounds": self.bounds,
            "starts": self.starts,
            "lengths": self.lengths,
            **self.norm._asdict(),
            **_strides("q", self.q, True),
            **_strides("k", self.k, True),
            "n_q": self.n_q,
            "n_k": self.n_k,
            "heads": self.q.shape[2],
            "scale": self.scale,
            "CAUSAL": self.causal,
            "DH": self.q.shape[3],
            "ROWS": config.rows,
            "KEYS": config.keys,
            "RAGGED": rest != 0 and tail == 0,
            "num_warps": config.warps,
            "num_stages": config.stages,
            "maxnreg": config.registers,
        }
        return arguments if tails is None else {**arguments, "TAIL_KEYS": tail}

    def forward(self, out: Tensor, lse: Tensor) -> None:
        """Writes the result [.., H, Dh] and the natural logsumexp fp32 [.., H], 0 for a row without keys."""
        if out.numel() == 0:
            return
        heads, width = self.q.shape[2:]
        config = forward_config(self.n_q, width, self._fuses(), self.arch)
        rest = self.n_q % config.rows
        tails = takes_tails(width, self._fuses(), self.arch)
        tail_rows = 16 if tails and self.bounds is None and 0 < rest <= 16 else 0
        tiles = triton.cdiv(self.n_q, config.rows)
        attention_forward[(self.windows * heads * tiles,)](
            self.q,
            self.k,
            self.v,
            out,
            lse,
            tiles=tiles,
            TAIL_ROWS=tail_rows,
            **self._arguments(config, tails),
        )

    def backward(
        self, dout: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes the gradients, views [.., H, Dh] with heads side by side, dk and dv with equal strides;
        returns those of the norm's weights (fp32 [Dh], empty without a norm).

        Extra memory: fp32 [B, H, N] in two passes, twice that for 257 tokens in one.
        """
        if self.varlen:
            dq, dk, dv = dq[None], dk[None], dv[None]
        q_weight, k_weight, *rest = self.norm
        if out.numel() == 0:
            for grad in (dq, dk, dv):
                grad.zero_()
            weights = (q_weight, k_weight) if q_weight is not None else (lse.new_empty(0),) * 2
            return tuple(torch.zeros_like(weight) for weight in weights)
        dout = _aligned(dout)
        heads, width = self.q.shape[2:]
        to_q, to_k = _strides("dq", dq, False), _strides("dk", dk, False)
        plain = not (self.causal or self.bounds is not None or self.lengths is not None)
        plain = plain and self.n_q == self.n_k
        rows = self.windows * 128 * triton.cdiv(self.n_q, 128)
        sparse = self.bounds is not None and 2 * self.q.shape[1] < rows
        configs = backward_config(self.n_q, width, self._fuses(), self.arch, plain, sparse)
        if isinstance(configs, Config):
            held = configs.groups * configs.rows
            apart = max(0, self.n_q - held)
            rates = lse.new_empty((self.windows * heads, 2, held)) if apart else None
            tails = takes_tails(width, self._fuses(), self.arch, configs)
            arguments = {**to_q, **to_k, **self._arguments(configs, tails, apart), "GROUPS": configs.groups}
            attention_backward[(self.windows * heads,)](
                self.q, self.k, self.v, out, dout, lse, dq, dk, dv, rates, **arguments
            )
        else:
            delta = torch.empty_like(lse)
            of_queries, of_keys = (self._arguments(config, None) for config in configs)
            tiles = triton.cdiv(self.n_q, configs[0].rows)
            attention_backward_queries[(self.windows * heads * tiles,)](
                self.q, self.k, self.v, out, dout, lse, delta, dq, **to_q, tiles=tiles, **of_queries
            )
            tiles = triton.cdiv(self.n_k, configs[1].keys)
            attention_backward_keys[(self.windows * heads * tiles,)](
                self.q, self.k, self.v, dout, lse, delta, dk, dv, **to_k, tiles=tiles, **of_keys
            )
        if not self._fuses():
            return lse.new_empty(0), lse.new_empty(0)
        rest.append(self.firsts)
        dq_weight = norm_backward(self.q, dq, q_weight, *rest, None)
        return dq_weight, norm_backward(self.k, dk, k_weight, *rest, self.lengths)


def _aligned(x: Tensor) -> Tensor:
    """x with a contiguous head on 16 bytes; a copy only where it is not so already."""
    fits = x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    if fits:
        return x
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _near(x: Tensor) -> Tensor:
    """x with the tokens and heads of a sequence so near each other that int32 counts the elements between; a
    copy only where they are not, as in large batches with the batch inside."""
    near = all((x.shape[i] - 1) * x.stride(i) < 2**31 - 2**16 for i in (1, 2))
    return x if near else x.contiguous()


def _strides(name: str, x: Tensor, head: bool) -> dict[str, int]:
    strides = {f"{name}_batch8": x.stride(0) // 8, f"{name}_row8": x.stride(1) // 8}
    return {**strides, f"{name}_head8": x.stride(2) // 8} if head else strides


# Compilations --------------------------------------------------------------------------------------------

_MASKED = {"CAUSAL": True, "RAGGED": True}
_TAILS = {"TAIL_ROWS": 16, "TAIL_KEYS": 16, "CAUSAL": True}
_PACKED = ("bounds", "starts")
_NORM = ("q_weight", "k_weight", "cos", "sin")
_VARIANTS = {
    "plain": ({}, ()),
    "tails": (_TAILS, ()),
    "last": ({}, ("rates",)),
    "ragged": ({"RAGGED": True}, ()),
    "packed": (_MASKED, _PACKED),
    "segments": (_MASKED, ("bounds",)),
    "lengths": (_MASKED, ("lengths",)),
    "norm": (_MASKED, (*_PACKED, *_NORM)),
}
_WIDTHS = (64, 72, 88, 128)  # 80 and 96 are 72 and 88 without a mask of features
_MASKS = ("plain", "tails", "packed")
_LONG = ("plain", "last", "ragged", "segments", "lengths")
_ROWS = (
    # kernel, configuration, arch, head dims, variants
    (attention_forward, _FORWARD_NARROW, 90, _WIDTHS, _MASKS),
    (attention_forward, _FORWARD_WIDE, 90, (64,), _MASKS),
    (attention_forward, _FORWARD_WIDE_96, 90, (72, 88), (*_MASKS, "ragged", "lengths")),
    (attention_forward, _FORWARD_WIDE_128, 90, (128,), _MASKS),
    (attention_forward, _FORWARD_NORM, 90, _WIDTHS, ("norm",)),
    (attention_forward, _FORWARD_80, 80, _WIDTHS, ("plain", "packed")),
    (attention_backward, _SINGLE_64, 90, (64,), ("plain", "tails", "norm")),
    (attention_backward, _SINGLE_64_WIDE, 90, (72, 88), ("plain", "norm")),
    (attention_backward, _SINGLE_64_WIDE, 90, (88,), ("tails",)),
    (attention_backward, _SINGLE_128, 90, _WIDTHS, ("plain",)),
    (attention_backward, _SINGLE_128, 90, (64, 72, 88), ("norm",)),
    (attention_backward, _SINGLE_128, 90, (64, 88), ("tails",)),
    (attention_backward, _SINGLE_128_NORM, 90, (128,), ("norm",)),
    (attention_backward, _SINGLE_256, 90, (64, 72), _LONG),
    (attention_backward, _SINGLE_256_96, 90, (88,), _LONG),
    (attention_backward, _SINGLE_256_NORM, 90, (64, 72), ("norm",)),
    (attention_backward, _SINGLE_384, 90, (64,), ("plain", "ragged", "segments", "lengths")),
    (attention_backward, _SINGLE_80, 80, (64, 128), ("plain", "packed")),
    (attention_backward_queries, _QUERIES, 90, _WIDTHS, ("plain", "segments", "lengths")),
    (attention_backward_keys, _KEYS, 90, _WIDTHS, ("plain", "segments", "lengths")),
    (attention_backward_queries, _TWICE_NORM, 90, _WIDTHS, ("norm",)),
    (attention_backward_keys, _TWICE_NORM, 90, _WIDTHS, ("norm",)),
    (attention_backward_queries, _QUERIES_80, 80, _WIDTHS, ("plain", "packed")),
    (attention_backward_keys, _KEYS_80, 80, _WIDTHS, ("plain", "packed")),
)


def compile_cases() -> list[CompileCase]:
    """Every row of the launch table with every addition to its inner loop: nothing, tails, masks, norm.

    What lies between is less than one of these. fp16 takes the registers of bf16 and is listed at Dh 64.
    """
    cases = []
    for kernel, config, arch, widths, variants in _ROWS:
        for width in widths:
            for variant in variants:
                for dtype in (torch.bfloat16, torch.float16)[: 2 if width == 64 else 1]:
                    cases.append(_case(kernel, config, arch, width, variant, TYPES[dtype]))
    for width in _WIDTHS:
        for kind in ("bf16", "fp16"):
            pointers = {"x": kind, "g": kind, "starts": "i32", "lengths": "i32"}
            pointers |= dict.fromkeys(("weight", "cos", "sin", "partial"), "fp32")
            signature = _signature(attention_norm_backward, pointers, {"DH": width, "ROWS": 32})
            name = f"{attention_norm_backward.__name__}/{width}/{kind}"
            constexprs = {"DH": width, "ROWS": 32}
            cases.append(
                CompileCase(
                    name, attention_norm_backward, signature, constexprs, 4, 3, needs_dot=False, archs=(90,)
                )
            )
    return cases


def _case(kernel, config: Config, arch: int, width: int, variant: str, kind: str) -> CompileCase:
    constants, given = _VARIANTS[variant]
    chosen = {"CAUSAL": False, "RAGGED": False, "TAIL_ROWS": 0, "TAIL_KEYS": 0, **constants}
    chosen |= {"DH": width, "ROWS": config.rows, "GROUPS": config.groups, "KEYS": config.keys}
    chosen |= {name: None for name in ("rates", "bounds", "starts", "lengths", *_NORM) if name not in given}
    constexprs = {name: value for name, value in chosen.items() if name in kernel.arg_names}
    pointers = dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), kind)
    pointers |= dict.fromkeys(("bounds", "starts", "lengths"), "i32")
    pointers |= dict.fromkeys(("lse", "delta", "rates", *_NORM), "fp32")
    rows = config.groups * config.rows
    return CompileCase(
        name=f"{kernel.__name__}/{rows}x{config.keys}/{variant}/{width}/{kind}/sm_{arch}",
        kernel=kernel,
        signature=_signature(kernel, pointers, constexprs),
        constexprs=constexprs,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        archs=(arch,),
    )


def _signature(kernel, pointers: dict[str, str], constexprs: dict) -> dict[str, str]:
    kinds = {name: f"*{kind}" for name, kind in pointers.items()}
    kinds |= {"scale": "fp32", "eps": "fp32", **dict.fromkeys(constexprs, "constexpr")}
    return {name: kinds.get(name, "i32") for name in kernel.arg_names}
