"""Evaluate a finished run, and write its table, `eval.json` and `report.html`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pinclip.data.store import PinStore
from pinclip.io import write_text
from pinclip.retrieval.report import ReportContext, write_report
from pinclip.retrieval.tables import evaluation_table
from pinclip.train.evaluation import Evaluation, evaluate_model
from pinclip.train.metrics import read_rows
from pinclip.train.run import TrainedRun


def evaluate_run(
    folder: str | Path, data: str | None = None, *, progress: bool = False
) -> tuple[Evaluation, PinStore]:
    """Evaluate RUN on its cold pins, or on `data`, of which every pin that it was not trained on is cold."""
    run = TrainedRun.open(folder)
    store, cold = run.dataset(data)
    return evaluate_model(run.model, run.tokenizer, store, cold, progress=progress), store


def evaluate_and_report(folder: Path) -> None:
    """Evaluate RUN on its own data; print the table, write `eval.json` and `report.html`."""
    run = TrainedRun.open(folder)
    store, cold = run.dataset(None)
    evaluation = evaluate_model(run.model, run.tokenizer, store, cold, progress=True)
    write_text(folder / "eval.json", json.dumps(evaluation.summary, indent=1))
    synthetic = " (synthetic)" if store.synthetic else ""
    print(f"\n{store.name}{synthetic}\n{evaluation_table(evaluation.summary)}\n")
    write_report(folder / "report.html", _context(run, store, cold, evaluation))
    print(f"report: {folder / 'report.html'}", flush=True)


def _context(run: TrainedRun, store: PinStore, cold: np.ndarray, evaluation: Evaluation) -> ReportContext:
    bad = (json.loads(line) for line in (run.folder / "bad_pins.jsonl").read_text().splitlines())
    history = read_rows(run.folder)
    return ReportContext(
        dataset=store.info,
        summary=evaluation.summary,
        queries=evaluation.queries,
        embeddings=evaluation.embeddings,
        graph=store.graph,
        cold=cold,
        ids=store.ids,
        texts=store.texts,
        board_titles=store.board_titles,
        picture=lambda pin: store.image(pin) if store.has_image[pin] else None,
        bad_pins=[(row["pin"], row["reason"]) for row in bad],
        history=history,
        config=run.config.model_dump(mode="json"),
        environment=_environment(run, history),
        seed=run.config.seed,
    )


def _environment(run: TrainedRun, history: list[dict]) -> dict:
    facts = json.loads((run.folder / "environment.json").read_text())
    steps = [row for row in history if "loss" in row]
    between = np.diff([0, *(row["step"] for row in steps)])
    seconds = sum(n * run.config.train.batch_size / row["pins_per_second"] for n, row in zip(between, steps))
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "steps": run.config.train.steps,
        "seconds": float(seconds),
        "pins_per_second": run.config.train.steps * run.config.train.batch_size / seconds if seconds else 0.0,
        "device": facts["gpu"]
        if facts["gpu"] != "none"
        else f"{facts['processor']}, {facts['threads']} thread(s)",
        "peak_memory_bytes": int(1e9 * max((row["memory_gb"] for row in steps), default=0)),
        **facts,
    }
