"""The training loop."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import torch

from pinclip import distributed
from pinclip.data.batches import PinBatch
from pinclip.errors import PinclipError
from pinclip.train import checkpoint
from pinclip.train.config import RunConfig
from pinclip.train.engine import Engine, start_processes
from pinclip.train.evaluation import evaluate_model, headline
from pinclip.train.metrics import Metrics
from pinclip.train.objective import Objective, Trainee
from pinclip.train.run import Run, build_model, export_model, prepare
from pinclip.train.step import forward_backward


class NonFiniteError(PinclipError):
    """The loss or a gradient became NaN or infinite; the optimiser has not moved."""


def train(config: RunConfig, *, resume: bool = False) -> Path | None:
    """Train one run and export its model. Returns the run folder, or None if SIGTERM ended it early.

    With `resume`, continue from the newest whole checkpoint of the run folder: the result is bitwise what
    the uninterrupted run gives on one device.
    """
    start_processes()
    newest = checkpoint.newest(Path(config.out), config) if resume else None
    run = prepare(config, resume=resume)
    trainee = Trainee(build_model(config, run.tokenizer), config.objective, config.train.precision)
    engine = Engine(trainee, config)
    start = engine.load(newest)["step"] if newest else 0
    if distributed.rank() == 0:
        print(_greeting(run, trainee, start), flush=True)
    with _Sigterm() as sigterm:
        finished = _loop(engine, run, start, sigterm)
    if not finished:
        return None
    state = _model_state(engine)
    if distributed.rank() == 0:
        export_model(run.folder, trainee.model, state, run.tokenizer)
    distributed.barrier()
    return run.folder


def _loop(engine: Engine, run: Run, start: int, sigterm: _Sigterm) -> bool:
    config = run.config.train
    # On a GPU tensor cores multiply bf16, and fp32 only as three products; on a CPU there is no gain.
    half = engine.module.autocast and engine.device.type == "cuda"
    objective = Objective(run.config.objective, run.config.model.dims, torch.bfloat16 if half else None)
    metrics = Metrics(run.folder, start, config.steps, config.log_every, config.batch_size)
    loader = iter(run.batches.loader(start, run.config.data.workers, engine.device.type == "cuda"))
    step = start
    while step < config.steps:
        asked = time.perf_counter()
        batch = next(loader).to(engine.device)
        metrics.waited(time.perf_counter() - asked)
        loss, parts = forward_backward(engine, objective, batch, config.micro_batches)
        _check_finite(engine, loss, batch, run)
        lr = engine.learning_rate
        engine.end_micro_batch()
        step += 1
        metrics.step(step, loss, parts, _scales(engine), lr)
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            _evaluate(engine, run, metrics, step)
        stop = distributed.any_true(torch.tensor(sigterm.received, device=engine.device))
        if stop or step == config.steps or (config.save_every and step % config.save_every == 0):
            checkpoint.save(engine, run.folder, step, run.config)
        if stop:
            break
    metrics.close()
    if step < config.steps and distributed.rank() == 0:
        print(f"stopped by SIGTERM after step {step}; saved. Continue with --resume", flush=True)
    return step == config.steps


def _check_finite(engine: Engine, loss: torch.Tensor, batch: PinBatch, run: Run) -> None:
    """Stop all ranks before the optimiser moves. This is the step's one deliberate wait for the device."""
    fine = torch.isfinite(loss).all() & engine.gradients_finite().to(loss.device)
    if distributed.any_true(~fine):
        pins = [run.store.ids[pin] for pin in run.batches.slots(batch.step)[0][:4].tolist()]
        raise NonFiniteError(
            f"step {batch.step + 1}: loss {float(loss):g}, or a gradient, is not finite; nothing moved. "
            f"The batch begins with the pins {', '.join(pins)}; batch {batch.step} of seed {run.config.seed}"
        )


def _scales(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: module()[0].detach() for name, module in engine.module.temperatures.items()}


def _model_state(engine: Engine) -> dict[str, torch.Tensor]:
    prefix = "model."
    return {k.removeprefix(prefix): v for k, v in engine.full_state().items() if k.startswith(prefix)}


def _evaluate(engine: Engine, run: Run, metrics: Metrics, step: int) -> None:
    """Rank 0 evaluates a copy of the weights: no collective, the same code whatever the ZeRO stage."""
    state = _model_state(engine)
    if distributed.rank() == 0:
        model = build_model(run.config, run.tokenizer)
        model.load_state_dict(state)
        model.to(engine.device)
        result = evaluate_model(model, run.tokenizer, run.store, run.split.cold, bootstrap=0)
        metrics.evaluated(step, headline(result.summary))
    distributed.barrier()


def _greeting(run: Run, trainee: Trainee, start: int) -> str:
    config, store = run.config, run.store
    size = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in trainee.parameters())
    synthetic = " (synthetic)" if store.synthetic else ""
    return (
        f"{store.name}{synthetic}: {len(run.batches.train_pins)} training pins, {len(run.split.cold)} cold, "
        f"{store.graph.num_boards} boards, {store.graph.num_edges} edges\n"
        f"model: {size / 1e6:.1f} M parameters; batch {config.train.batch_size} on "
        f"{distributed.world_size()} process(es) x {config.train.micro_batches} micro-batch(es), "
        f"ZeRO-{config.train.zero_stage}, {'bf16' if trainee.autocast else 'fp32'}; "
        f"steps {start + 1}..{config.train.steps}"
    )


class _Sigterm:
    """While entered, SIGTERM is noted and not obeyed at once: the step ends, a checkpoint is written."""

    received = False

    def __enter__(self) -> _Sigterm:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exc) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, signum: int, frame: object) -> None:
        self.received = True
