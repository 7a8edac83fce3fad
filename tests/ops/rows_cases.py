"""What the tests of the row kernels share: gated residual norm, fusion pack, L2 normalisation, GELU.

Functions named check_* run in Triton's interpreter (see triton_cases). These kernels have no products, so
bf16 is right there too.
"""

import importlib

import torch
from ops_helpers import run
from triton_cases import assert_within_budget

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def use_row_kernels(monkeypatch, stem, programs=2):
    """Makes an op run its kernels on the CPU, with so few programs that each walks many rows; what is
    allocated and not written holds NaN."""
    from pinclip_kernels.triton import _rows, gelu

    op = importlib.import_module(f"pinclip.ops.{stem}")
    for name in ("runs_triton", "on_gpu"):
        if hasattr(op, name):
            monkeypatch.setattr(op, name, lambda *args: args[-1].dtype != torch.float64)
    monkeypatch.setattr(_rows.RowConfig, "full", lambda self, device: programs)
    whole = gelu.GeluConfig.grid

    def few(*args):
        along_rows, blocks = whole(*args)
        return min(along_rows, programs), blocks

    monkeypatch.setattr(gelu.GeluConfig, "grid", few)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)


def assert_as_exact_over_draws(function, plain, reference, problems):
    """As `ops_helpers.assert_as_exact_as`, with the errors taken over several draws: that of a single number,
    such as the gradient of a scalar, may be small by chance."""
    errors, allowed, greatest = ({} for _ in range(3))
    for tensors in problems:
        truth = run(reference, [t.double() for t in tensors])
        ours, theirs = run(function, tensors), run(plain, tensors)
        for part in (0, 1):
            for i, true in enumerate(truth[part]):
                if not true.numel():
                    continue
                here, eps = (part, i), torch.finfo(ours[part][i].dtype).eps
                for kept, got in ((errors, ours), (allowed, theirs)):
                    error = (got[part][i].double() - true).abs().max().item()
                    kept[here] = max(kept.get(here, 0.0), error)
                greatest[here] = max(greatest.get(here, 0.0), eps * true.abs().max().item())
    for here, error in errors.items():
        assert error <= 2 * allowed[here] + greatest[here], f"{here}: {error:.3g}, plain {allowed[here]:.3g}"


def assert_cases(cases, compiled, walks=None):
    """Every case names each argument of its kernel; those whose name starts with one of `compiled` keep their
    budget: no spill, and no wait of a tensor core product, as there is none.

    walks: the RowWalks of forward and backward, whose programs must all be resident: one that waited for the
    others to end would have the GPU to itself. With the newest Triton, for which the tables are made.
    """
    from pinclip_kernels.triton._rows import row_config

    from bench.compile import known_versions, report_triton, triton_version

    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert set(case.signature) == set(case.kernel.arg_names), case.name
        assert {k for k, v in case.signature.items() if v == "constexpr"} == set(case.constexprs)
    for name, arch in compiled:
        (case,) = (each for each in cases if each.name == name)
        assert_within_budget(case, arch)
        if walks is not None and triton_version() == known_versions()[-1]:
            wanted = row_config(case.constexprs["D"], walks["backward" in name]).programs
            assert wanted <= report_triton(case, arch).blocks, f"{name} sm_{arch}: {wanted} programs per SM"


def assert_repeats(function, tensors, times=5):
    """Bit for bit the same results and gradients."""
    first, *others = ([t for part in run(function, tensors) for t in part] for _ in range(times))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


def assert_captured(function, tensors):
    """A CUDA graph of forward and backward gives what the op gives, for new contents of the first tensor."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]

    def step():
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        grads = torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])
        return [*(r.detach() for r in results), *grads]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].copy_(leaves[0].flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def assert_does_not_wait(function, tensors):
    """Neither direction waits for the GPU."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]

    def step():
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])

    assert_step_does_not_wait(step)


def assert_step_does_not_wait(step):
    """Nor does a step of any kind, the second time."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
