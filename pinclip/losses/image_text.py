"""Image–text alignment over the batch of all ranks."""

from collections.abc import Sequence

from torch import Tensor, nn

from pinclip.distributed import GatheredRows, gather_rows, rank, world_size
from pinclip.losses.rows import check_kind, mean_over, only, only_columns, pair_loss, removing
from pinclip.losses.sharded import sharded_loss
from pinclip.ops.contrastive import contrastive_loss
from pinclip.ops.pairs import Pairs


class ImageTextLoss(nn.Module):
    """Each image against all texts and each text against all images; the pair of one pin is the positive.

    kind="softmax": the symmetric `contrastive_loss`. kind="sigmoid": `sigmoid_loss` of images against texts,
    every pair once. `dims`: Matryoshka prefixes. Averaged over the valid pins of all ranks, as
    `pinclip.distributed` states. No parameters.
    """

    def __init__(self, kind: str = "softmax", dims: Sequence[int] | None = None) -> None:
        super().__init__()
        check_kind(kind)
        self.kind, self.dims = kind, dims

    def forward(
        self,
        image: Tensor,
        text: Tensor | GatheredRows,
        scale: Tensor | float,
        bias: Tensor | float | None = None,
        *,
        ids: Tensor | None = None,
        valid: Tensor | None = None,
        log_q: Tensor | None = None,
    ) -> Tensor:
        """Loss of this rank's rows, such that its mean over ranks is the loss of the whole batch.

        image, text [b, D] of the same pins, L2-normalised; b may differ between ranks. text may be gathered
        already, to share that with other losses: then all its rows must be finite. ids int64 [b]: pins of
        equal id are no negatives of each other. valid bool [b]: pins that have both modalities; the others
        are neither rows nor columns and get zero gradient, whatever their vectors hold. log_q float [b]: log
        of the probability with which a pin appears in a batch slot. `bias` is read by the sigmoid kind only.
        ids, valid and log_q are given on all ranks or on none.

        Collectives at W > 1: one gather of the counts and of each of ids, valid, log_q that is given; the
        text of all ranks a shard at a time, and its gradients back (`pinclip.losses.sharded`). Extra memory:
        the gathered text, and that of the op on a shard. Raises ValueError naming the argument.
        """
        local = text.local if isinstance(text, GatheredRows) else text
        if image.shape != local.shape:
            raise ValueError(f"text has shape {tuple(local.shape)}, image has {tuple(image.shape)}")
        for name, value in (("ids", ids), ("valid", valid), ("log_q", log_q)):
            if value is not None and value.shape != image.shape[:1]:
                shape = tuple(value.shape)
                raise ValueError(f"{name} has shape {shape}, expected [{len(image)}] like the rows of image")
        if valid is not None:
            image = only(image, valid)
        text = only_columns(text, valid)
        if world_size() == 1:
            return self._local(image, text.local, scale, bias, ids, valid, log_q)

        counts = text.counts
        ids_all, valid_all, log_q_all = (
            None if value is None else gather_rows(value, counts) for value in (ids, valid, log_q)
        )
        pairs = Pairs(
            offset=sum(counts[: rank()]),
            row_ids=ids,
            col_ids=ids_all,
            log_q_cols=removing(log_q_all, valid_all),
            log_q_rows=removing(log_q, valid),
            row_weights=None if valid is None else valid.float(),
            col_weights=None if valid is None else valid_all.float(),
        )
        return sharded_loss(
            self.kind,
            image,
            text,
            scale,
            bias,
            pairs,
            symmetric=self.kind == "softmax",
            dims=self.dims,
            normalizer=mean_over(sum(counts) if valid_all is None else valid_all.sum()),
        )

    def _local(self, image, text, scale, bias, ids, valid, log_q) -> Tensor:
        weights = None if valid is None else valid.float()
        log_q = removing(log_q, valid)
        pairs = Pairs(
            row_ids=ids,
            col_ids=ids,
            log_q_cols=log_q,
            log_q_rows=log_q,
            row_weights=weights,
            col_weights=weights,
        )
        if self.kind == "sigmoid":
            return pair_loss(self.kind, image, text, scale, bias, pairs, self.dims, None)
        return contrastive_loss(image, text, scale, pairs, dims=self.dims)
