"""Does the neighbor objective help? The same run with it off and on, the same seeds, the same steps.

"off" sets the three neighbor weights to zero and leaves everything else as configured; its batches are
then plain permutations of the training pins.
"""

from __future__ import annotations

import json
from pathlib import Path

from pinclip import distributed
from pinclip.errors import ConfigError
from pinclip.io import write_text
from pinclip.retrieval import tables
from pinclip.train.config import RunConfig
from pinclip.train.evaluation import Evaluation, evaluate_model
from pinclip.train.loop import train
from pinclip.train.run import TrainedRun

_WEIGHTS = ("fused_fused_weight", "image_fused_weight", "text_fused_weight")


def ablate(config: str, seeds: int, out: Path, overrides: dict[str, object]) -> str:
    """Train off and on for seeds 0 … `seeds` − 1 under `out`; write `ablation.json`, return its table.

    A run that has already finished with the same configuration is evaluated again, not trained again.
    """
    if not RunConfig.load(config, overrides).objective.uses_neighbors:
        raise ConfigError(
            f"{config}: every neighbor weight of [objective] is 0, so there is nothing to switch off"
        )
    off = {f"objective.{name}": 0.0 for name in _WEIGHTS}
    evaluations: dict[str, dict[int, Evaluation]] = {"off": {}, "on": {}}
    for seed in range(seeds):
        for arm, change in (("off", off), ("on", {})):
            folder = out / f"{arm}-{seed}"
            run = RunConfig.load(config, {**overrides, **change, "seed": seed, "out": str(folder)})
            print(f"--- neighbor alignment {arm}, seed {seed}", flush=True)
            evaluations[arm][seed] = _run(run, folder)
    runs = {arm: {seed: e.summary for seed, e in arms.items()} for arm, arms in evaluations.items()}
    queries = {arm: {seed: e.queries for seed, e in arms.items()} for arm, arms in evaluations.items()}
    result = tables.ablation(runs, queries)  # data.split_seed is the same in all runs, so queries pair up
    write_text(out / "ablation.json", json.dumps({"result": result, "runs": runs}, indent=1))
    return tables.ablation_table(result)


def _run(config: RunConfig, folder: Path) -> Evaluation:
    if not _finished(config, folder):
        train(config)
    trained = TrainedRun.open(folder)
    store, cold = trained.dataset(None)
    return evaluate_model(trained.model, trained.tokenizer, store, cold, bootstrap=200)


def _finished(config: RunConfig, folder: Path) -> bool:
    path = folder / "config.json"
    # Parsed again, so that a key that is newer than the run counts with its default.
    same = path.is_file() and RunConfig.parse(json.loads(path.read_text()), str(path)) == config
    return same and (folder / "model").is_dir() and distributed.world_size() == 1
