"""What machine code says without being run: instruction counts, load widths, the hot loop, occupancy, an
estimate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_HGMMA = re.compile(r"[A-Z]GMMA\.64x(\d+)x(\d+)")
_HMMA = re.compile(r"[HIQ]?MMA\.(16816|1688|16832|884)")
_HMMA_FLOPS = {
    "16816": 2 * 16 * 8 * 16,
    "1688": 2 * 16 * 8 * 8,
    "16832": 2 * 16 * 8 * 32,
    "884": 2 * 8 * 8 * 4,
}
_LOADS = ("LDG", "LDGSTS", "LD")
_GLOBAL = (*_LOADS, "STG", "ST")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        """Bytes per thread of a load or store, from its width."""
        for mark, size in (
            (".256", 32),
            (".128", 16),
            (".64", 8),
            (".U16", 2),
            (".S16", 2),
            (".U8", 1),
            (".S8", 1),
        ):
            if mark in self.opcode:
                return size
        return 4


def functions(text: str) -> dict[str, list[Instruction]]:
    """Instructions of every function in `cuobjdump -sass` output, by (mangled) name."""
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] | None = None
    for line in text.splitlines():
        if "Function :" in line:
            body = found.setdefault(line.split("Function :")[1].strip(), [])
        elif body is not None and (match := _LINE.search(line)):
            body.append(Instruction(int(match[1], 16), match[3], match[4]))
    return found


def loops(body: list[Instruction]) -> list[list[Instruction]]:
    """What the backward branches enclose."""
    found = []
    for instruction in body:
        target = _target(instruction)
        if target is not None and target < instruction.address:
            found.append([i for i in body if target <= i.address <= instruction.address])
    return found


def _target(instruction: Instruction) -> int | None:
    if instruction.base != "BRA":
        return None
    targets = re.findall(r"0x([0-9a-f]+)", instruction.operands)
    return int(targets[-1], 16) if targets else None


def hot_loop(body: list[Instruction]) -> list[Instruction]:
    """The loop densest in tensor-core work, else in bytes moved; without a loop the whole function."""

    def rank(loop: list[Instruction]) -> tuple[float, float, int]:
        flops = sum(mma_flops(i) or float(is_tensor(i)) for i in loop)
        return flops / len(loop), sum(i.bytes for i in loop if i.base in _GLOBAL) / len(loop), -len(loop)

    return max(loops(body), key=rank, default=body)


def split_loop(loop: list[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
    """(what every turn runs, what stands under a condition and has no products).

    A persistent kernel runs one flat loop over the depth of all its tiles; what belongs to the end of a tile
    stands under a condition in it.
    """
    skipped: set[int] = set()
    last = loop[-1].address
    for instruction in loop:
        target = _target(instruction)
        if target is None or not instruction.address < target <= last:
            continue
        region = [i for i in loop if instruction.address < i.address < target]
        if not any(is_tensor(i) for i in region):
            skipped.update(i.address for i in region)
    steady = [i for i in loop if i.address not in skipped]
    return steady, [i for i in loop if i.address in skipped]


def is_tensor(instruction: Instruction) -> bool:
    return bool(re.match(r"[HIQDUTCOSF]*MMA", instruction.base)) or instruction.base.endswith("GMMA")


def mma_flops(instruction: Instruction) -> float:
    """Operations per warp; 0 where the opcode does not say the shape (tcgen05's is in a descriptor)."""
    if match := _HGMMA.match(instruction.opcode):
        return 2 * 64 * int(match[1]) * int(match[2]) / 4
    if match := _HMMA.match(instruction.opcode):
        return float(_HMMA_FLOPS[match[1]])
    return 0.0


@dataclass
class Counts:
    """Instructions of one function."""

    instructions: int = 0
    hgmma: int = 0
    arrivals: int = 0  # of a warp group at an HGMMA or several
    hmma: int = 0
    tcgen05: int = 0
    mufu: int = 0
    local: int = 0  # loads and stores of local memory: spills and indexed arrays
    local_bytes: int = 0  # of a thread
    tma: int = 0
    atomics: int = 0
    loads: dict[int, int] = field(default_factory=dict)  # bytes per thread -> loads from global memory
    stores: dict[int, int] = field(default_factory=dict)

    @property
    def wide_loads(self) -> float | None:
        """Share of the loads from global memory that are 16 bytes a thread or more; None without loads."""
        total = sum(self.loads.values())
        return sum(n for size, n in self.loads.items() if size >= 16) / total if total else None

    @property
    def wide_stores(self) -> float | None:
        total = sum(self.stores.values())
        return sum(n for size, n in self.stores.items() if size >= 16) / total if total else None


def count(body: Iterable[Instruction]) -> Counts:
    counts = Counts()
    for each in body:
        base = each.base
        counts.instructions += base != "NOP"
        counts.hgmma += base.endswith("GMMA")
        counts.arrivals += each.opcode.startswith("WARPGROUP.ARRIVE")
        counts.hmma += base in ("HMMA", "IMMA", "QMMA", "DMMA")
        counts.tcgen05 += bool(re.match(r"UTC\w*MMA", base))
        counts.mufu += base == "MUFU"
        counts.local += base in ("LDL", "STL")
        counts.local_bytes += each.bytes if base in ("LDL", "STL") else 0
        counts.tma += base in ("UTMALDG", "UTMASTG", "UBLKCP", "UTMAREDG")
        counts.atomics += base in ("ATOMG", "RED", "REDG", "ATOM")
        if base in _LOADS:
            counts.loads[each.bytes] = counts.loads.get(each.bytes, 0) + 1
        elif base in ("STG", "ST"):
            counts.stores[each.bytes] = counts.stores.get(each.bytes, 0) + 1
    return counts


@dataclass(frozen=True)
class Gpu:
    """Limits of one multiprocessor, per compute capability, and rates per clock; dense bf16 for the tensor
    cores.
    """

    warps: int
    registers: int
    shared: int
    shared_per_block: int
    blocks: int
    tensor_flops: float
    memory_bytes: float
    l2_bytes: float = 64.0
    special: float = 16.0
    latency_clocks: float = 1000.0
    reserved: int = 1024  # of shared memory, per block


# A100 80 GB: 2.0 TB/s, 108 multiprocessors at 1.41 GHz. H100 SXM: 3.35 TB/s, 132 at 1.83 GHz. B200: 8 TB/s,
# 148 at 1.85 GHz.
GPUS = {
    80: Gpu(64, 65536, 164 * 1024, 163 * 1024, 32, 2048, 13.4),
    90: Gpu(64, 65536, 228 * 1024, 227 * 1024, 32, 4096, 13.9),
    100: Gpu(64, 65536, 228 * 1024, 227 * 1024, 32, 8192, 29.2),
}


def occupancy(arch: int, registers: int, shared: int, warps: int) -> int:
    """Blocks that one multiprocessor holds at once; registers go out in units of 256 per warp."""
    gpu = GPUS[arch]
    if shared > gpu.shared_per_block:
        return 0
    per_warp = -(-registers * 32 // 256) * 256
    fits = [gpu.warps // warps, gpu.blocks, gpu.shared // (-(-(shared + gpu.reserved) // 128) * 128)]
    if per_warp:
        fits.append(gpu.registers // per_warp // 4 * 4 // warps)  # each of four parts has its share
    return min(fits)


@dataclass(frozen=True)
class Estimate:
    """How near its peak the unit that matters (tensor cores where there are products, else memory) can come.

    percent: all units perfectly overlapped, an upper bound; serial: the end of a tile not overlapped with the
    products of the next. limit: the unit that takes longest. clocks: per tile and block, by unit.
    """

    percent: float
    serial: float
    of: str
    limit: str
    clocks: dict[str, float]


def estimate(
    arch: int, body: list[Instruction], warps: int, blocks: int, turns: float | None
) -> Estimate | None:
    """From the instructions of the hot loop; None where they do not say.

    turns: of the hot loop per tile, where it runs over the depth of a product; the rest of the loop around
    it, and what stands under a condition in it, then counts once a tile. None: the hot loop alone is the
    work.
    """
    gpu, hot = GPUS[arch], hot_loop(body)
    steady, once = split_loop(hot) if turns else (hot, [])
    if turns:
        around = [loop for loop in loops(body) if len(loop) > len(hot) and loop[0].address <= hot[0].address]
        outer = min((loop for loop in around if loop[-1].address >= hot[-1].address), key=len, default=body)
        inside = {i.address for i in hot}
        if outer is not hot:
            once = once + [i for i in outer if i.address not in inside]
    per_turn, per_tile = _clocks(gpu, steady, warps), _clocks(gpu, once, warps)
    total = {unit: (turns or 1) * per_turn[unit] + per_tile[unit] for unit in per_turn}
    if any(is_tensor(i) for i in hot):
        of = "tensor"
        if not total["tensor"]:
            return None
        serial = (turns or 1) * max(per_turn.values()) + max(per_tile.values())
    else:
        of = "memory"
        moved = _moved(hot, warps)
        if not moved or not blocks:
            return None
        total["memory"] = moved / gpu.memory_bytes
        flight = sum(i.bytes for i in hot if i.base in _LOADS) * 32 * warps * blocks
        short = gpu.memory_bytes * gpu.latency_clocks / flight if flight else 1.0
        total["latency"] = total["memory"] * max(1.0, short)
        serial = max(total.values())
    limit = max(total, key=total.get)
    if total[limit] == total[of]:
        limit = of
    return Estimate(100 * total[of] / total[limit], 100 * total[of] / serial, of, limit, total)


def _moved(instructions: list[Instruction], warps: int) -> float:
    return sum(i.bytes for i in instructions if i.base in _GLOBAL) * 32.0 * warps


def _clocks(gpu: Gpu, instructions: list[Instruction], warps: int) -> dict[str, float]:
    """Clocks that a block's instructions take in each unit of a multiprocessor."""
    counts = count(instructions)
    flops = sum(mma_flops(i) * (2 if "TF32" in i.opcode else 1) for i in instructions)  # tf32: half the rate
    return {
        "tensor": flops * warps / gpu.tensor_flops,
        "issue": counts.instructions * warps / 4,
        "special functions": counts.mufu * warps * 32 / gpu.special,
        "L2": _moved(instructions, warps) / gpu.l2_bytes,
    }
