"""Neighbor alignment over the batch of all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pinclip.distributed import GatheredRows, all_sum, gather_rows, world_size
from pinclip.losses.rows import check_kind, mean_over, only, only_columns, pair_loss, removing
from pinclip.losses.sharded import sharded_loss
from pinclip.ops.pairs import Pairs


class NeighborLoss(nn.Module):
    """Each local x against all ranks' y; its positive is its sampled neighbor (`partner`).

    kind="softmax": the row direction of `contrastive_loss`. kind="sigmoid": `sigmoid_loss`. `dims`:
    Matryoshka prefixes. x and y are embeddings of the same pins, of one kind (fused–fused) or of two
    (image–fused).
    Averaged over the rows of all ranks that have a usable partner, as `pinclip.distributed` states.
    No parameters.
    """

    def __init__(self, kind: str = "softmax", dims: Sequence[int] | None = None) -> None:
        super().__init__()
        check_kind(kind)
        self.kind, self.dims = kind, dims

    def forward(
        self,
        x: Tensor,
        y: Tensor | GatheredRows,
        scale: Tensor | float,
        bias: Tensor | float | None = None,
        *,
        ids: Tensor,
        partner: Tensor,
        known: tuple[Tensor, Tensor] | None = None,
        log_q: Tensor | None = None,
        valid_x: Tensor | None = None,
        valid_y: Tensor | None = None,
    ) -> Tensor:
        """Loss of this rank's rows, such that its mean over ranks is the loss of the whole batch.

        x, y [b, D], L2-normalised; b may differ between ranks. y may be gathered already, to share that with
        other losses: then all its rows must be finite. ids int64 [b]: the pin of each row; columns
        of equal id, the row itself among them, are no negatives. partner int64 [b]: *global* row number of
        each row's neighbor (rows of all ranks in rank order), -1 for none: the row then has no loss, its y is
        still a column. known = (indptr [b+1], indices) int64: CSR of the global columns that are known
        neighbors of each local row: no negatives either. log_q float [b]: log of the probability with which a
        pin appears in a batch slot. valid_x, valid_y bool [b]: rows and columns that exist; the others take
        no part and get zero gradient, whatever their vectors hold. `bias` is read by the sigmoid kind only.
        log_q and valid_y are given on all ranks or on none.

        Collectives at W > 1: one gather of the counts, of ids and of each of log_q, valid_y that is given;
        one sum of the number of rows with a partner; y of all ranks a shard at a time, and its gradients back
        (`pinclip.losses.sharded`). Extra memory: the gathered y, and that of the op on a shard. Raises
        ValueError naming the argument.
        """
        local = y.local if isinstance(y, GatheredRows) else y
        self._check(x, local, ids, partner, log_q, valid_x, valid_y)
        y = only_columns(y, valid_y)
        counts = y.counts
        if partner.device.type == "cpu" and len(partner):
            worst = int(partner.max())
            if worst >= sum(counts) or int(partner.min()) < -1:
                worst = worst if worst >= sum(counts) else int(partner.min())
                raise ValueError(f"partner has row {worst}, expected -1 … {sum(counts) - 1}")
        x = x if valid_x is None else only(x, valid_x)
        ids_all = gather_rows(ids, counts)
        log_q_all, valid_all = (
            None if value is None else gather_rows(value, counts) for value in (log_q, valid_y)
        )

        # One entry per row keeps every shape fixed: a row without a partner lists column 0 with weight 0.
        has_partner = partner >= 0
        target = partner.clamp_min(0)
        if valid_x is not None:
            has_partner = has_partner & valid_x
        if valid_all is not None:
            has_partner = has_partner & valid_all[target]
        present = has_partner.float()
        pairs = Pairs(
            indptr=torch.arange(len(x) + 1, device=x.device),
            indices=target,
            weights=present,
            row_ids=ids,
            col_ids=ids_all,
            known_indptr=None if known is None else known[0],
            known_indices=None if known is None else known[1],
            log_q_cols=removing(log_q_all, valid_all),
            row_weights=present,
        )
        normalizer = mean_over(all_sum(present.sum()))
        if world_size() == 1:
            return pair_loss(self.kind, x, y.local, scale, bias, pairs, self.dims, normalizer)
        options = {"symmetric": False, "dims": self.dims, "normalizer": normalizer}
        return sharded_loss(self.kind, x, y, scale, bias, pairs, **options)

    @staticmethod
    def _check(x, y, ids, partner, log_q, valid_x, valid_y) -> None:
        if x.shape != y.shape:
            raise ValueError(f"y has shape {tuple(y.shape)}, x has {tuple(x.shape)}")
        rest = {"ids": ids, "partner": partner, "log_q": log_q, "valid_x": valid_x, "valid_y": valid_y}
        for name, value in rest.items():
            if value is not None and value.shape != x.shape[:1]:
                shape = tuple(value.shape)
                raise ValueError(f"{name} has shape {shape}, expected [{len(x)}] like the rows of x")
        if partner.dtype != torch.int64:
            raise ValueError(f"partner has dtype {partner.dtype}, expected torch.int64")
