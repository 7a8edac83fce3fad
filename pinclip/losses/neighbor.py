"""Neighbor alignment over the batch of all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pinclip.distributed import all_sum, gather_counts, gather_rows, world_size
from pinclip.losses.rows import check_kind, mean_over, only, pair_loss, removing
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
        y: Tensor,
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

        x, y [b, D], L2-normalised; b may differ between ranks. ids int64 [b]: the pin of each row; columns
        of equal id, the row itself among them, are no negatives. partner int64 [b]: *global* row number of
        each row's neighbor (rows of all ranks in rank order), -1 for none: the row then has no loss, its y is
        still a column. known = (indptr [b+1], indices) int64: CSR of the global columns that are known
        neighbors of each local row: no negatives either. log_q float [b]: log of the probability with which a
        pin appears in a batch slot. valid_x, valid_y bool [b]: rows and columns that exist; the others take
        no part and get zero gradient, whatever their vectors hold. `bias` is read by the sigmoid kind only.
        log_q and valid_y are given on all ranks or on none.

        Collectives at W > 1: one gather of rows for y, ids, and each of log_q, valid_y that is given; one of
        the counts; one sum of the number of rows with a partner. Backward: one exchange.
        Extra memory: the gathered rows, and that of the op. Raises ValueError naming the argument.
        """
        self._check(x, y, ids, partner, log_q, valid_x, valid_y)
        counts = gather_counts(len(y), y.device) if world_size() > 1 else (len(y),)
        if partner.device.type == "cpu" and len(partner):
            worst = int(partner.max())
            if worst >= sum(counts) or int(partner.min()) < -1:
                worst = worst if worst >= sum(counts) else int(partner.min())
                raise ValueError(f"partner has row {worst}, expected -1 … {sum(counts) - 1}")
        x = x if valid_x is None else only(x, valid_x)
        y = y if valid_y is None else only(y, valid_y)
        y_all, ids_all = gather_rows(y, counts), gather_rows(ids, counts)
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
        return pair_loss(self.kind, x, y_all, scale, bias, pairs, self.dims, normalizer)

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
