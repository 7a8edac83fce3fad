"""The command line. A user's mistake is one line on standard error and exit code 2, without a traceback."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pinclip.errors import ConfigError, PinclipError


def main(argv: Sequence[str] | None = None) -> int:
    """`pinclip data|graph|eval|report|ablation ...`"""
    parser = argparse.ArgumentParser(prog="pinclip", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    from pinclip.cli.data import add_parser as add_data_parser
    from pinclip.cli.graph import add_parser as add_graph_parser

    add_data_parser(commands)
    add_graph_parser(commands)

    command = commands.add_parser("eval", help="evaluate a run on pins it was not trained on")
    command.add_argument("folder", metavar="RUN", help="a finished run folder")
    command.add_argument(
        "--data", metavar="DIR", help="other data than the run's own; all of it counts as cold"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=_eval)

    command = commands.add_parser("report", help="write RUN/report.html")
    command.add_argument("folder", metavar="RUN", help="a finished run folder")
    command.set_defaults(run=_report)

    command = commands.add_parser("ablation", help="neighbor alignment off and on, several seeds, one table")
    command.add_argument("--config", required=True, metavar="FILE", help="the run to ablate")
    command.add_argument("--seeds", type=int, default=3, metavar="N")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    command.add_argument("--out", required=True, metavar="DIR")
    command.set_defaults(run=_ablation)

    return guarded(lambda arguments: arguments.run(arguments) or 0, parser.parse_args(argv))


def train_main(argv: Sequence[str] | None = None) -> int:
    """What `train.py` runs: train, evaluate, report."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train, evaluate and report one run.")
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file (docs/configuration.md)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--no-report", action="store_true", help="train only")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    return guarded(_train, parser.parse_args(argv))


def guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run `command`; turn a user's mistake into one line and exit code 2."""
    try:
        return command(arguments)
    except PinclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _train(arguments: argparse.Namespace) -> int:
    from pinclip import distributed
    from pinclip.train.config import RunConfig
    from pinclip.train.loop import train
    from pinclip.train.report import evaluate_and_report

    config = RunConfig.load(arguments.config, overrides(arguments.set))
    folder = train(config, resume=arguments.resume)
    if folder is not None and not arguments.no_report and distributed.rank() == 0:
        evaluate_and_report(folder)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from pinclip.train.report import evaluate_run

    evaluation, store = evaluate_run(arguments.folder, arguments.data, progress=not arguments.json)
    if arguments.json:
        print(json.dumps(evaluation.summary, indent=1))
    else:
        from pinclip.retrieval.tables import evaluation_table

        print(
            f"{store.name}{' (synthetic)' if store.synthetic else ''}\n{evaluation_table(evaluation.summary)}"
        )
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pinclip.train.report import evaluate_and_report

    evaluate_and_report(Path(arguments.folder))
    return 0


def _ablation(arguments: argparse.Namespace) -> int:
    from pinclip.train.ablation import ablate

    print(ablate(arguments.config, arguments.seeds, Path(arguments.out), overrides(arguments.set)))
    return 0


def overrides(assignments: Sequence[str]) -> dict[str, object]:
    """`["train.steps=10"]` to `{"train.steps": 10}`: values are TOML, anything that is not is a string."""
    from pinclip.train.config import parse_value

    result = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE")
        result[key] = parse_value(value)
    return result
