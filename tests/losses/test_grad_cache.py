"""The losses give gradients of embeddings without autograd through the towers (GradCache, 2101.06983)."""

import torch
import torch.nn.functional as F
from torch import nn

from pinclip.losses import ImageTextLoss, NeighborLoss, Temperature


def test_chunked_towers_get_the_gradients_of_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    ids, partner = torch.arange(12), torch.arange(12) ^ 1
    image_text, neighbor = ImageTextLoss("softmax"), NeighborLoss("sigmoid")
    modules = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4), Temperature(9.0, -2.0)]).double()

    def towers(rows):
        return tuple(F.normalize(tower(rows), dim=1) for tower in modules[:2])

    def loss_of(image, text):
        scale, bias = modules[2]()
        return image_text(image, text, scale) + neighbor(image, text, scale, bias, ids=ids, partner=partner)

    whole = torch.autograd.grad(loss_of(*towers(inputs)), list(modules.parameters()))

    chunks = inputs.split(5)
    with torch.no_grad():
        parts = zip(*(towers(chunk) for chunk in chunks))
    embeddings = [torch.cat(part).requires_grad_() for part in parts]
    loss_of(*embeddings).backward()
    for chunk, image, text in zip(chunks, *(each.grad.split(5) for each in embeddings)):
        torch.autograd.backward(towers(chunk), (image, text))
    for parameter, expected in zip(modules.parameters(), whole):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-14)
