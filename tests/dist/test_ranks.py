"""N gloo processes against one process with the whole batch: no mocks."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from pinclip import distributed as D
from pinclip.losses import ImageTextLoss, NeighborLoss, Temperature

# Rows per rank. Uneven always; a rank with one row, and one that has run out of rows.
SHARDS = {1: [(9,)], 2: [(5, 4), (1, 8)], 3: [(3, 4, 2), (4, 0, 5)], 4: [(1, 3, 2, 3)]}
TOTAL, FEATURES = 9, 5

IDS = torch.tensor([0, 1, 2, 3, 1, 4, 5, 0, 6])
PARTNER = torch.tensor([5, 8, 3, 0, 7, 6, -1, 2, 4])
KNOWN = [[1, 2], [4], [3, 5], [], [0, 8], [1], [2, 3], [4], []]
VALID = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
LOG_Q = torch.linspace(-3, -1, TOTAL)
CASES = [
    f"{loss}-{kind}-{features}"
    for loss in ("image_text", "neighbor")
    for kind in ("softmax", "sigmoid")
    for features in ("plain", "all")
]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image, self.text = nn.Linear(FEATURES, 4), nn.Linear(FEATURES, 4)
        self.temperature = Temperature(9.0, -1.5)
        self.double()
        for layer in (self.image, self.text):
            for parameter in layer.parameters():
                parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)

    def forward(self, inputs):
        inputs = inputs.to(self.image.weight.dtype)
        image, text = (F.normalize(tower(inputs), dim=1) for tower in (self.image, self.text))
        return image, text, *self.temperature()


def whole_batch():
    return torch.randn(TOTAL, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def known_of(rows):
    lists = KNOWN[rows]
    indptr = torch.tensor([0, *map(len, lists)]).cumsum(0)
    return indptr, torch.tensor([c for each in lists for c in each], dtype=torch.int64)


def loss_of(case, model, rows):
    """The case's loss for the local `rows`, a slice of the whole batch."""
    loss, kind, features = case.split("-")
    image, text, scale, bias = model(whole_batch()[rows])
    everything = features == "all"
    valid, log_q = (VALID[rows], LOG_Q[rows]) if everything else (None, None)
    if loss == "image_text":
        ids = IDS[rows] if everything else None
        dims = (2, 4) if everything else None
        return ImageTextLoss(kind, dims)(image, text, scale, bias, ids=ids, valid=valid, log_q=log_q)
    return NeighborLoss(kind)(
        image,
        text,
        scale,
        bias,
        ids=IDS[rows],
        partner=PARTNER[rows],
        known=known_of(rows) if everything else None,
        log_q=log_q,
        valid_x=valid,
        valid_y=valid,
    )


def loss_and_gradients(case, rows):
    model = Model()
    loss = loss_of(case, model, rows)
    loss.backward()
    softmax = "softmax" in case
    for name, parameter in model.named_parameters():
        # A softmax loss does not read the bias; every other parameter must get a gradient on every rank.
        assert (parameter.grad is None) == (softmax and name == "temperature.bias"), name
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def local_rows(counts):
    start = sum(counts[: D.rank()])
    return slice(start, start + counts[D.rank()])


def check_gather(counts):
    """Values and gradients of gather_rows, from the definition."""
    rows = local_rows(counts)
    whole = whole_batch()
    for value in (whole, IDS, VALID, LOG_Q, whole[:, None, :2].contiguous()):
        gathered = D.gather_rows(value[rows])
        assert gathered.dtype == value.dtype and torch.equal(gathered, value)
    assert D.gather_counts(counts[D.rank()]) == counts

    mine = whole[rows].clone().requires_grad_()
    weights = [
        torch.randn(whole.shape, dtype=whole.dtype, generator=torch.Generator().manual_seed(r))
        for r in range(len(counts))
    ]
    (D.gather_rows(mine, counts) * weights[D.rank()]).sum().backward()
    expected = torch.zeros_like(whole)
    for each in weights:
        expected += each
    assert torch.equal(mine.grad, expected[rows])  # to the bit: summed in rank order

    if len(counts) > 1:
        with pytest.raises(ValueError, match="counts="):
            D.gather_rows(mine, tuple(n + 1 for n in counts))


