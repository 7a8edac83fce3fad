"""Small models and batches for the model tests."""

import pytest
import torch

from pinclip.models.pinclip import PinCLIP, PinCLIPConfig

TINY = {
    "image": {"image_size": 32, "patch_size": 4, "width": 24, "depth": 3, "heads": 3, "funnel": [1]},
    "text": {"vocab_size": 40, "max_length": 9, "width": 20, "depth": 2, "heads": 2, "mlp_width": 28},
    "fusion": {"width": 16, "depth": 2, "heads": 2, "fusion_tokens": 2, "image_stages": "all"},
    "embed_dim": 12,
    "dims": [4, 12],
}


def build(seed: int = 0, **changes) -> PinCLIP:
    """A tiny model; `image={...}` and the like override TINY. No parameter keeps a neutral value."""
    torch.manual_seed(seed)
    config = {
        key: {**value, **changes.get(key, {})} if isinstance(value, dict) else changes.get(key, value)
        for key, value in TINY.items()
    }
    model = PinCLIP(PinCLIPConfig.model_validate(config))
    perturb(model)
    return model


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    """Move biases, norms and gates away from 0 and 1, where a forgotten or swapped one would not show."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter) if parameter.ndim < 2 else 0.0)


@pytest.fixture(scope="session")
def tiny():
    return build


@pytest.fixture(scope="session")
def stir():
    return perturb


@pytest.fixture
def mixed():
    """Six pins: both, image, text, none, both, text; with the pin each row belongs to."""
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64),
        "tokens": torch.randint(0, 40, (4, 7), generator=generator),
        "token_lengths": [3, 7, 1, 4],
        "image_rows": [0, 1, 4],
        "text_rows": [5, 0, 2, 4],
        "batch_size": 6,
    }
