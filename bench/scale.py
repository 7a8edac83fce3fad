"""python -m bench scale: what a step costs on 8 … 1,024 GPUs, from one GPU's measured rates and stated links.

A model, not a measurement: every number that it makes is called a prediction. What it takes from measurement
are the rate of the towers and of the matrix product (a results file); what it is told are the links; what it
counts are operations and bytes. `python -m bench scale --check` runs both losses on 1 … 4 gloo processes and
compares the bytes that they really sent, read from the kernel's counter of the loopback device, with the
formulas here.

W ranks, b samples on each, N = W b, D wide, s bytes a number, P parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCHEDULES = ("pinclip", "open_clip", "open_clip local_loss")


@dataclass(frozen=True)
class Links:
    """Bytes per second that one GPU sends, within a node of `node` GPUs and between nodes; seconds per
    message.
    """

    inside: float = 450e9  # NVLink 4, one direction
    between: float = 50e9  # one 400 Gbit/s adapter per GPU
    node: int = 8
    latency: float = 10e-6

    def rate(self, ranks: int) -> float:
        """Of a ring over `ranks`: its slowest link."""
        return self.inside if ranks <= self.node else self.between


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU: images/s of the towers alone, TFLOP/s of the pair loss and its share of the matrix
    product.
    """

    images: float
    gemm: float
    loss_share: float = 0.7
    memory_gb: float = 141.0
    measured: bool = False


@dataclass(frozen=True)
class Job:
    local: int  # b
    width: int  # D
    parameters: float
    itemsize: int = 4  # of a gathered embedding


def loss_flops(schedule: str, ranks: int, job: Job) -> float:
    """Of one rank, forward and backward.

    pinclip: its local rows against all columns, both directions from one S: S twice, dX and dY, 8 b N D.
    open_clip's default computes the whole N² loss on every rank, two matrices and their
    gradients: 12 N² D; with local_loss its own rows of both, 12 b N D.
    """
    n = ranks * job.local
    if schedule == "pinclip":
        return 8.0 * job.local * n * job.width
    return 12.0 * (n if schedule == "open_clip" else job.local) * n * job.width


def loss_bytes(schedule: str, ranks: int, job: Job) -> float:
    """That one rank sends for one step's loss.

    pinclip: its text rows to everyone, their gradients back, and (peak, total) of the columns, once to their
    owner and once to everyone. open_clip: image and text rows to everyone, and with local_loss, which needs
    gather_with_grad, their gradients back.
    """
    once = float((ranks - 1) * job.local * job.width * job.itemsize)
    if schedule == "pinclip":
        return 2 * once + 2 * 8.0 * (ranks - 1) * job.local
    return 2 * once if schedule == "open_clip" else 4 * once


def loss_memory(schedule: str, ranks: int, job: Job) -> float:
    """Bytes on one rank beyond its own rows: gathered rows, gradients on their way, and what is kept of S.

    pinclip: the text of all ranks, four shards of gradients in transit and in sum, (peak, total) of columns.
    open_clip keeps logits and their softmax of both directions: 8 bytes a pair in bf16.
    """
    n = ranks * job.local
    gathered = float(n * job.width * job.itemsize)
    if schedule == "pinclip":
        return gathered + 4.0 * job.local * job.width * job.itemsize + 8.0 * n
    return 2 * gathered + 8.0 * n * (n if schedule == "open_clip" else job.local)


def step(schedule: str, ranks: int, job: Job, gpu: Gpu, links: Links) -> dict:
    """Predicted seconds of one step and of its parts, for one rank.

    The gradient's all-reduce (bf16, 2 (W-1)/W P numbers) runs beside the backward pass, two thirds of the
    towers' time; what is longer than that shows. pinclip's exchange runs beside its loss, open_clip's beside
    nothing; exchange_s is what shows.
    """
    towers = job.local / gpu.images
    loss = loss_flops(schedule, ranks, job) / (gpu.gemm * 1e12 * gpu.loss_share)
    rate = links.rate(ranks)
    exchange = loss_bytes(schedule, ranks, job) / rate + (links.latency * (ranks - 1) if ranks > 1 else 0.0)
    if schedule == "pinclip":
        exchange = max(0.0, exchange - loss * (ranks - 1) / ranks)  # the first shard needs no exchange
    reduce = 2.0 * 2 * (ranks - 1) / ranks * job.parameters / rate
    shown = max(0.0, reduce - 2 / 3 * towers)
    memory = loss_memory(schedule, ranks, job)
    return {
        "schedule": schedule,
        "gpus": ranks,
        "batch": ranks * job.local,
        "towers_s": towers,
        "loss_s": loss,
        "exchange_s": exchange,
        "all_reduce_shown_s": shown,
        "step_s": towers + loss + exchange + shown,
        "loss_memory_gb": memory / 1e9,
        "fits": memory < 0.5e9 * gpu.memory_gb,  # the towers take the other half
        "images_per_s": ranks * job.local / (towers + loss + exchange + shown),
    }


def predictions(job: Job, gpu: Gpu, links: Links, ranks: Iterable[int]) -> list[dict]:
    return [step(schedule, w, job, gpu, links) for w in ranks for schedule in SCHEDULES]


