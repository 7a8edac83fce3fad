"""python -m bench compile: every kernel's machine code, read without a GPU and held to bench/budgets.toml.

Triton kernels: every `compile_cases()` of kernels/pinclip_kernels/triton, through Triton's own ptxas. CUDA
kernels: every csrc/*.cu, through nvcc. Reports are kept by a hash of what they follow from, in
build/bench_compile.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench import sass

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = Path(__file__).with_name("budgets.toml")
CACHE = ROOT / "build" / "bench_compile"
ARCHS = (80, 90)
DEPTH = 512  # of the products, for the estimates: the most usual embedding width
_FORMAT = 5  # of a report; another one makes kept reports void


@dataclass
class Report:
    """What one kernel takes on one architecture."""

    kernel: str
    arch: int
    warps: int
    registers: int = 0
    spill_bytes: int = 0
    stack: int = 0
    shared: int = 0
    blocks: int = 0
    occupancy: float = 0.0
    needs_dot: bool = False
    counts: dict = field(default_factory=dict)
    wide_loads: float | None = None
    wide_stores: float | None = None
    loop_instructions: int = 0
    estimate: dict | None = None
    failed: str = ""


def tool(name: str) -> str:
    """A CUDA binary utility: the one inside the triton package, else the one on the PATH."""
    import triton

    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(inside) if inside.exists() else shutil.which(name)
    if not found:
        raise FileNotFoundError(f"{name} is neither in the triton package nor on the PATH")
    return found


def triton_cases(modules: Iterable[str] | None = None) -> list:
    """Every compilation that the launch tables can ask for, from `compile_cases()` of each kernel module."""
    if modules is None:
        folder = ROOT / "kernels" / "pinclip_kernels" / "triton"
        modules = (
            f"pinclip_kernels.triton.{p.stem}" for p in sorted(folder.glob("*.py")) if p.stem != "__init__"
        )
    found = []
    for name in modules:
        module = importlib.import_module(name)
        found += module.compile_cases() if hasattr(module, "compile_cases") else []
    return found


def report_triton(case, arch: int) -> Report:
    """Compile one case and read it. A case that does not compile is a report that says so."""
    report = Report(case.name, arch, case.num_warps, needs_dot=case.needs_dot)
    key = _key(
        case.kernel.cache_key,
        case.signature,
        case.constexprs,
        case.num_warps,
        case.num_stages,
        case.num_ctas,
        case.maxnreg,
        arch,
    )
    if kept := _kept(key):
        return Report(**{**kept, "kernel": case.name, "needs_dot": case.needs_dot})
    try:
        compiled = case.compile(arch)
    except Exception as error:
        report.failed = str(error).strip().splitlines()[-1][:300]
        return report
    shared, name = compiled.metadata.shared, compiled.metadata.name
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        used = _resources(cubin)[name]
        body = sass.functions(_run(tool("cuobjdump"), "-sass", cubin))[name]
    # From the machine code: the assembler, asked again about the PTX, may allot registers otherwise.
    used["spill"] = sass.count(body).local_bytes
    depth = case.constexprs.get("BLOCK_K")
    _fill(report, used, shared, body, DEPTH / depth if depth else None)
    return _keep(key, report)


def report_cuda(source: Path, arch: int) -> list[Report]:
    """Compile one .cu file and read every kernel in it; its block size is what its launch bounds say."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    key = _key(*(path.read_text() for path in sorted(source.parent.glob("*.[hc]*"))), source.name, arch)
    if kept := _kept(key):
        return [Report(**each) for each in kept["kernels"]]
    target = f"{arch}a" if arch >= 90 else str(arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{target},code=sm_{target}", "-cubin"]
        done = subprocess.run(
            [nvcc, *flags, "-Xptxas", "-v", "-o", cubin, source], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return [Report(source.stem, arch, 0, failed=done.stderr.strip()[-300:])]
        usage = _usage(done.stderr)
        bodies = sass.functions(_run(tool("cuobjdump"), "-sass", cubin))
    reports = []
    for name, used in usage.items():
        report = Report(f"{source.stem}: {_readable(name)}", arch, used.get("threads", 256) // 32)
        _fill(report, used, used["shared"], bodies.get(name, []))
        reports.append(report)
    _write(key, {"kernels": [asdict(each) for each in reports]})
    return reports


def _resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Registers and stack of every function, from the machine code."""
    found, name = {}, ""
    for line in _run(tool("cuobjdump"), "--dump-resource-usage", cubin).splitlines():
        if match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif name and (match := re.search(r"REG:(\d+) STACK:(\d+)", line)):
            found[name] = {"registers": int(match[1]), "stack": int(match[2])}
    return found


def _usage(text: str) -> dict[str, dict[str, int]]:
    """`ptxas -v`, by function."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name = match[1]
            found[name] = {"registers": 0, "stack": 0, "spill": 0, "shared": 0}
        elif name and (
            match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", line)
        ):
            found[name].update(stack=int(match[1]), spill=int(match[2]) + int(match[3]))
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            found[name]["registers"] = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                found[name]["shared"] = int(shared[1])
    return found


def _fill(
    report: Report,
    used: dict[str, int],
    shared: int,
    body: list[sass.Instruction],
    turns: float | None = None,
) -> None:
    report.registers, report.stack, report.spill_bytes = used["registers"], used["stack"], used["spill"]
    report.shared = shared
    report.blocks = sass.occupancy(report.arch, report.registers, shared, report.warps)
    report.occupancy = report.blocks * report.warps / sass.GPUS[report.arch].warps
    counts = sass.count(body)
    report.counts = {name: value for name, value in asdict(counts).items() if not isinstance(value, dict)}
    report.wide_loads, report.wide_stores = counts.wide_loads, counts.wide_stores
    report.loop_instructions = len(sass.hot_loop(body))
    guess = sass.estimate(report.arch, body, report.warps, report.blocks, turns)
    report.estimate = None if guess is None else asdict(guess)


def _run(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _readable(mangled: str) -> str:
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=False)
    text = done.stdout.strip() if done.returncode == 0 else mangled
    text = re.sub(r"\(anonymous namespace\)::", "", text).removeprefix("void ")
    return re.sub(r"\(.*\)$", "", text)


def _key(*parts) -> str:
    import triton

    tools = Path(sass.__file__).read_text()
    return hashlib.sha256(repr((_FORMAT, triton.__version__, tools, *map(repr, parts))).encode()).hexdigest()[
        :32
    ]


def _kept(key: str) -> dict | None:
    path = CACHE / f"{key}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _keep(key: str, report: Report) -> Report:
    _write(key, asdict(report))
    return report


def _write(key: str, value: dict) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{key}.json"
    path.with_suffix(".new").write_text(json.dumps(value))
    path.with_suffix(".new").replace(path)


def budgets(path: Path = BUDGETS, version: str | None = None) -> list[dict]:
    """The rules that hold with a version of Triton, by default the installed one."""
    version = version or triton_version()
    return [rule for rule in _read_budgets(path)["budget"] if rule.get("triton", version) == version]


def known_versions(path: Path = BUDGETS) -> list[str]:
    """The versions of Triton that the budgets are of; another one allots registers otherwise."""
    return _read_budgets(path)["triton"]


def triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def _read_budgets(path: Path) -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with open(path, "rb") as file:
        return tomllib.load(file)


def budget_of(report: Report, rules: list[dict]) -> dict:
    """The limits of a kernel: every rule that names it, later ones over earlier ones."""
    limits: dict = {}
    for rule in rules:
        if fnmatch.fnmatchcase(report.kernel, rule["kernel"]) and report.arch in rule.get(
            "arch", [report.arch]
        ):
            limits.update(
                {
                    name: value
                    for name, value in rule.items()
                    if name not in ("kernel", "arch", "triton", "why")
                }
            )
    return limits


def violations(report: Report, rules: list[dict]) -> list[str]:
    """What a kernel breaks of its budget, in words."""
    where = f"{report.kernel} sm_{report.arch}"
    if report.failed:
        return [f"{where}: does not compile: {report.failed}"]
    limits, broken = budget_of(report, rules), []
    for name in ("registers", "spill_bytes", "stack", "shared"):
        if name in limits and getattr(report, name) > limits[name]:
            broken.append(f"{where}: {name} {getattr(report, name)}, budget {limits[name]}")
    if report.blocks < limits.get("blocks", 1):
        broken.append(
            f"{where}: {report.blocks} blocks fit a multiprocessor, budget {limits.get('blocks', 1)}"
        )
    if report.counts["atomics"] > limits.get("atomics", 0):
        broken.append(f"{where}: {report.counts['atomics']} atomics, budget {limits.get('atomics', 0)}")
    wide = limits.get("wide_loads", 0.0)
    if report.wide_loads is not None and report.wide_loads < wide:
        broken.append(f"{where}: {report.wide_loads:.0%} of the loads are 16 bytes wide, budget {wide:.0%}")
    if report.needs_dot:
        wanted = limits.get("tensor_core", {80: "hmma", 90: "hgmma", 100: "tcgen05"}[report.arch])
        if not report.counts[wanted]:
            broken.append(f"{where}: no {wanted.upper()} in the machine code")
        if 1 < report.counts["hgmma"] <= report.counts["arrivals"]:
            broken.append(f"{where}: every HGMMA waits for the one before, as the registers do not suffice")
    return broken


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def table(reports: list[Report]) -> str:
    """All reports as text; the estimate counts instructions of the hot loop and of a tile's end, at depth
    512.
    """
    head = (
        f"{'kernel':52} {'sm':>4} {'warps':>5} {'regs':>5} {'spill':>5} {'stack':>5} {'shared':>7} "
        f"{'blocks':>6} {'occ.':>5} {'HGMMA':>5} {'HMMA':>5} {'TC05':>5} {'MUFU':>5} {'LDG.128':>7} "
        f"{'TMA':>4}  estimate"
    )
    lines = [head]
    for r in reports:
        if r.failed:
            lines.append(f"{r.kernel:52} {r.arch:4} does not compile: {r.failed}")
            continue
        guess = "-"
        if r.estimate:
            low, high = r.estimate["serial"], r.estimate["percent"]
            percent = f"{high:.0f}%" if high - low < 1 else f"{low:.0f}-{high:.0f}%"
            guess = f"{percent} of {r.estimate['of']}, limit {r.estimate['limit']}"
        c = r.counts
        lines.append(
            f"{r.kernel:52} {r.arch:4} {r.warps:5} {r.registers:5} {r.spill_bytes:5} {r.stack:5} "
            f"{r.shared:7} {r.blocks:6} {r.occupancy:5.0%} {c['hgmma']:5} {c['hmma']:5} {c['tcgen05']:5} "
            f"{c['mufu']:5} {_share(r.wide_loads):>7} {c['tma']:4}  {guess}"
        )
    return "\n".join(lines)


def every_report(archs: Iterable[int], only: str = "*") -> list[Report]:
    """All kernels on all architectures: a Triton case where its launch table leads, every csrc/*.cu
    everywhere.

    Blackwell takes Hopper's cases: there is no launch table of its own, but it must compile.
    """
    archs = list(archs)
    wanted = [
        (index, arch)
        for arch in archs
        for index, case in enumerate(triton_cases())
        if (arch in case.archs or (arch >= 100 and 90 in case.archs)) and fnmatch.fnmatchcase(case.name, only)
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        reports = list(pool.map(_report_of, wanted, chunksize=4))
    for arch in archs:
        for source in sorted((ROOT / "csrc").glob("*.cu")):
            reports += [r for r in report_cuda(source, arch) if fnmatch.fnmatchcase(r.kernel, only)]
    return reports


@functools.cache
def _cases() -> list:
    return triton_cases()


def _report_of(wanted: tuple[int, int]) -> Report:
    index, arch = wanted
    return report_triton(_cases()[index], arch)


def add_arguments(commands) -> None:
    parser = commands.add_parser(
        "compile", help="registers, spills, occupancy and budgets of every kernel, no GPU"
    )
    parser.add_argument("--arch", default="sm_80,sm_90", help="of sm_80, sm_90, sm_100")
    parser.add_argument("--only", default="*", help="kernels whose name fits this pattern")
    parser.add_argument("--out", help="write the reports to this JSON file too")
    parser.set_defaults(call=main)


def main(options: argparse.Namespace) -> int:
    try:
        archs = [int(name.removeprefix("sm_")) for name in options.arch.split(",")]
        unknown = [arch for arch in archs if arch not in sass.GPUS]
    except ValueError:
        archs, unknown = [], [options.arch]
    if unknown:
        print(
            f"--arch {options.arch}: known are {', '.join(f'sm_{arch}' for arch in sass.GPUS)}",
            file=sys.stderr,
        )
        return 2
    reports = every_report(archs, options.only)
    print(table(reports))
    if shutil.which("nvcc") is None and any((ROOT / "csrc").glob("*.cu")):
        print("csrc/*.cu: not compiled, there is no nvcc on the PATH")
    if options.out:
        Path(options.out).write_text(json.dumps([asdict(each) for each in reports], indent=1) + "\n")
    broken = [text for report in reports for text in violations(report, budgets())]
    for text in broken:
        print(f"OVER BUDGET: {text}", file=sys.stderr)
    return 1 if broken else 0
