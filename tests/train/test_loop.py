"""The loop as a whole: resume, SIGTERM, non-finite numbers, damaged and foreign checkpoints, bad pins."""

import json
import os
import signal

import pytest
import torch

from pinclip.errors import CheckpointError, ConfigError, DataError
from pinclip.train import checkpoint, loop
from pinclip.train.loop import NonFiniteError, train
from pinclip.train.metrics import read_rows
from pinclip.train.run import TrainedRun


def weights(folder):
    return TrainedRun.open(folder).model.state_dict()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def interrupt_after(monkeypatch, step):
    """Raise in the given step, as a crash would, before its optimiser moves."""
    count = iter(range(1000))
    real = loop.forward_backward

    def failing(*args):
        if next(count) == step:
            raise RuntimeError("crash")
        return real(*args)

    monkeypatch.setattr(loop, "forward_backward", failing)


@pytest.mark.parametrize("zero_stage,micro_batches", [(0, 1), (0, 2), (2, 1)])
def test_interrupted_equals_uninterrupted_bitwise(tiny, monkeypatch, tmp_path, zero_stage, micro_batches):
    changes = {"train.zero_stage": zero_stage, "train.micro_batches": micro_batches, "train.save_every": 2}
    whole = train(tiny(**changes, out=str(tmp_path / "whole")))
    broken = tiny(**changes, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(RuntimeError, match="crash"):
            train(broken)
    resumed = train(broken, resume=True)
    assert_same(weights(whole), weights(resumed))
    loss = [[row["loss"] for row in read_rows(folder) if "loss" in row] for folder in (whole, resumed)]
    assert len(loss[0]) == 5 and loss[0] == loss[1]


def test_another_seed_is_another_run(tiny, tmp_path):
    """The bitwise test above can fail."""
    a = train(tiny(out=str(tmp_path / "a")))
    b = train(tiny(out=str(tmp_path / "b"), seed=1))
    assert not torch.equal(weights(a)["fusion.projection.weight"], weights(b)["fusion.projection.weight"])


def test_sigterm_saves_and_resume_finishes(tiny, monkeypatch, tmp_path, capsys):
    whole = train(tiny(out=str(tmp_path / "whole")))
    config = tiny(out=str(tmp_path / "stopped"))
    real, count = loop.forward_backward, iter(range(100))

    def terminated(*args):
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "forward_backward", terminated)
        assert train(config) is None
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
    assert_same(weights(whole), weights(train(config, resume=True)))


def test_damaged_checkpoint_is_passed_over(tiny, tmp_path, caplog):
    config = tiny(**{"train.save_every": 2, "train.keep": 5})
    folder = train(config)
    before = weights(folder)
    newest = folder / "checkpoints" / "step-00000005"
    victim = next(path for path in (newest / "state").iterdir())
    victim.write_bytes(victim.read_bytes()[:-10])
    (folder / "checkpoints" / ".step-00000006.partial").mkdir()  # what a crash while writing leaves
    assert_same(before, weights(train(config, resume=True)))
    assert "step-00000005" in caplog.text


def test_old_checkpoints_are_removed(tiny):
    folder = train(tiny(**{"train.save_every": 1, "train.keep": 2}))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]


def test_checkpoint_of_another_configuration(tiny):
    train(tiny())
    with pytest.raises(CheckpointError, match=r"optim\.lr = 0\.003, this configuration has 0\.1"):
        train(tiny(**{"optim.lr": 0.1}), resume=True)


