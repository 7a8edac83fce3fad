"""What the tests of the pair losses' Triton kernels share.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported:
functions named check_* are collected only by `interpret`, in a process of their own. The interpreter
multiplies bf16 wrongly, so fp16 stands for both there.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

# Bytes that one program may take of an SM's shared memory.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


def interpret(path):
    """Runs the functions check_* of a test file in the interpreter."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "python_functions=check_*",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, path], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def use_kernels(monkeypatch, op, descriptors=False, block=32):
    """Makes the module of an op run the kernels on the CPU, with tiles so small that there are several; what
    is allocated and not written holds NaN."""
    from pinclip_kernels.triton import _pair_tile

    whole = _pair_tile.tile_config(torch.bfloat16, 90 if descriptors else 80, False)
    monkeypatch.setattr(_pair_tile, "tile_config", lambda *_: whole.shrunk(block, 128, 64))
    monkeypatch.setattr(op, "runs_triton", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)


def assert_as_exact(ours, plain, truth):
    """Against fp64, ours errs at most twice as much as plain torch does and two roundings of the greatest
    value.

    Plain torch is the reference from the same inputs: it computes in fp32 whatever their dtype.
    """
    for name, got, other, true in zip(("loss", "x", "y", "scale", "bias"), ours, plain, truth):
        error, allowed = ((each.double() - true).abs().max() for each in (got, other))
        rounding = 2 * torch.finfo(got.dtype).eps * true.abs().max()
        assert error <= 2 * allowed + rounding, f"{name}: {error:.3g}, plain torch {allowed:.3g}"


class Resources(NamedTuple):
    registers: int
    spills: int
    serialized: bool  # the assembler found that wgmma cannot overlap: half the speed
    shared: int
    wgmma: int
    mma: int


def resources(case, arch) -> Resources:
    """What the compiled case takes, read from the machine code."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    compiled = case.compile(arch)

    def read(content, tool, *options):
        with tempfile.NamedTemporaryFile() as file:
            file.write(compiled.asm[content] if content == "cubin" else compiled.asm[content].encode())
            file.flush()
            run = subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True)
            return run.stdout + run.stderr

    name = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
    assembled = read("ptx", get_ptxas(arch).path, "-v", name, "-o", os.devnull)
    code = read("cubin", tools / "nvdisasm", "-c")
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", assembled)[1]),
        spills=len(re.findall(r"\bSTL\b", code)),
        serialized="serialized" in assembled,
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r"\bHGMMA\b", code)),
        mma=len(re.findall(r"\bHMMA\b", code)),
    )


def assert_within_budget(case, arch, spills=0):
    found = resources(case, arch)
    assert found.spills <= spills and not found.serialized, f"{case.name}: {found}"
    assert found.shared <= SHARED_MEMORY[arch], f"{case.name}: {found}"
    if case.needs_dot:
        assert found.wgmma if arch == 90 else found.mma, f"{case.name}: {found}"