def measured_gpu(path: Path, stated: Gpu) -> Gpu:
    """The rates of a results file, and the stated ones where it has none."""
    document = json.loads(path.read_text())
    gemm = document["runs"][-1]["ceilings"].get("gemm bfloat16", stated.gemm)
    images = [
        row["rate"]
        for row in document["rows"]
        if row["op"] == "train_step" and row["arm"] == "pinclip" and row["status"] == "ok"
    ]
    share = [
        row["pct_gemm"] / 100
        for row in document["rows"]
        if row["op"] == "contrastive"
        and row["role"] == "ours"
        and row.get("pct_gemm")
        and row["sizes"]["n"] >= 32768
    ]
    memory = document["runs"][-1]["machine"]["memory_gb"]
    return Gpu(
        max(images, default=stated.images), gemm, max(share, default=stated.loss_share), memory, bool(images)
    )


# The check on gloo processes


def check(ranks: int, job: Job, schedule: str) -> tuple[float, float]:
    """(bytes counted, bytes predicted) of all ranks for one step of the loss."""
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_count, (ranks, job, schedule, folder), nprocs=ranks)
        counted = float((Path(folder) / "bytes").read_text())
    return counted, ranks * loss_bytes(schedule, ranks, job)


def loopback_bytes() -> int:
    """Sent over the loopback device since the machine started."""
    line = next(
        each for each in Path("/proc/net/dev").read_text().splitlines() if each.strip().startswith("lo:")
    )
    return int(line.split(":")[1].split()[8])


_REPEATS = 5


def _count(rank: int, ranks: int, job: Job, schedule: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from pinclip.distributed import leave

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    loss = _loss(schedule, rank, ranks)
    generator = torch.Generator().manual_seed(rank)
    rows = [
        torch.randn(job.local, job.width, generator=generator).div_(job.width**0.5).requires_grad_()
        for _ in range(2)
    ]
    scale = torch.tensor(10.0, requires_grad=True)
    before = 0
    for number in range(_REPEATS + 1):
        if number == 1:  # connections and buffers stand
            dist.barrier()
            before = loopback_bytes()
        loss(*rows, scale).backward()
    dist.barrier()
    if rank == 0:
        (Path(folder) / "bytes").write_text(str((loopback_bytes() - before) / _REPEATS))
    dist.barrier()
    leave()


def _loss(schedule: str, rank: int, ranks: int):
    if schedule == "pinclip":
        from pinclip.losses import ImageTextLoss

        return ImageTextLoss()
    from open_clip.loss import ClipLoss

    local = schedule != "open_clip"
    return ClipLoss(local_loss=local, gather_with_grad=local, rank=rank, world_size=ranks)


def add_arguments(commands) -> None:
    parser = commands.add_parser(
        "scale", help="predicted step time on 8 … 1,024 GPUs; --check counts real bytes"
    )
    parser.add_argument("--results", type=Path, help="results file of one GPU; without it the stated rates")
    parser.add_argument("--local", type=int, default=1024, help="samples per GPU")
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument("--parameters", type=float, default=150e6)
    parser.add_argument(
        "--images", type=float, default=2500.0, help="images/s of one GPU's towers, if not measured"
    )
    parser.add_argument("--gemm", type=float, default=790.0, help="TFLOP/s, if not measured")
    parser.add_argument("--inside", type=float, default=450.0, help="GB/s that a GPU sends within a node")
    parser.add_argument("--between", type=float, default=50.0, help="GB/s that a GPU sends between nodes")
    parser.add_argument("--out", type=Path, help="write the predictions to this JSON file")
    parser.add_argument("--check", action="store_true", help="count bytes on 1 … 4 gloo processes")
    parser.set_defaults(call=main)


def main(options: argparse.Namespace) -> int:
    if options.check:
        return _main_check()
    gpu = Gpu(options.images, options.gemm)
    if options.results:
        gpu = measured_gpu(options.results, gpu)
    links = Links(1e9 * options.inside, 1e9 * options.between)
    job = Job(options.local, options.width, options.parameters)
    found = predictions(job, gpu, links, [2**k for k in range(3, 11)])
    source = "measured on one GPU" if gpu.measured else "STATED, not measured"
    print(f"predictions; rates of one GPU: {source}: {gpu}")
    print(f"links: {links}; {job}")
    print(
        f"{'GPUs':>5} {'batch':>8}  {'schedule':22}{'step ms':>9}{'towers':>9}{'loss':>9}{'exchange':>9}"
        f"{'loss GB':>9}  images/s"
    )
    for row in found:
        fits = f"{row['images_per_s']:,.0f}" if row["fits"] else "does not fit"
        parts = (row["step_s"], row["towers_s"], row["loss_s"], row["exchange_s"])
        times = "".join(f"{1e3 * each:9.1f}" for each in parts)
        head = f"{row['gpus']:5} {row['batch']:8}  {row['schedule']:22}"
        print(f"{head}{times}{row['loss_memory_gb']:9.2f}  {fits}")
    if options.out:
        document = {"gpu": asdict(gpu), "links": asdict(links), "job": asdict(job), "predictions": found}
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _main_check() -> int:
    job, bad = Job(1024, 256, 0.0), 0
    for schedule in SCHEDULES:
        for ranks in (1, 2, 3, 4):
            try:
                counted, predicted = check(ranks, job, schedule)
            except Exception as error:
                if "open_clip" in schedule and "No module named" in str(error):
                    print(f"{schedule}: not installed")
                    break
                raise
            off = abs(counted - predicted) / predicted if predicted else 0.0
            bad += off > 0.1
            megabytes = f"counted {counted / 1e6:8.3f} MB, predicted {predicted / 1e6:8.3f} MB"
            print(f"{schedule:22} W={ranks}: {megabytes}")
    if bad:
        print(f"{bad} predictions are off by more than a tenth", file=sys.stderr)
    return 1 if bad else 0
