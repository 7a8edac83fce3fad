"""The losses under DistributedDataParallel, FSDP2 and DeepSpeed ZeRO: parameter gradients on W gloo processes
with uneven shards equal those of one process with the whole batch."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_ranks import TOTAL, Model, local_rows, loss_of

from pinclip.distributed import leave

WORLDS = {1: (9,), 2: (2, 7), 3: (4, 0, 5), 4: (1, 3, 2, 3)}
CASES = ("image_text-softmax-all", "image_text-sigmoid-plain", "neighbor-softmax-all", "neighbor-sigmoid-all")
WRAPPERS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def parameters_after(wrapper, case, rows):
    """The parameters after a step of plain descent at rate 1: what they lost is their gradient."""
    torch.manual_seed(0)
    model = Model().float()
    if wrapper.startswith("zero"):
        return _after_deepspeed(model, int(wrapper[-1]), case, rows)
    if wrapper == "ddp":
        # A softmax loss does not read the bias.
        model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    if wrapper == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for part in (model.image, model.text, model):
            fully_shard(part)
    loss_of(case, model, rows).backward()
    model = model.module if wrapper == "ddp" else model
    found = {}
    for name, parameter in model.named_parameters():
        whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in _with_gradient(parameter)]
        found[name] = (whole[0] - whole[1]).detach()
    return found


def _with_gradient(parameter):
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return parameter, gradient


def _after_deepspeed(model, stage, case, rows):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # the default is 1
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(loss_of(case, engine, rows))
    engine.step()
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        return {name: value.detach().clone() for name, value in engine.module.named_parameters()}


def work(rank, world, folder):
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
    os.environ |= {"DS_ACCELERATOR": "cpu", **{name: str(value) for name, value in names.items()}}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        rows = local_rows(WORLDS[world])
        found = {(w, case): parameters_after(w, case, rows) for w in WRAPPERS for case in CASES}
        if rank == 0:
            torch.save(found, f"{folder}/found.pt")
    finally:
        leave()


@pytest.fixture(scope="module", params=sorted(WORLDS))
def found(request, tmp_path_factory):
    """One start of W processes does all the work; the tests look at what they found."""
    folder = tmp_path_factory.mktemp(f"wrappers{request.param}")
    multiprocessing.set_forkserver_preload(["deepspeed", "test_ranks"])
    mp.start_processes(work, (request.param, str(folder)), nprocs=request.param, start_method="forkserver")
    return torch.load(folder / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_parameter_gradients_equal_those_of_one_process(found, wrapper, case):
    model = Model()
    loss_of(case, model, slice(0, TOTAL)).backward()
    for name, parameter in model.named_parameters():
        start, gradient = (each.detach() for each in _with_gradient(parameter))
        error = (start - found[wrapper, case][name] - gradient).abs().max()
        assert error <= 3e-6 * (1 + gradient.abs().max()), (name, float(error))
        assert gradient.abs().max() > 1e-4 or name == "temperature.bias", name
