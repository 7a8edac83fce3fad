"""Rows of all ranks one shard at a time, each on its way while the caller works on the one before."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pinclip.distributed.collectives import check_counts, gather_counts, rank, world_size


class GatheredRows:
    """The rows of all ranks, gathered a shard at a time when they are first gone through, then kept: so
    several losses can share one gather.

    local [n, ...] the rows of this rank; counts the rows of every rank, None: asked for (`gather_counts`).
    Iteration yields (r, the rows of rank r) without autograd: this rank's own first, then those of rank + 1,
    rank + 2, … (mod W). The exchange of a shard starts before the shard in front of it is yielded, so it runs
    under what the caller does with that one. Every rank must go through all shards, in the same order of
    calls; in all, a rank receives what one all_gather brings.

    Collectives: W - 1 exchanges, point to point. Extra memory: the rows of the other ranks.
    Raises ValueError when `counts` contradicts the local rows.
    """

    def __init__(self, local: Tensor, counts: tuple[int, ...] | None = None) -> None:
        self.local = local
        self.counts = gather_counts(len(local), local.device) if counts is None else tuple(counts)
        check_counts(self.counts, len(local))
        self.shards: list[tuple[int, Tensor]] = []

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return iter(self.shards) if self.shards else self._gather()

    def _gather(self) -> Iterator[tuple[int, Tensor]]:
        x, me, world, shards = self.local.detach().contiguous(), rank(), world_size(), []
        arriving = _exchange(x, self.counts, 1) if world > 1 else None
        for step in range(world):
            shards.append((me, x) if step == 0 else ((me + step) % world, arriving.wait()))
            if 0 < step < world - 1:
                arriving = _exchange(x, self.counts, step + 1)
            yield shards[-1]
        self.shards = shards


class RowSums:
    """The way back of `GatheredRows`: sums over ranks of what each found for the rows of every rank.

    `add` is called once for every shard in the order of `GatheredRows`; what it is given goes to the owner
    under the work on the next shard. `result` is the sum for the local rows, in the dtype of the parts, taken
    in fp32 (fp64 for fp64) in a fixed order: the own part, then those of rank - 1, rank - 2, …

    Collectives: W - 1 exchanges, point to point. Extra memory: two parts in transit.
    """

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.counts, self.step, self.total, self.dtype, self.arriving = counts, 0, None, None, None

    def add(self, part: Tensor) -> None:
        """`part` [rows of the shard's rank, ...]."""
        if self.step == 0:
            self.dtype = part.dtype
            self.total = part.to(torch.promote_types(part.dtype, torch.float32), copy=True)
        else:
            self._collect()
            self.arriving = _exchange(part.contiguous(), self.counts, self.step, back=True)
        self.step += 1

    def result(self) -> Tensor:
        self._collect()
        return self.total.to(self.dtype)

    def _collect(self) -> None:
        if self.arriving is not None:
            self.total += self.arriving.wait()
            self.arriving = None


class _Arriving:
    def __init__(self, rows: Tensor, sent: Tensor, works: list) -> None:
        self.rows, self.sent, self.works = rows, sent, works

    def wait(self) -> Tensor:
        """The rows; on NCCL the current stream waits, not the host."""
        for work in self.works:
            work.wait()
        return self.rows


def _exchange(rows: Tensor, counts: tuple[int, ...], step: int, back: bool = False) -> _Arriving:
    """Start to send `rows` to rank - step and to receive those of rank + step; with `back` the other way, and
    what arrives belongs to the local rows."""
    me, world = rank(), world_size()
    before, behind = (me - step) % world, (me + step) % world
    to, source, arriving = (behind, before, counts[me]) if back else (before, behind, counts[behind])
    received = rows.new_empty((arriving, *rows.shape[1:]))
    messages = [(dist.isend, rows, to), (dist.irecv, received, source)]
    # Both ends know that an empty message is not sent.
    calls = [dist.P2POp(call, tensor, peer) for call, tensor, peer in messages if tensor.numel()]
    return _Arriving(received, rows, dist.batch_isend_irecv(calls) if calls else [])


def exchange_rows(parts: list[Tensor], counts: tuple[int, ...]) -> list[Tensor]:
    """`parts[r]` [counts[r], ...] goes to rank r; returns what every rank found for the local rows, in rank
    order. One all_to_all."""
    mine = counts[rank()]
    sent = torch.cat(parts)
    received = sent.new_empty((len(counts) * mine, *sent.shape[1:]))
    dist.all_to_all_single(received, sent, [mine] * len(counts), list(counts))
    return list(received.split(mine)) if mine else [received] * len(counts)


def check_same(value: Tensor, what: str) -> None:
    """RuntimeError unless the 0-d `value` is the same on all ranks. One all_gather; on a GPU the error comes
    from the device, without a synchronisation."""
    if world_size() == 1:
        return
    every = value.new_empty(world_size())
    dist.all_gather_into_tensor(every, value.detach().reshape(1))
    same = (every == value) | (every.isnan() & value.isnan())
    torch._assert_async(same.all(), f"{what} differs between ranks")
