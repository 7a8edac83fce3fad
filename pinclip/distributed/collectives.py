"""Collectives over the default process group; with no group initialised the world is this process."""

import gc

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's rank, 0 when torch.distributed is not initialised."""
    return dist.get_rank() if _ready() else 0


def world_size() -> int:
    """Number of processes, 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if _ready() else 1


def _ready() -> bool:
    return dist.is_available() and dist.is_initialized()


def gather_counts(count: int, device: torch.device | str = "cpu") -> tuple[int, ...]:
    """How many rows every rank holds, in rank order. One all_gather of an int; reads it on the host.

    Over NCCL pass the CUDA device: the numbers travel on it and one host synchronisation follows. A caller
    that knows the counts passes them to `gather_rows` instead.
    """
    if world_size() == 1:
        return (count,)
    mine = torch.tensor([count], dtype=torch.int64, device=device)
    every = torch.empty(world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(every, mine)
    return tuple(every.tolist())


def check_counts(counts: tuple[int, ...], rows: int) -> None:
    """ValueError unless there is a count for every rank, and this rank's is `rows`."""
    if len(counts) != world_size() or counts[rank()] != rows:
        raise ValueError(f"counts={counts} for {world_size()} ranks, but rank {rank()} holds {rows} rows")


def gather_rows(x: Tensor, counts: tuple[int, ...] | None = None) -> Tensor:
    """Rows of all ranks in rank order: [n_r, ...] -> [sum n_r, ...]. Ranks may hold different numbers.

    Backward: the gradient of rank r's rows is the *sum* over ranks, in rank order (so it is repeatable),
    and arrives at rank r. Integer and bool tensors are gathered without autograd. `counts` are the rows of
    every rank (`gather_counts`), asked for here when not given.

    Collectives: forward one all_gather of rows padded to the largest count; backward one all_to_all.
    Extra memory: W·max(n_r) rows in forward, the same in backward.
    Raises ValueError when `counts` contradicts x.
    """
    if world_size() == 1:
        return x
    if counts is None:
        counts = gather_counts(x.shape[0], x.device)
    check_counts(counts, x.shape[0])
    if x.requires_grad and torch.is_grad_enabled():
        return _GatherRows.apply(x, counts)
    return _all_gather_rows(x, counts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        return _all_gather_rows(x, counts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        counts, mine = ctx.counts, ctx.counts[rank()]
        parts = grad.new_empty((len(counts) * mine, *grad.shape[1:]))
        dist.all_to_all_single(
            parts, grad.contiguous(), output_split_sizes=[mine] * len(counts), input_split_sizes=list(counts)
        )
        # Not reduce_scatter: its order of summation is the backend's, and gloo has none.
        total = parts[:mine].clone()
        for r in range(1, len(counts)):
            total += parts[r * mine : (r + 1) * mine]
        return total, None


def _all_gather_rows(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    longest = max(counts)
    padded = x.detach()
    if x.dtype == torch.bool:  # gloo gathers no bools
        padded = padded.to(torch.uint8)
    if x.shape[0] < longest:
        padded = torch.cat([padded, padded.new_zeros((longest - x.shape[0], *x.shape[1:]))])
    every = padded.new_empty((len(counts) * longest, *x.shape[1:]))
    dist.all_gather_into_tensor(every, padded.contiguous())
    if min(counts) < longest:
        every = torch.cat([every[r * longest : r * longest + n] for r, n in enumerate(counts)])
    return every.to(x.dtype)


def all_sum(value: Tensor) -> Tensor:
    """Sum of `value` over ranks, a new tensor without autograd. One all_reduce."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def all_mean(value: Tensor) -> Tensor:
    """Mean of the floating `value` over ranks, a new tensor without autograd. One all_reduce."""
    return all_sum(value) / world_size()


def any_true(flag: Tensor) -> Tensor:
    """Whether `flag` (bool, any shape) is true on any rank, element by element. One all_reduce."""
    return all_sum(flag.to(torch.int32)) > 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """End the process group, if there is one. Models that still refer to it from reference cycles are
    collected first: else gloo's threads outlive it, and one that lets go of a tensor while the interpreter
    ends aborts the process (pytorch#179291)."""
    gc.collect()
    if _ready():
        dist.destroy_process_group()
