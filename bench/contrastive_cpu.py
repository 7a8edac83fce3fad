"""The tiled contrastive loss on the CPU against open_clip's ClipLoss.

    python bench/contrastive_cpu.py --n 8192 --d 256

Forward + backward, fp32, median over interleaved repetitions in one process. Peak extra memory, each in a
fresh process: the greatest resident size, sampled every 2 ms, minus the size before the step, inputs and
libraries warm. Nothing is timed before its loss and gradients agree.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from pinclip.ops.contrastive import contrastive_loss

LOSSES = ("pinclip", "open_clip")


def problem(n: int, d: int, scale: float):
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, d, generator=generator), dim=1).requires_grad_() for _ in range(2))
    return x, y, torch.tensor(scale, requires_grad=True)


def step(name: str, inputs) -> list[torch.Tensor]:
    if name == "pinclip":
        loss = contrastive_loss(*inputs)
    else:
        import open_clip.loss  # here: its import would blur the memory of the other arm

        loss = open_clip.loss.ClipLoss()(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def check(d: int, scale: float) -> None:
    inputs = problem(1000, d, scale)
    for ours, theirs in zip(step("pinclip", inputs), step("open_clip", inputs)):
        torch.testing.assert_close(ours, theirs)


def times(n: int, d: int, scale: float, repeats: int) -> dict[str, list[float]]:
    inputs = problem(n, d, scale)
    taken = {name: [] for name in LOSSES}
    for repeat in range(repeats + 1):
        for name in LOSSES:
            start = time.perf_counter()
            step(name, inputs)
            if repeat:  # the first is warm-up
                taken[name].append(time.perf_counter() - start)
    return taken


def extra_memory(name: str, n: int, d: int, scale: float) -> float:
    """MB that one step adds to a process that has run a small step and holds the inputs."""
    step(name, problem(64, d, scale))
    inputs = problem(n, d, scale)
    before, greatest, done = anonymous_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal greatest
        while not done.wait(0.002):
            greatest = max(greatest, anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(name, inputs)
    done.set()
    watcher.join()
    return greatest - before


def anonymous_mb() -> float:
    """Resident memory without mapped files: the kernel drops and reloads pages of libraries as it likes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=8192, help="rows of x and y")
    parser.add_argument("--d", type=int, default=256, help="features")
    parser.add_argument("--scale", type=float, default=14.3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-n", type=int, nargs="*", help="sizes for peak memory, ours only above n")
    parser.add_argument(
        "--memory-of", choices=LOSSES, help="print the extra memory of one loss in MB and exit"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = (options.n, options.d, options.scale)
    if options.memory_of:
        print(extra_memory(options.memory_of, *shape))
        return

    check(options.d, options.scale)
    taken = times(*shape, options.repeats)
    print(
        f"N={options.n} D={options.d} scale={options.scale}, {options.threads} threads, {torch.__version__}"
    )
    for name, seconds in taken.items():
        print(f"{name:10} {statistics.median(seconds):7.3f} s  (best {min(seconds):.3f})")
    ratio = statistics.median(taken["pinclip"]) / statistics.median(taken["open_clip"])
    print(f"pinclip / open_clip = {ratio:.2f}")
    for n in options.memory_n if options.memory_n is not None else [options.n]:
        for name in LOSSES if n <= options.n else ["pinclip"]:
            command = [sys.executable, __file__, "--memory-of", name, "--n", str(n), "--d", str(options.d)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"{name:10} {float(output):8.0f} MB peak extra at N={n}")


if __name__ == "__main__":
    main()
