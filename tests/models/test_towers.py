"""Shapes, initialisation and options of the two towers that the whole-model test does not pin down."""

import math

import pytest
import torch

from pinclip.models.image_tower import ImageTower, ImageTowerConfig
from pinclip.models.text_tower import TextTower, TextTowerConfig

SIZES = {"width": 64, "depth": 4, "heads": 4}


@pytest.mark.parametrize(
    "funnel, stages", [((), (64,)), ((2,), (64, 16)), ((1, 3), (64, 16, 4)), ((1, 2, 3), (64, 16, 4, 1))]
)
def test_funnel_stages(funnel, stages):
    config = ImageTowerConfig(image_size=64, patch_size=8, funnel=funnel, **SIZES)
    assert config.stage_tokens == stages
    features = ImageTower(config, 32)(torch.randn(2, 3, 64, 64))
    assert features.pooled.shape == (2, 32)
    assert [tuple(s.shape) for s in features.stages] == [(2, n, 64) for n in stages]


def test_attention_head_needs_no_projection_at_its_own_width():
    config = ImageTowerConfig(image_size=16, patch_size=8, **SIZES)
    assert ImageTower(config, 64).projection is None
    assert ImageTower(config, 32).projection is not None
    mean = ImageTowerConfig(image_size=16, patch_size=8, pool="mean", **SIZES)
    assert ImageTower(mean, 64).projection is not None


def test_activation_checkpointing_keeps_less():
    """The recomputing tower stores one tensor for each block, the plain one many."""
    saved = {}
    for recompute in (False, True):
        torch.manual_seed(0)
        config = ImageTowerConfig(image_size=64, patch_size=8, activation_checkpointing=recompute, **SIZES)
        tower = ImageTower(config, 64)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x
        ):
            pooled = tower(torch.randn(4, 3, 64, 64)).pooled
        pooled.sum().backward()
        saved[recompute] = sum(sizes)
    assert saved[True] < saved[False] / 2


def test_initialisation_is_siglips():
    torch.manual_seed(0)
    image = ImageTower(ImageTowerConfig(image_size=64, patch_size=8, width=128, depth=1, heads=4), 128)
    text = TextTower(TextTowerConfig(vocab_size=500, max_length=64, width=128, depth=1, heads=4), 96)
    state = {**image.state_dict(), **{f"text.{k}": v for k, v in text.state_dict().items()}}
    stds = {
        "embeddings.patch_embedding.weight": 1 / math.sqrt(3 * 64),
        "embeddings.position_embedding.weight": 1 / math.sqrt(128),
        "text.embeddings.token_embedding.weight": 1 / math.sqrt(128),
        "text.head.weight": 1 / math.sqrt(128),
        # Xavier uniform of each matrix by itself: variance 2 / (fan in + fan out).
        "encoder.layers.0.self_attn.qkv_proj.weight": math.sqrt(2 / 256),
        "encoder.layers.0.mlp.fc1.weight": math.sqrt(2 / (128 + 512)),
        "head.attention.in_proj_weight": math.sqrt(2 / 256),
    }
    for name, std in stds.items():
        assert abs(state[name].std() / std - 1) < 0.05, name
    assert state["encoder.layers.0.self_attn.qkv_proj.bias"].abs().max() == 0
    assert state["encoder.layers.0.mlp.fc1.bias"].abs().max() < 1e-5


def test_packed_text_equals_each_text_alone():
    torch.manual_seed(0)
    tower = TextTower(TextTowerConfig(vocab_size=30, max_length=8, width=24, depth=2, heads=2), 16).double()
    tokens, lengths = torch.randint(0, 30, (4, 8)), torch.tensor([8, 1, 5, 3])
    together = tower(tokens, lengths)
    for i, length in enumerate(lengths):
        alone = tower(tokens[i : i + 1, :length])
        torch.testing.assert_close(together.pooled[i], alone.pooled[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(together.tokens[i, :length], alone.tokens[0], rtol=0, atol=1e-13)
        assert together.tokens[i, length:].abs().sum() == 0


def test_lengths_on_a_device_are_refused():
    tower = TextTower(TextTowerConfig(vocab_size=30, max_length=8, width=24, depth=1, heads=2), 16)
    with pytest.raises(ValueError, match=r"lengths must be \[2\] on the host, got \[2\] on meta"):
        tower(torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, dtype=torch.int64, device="meta"))