def test_a_new_run_leaves_nothing_of_the_old(tiny):
    config = tiny()
    folder = train(config)
    (folder / "eval.json").write_text("{}")
    train(tiny(**{"train.steps": 3}))
    assert not (folder / "eval.json").exists()
    assert [row["step"] for row in read_rows(folder)] == [1, 2, 3]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_stops_before_the_optimiser_moves(tiny, monkeypatch, where):
    seen = {}
    real = loop.forward_backward

    class Poisoned:
        """The real objective, made NaN; or finite with a NaN gradient: 0 * d sqrt(z)/dz at z = 0."""

        def __init__(self, objective):
            self.objective = objective

        def __call__(self, embeddings, temperatures, batch):
            loss, parts = self.objective(embeddings, temperatures, batch)
            if where == "loss":
                return loss * float("nan"), parts
            return loss + (0 * embeddings.fused.sum()).sqrt(), parts

    def step(engine, objective, batch, micro_batches):
        if batch.step == 2:
            seen["engine"] = engine
            seen["before"] = {k: v.clone() for k, v in engine.module.state_dict().items()}
            objective = Poisoned(objective)
        return real(engine, objective, batch, micro_batches)

    monkeypatch.setattr(loop, "forward_backward", step)
    with pytest.raises(NonFiniteError, match=r"step 3: .*begins with the pins s\d+, .*batch 2 of seed 0"):
        train(tiny())
    assert_same(seen["before"], seen["engine"].module.state_dict())


def test_bad_pins_are_skipped_counted_and_listed(tiny, tmp_path, capsys):
    import csv

    from pinclip.data.importer import import_pins
    from pinclip.data.store import PinStore

    good = PinStore.open(tiny().data.path)
    raw = tmp_path / "raw"
    raw.mkdir()
    with (raw / "pins.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "text"])
        for pin, name in enumerate(good.ids):
            data = good.image_bytes(pin)
            (raw / f"{name}.png").write_bytes(data[: len(data) // 2] if pin < 3 else data)
            table.writerow([name, f"{name}.png", good.texts[pin]])
    graph = good.graph
    with (raw / "edges.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["board", "pin"])
        for pin in range(len(good)):
            for board in graph.pin_boards[graph.pin_indptr[pin] : graph.pin_indptr[pin + 1]]:
                table.writerow([f"b{board}", good.ids[pin]])
    import_pins(raw / "pins.csv", raw / "edges.csv", tmp_path / "store", max_bad=0.1, progress=False)

    folder = train(tiny(**{"data.path": str(tmp_path / "store")}))
    assert "3 bad pins are skipped" in capsys.readouterr().out
    listed = [json.loads(line)["pin"] for line in (folder / "bad_pins.jsonl").read_text().splitlines()]
    assert listed == list(good.ids[:3])
    with pytest.raises(DataError, match=r"3 of 80 pins are bad, more than data.max_bad = 1%"):
        train(tiny(**{"data.path": str(tmp_path / "store"), "data.max_bad": 0.01}))


def test_checkpoint_is_never_half_written(tiny, monkeypatch, tmp_path):
    """A crash while a checkpoint is written leaves the one before it as the newest."""
    config = tiny(**{"train.save_every": 2})
    real, count = checkpoint.sync_tree, iter(range(10))

    def dying(folder):
        if next(count) == 1:
            raise RuntimeError("power cut")
        real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync_tree", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    folders = [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert folders == ["step-00000002"]
    train(config, resume=True)


def test_training_on_siglip_weights(tiny, store_path, tmp_path):
    """A saved Hugging Face SiglipModel and its tokenizer in, a trained PinCLIP out."""
    from transformers import SiglipConfig, SiglipModel

    from pinclip.data.store import PinStore
    from pinclip.data.tokenizer import Tokenizer

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipModel(
        SiglipConfig(
            text_config={**sizes, "vocab_size": 300, "max_position_embeddings": 12},
            vision_config={**sizes, "image_size": 16, "patch_size": 4},
        )
    )
    siglip.save_pretrained(tmp_path / "siglip")
    Tokenizer.train(PinStore.open(store_path).texts, vocab_size=300, max_length=12).save(
        tmp_path / "tok.json"
    )
    model = {"siglip": str(tmp_path / "siglip"), "fusion": {"width": 16, "depth": 1, "heads": 2}}
    config = tiny(**{"model": model, "data.tokenizer": str(tmp_path / "tok.json"), "train.steps": 2})
    trained = TrainedRun.open(train(config))
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    ours = trained.model.image_tower.encoder.layers[0].mlp.fc1.weight
    moved = float((ours - siglip.state_dict()[name]).abs().max())
    assert 0 < moved < 0.02  # started from these weights, and trained on

    with pytest.raises(ConfigError, match=r"model.siglip needs data.tokenizer"):
        tiny(model=model)
