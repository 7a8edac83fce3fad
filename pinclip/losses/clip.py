"""open_clip's two losses, with its constructors and calls, over the tiled ops: change one import.

    from pinclip.losses import ClipLoss, SigLipLoss  # was: from open_clip.loss import ClipLoss, SigLipLoss

Loss and gradients on every rank are open_clip's own; what is never formed is the N × N matrix of logits, and
in no mode is the whole batch's loss computed on every rank. Batches may be uneven.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pinclip.distributed import all_mean, gather_counts, gather_rows
from pinclip.distributed import rank as current_rank
from pinclip.distributed import world_size as current_world_size
from pinclip.losses.rows import pair_loss
from pinclip.ops.contrastive import contrastive_loss
from pinclip.ops.pairs import Pairs

_EXCHANGES = ("bidir", "shift", "reduce", "gather")


class _OpenClipLoss(nn.Module):
    """What the two have in common."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in [0, world_size={world_size})")
        self.rank, self.world_size = rank, world_size

    def _counts(self, image: Tensor, text: Tensor) -> tuple[int, ...]:
        if image.shape != text.shape:
            raise ValueError(f"text has shape {tuple(text.shape)}, image has {tuple(image.shape)}")
        if self.world_size == 1:
            return (len(image),)
        here = current_rank(), current_world_size()
        if here != (self.rank, self.world_size):
            raise ValueError(
                f"rank={self.rank}, world_size={self.world_size}, but torch.distributed says {here}"
            )
        return gather_counts(len(image), image.device)


class ClipLoss(_OpenClipLoss):
    """The symmetric softmax loss of CLIP. With S = logit_scale · image · textᵀ over the batch of all ranks,

        L = -1/(2N) Σ_i (log softmax(S_i·)_i + log softmax(S_·i)_i).

    Args:
        local_loss: True: a rank returns the mean over its own rows; False: every rank returns L.
        gather_with_grad: False: gathered features are constants, so that a rank's features get no gradient
            from the rows of other ranks; with local_loss=False the gradients of parameters, averaged by DDP,
            are then those of L / world_size. That is open_clip's default, and kept.
        rank, world_size: must be those of the default process group when world_size > 1.
        cache_labels: no labels are made, so it changes nothing. use_horovod: not supported.

    Extra memory: the gathered features, and that of `contrastive_loss`. Raises ValueError naming the
    argument.

    Source: Radford et al., arXiv 2103.00020; signature, modes and their gradients: open_clip 3.3.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(rank, world_size)
        if use_horovod:
            raise ValueError("use_horovod=True is not supported; use torch.distributed")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of this rank, or {"contrastive_loss": loss}.

        image_features, text_features [b, D] of the same pairs, L2-normalised. logit_bias shifts all logits
        and so changes nothing; its gradient is zero.
        """
        counts = self._counts(image_features, text_features)
        if self.world_size == 1:
            loss = contrastive_loss(image_features, text_features, logit_scale)
        else:
            loss = self._ranks(image_features, text_features, logit_scale, counts)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _ranks(self, image: Tensor, text: Tensor, scale, counts: tuple[int, ...]) -> Tensor:
        if not self.local_loss:
            # Every rank computes its own rows only, L_r, whose mean over ranks is L. Features get
            # Σ_r dL_r = W dL through the gather, as open_clip's do with it, and dL without it.
            share = 1.0 if self.gather_with_grad else 1 / self.world_size
            image, text = _scaled_gradient(image, share), _scaled_gradient(text, share)
            if isinstance(scale, Tensor):
                scale = _MeanGradient.apply(scale)
        constant = self.local_loss and not self.gather_with_grad
        pairs, total = Pairs(offset=sum(counts[: self.rank])), sum(counts)
        # The mean over this rank's rows where they are asked for, else W times their part of the whole mean.
        normalizer = max(counts[self.rank], 1) if self.local_loss else total / self.world_size
        loss = 0.0
        for rows, columns in ((image, text), (text, image)):
            every = gather_rows(columns.detach() if constant else columns, counts)
            loss = loss + pair_loss("softmax", rows, every, scale, None, pairs, None, normalizer) / 2
        return loss if self.local_loss else loss + (all_mean(loss) - loss).detach()


class SigLipLoss(_OpenClipLoss):
    """The sigmoid loss of SigLIP. With S = logit_scale · image · textᵀ + logit_bias, a rank of b rows returns

        L_r = 1/b Σ_{i of the rank} Σ_j softplus(-z_ij S_ij),    z_ij = 1 for the pair itself, else -1,

    j running over the texts of all ranks.

    Args:
        rank, world_size: must be those of the default process group when world_size > 1.
        dist_impl: open_clip's ways of passing the texts round, which give the same; here it is one gather.
        cache_labels: no labels are made, so it changes nothing.

    Extra memory: the gathered texts, and that of `sigmoid_loss`. Raises ValueError naming the argument.

    Source: Zhai et al., arXiv 2303.15343; signature: open_clip 3.3.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__(rank, world_size)
        if dist_impl is not None and dist_impl not in _EXCHANGES:
            raise ValueError(f"dist_impl={dist_impl!r}, expected one of {_EXCHANGES}")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of this rank, or {"contrastive_loss": loss}.

        image_features, text_features [b, D] of the same pairs, L2-normalised.
        """
        counts = self._counts(image_features, text_features)
        every = text_features if self.world_size == 1 else gather_rows(text_features, counts)
        pairs = Pairs(offset=sum(counts[: self.rank]))
        bias = 0.0 if logit_bias is None else logit_bias
        normalizer = max(counts[self.rank], 1)
        loss = pair_loss("sigmoid", image_features, every, logit_scale, bias, pairs, None, normalizer)
        return {"contrastive_loss": loss} if output_dict else loss


class _MeanGradient(torch.autograd.Function):
    """The same value; its gradient is averaged over ranks. One all_reduce in backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_mean(grad)


def _scaled_gradient(x: Tensor, share: float) -> Tensor:
    """The same value, with the gradient times `share`."""
    if share == 1.0 or not x.requires_grad:
        return x
    return _ScaledGradient.apply(x, share)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.share, None
