"""pytest bench/ --benchmark-json FILE: the registry's arms under pytest-benchmark.

On a GPU the quick shapes, on a CPU the tiny ones and, with PINCLIP_BENCH_QUICK=1, the CPU's quick shapes. An
arm that is not installed, cannot do a shape or is wrong is skipped or fails; only what passed its gate is
timed.
"""

from __future__ import annotations

import os

import pytest
import torch

from bench import machine, registry

DEVICE = machine.default_device()
TINY = DEVICE == "cpu" and not os.environ.get("PINCLIP_BENCH_QUICK")


def _cases():
    for entry in registry.entries().values():
        for shape in registry.select(entry, DEVICE, quick=True, tiny=TINY):
            for arm in entry.arms:
                if DEVICE in arm.on:
                    for mode in registry.modes_of(entry, shape):
                        name = f"{entry.name}-{shape.name}-{arm.name}-{mode}".replace(" ", "_")
                        yield pytest.param(entry, shape, arm, mode, id=name)


@pytest.mark.parametrize("entry,shape,arm,mode", _cases())
def test_arm(entry, shape, arm, mode, benchmark):
    if arm.memory is not None:
        needed, (_, free) = arm.memory(shape, mode), machine.free_bytes(DEVICE)
        if needed > 0.9 * free:
            pytest.skip(f"does not fit: needs {needed / 2**30:.3g} GiB")
    try:
        prepared = entry.prepare(shape, arm, DEVICE)
    except registry.Unsupported as error:
        pytest.skip(f"unsupported: {error}")
    except ImportError as error:
        if arm.role == "ours":
            raise
        pytest.skip(f"not installed: {error}")
    verdict = prepared.verdict
    if not verdict.passed and arm.role == "rival":
        pytest.skip(f"wrong: {verdict.why}")
    assert verdict.passed, verdict.why
    step = prepared.steps[mode]

    def run():
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    work = entry.work(shape, mode)
    benchmark.extra_info.update(flops=work.flops, bytes=work.bytes, items=work.items, unit=work.unit)
    benchmark.extra_info.update(error=verdict.error, **machine.versions())
    benchmark.pedantic(run, rounds=2 if TINY else 10, warmup_rounds=1)