def check_shards(counts):
    """What GatheredRows yields and RowSums adds up, from the definition; twice, from one gather."""
    rows, whole, me = local_rows(counts), whole_batch(), D.rank()
    gathered = D.GatheredRows(whole[rows], counts)
    for _ in range(2):
        order = []
        for r, shard in gathered:
            order.append(r)
            assert torch.equal(shard, whole[sum(counts[:r]) : sum(counts[: r + 1])])
        assert order == [(me + step) % len(counts) for step in range(len(counts))]

    sums, found = D.RowSums(counts), [each * (1 + me) for each in whole.split(list(counts))]
    for r, _ in gathered:
        sums.add(found[r])
    total = sum(range(1, len(counts) + 1))
    torch.testing.assert_close(sums.result(), whole[rows] * total, rtol=1e-15, atol=0)
    parts = D.exchange_rows(found, counts)
    assert len(parts) == len(counts)
    for r, part in enumerate(parts):
        assert torch.equal(part, whole[rows] * (1 + r))

    D.check_same(torch.tensor(1.5), "it")
    D.check_same(torch.tensor(torch.nan), "it")
    if len(counts) > 1:
        with pytest.raises(RuntimeError, match="it differs between ranks"):
            D.check_same(torch.tensor(float(me)), "it")
        with pytest.raises(ValueError, match="counts="):
            D.GatheredRows(whole[rows], tuple(n + 1 for n in counts))


def check_shared_gather(counts):
    """Two losses over one gather are those over a gather each; every result repeats to the bit."""
    rows, found = local_rows(counts), []
    for shared in (True, False, False):
        image, text, scale, _ = Model()(whole_batch()[rows])
        columns = D.GatheredRows(text, counts) if shared else text
        first = ImageTextLoss()(image, columns, scale)
        second = NeighborLoss()(image, columns, scale, ids=IDS[rows], partner=PARTNER[rows])
        found.append(torch.autograd.grad(first + 2 * second, (image, text, scale)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def check_sigmoid_without_bias(counts):
    image, text, scale, _ = Model()(whole_batch()[local_rows(counts)])
    with pytest.raises(ValueError, match="bias=None"):
        ImageTextLoss("sigmoid")(image, text, scale)


def check_reductions(world):
    r = D.rank()
    assert (r, D.world_size()) == (dist.get_rank(), world)
    value = torch.tensor([1.0, float(r)])
    assert torch.equal(D.all_sum(value), torch.tensor([world, sum(range(world))], dtype=torch.float32))
    assert torch.equal(D.all_mean(value), torch.tensor([1.0, (world - 1) / 2]))
    assert torch.equal(value, torch.tensor([1.0, float(r)]))
    flags = torch.tensor([False, r == world - 1, True])
    assert D.any_true(flags).tolist() == [False, True, True]


def check_ddp(counts):
    """The same gradients through torch's own DistributedDataParallel."""
    rows = local_rows(counts)
    model = nn.parallel.DistributedDataParallel(Model())
    loss_of("image_text-sigmoid-plain", model, rows).backward()
    return {n: p.grad for n, p in model.module.named_parameters()}


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        check_reductions(world)
        results = {}
        for number, counts in enumerate(SHARDS[world]):
            check_gather(counts)
            check_shards(counts)
            check_shared_gather(counts)
            check_sigmoid_without_bias(counts)
            for case in CASES:
                local = loss_and_gradients(case, local_rows(counts))
                results[case, number] = {name: D.all_mean(value) for name, value in local.items()}
        results["ddp", 0] = check_ddp(SHARDS[world][0])
        if rank == 0:
            torch.save(results, f"{folder}/results.pt")
    finally:
        D.leave()


@pytest.fixture(scope="module", params=sorted(SHARDS))
def results(request, tmp_path_factory):
    """One start of W processes does all the work; the tests look at what they found."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    mp.spawn(work, (request.param, str(folder)), nprocs=request.param)
    return request.param, torch.load(folder / "results.pt")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-12 * (1 + value.abs().max()), name
    assert expected["temperature.log_scale"].abs() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(results, case):
    world, found = results
    expected = loss_and_gradients(case, slice(0, TOTAL))
    for number in range(len(SHARDS[world])):
        assert_same(found[case, number], expected)


def test_under_distributed_data_parallel(results):
    expected = loss_and_gradients("image_text-sigmoid-plain", slice(0, TOTAL))
    expected.pop("loss")
    assert_same(results[1]["ddp", 0], expected)


def test_without_a_process_group():
    x = torch.arange(6.0).reshape(3, 2).requires_grad_()
    assert (D.rank(), D.world_size(), D.gather_counts(3)) == (0, 1, (3,))
    assert D.gather_rows(x) is x
    assert torch.equal(D.all_sum(x), x) and not D.all_mean(x).requires_grad
    assert D.any_true(torch.tensor([True, False])).tolist() == [True, False]
