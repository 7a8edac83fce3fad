"""A run that draws its neighbors from mined pairs."""

import numpy as np
import pyarrow as pa
import pytest

from pinclip.data.importer import open_dataset
from pinclip.errors import DataError
from pinclip.graph.folder import GraphFolder
from pinclip.graph.mine import mine_pairs
from pinclip.graph.mining import Mining
from pinclip.graph.splits import cold_split
from pinclip.train.run import prepare


@pytest.fixture
def mined(store_path, tmp_path):
    """Pairs of the tiny set's training graph, and the set of them as numbers of the store."""
    store = open_dataset(store_path)
    graph = cold_split(store.ids, 0.15, 0).training_graph(store.graph)
    split = {"format": 1, "kind": "pins", "fraction": 0.15, "seed": 0, "counts": {"edges": 1, "pins": 1}}
    folder = GraphFolder(tmp_path, graph, pa.array(store.ids), pa.array(store.board_ids), split)
    path = tmp_path / "pairs.parquet"
    mine_pairs(folder, path, Mining(walks=20, length=4, top_k=3, restart=0.2), progress=False)
    return str(path)


def test_partners_are_mined_pairs(tiny, mined, tmp_path):
    run = prepare(tiny(**{"objective.pairs": mined, "data.cold_fraction": 0.15}), resume=False)
    table = run.batches.neighbors._source._pairs
    pairs = set(zip(np.repeat(np.arange(80), np.diff(table.indptr)).tolist(), table.neighbors.tolist()))
    drawn = set()
    for step in range(5):
        slots, partner = run.batches.slots(step)
        anchors = np.arange(0, len(slots), 2)[partner[::2] >= 0]
        drawn |= set(zip(slots[anchors].tolist(), slots[partner[anchors]].tolist()))
    assert len(drawn) > 20 and drawn <= pairs
    shared = {(a, b) for a in range(80) for b in run.store.graph.co_board_pins(a).tolist()}
    assert not shared <= pairs  # so a sampler that walks would have drawn others


def test_pairs_of_another_split_are_refused(tiny, mined):
    with pytest.raises(DataError, match=r"fraction 0\.15 and seed 0, the run withholds .* = 0\.3"):
        prepare(tiny(**{"objective.pairs": mined, "data.cold_fraction": 0.3}), resume=False)
