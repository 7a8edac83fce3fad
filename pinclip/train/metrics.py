"""What a run says while it trains: a progress line, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter

from pinclip import distributed


class Metrics:
    """Rank 0 records, every rank takes part in the averages. Rows are written every `log_every` steps."""

    def __init__(self, run: Path, start: int, steps: int, log_every: int, batch_size: int):
        self.rows_path = run / "metrics.jsonl"
        self.steps, self.log_every, self.batch_size = steps, log_every, batch_size
        self._speaks = distributed.rank() == 0
        self._since, self._wait, self._count = time.perf_counter(), 0.0, 0
        if self._speaks:
            kept = [row for row in read_rows(run) if row["step"] <= start]
            self.rows_path.write_text("".join(json.dumps(row) + "\n" for row in kept))
            self._file = self.rows_path.open("a")
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)

    def waited(self, seconds: float) -> None:
        """Time for which the step had no data."""
        self._wait += seconds

    def step(
        self,
        step: int,
        loss: torch.Tensor,
        parts: dict[str, torch.Tensor],
        scales: dict[str, torch.Tensor],
        lr: float,
    ) -> None:
        """After step number `step` (from 1). Reads values from the device only when a row is due."""
        self._count += 1
        if step % self.log_every and step != self.steps:
            return
        values = distributed.all_mean(torch.stack([loss, *parts.values()])).tolist()
        seconds = time.perf_counter() - self._since
        row = {
            "step": step,
            "loss": values[0],
            **dict(zip(parts, values[1:])),
            **{f"scale/{name}": float(scale) for name, scale in scales.items()},
            "lr": lr,
            "pins_per_second": self._count * self.batch_size / seconds,
            "data_wait": self._wait / seconds,
            "memory_gb": memory_gb(),
        }
        if self._speaks:
            self._write(row)
        self._since, self._wait, self._count = time.perf_counter(), 0.0, 0

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """A row of retrieval results. The time that the evaluation took counts against no step."""
        if self._speaks:
            self._file.write(json.dumps({"step": step, "eval": values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(f"eval/{name}", value, step)
            print(
                f"  eval at step {step}: " + "  ".join(f"{k} {v:.3f}" for k, v in values.items()), flush=True
            )
        self._since = time.perf_counter()

    def close(self) -> None:
        if self._speaks:
            self._file.close()
            self._board.close()

    def _write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, row["step"])
        known = {"step", "loss", "lr", "pins_per_second", "data_wait", "memory_gb"}
        parts = " ".join(
            f"{name} {value:.3f}" for name, value in row.items() if name not in known and "/" not in name
        )
        scales = " ".join(f"{value:.1f}" for name, value in row.items() if name.startswith("scale/"))
        print(
            f"step {row['step']:>{len(str(self.steps))}}/{self.steps}  loss {row['loss']:.3f} ({parts})  "
            f"scale {scales}  lr {row['lr']:.1e}  {row['pins_per_second']:.0f} pins/s  "
            f"wait {row['data_wait']:.1%}  {row['memory_gb']:.1f} GB",
            file=sys.stdout,
            flush=True,
        )


def read_rows(run: Path) -> list[dict]:
    """The rows of `RUN/metrics.jsonl`; a last line cut short by a crash is dropped."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def memory_gb() -> float:
    """Peak GPU memory of this process, or its resident memory with its data workers, in 10^9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    process = psutil.Process()
    family = [process, *process.children(recursive=True)]
    return sum(getattr(p.memory_full_info(), "pss", p.memory_info().rss) for p in family) / 1e9
