"""What the tests of attention, pooling and fusion ops share."""

import torch
from torch.utils.checkpoint import checkpoint


def normal(*shape, seed=0, dtype=torch.float64, scale=1.0):
    """Standard normal numbers times `scale`; a seed gives the same ones in every dtype, but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def run(function, tensors):
    """(results, gradients) of function(*tensors), for fixed random output gradients, not all one."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    seeds = [normal(*r.shape, seed=90 + i, dtype=r.dtype).to(r.device) for i, r in enumerate(results)]
    grads = torch.autograd.grad(results, leaves, seeds, allow_unused=True, materialize_grads=True)
    return [r.detach() for r in results], list(grads)


def assert_same(ours, theirs, rtol=0.0, atol=0.0):
    """Two returns of `run` are equal."""
    for kind, a, b in zip(("result", "gradient"), ours, theirs):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            text = f"{kind} {index}: "
            torch.testing.assert_close(left, right, rtol=rtol, atol=atol, msg=lambda m, t=text: t + m)


def assert_exact(function, reference, tensors):
    """function equals reference in fp64, in every result and every gradient."""
    ours = run(function, [tensor.double() for tensor in tensors])
    assert all(t.dtype == torch.float64 for part in ours for t in part)
    assert_same(ours, run(reference, [tensor.double() for tensor in tensors]), rtol=1e-10, atol=1e-11)


def assert_as_exact_as(function, plain, reference, tensors):
    """In the tensors' dtype, function errs at most twice as much as plain torch does, against fp64.

    The errors are largest absolute differences; one rounding of the largest true number is allowed besides.
    """
    truth = run(reference, [tensor.double() for tensor in tensors])
    for kind, *parts in zip(("result", "gradient"), run(function, tensors), run(plain, tensors), truth):
        for index, (ours, theirs, true) in enumerate(zip(*parts, strict=True)):
            if not true.numel():
                continue
            error, allowed = ((got.double() - true).abs().max().item() for got in (ours, theirs))
            rounding = torch.finfo(ours.dtype).eps * true.abs().max().item()
            assert error <= 2 * allowed + rounding, f"{kind} {index}: {error:.3g}, plain torch {allowed:.3g}"


def assert_survives(function, tensors):
    """The same numbers a second time, compiled, checkpointed, and from strided tensors."""
    torch.compiler.reset()  # compiled variants of other cases count against a limit
    expected = run(function, tensors)
    assert_same(run(function, tensors), expected)
    assert_same(run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors), expected)
    assert_same(run(lambda *leaves: checkpoint(function, *leaves, use_reentrant=False), tensors), expected)
    strided = [torch.stack((t, t), -1)[..., 0] for t in tensors]
    assert not any(t.is_contiguous() for t in strided if t.numel() > 1)
    # Another stride may take another path through the BLAS, hence another rounding.
    eps = torch.finfo(tensors[0].dtype).eps
    spread = run(lambda *leaves: function(*(torch.stack((t, t), -1)[..., 0] for t in leaves)), tensors)
    assert_same(spread, expected, rtol=100 * eps, atol=100 * eps)


def assert_autocast(function, tensors, dtype):
    """Under autocast to bf16 the result is of `dtype`, and gradients do not depend on where backward runs."""
    leaves = [tensor.float().requires_grad_() for tensor in tensors]
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        result = function(*leaves)
        inside = torch.autograd.grad(result.float().sum(), leaves, retain_graph=True)
    assert result.dtype == dtype
    outside = torch.autograd.grad(result.float().sum(), leaves)
    assert all(torch.equal(a, b) and a.dtype == leaf.dtype for leaf, a, b in zip(leaves, inside, outside))
    return result.detach()


def assert_backward_ignores_autocast(function, tensors):
    """What ran in fp32 has fp32's gradients, also where backward runs under autocast."""
    leaves = [tensor.float().requires_grad_() for tensor in tensors]
    result = function(*leaves)
    outside = torch.autograd.grad(result.square().sum(), leaves, retain_graph=True)
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        inside = torch.autograd.grad(result.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))
