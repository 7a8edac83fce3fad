"""python -m bench list | run | compile | campaign | report | scale"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    if importlib.util.find_spec("pinclip_kernels") is None:  # a checkout that is not installed
        sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure pinclip; see docs/performance.md."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _list_arguments(commands)
    _run_arguments(commands)
    from bench import campaign, compile, report, scale

    for module in (compile, campaign, report, scale):
        module.add_arguments(commands)
    options = parser.parse_args(arguments)
    return options.call(options)


def _list_arguments(commands) -> None:
    parser = commands.add_parser("list", help="every entry, its arms and its shapes")
    parser.add_argument("op", nargs="*")
    parser.set_defaults(call=list_entries)


def list_entries(options: argparse.Namespace) -> int:
    from bench import registry

    for name, entry in registry.entries().items():
        if options.op and name not in options.op:
            continue
        print(f"{name}: {', '.join(arm.name for arm in entry.arms)}")
        for shape in entry.shapes:
            marks = [*shape.on, *(mark for mark in ("quick", "tiny") if getattr(shape, mark))]
            print(f"    {shape.name:34} {shape.dtype:9} {' '.join(marks)}")
    for stem, why in registry.broken().items():
        print(f"{stem}: cannot be imported here: {why}")
    return 0


def _run_arguments(commands) -> None:
    parser = commands.add_parser("run", help="time entries against their rivals")
    parser.add_argument("op", nargs="*", help="ENTRY, or ENTRY=SHAPE for one shape of it; default: all")
    parser.add_argument("--arms", nargs="*", default=(), help="only these arms")
    parser.add_argument("--shapes", nargs="*", default=(), help="only shapes whose name begins so")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions (always reported)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: tiny shapes, times without meaning")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, also where there is a GPU")
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no shape after so long")
    parser.add_argument(
        "--out", required=True, help="results file; rows that it holds and are not measured stay"
    )
    parser.set_defaults(call=run)


def run(options: argparse.Namespace) -> int:
    from bench import machine, registry, runner
    from bench.records import Results

    device = "cpu" if options.cpu else machine.default_device()
    flags = {"quick": options.quick, "tiny": options.tiny}
    try:
        work = chosen(options.op or registry.entries(), device, options.shapes, flags)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for stem, why in registry.broken().items():
        print(f"{stem}: cannot be imported here: {why}")
    deadline = time.monotonic() + 60 * options.minutes
    budget = runner.Budget.of(device, **flags)
    bench = runner.Runner(Results(options.out), device, budget, threads=options.threads, deadline=deadline)
    bench.begin(flags, options.tiny)
    return runner.measure(work, bench, options.arms)


def chosen(names, device: str, shapes, flags: dict) -> list:
    """(entry, shapes) of every ENTRY or ENTRY=SHAPE. ValueError for a name that is none, or nothing to do."""
    from bench import registry

    work = []
    for name in names:
        op, _, one = name.partition("=")
        entry = registry.find(op)
        picked = registry.select(entry, device, **flags, names=[one] if one else shapes)
        if one and not picked:
            raise ValueError(f"{op} has no shape {one!r} on {device}")
        work.append((entry, picked))
    return work


if __name__ == "__main__":
    sys.exit(main())
