"""`pinclip data emoji | openclipart | synthetic | import | info`."""

from __future__ import annotations

import argparse
import sys

from pinclip.data import apt, emoji, openclipart, synthetic
from pinclip.data.importer import Columns, import_pins, open_dataset
from pinclip.data.store import PinStore

_IMPORT_HELP = """
PINS is a table (.parquet, .jsonl, .csv, .tsv) or WebDataset shards (.tar): a file, a folder or a quoted
pattern. EDGES is a table with the columns board and pin; a .tsv may do without a header. Pin ids are strings
or integers.
"""


def add_parser(subparsers) -> None:
    """Add `data` and its sub-commands; each sets `run`, a function of the parsed arguments."""
    data = subparsers.add_parser("data", help="make, import and look at data sets")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    command = commands.add_parser("emoji", help="the quickstart data: the Noto colour emoji")
    _add_out(command)
    command.set_defaults(run=_emoji)

    command = commands.add_parser("openclipart", help="a larger real set: public-domain clip art")
    _add_out(command)
    command.set_defaults(run=_openclipart)

    command = commands.add_parser("synthetic", help="a made-up set of the emoji's shape")
    _add_out(command)
    command.add_argument("--pins", type=int, default=synthetic.EMOJI_PINS, metavar="N")
    command.add_argument("--seed", type=int, default=0, metavar="S")
    command.set_defaults(run=_synthetic)

    command = commands.add_parser("import", help="your own data", description=_IMPORT_HELP)
    _add_import_arguments(command)
    command.set_defaults(run=_import)

    command = commands.add_parser("info", help="what a data set holds")
    command.add_argument("folder", metavar="DIR", help="a pin store, or a raw folder (shards or tables)")
    command.set_defaults(run=_info)


def describe(store: PinStore) -> str:
    """A few lines on a store: what it is, how many of what, what was left out."""
    info = store.info
    graph = store.graph
    sizes = graph.board_sizes
    lines = [
        f"{store.name}{' (SYNTHETIC: generated, not real data)' if store.synthetic else ''}  {store.root}",
        f"  {len(store):,} pins: {info['images']:,} with image, {info['texts']:,} with text",
        f"  {graph.num_boards:,} boards, {graph.num_edges:,} edges; "
        f"{int((graph.pin_degrees == 0).sum()):,} pins on no board",
    ]
    if len(sizes):
        lines.append(f"  pins a board: {sizes.min()} to {sizes.max()}, mean {sizes.mean():.1f}")
    left_out = {
        "bad": f"bad pins, listed in {store.root / 'bad_pins.jsonl'}",
        "single_pin_boards": "boards of a single pin, which relate nothing",
        "edges_of_bad_pins": "edges of bad pins left out",
        "edges_of_unknown_pins": "edges of unknown pins left out",
    }
    lines += [f"  {info[key]:,} {meaning}" for key, meaning in left_out.items() if info.get(key)]
    lines += [f"  {key}: {info[key]}" for key in ("source", "license") if info.get(key)]
    return "\n".join(lines)


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="the pin store to write")


def _add_import_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--pins", required=True, metavar="PINS", help="table of pins, or shards")
    command.add_argument("--edges", metavar="EDGES", help="table of edges (board, pin)")
    command.add_argument("--boards", metavar="BOARDS", help="table of boards (id, title)")
    _add_out(command)
    command.add_argument("--id-column", default="id", metavar="NAME", help="the pins' ids (default: id)")
    command.add_argument("--image-column", metavar="NAME", help="image path or bytes (default: image)")
    command.add_argument(
        "--text-columns",
        metavar="NAME[,NAME...]",
        help="the text, lines joined (default: text; with shards the .txt, else keys of the .json)",
    )
    command.add_argument("--board-column", default="board", metavar="NAME", help="in EDGES (default: board)")
    command.add_argument("--pin-column", default="pin", metavar="NAME", help="in EDGES (default: pin)")
    command.add_argument(
        "--unknown-pins",
        choices=("error", "drop"),
        default="error",
        help="an edge naming a pin that is not in PINS stops the import, or is left out and counted",
    )
    command.add_argument(
        "--max-bad",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="stop if more than this share of the pins is bad, as by broken images (default: 0.05)",
    )
    command.add_argument("--name", help="name of the data set (default: that of PINS)")


def _emoji(arguments: argparse.Namespace) -> None:
    print(f"downloading the Debian packages {', '.join(emoji.PACKAGES)}", file=sys.stderr)
    try:
        store = emoji.build(arguments.out)
    except apt.PackagesUnavailable as error:
        print(f"the emoji's Debian packages cannot be had: {error}", file=sys.stderr)
        print("making a SYNTHETIC set of the same shape instead", file=sys.stderr)
        store = synthetic.build(arguments.out)
    print(describe(store))


def _openclipart(arguments: argparse.Namespace) -> None:
    print(f"downloading the Debian packages {', '.join(openclipart.PACKAGES)} (155 MB)", file=sys.stderr)
    print(describe(openclipart.build(arguments.out)))


def _synthetic(arguments: argparse.Namespace) -> None:
    print(describe(synthetic.build(arguments.out, pins=arguments.pins, seed=arguments.seed)))


def _import(arguments: argparse.Namespace) -> None:
    texts = arguments.text_columns
    store = import_pins(
        arguments.pins,
        arguments.edges,
        arguments.out,
        columns=Columns(
            id=arguments.id_column,
            image=arguments.image_column,
            texts=tuple(name.strip() for name in texts.split(",")) if texts else None,
            board=arguments.board_column,
            pin=arguments.pin_column,
        ),
        boards=arguments.boards,
        unknown_pins=arguments.unknown_pins,
        max_bad=arguments.max_bad,
        name=arguments.name,
    )
    print(describe(store))


def _info(arguments: argparse.Namespace) -> None:
    print(describe(open_dataset(arguments.folder)))
