"""Two processes under the DeepSpeed launcher equal one on the same global batch, at every ZeRO stage."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_table, to_toml

from pinclip.train.metrics import read_rows
from pinclip.train.run import TrainedRun

ROOT = Path(__file__).resolve().parents[2]
CHANGES = {"train.steps": 5, "model.dims": [8, 16], "optim.lr": 0.003}


def launch(processes, config_path, *arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            f"--num_gpus={processes}",
            f"--master_port={port}",
        ),
        *("train.py", "--config", str(config_path), "--no-report", *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def write_config(path, store_path, out, **changes):
    table = tiny_table(store_path, out, {**CHANGES, **changes})
    path.write_text(to_toml(table))
    return path


@pytest.fixture(scope="module")
def alone(store_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    launch(1, write_config(folder / "run.toml", store_path, folder / "run"))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("stage,micro_batches", [(0, 1), (1, 1), (2, 1), (3, 1), (3, 2)])
def test_two_processes_equal_one(alone, store_path, tmp_path, stage, micro_batches):
    changes = {"train.zero_stage": stage, "train.micro_batches": micro_batches}
    launch(2, write_config(tmp_path / "run.toml", store_path, tmp_path / "run", **changes))
    one, two = read_rows(alone), read_rows(tmp_path / "run")
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5]
    for a, b in zip(one, two):
        for name in ("loss", "image_text", "fused_fused", "image_fused", "text_fused", "own_image"):
            assert b[name] == pytest.approx(a[name], rel=2e-5), (a["step"], name)
    want, got = (
        TrainedRun.open(alone).model.state_dict(),
        TrainedRun.open(tmp_path / "run").model.state_dict(),
    )
    for name in want:
        mine, theirs = identifiable(name, got[name]), identifiable(name, want[name])
        # Adam divides by the gradient's size, so rounding in a small gradient moves a weight by a share of
        # the learning rate, which is 0.003 in each of 5 steps.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def identifiable(name, value):
    """Without the bias of the keys: it cancels in the softmax, so its gradient is nothing but rounding."""
    if not name.endswith("qkv_proj.bias"):
        return value
    q, _, v = value.chunk(3)
    return torch.cat([q, v])


@pytest.mark.slow
def test_two_processes_resume(store_path, tmp_path):
    """ZeRO-3 shards on two processes: three steps and a continuation equal five steps."""
    changes = {"train.zero_stage": 3, "train.save_every": 3}
    whole = write_config(tmp_path / "whole.toml", store_path, tmp_path / "whole", **changes)
    launch(2, whole)
    # The checkpoint of step 3 is whole; losing the last one is what a crash after step 3 looks like.
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000005")
    again = write_config(tmp_path / "again.toml", store_path, tmp_path / "again", **changes)
    launch(2, again, "--resume")
    want = TrainedRun.open(tmp_path / "whole").model.state_dict()
    got = TrainedRun.open(tmp_path / "again").model.state_dict()
    for name in want:
        assert torch.equal(got[name], want[name]), name
