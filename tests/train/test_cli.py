"""The command line: what it prints, what it writes, and how it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import tiny_table, to_toml

from pinclip.cli import main, train_main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(store_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "run.toml"
    table = tiny_table(store_path, folder / "run", {"train.eval_every": 3, "model.dims": [8, 16]})
    config.write_text(to_toml(table))
    assert train_main(["--config", str(config)]) == 0
    return folder


def test_a_run_leaves_everything_in_its_folder(finished):
    run = finished / "run"
    for name in (
        "config.json",
        "split.json",
        "environment.json",
        "metrics.jsonl",
        "eval.json",
        "report.html",
    ):
        assert (run / name).is_file(), name
    assert sorted(p.name for p in (run / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval" in row] == [3]
    assert {"loss", "image_text", "lr", "pins_per_second", "data_wait", "memory_gb"} <= rows[0].keys()
    assert any(path.name.startswith("events") for path in (run / "tensorboard").iterdir())
    report = (run / "report.html").read_text()
    assert "synthetic" in report and "http://" not in report.replace("http://www.w3.org", "")


def test_eval_json_has_the_promised_shape(finished, capsys):
    assert main(["eval", str(finished / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    keys = {"recall@1", "recall@10", "mrr", "ndcg@10", "chance@10", "ci95"}
    assert keys <= result["text_to_image"].keys() and keys <= result["image_to_text"].keys()
    for kind in ("fused", "image", "text", "tfidf"):
        assert keys <= result["pin_to_related"][kind].keys()
    assert result == json.loads((finished / "run" / "eval.json").read_text())


def test_eval_says_synthetic(finished, capsys):
    assert main(["eval", str(finished / "run")]) == 0
    assert "(synthetic)" in capsys.readouterr().out


def test_eval_on_other_data_counts_all_of_it_as_cold(finished, tmp_path, capsys):
    assert main(["data", "synthetic", "--out", str(tmp_path / "other"), "--pins", "40", "--seed", "9"]) == 0
    capsys.readouterr()
    assert main(["eval", str(finished / "run"), "--data", str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text_to_image"]["corpus"] == 40


def test_a_mistake_is_one_line_and_exit_code_2(finished, tmp_path, capsys):
    config = finished / "run.toml"
    for command, message in [
        (lambda: train_main(["--config", str(tmp_path / "no.toml")]), "no.toml: no such file"),
        (
            lambda: train_main(["--config", str(config), "--set", "train.stepz=1"]),
            "unknown key 'train.stepz'",
        ),
        (lambda: train_main(["--config", str(config), "--set", f"data.path={tmp_path}/none"]), "none"),
        (lambda: main(["eval", str(tmp_path)]), "not a run folder"),
        (lambda: main(["eval", str(finished / "run"), "--data", str(tmp_path / "absent")]), "absent"),
        (lambda: main(["data", "info", str(tmp_path / "absent")]), "absent"),
        (
            lambda: train_main(["--config", str(config), "--resume", "--set", "train.batch_size=8"]),
            "made with train.batch_size = 16, this configuration has 8",
        ),
    ]:
        assert command() == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_unfinished_run_and_damaged_model(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished / "run", copy)
    weights = copy / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["eval", str(copy)]) == 2
    assert "not a PinCLIP model folder" in capsys.readouterr().err
    shutil.rmtree(copy / "model")
    assert main(["eval", str(copy)]) == 2
    assert "has not finished" in capsys.readouterr().err


def test_a_process_that_fails_shows_no_traceback(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "train.py", "--config", str(tmp_path / "no.toml")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and "error: " in result.stderr


def test_unwritable_run_folder(store_path, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    config = tmp_path / "run.toml"
    config.write_text(to_toml(tiny_table(store_path, tmp_path / "file" / "run", {})))
    assert train_main(["--config", str(config)]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_full_disk_while_a_checkpoint_is_written(store_path, tmp_path):
    """A file size limit is what a full disk looks like to the process that writes."""
    config = tmp_path / "run.toml"
    config.write_text(to_toml(tiny_table(store_path, tmp_path / "run", {})))
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from pinclip.cli import train_main; sys.exit(train_main(sys.argv[1:]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program, "--config", str(config)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr[-2000:]
    assert "error: cannot write" in result.stderr and "Traceback" not in result.stderr
    assert (
        not list((tmp_path / "run").glob("checkpoints/step-*")) and not (tmp_path / "run" / "model").exists()
    )
