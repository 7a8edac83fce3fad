"""What the machine itself can do, measured in the same run: a matrix product and a copy, on random data."""

from __future__ import annotations

import torch

from bench import worker


def measure(device: str, *, tiny: bool = False) -> dict[str, float]:
    """{"gemm DTYPE": TFLOP/s, "copy": GB/s read and written}, medians.

    GPU: bf16 product of 8192 cubed, copy of 2 GiB. CPU: fp32 and bf16 products of 2048 cubed, copy of 256 MiB
    on torch's threads.
    """
    n = 256 if tiny else 8192 if device == "cuda" else 2048
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]
    repeats, seconds = (3, 1.0) if tiny else (30, 3.0)
    found = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        times = worker.time_steps(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, repeats, seconds)
        found[f"gemm {str(dtype).removeprefix('torch.')}"] = 2 * n**3 / worker.median(times.ms) / 1e9
    size = 2**20 if tiny else 2**31 if device == "cuda" else 2**28
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = worker.time_steps(lambda: target.copy_(source), device, repeats, seconds)
    found["copy"] = 2 * size / worker.median(times.ms) / 1e6
    return found
