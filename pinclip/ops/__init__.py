"""Fused ops for image-text models, usable in any torch model: `from pinclip.ops import attention`.

Each op has one stem in every room: `ops/STEM.py` (the public function), `reference/STEM.py` (the same in
plain torch; the truth), `tests/ops/test_STEM.py`.  docs/ops.md and docs/losses.md have the equations.
"""

from pinclip.ops.attention import AttentionPlan, QKNorm, attention, attention_plan
from pinclip.ops.attention_pool import attention_pool
from pinclip.ops.contrastive import contrastive_loss
from pinclip.ops.funnel_pool import funnel_pool
from pinclip.ops.fusion_pack import FusionLayout, fusion_pack
from pinclip.ops.gated_residual_norm import gated_residual_norm
from pinclip.ops.gelu import gelu
from pinclip.ops.l2_normalize import l2_normalize
from pinclip.ops.pairs import Pairs
from pinclip.ops.random_walk import WalkGraph, random_walk
from pinclip.ops.sigmoid import sigmoid_loss

__all__ = [
    "AttentionPlan",
    "FusionLayout",
    "Pairs",
    "QKNorm",
    "WalkGraph",
    "attention",
    "attention_plan",
    "attention_pool",
    "contrastive_loss",
    "funnel_pool",
    "fusion_pack",
    "gated_residual_norm",
    "gelu",
    "l2_normalize",
    "random_walk",
    "sigmoid_loss",
]
