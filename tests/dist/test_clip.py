"""ClipLoss and SigLipLoss against open_clip's own, rank by rank, in fp64: no mocks."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from open_clip import loss as open_clip_loss

from pinclip.distributed import leave
from pinclip.losses import ClipLoss, SigLipLoss

ROWS, FEATURES = 5, 7
CLIP_MODES = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad
SIGLIP_MODES = ["bidir", "shift", "reduce", "gather", None]


def leaves(rank):
    """Features of one rank and the scale and bias of all."""
    generator = torch.Generator().manual_seed(rank)
    features = torch.randn(2, ROWS, FEATURES, dtype=torch.float64, generator=generator)
    image, text = (F.normalize(each, dim=1).requires_grad_() for each in features)
    scalars = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (9.0, -3.0))
    return image, text, *scalars


def results_of(loss, rank, *, as_dict=False):
    """Loss and gradients of one rank, of a weighted loss: so no gradient of one is taken for granted."""
    inputs = leaves(rank)
    value = loss(*inputs, output_dict=as_dict)
    value = value["contrastive_loss"] if as_dict else value
    (1.7 * value).backward()
    return [value.detach(), *(each.grad for each in inputs)]


def losses_of(library, rank, world):
    clip, siglip = library
    found = {}
    for local, grad in CLIP_MODES:
        loss = clip(local_loss=local, gather_with_grad=grad, rank=rank, world_size=world)
        found["clip", local, grad] = results_of(loss, rank, as_dict=local)
    for way in SIGLIP_MODES:
        found["siglip", way] = results_of(siglip(rank=rank, world_size=world, dist_impl=way), rank)
    return found


OURS, THEIRS = (ClipLoss, SigLipLoss), (open_clip_loss.ClipLoss, open_clip_loss.SigLipLoss)


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        found = [losses_of(library, rank, world) for library in (OURS, THEIRS)]
        torch.save(found, f"{folder}/{rank}.pt")
        with pytest.raises(ValueError, match=r"but torch\.distributed says"):
            results_of(ClipLoss(rank=(rank + 1) % world, world_size=world), rank)
    finally:
        leave()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for ours, theirs in zip(found[name], values, strict=True):
            assert (ours - theirs).abs().max() <= 1e-12 * (1 + theirs.abs().max()), name
        assert values[0] > 0.1 and values[3].abs() > 1e-4


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_has_the_loss_and_the_gradients_of_open_clip(world, tmp_path):
    mp.spawn(work, (world, str(tmp_path)), nprocs=world)
    for rank in range(world):
        assert_same(*torch.load(tmp_path / f"{rank}.pt"))


def test_one_process():
    found, expected = (losses_of(library, 0, 1) for library in (OURS, THEIRS))
    assert_same(found, expected)


def test_modes_differ():
    """The comparison above can fail: at one process all modes agree, and softmax and sigmoid do not."""
    found = losses_of(OURS, 0, 1)
    assert torch.equal(found["clip", True, True][1], found["clip", False, False][1])
    assert not torch.allclose(found["clip", True, True][1], found["siglip", None][1])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ClipLoss(use_horovod=True), "use_horovod=True is not supported"),
        (lambda: ClipLoss(rank=2, world_size=2), "rank=2 is not in"),
        (lambda: SigLipLoss(dist_impl="ring"), "dist_impl='ring', expected one of"),
        (lambda: ClipLoss()(torch.ones(3, 2), torch.ones(2, 2), 1.0), "text has shape (2, 2)"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
