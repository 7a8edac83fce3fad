import math

import pytest
import torch

from pinclip.losses import Temperature


def test_values_and_gradients():
    module = Temperature(10.0, -10.0, max_scale=100.0)
    scale, bias = module()
    (3 * scale + 2 * bias).backward()
    assert scale.item() == pytest.approx(10.0) and bias.item() == -10.0
    assert module.log_scale.grad.item() == pytest.approx(30.0) and module.bias.grad.item() == 2.0
    assert Temperature(5.0)()[1] is None


def test_scale_is_bounded_and_comes_back():
    module = Temperature(50.0, max_scale=50.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    for sign in (-1.0, 1.0):
        for _ in range(8):
            optimizer.zero_grad()
            scale = module()[0]
            assert scale.item() <= 50.0 * (1 + 1e-6)
            (sign * scale).backward()
            optimizer.step()
    assert module.log_scale.item() == pytest.approx(math.log(50.0), abs=2e-2)
    optimizer.step()
    assert module()[0].item() < 50.0


def test_bf16_parameters_give_fp32_values():
    scale, bias = Temperature(10.0, -10.0).to(torch.bfloat16)()
    assert scale.dtype == bias.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"init_scale": 0.0}, "init_scale=0.0"),
        ({"init_scale": 200.0}, "init_scale=200.0"),
        ({"max_scale": -1.0}, "max_scale=-1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Temperature(**arguments)
