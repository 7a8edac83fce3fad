"""The only room that knows DeepSpeed: processes, ZeRO, optimiser, schedule, clipping."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
from pathlib import Path

import torch
from torch import nn

from pinclip import distributed
from pinclip.train.config import OptimConfig, RunConfig

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
from deepspeed.utils import logger as deepspeed_logger


def start_processes() -> torch.device:
    """Join the processes that the launcher started (or be the only one) and return this rank's device."""
    deepspeed_logger.setLevel(logging.WARNING)
    if not torch.distributed.is_initialized():
        for name, alone in _ALONE.items():
            os.environ.setdefault(name, alone)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend)
        atexit.register(distributed.leave)
    deepspeed.init_distributed(verbose=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


class Engine:
    """A module under DeepSpeed. One `step` is: `forward`, `backward` for every micro-batch, `update`."""

    def __init__(self, module: nn.Module, config: RunConfig):
        self.module = module
        self._gradients_finite = _watch_gradients(module)
        optimizer = torch.optim.AdamW(
            parameter_groups(module, config.optim.weight_decay),
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, config.train.steps, config.optim)
        )
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                lr_scheduler=schedule,
                config=deepspeed_config(config, torch.distributed.get_world_size()),
            )
        self.device = self._engine.device

    def forward(self, *args, **kwargs):
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of `loss`; micro-batches add up, nothing is divided."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradients_finite(self) -> torch.Tensor:
        """Whether every gradient of this step was finite on this rank, as a 0-d bool tensor."""
        return self._gradients_finite()

    def end_micro_batch(self) -> None:
        """After every `backward`; after the last one of a step the optimiser and the schedule move."""
        self._engine.step()

    @property
    def learning_rate(self) -> float:
        return self._engine.get_lr()[0]

    def full_state(self) -> dict[str, torch.Tensor]:
        """The whole module's fp32 state on rank 0's CPU (empty elsewhere); a collective under ZeRO-3."""
        parameters = list(self.module.parameters())
        gather = (
            deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)
            if self._engine.zero_optimization_stage() == 3
            else contextlib.nullcontext()
        )
        with gather:
            if torch.distributed.get_rank():
                return {}
            return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def save(self, folder: Path, client_state: dict) -> None:
        """Write every rank's part of module, optimiser and schedule. A collective."""
        with _quiet():
            self._engine.save_checkpoint(
                str(folder), tag="state", client_state=client_state, save_latest=False
            )

    def load(self, folder: Path) -> dict:
        """Read what `save` wrote on the same number of ranks; returns the client state."""
        with _quiet():
            _, client_state = self._engine.load_checkpoint(str(folder), tag="state")
        return client_state


def deepspeed_config(config: RunConfig, world_size: int) -> dict:
    """The DeepSpeed configuration of a run. Precision is autocast inside the module, over fp32 parameters."""
    local = config.train.batch_size // world_size
    return {
        "train_micro_batch_size_per_gpu": local // config.train.micro_batches,
        "gradient_accumulation_steps": config.train.micro_batches,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {"stage": config.train.zero_stage},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: no norm, bias, gate, embedding vector, scale or probe decays."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decay = [p for name, p in named if p.ndim >= 2 and not _never_decays(name)]
    keep = [p for name, p in named if p.ndim < 2 or _never_decays(name)]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _never_decays(name: str) -> bool:
    return any(
        part in name for part in ("position", "type_embedding", "fusion_tokens", "probe", "temperature")
    )


def learning_rate_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Linear warm-up to 1 over `warmup_steps`, then a half cosine down to `final_lr_ratio`."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
    return optim.final_lr_ratio + (1 - optim.final_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def _watch_gradients(module: nn.Module):
    """Note on the device whether a non-finite gradient passes by, before ZeRO takes it away."""
    finite: list[torch.Tensor] = []

    def look(gradient: torch.Tensor) -> None:
        finite.append(torch.isfinite(gradient).all())

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_hook(look)

    def read() -> torch.Tensor:
        result = torch.stack(finite).all() if finite else torch.tensor(True)
        finite.clear()
        return result

    return read


@contextlib.contextmanager
def _quiet():
    """DeepSpeed greets with dozens of lines on standard output; a user's terminal is for the user's run."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
