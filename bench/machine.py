"""What a result must say about where it was measured: device, versions, clocks, load. No names of hosts."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

LIBRARIES = (
    "triton",
    "numpy",
    "open_clip_torch",
    "memeff",
    "inf-cl",
    "cut-cross-entropy",
    "liger-kernel",
    "quack-kernels",
    "xformers",
    "flash-attn",
    "deepspeed",
)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def facts(device: str) -> dict:
    """date, device, machine and versions of a run."""
    return {"date": now(), "device": device, "machine": _machine(device), "versions": versions()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["driver"] = _smi("driver_version")
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in found.items() if version}


def _machine(device: str) -> dict:
    cpu = {
        "name": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory_gb()[0], 1),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }
    if device != "cuda":
        return cpu
    gpu = torch.cuda.get_device_properties(0)
    return {
        "name": gpu.name,
        "sm": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_gb": round(gpu.total_memory / 2**30, 1),
        "l2_mb": gpu.L2_cache_size / 2**20,
        "cpu": cpu,
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.machine()


def slug(device: str) -> str:
    """Name of the results file of this machine: nvidia-h200, amd-epyc."""
    return re.sub(r"[^a-z0-9]+", "-", _machine(device)["name"].lower()).strip("-")


def memory_gb() -> tuple[float, float]:
    """(all, free for a program) memory of the host, in GiB."""
    sizes = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    return int(sizes["MemTotal"]) / 2**20, int(sizes["MemAvailable"]) / 2**20


def free_bytes(device: str) -> tuple[float, float]:
    """(all, free for one more program) memory in bytes of the device that a step runs on."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total, free
    return tuple(2**30 * gb for gb in memory_gb())


def state(device: str) -> dict:
    """Clocks of a GPU, or the load of a host, at this moment."""
    if device == "cuda":
        found = _smi("clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active")
        names = ("sm_mhz", "memory_mhz", "celsius", "watts", "throttle")
        return dict(zip(names, found.split(", "))) if found else {}
    return {"load_1min": round(os.getloadavg()[0], 2)}


def _smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
