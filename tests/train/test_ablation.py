"""`pinclip ablation`: the same run with the neighbor objective off and on."""

import json

import pytest
from tiny_run import tiny_table, to_toml

from pinclip.cli import main, overrides
from pinclip.errors import ConfigError
from pinclip.train.ablation import ablate


@pytest.fixture(scope="module")
def ablated(store_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    config = folder / "run.toml"
    config.write_text(to_toml(tiny_table(store_path, folder / "unused", {"train.steps": 3})))
    return config, folder / "out", ablate(str(config), 2, folder / "out", {})


def test_both_arms_have_the_same_seeds_steps_and_cold_pins(ablated):
    _, out, _ = ablated
    configs = {run.parent.name: json.loads(run.read_text()) for run in out.glob("*/config.json")}
    assert configs.keys() == {"off-0", "off-1", "on-0", "on-1"}
    splits = {(out / name / "split.json").read_text() for name in configs}
    assert len(splits) == 1
    for seed in (0, 1):
        off, on = configs[f"off-{seed}"], configs[f"on-{seed}"]
        assert off["seed"] == on["seed"] == seed and off["train"] == on["train"]
        weights = [off["objective"].pop(f"{kind}_fused_weight") for kind in ("fused", "image", "text")]
        assert weights == [0, 0, 0]
        for kind in ("fused", "image", "text"):
            assert on["objective"].pop(f"{kind}_fused_weight") > 0
        assert off["objective"] == on["objective"]


def test_the_table_and_the_file_hold_the_evaluations(ablated):
    _, out, table = ablated
    saved = json.loads((out / "ablation.json").read_text())
    for arm in ("off", "on"):
        runs = [saved["runs"][arm][seed]["pin_to_related"]["fused"]["recall@10"] for seed in ("0", "1")]
        cell = saved["result"]["arms"][arm]["pin_to_related/fused"]
        assert cell["mean"] == pytest.approx(sum(runs) / 2)
        assert f"{cell['mean']:.3f}" in table
    assert "on − off" in table


def test_finished_runs_are_not_trained_again(ablated):
    config, out, table = ablated
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/model/model.safetensors")}
    older = json.loads((out / "on-0" / "config.json").read_text())
    del older["objective"]["pairs"]  # a key that the run of an earlier version does not have
    (out / "on-0" / "config.json").write_text(json.dumps(older))
    assert ablate(str(config), 2, out, {}) == table
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/model/model.safetensors")} == before


def test_nothing_to_switch_off(ablated, capsys):
    config, out, _ = ablated
    off = [f"--set=objective.{kind}_fused_weight=0.0" for kind in ("fused", "image", "text")]
    assert main(["ablation", "--config", str(config), "--out", str(out), *off]) == 2
    assert "nothing to switch off" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        ablate(str(config), 1, out, overrides([text.removeprefix("--set=") for text in off]))
