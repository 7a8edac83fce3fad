"""Batches are a pure function of seed and step, on any number of ranks; what a slot holds is what it says."""

import numpy as np
import pytest
import torch

from pinclip.data.batches import PinBatches, PinChunks, drop_tokens
from pinclip.data.synthetic import build
from pinclip.data.tokenizer import Tokenizer
from pinclip.data.transforms import EvalTransform, TrainTransform
from pinclip.errors import DataError
from pinclip.graph.neighbors import NeighborSampler
from pinclip.graph.splits import cold_split


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    store = build(tmp_path_factory.mktemp("batches") / "store", pins=90, seed=3, progress=False)
    split = cold_split(store.ids, 0.2, 0)
    tokenizer = Tokenizer.train((store.texts[i] for i in split.train), vocab_size=300, max_length=12)
    return store, split, tokenizer


def batches(world, *, neighbors=True, rank=0, world_size=1, seed=0, **changes):
    store, split, tokenizer = world
    graph = split.training_graph(store.graph)
    return PinBatches(
        store,
        split.train,
        tokenizer,
        TrainTransform(16, 0.4, True, 0.2),
        batch_size=24,
        steps=50,
        seed=seed,
        neighbors=NeighborSampler(graph, seed, anchors=split.train) if neighbors else None,
        token_dropout=0.3,
        rank=rank,
        world_size=world_size,
        **changes,
    )


def same(a, b):
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name


def test_a_batch_is_a_function_of_seed_and_step(world):
    one, two = batches(world), batches(world)
    for step in (0, 7, 3):
        same(one[step], two[step])
    assert not torch.equal(one[0].pins, batches(world, seed=1)[0].pins)
    assert not torch.equal(one[0].images, one[1].images)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_one_global_batch(world, world_size):
    whole = batches(world)[5]
    parts = [batches(world, rank=r, world_size=world_size)[5] for r in range(world_size)]
    for name in ("pins", "partner", "images", "tokens", "token_lengths", "log_q", "known_indices"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_every_epoch_holds_every_training_pin_once(world):
    _, split, _ = world
    plain = batches(world, neighbors=False)
    pins = np.concatenate([plain.slots(step)[0] for step in range(12)])
    for epoch in range(3):
        chunk = pins[epoch * len(split.train) : (epoch + 1) * len(split.train)]
        assert sorted(chunk) == sorted(split.train)
    assert (plain.slots(0)[1] == -1).all()


def test_partners_share_a_training_board_and_cold_pins_never_appear(world):
    store, split, _ = world
    graph = split.training_graph(store.graph)
    boards = [set(graph.pin_boards[graph.pin_indptr[p] : graph.pin_indptr[p + 1]]) for p in range(len(store))]
    found = 0
    for step in range(20):
        batch = batches(world)[step]
        assert not np.isin(batch.pins, split.cold).any()
        for slot, partner in enumerate(batch.partner.tolist()):
            if partner >= 0:
                found += 1
                assert batch.partner[partner] == slot
                a, b = batch.pins[slot], batch.pins[partner]
                assert a != b and boards[a] & boards[b]
    assert found > 200


def test_log_q_is_the_frequency_of_a_pin(world):
    """A 5-sigma bound for each pin's count over 2,000 batches: false alarm below 1 in 20,000."""
    made = batches(world)
    made.steps = 2000
    counts = np.bincount(np.concatenate([made.slots(s)[0] for s in range(2000)]), minlength=len(made.store))
    q = np.exp(made.neighbors.log_q(np.arange(len(made.store))).astype(np.float64))
    n = 2000 * 24
    assert (np.abs(counts - n * q) <= 5 * np.sqrt(n * q) + 1e-9).all()


def test_missing_modalities(world):
    _store, _, _ = world
    made = batches(world)
    made.token_lengths = made.token_lengths.clone()
    made.token_lengths[::3] = 0
    batch = made[0]
    assert torch.equal(batch.has_text, made.token_lengths[batch.pins] > 0)
    assert len(batch.tokens) == len(batch.text_rows) == len(batch.token_lengths) == int(batch.has_text.sum())
    assert batch.has_image.all()


def test_too_few_pins_and_odd_shares(world):
    store, split, tokenizer = world
    with pytest.raises(DataError, match="1 usable training pins"):
        PinBatches(
            store,
            split.train[:1],
            tokenizer,
            TrainTransform(16),
            batch_size=4,
            steps=1,
            seed=0,
            neighbors=None,
        )
    with pytest.raises(DataError, match="batch_size = 24 is not a multiple of the 5 processes"):
        batches(world, world_size=5)


def test_workers_give_the_same_batches(world):
    made = batches(world)
    made.steps = 4
    for with_workers, without in zip(made.loader(1, 2, False), made.loader(1, 0, False), strict=True):
        same(with_workers, without)


def test_drop_tokens():
    tokens = torch.tensor([[5, 6, 7, 2, 0], [5, 2, 0, 0, 0], [5, 6, 2, 0, 0], [2, 0, 0, 0, 0]])
    lengths = torch.tensor([4, 2, 3, 1], dtype=torch.int32)
    dropped = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    got, got_lengths = drop_tokens(tokens, lengths, dropped, pad_id=9)
    # The end token stays; where all inner tokens would go, none does.
    assert got.tolist() == [[5, 7, 2, 9, 9], [5, 2, 9, 9, 9], [6, 2, 9, 9, 9], [2, 9, 9, 9, 9]]
    assert got_lengths.tolist() == [3, 2, 2, 1] and got_lengths.dtype == torch.int32


def test_chunks_hold_every_pin_in_order(world):
    store, _, tokenizer = world
    chunks = list(PinChunks(store, tokenizer, EvalTransform(16), chunk=40))
    assert [len(chunk) for chunk in chunks] == [40, 40, 10]
    assert torch.equal(torch.cat([chunk.pins for chunk in chunks]), torch.arange(90))


def test_transforms():
    from PIL import Image

    image = Image.fromarray((np.arange(40 * 30 * 3) % 251).astype(np.uint8).reshape(40, 30, 3))
    plain = EvalTransform(8)(image)
    assert plain.shape == (3, 8, 8) and plain.dtype == torch.uint8
    # A training transform without any freedom is the evaluation's.
    assert torch.equal(TrainTransform(8)(image, np.random.default_rng(0)), plain)
    crops = [TrainTransform(8, 0.4)(image, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])
    mirror = TrainTransform(8, 1.0, True)
    flipped = {mirror(image, np.random.default_rng(seed)).flip(2).equal(plain) for seed in range(20)}
    assert flipped == {True, False}
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    jittered = TrainTransform(8, 1.0, False, 0.5)(grey, np.random.default_rng(0))
    assert jittered.unique().numel() == 1 and jittered.unique() != 100  # a grey stays one grey


def test_crops_stay_inside_and_keep_their_area():
    from PIL import Image

    transform, image = TrainTransform(8, 0.4), Image.new("RGB", (60, 40))
    for seed in range(300):
        left, top, right, bottom = transform._box(image, np.random.default_rng(seed))
        assert 0 <= left < right <= 60 + 1e-9 and 0 <= top < bottom <= 40 + 1e-9
        assert (right - left) * (bottom - top) <= 2400 + 1e-6


def test_tokenizer(tmp_path):
    texts = ["Red apple", "red  pear", "", "  ", "a blue whale with a very long name indeed"] * 4
    tokenizer = Tokenizer.train(texts, vocab_size=320, max_length=6)
    ids, lengths = tokenizer(texts[:5])
    assert ids.shape == (5, 6) and ids.dtype == torch.int64
    assert lengths.tolist()[2:] == [0, 0, 6] and (lengths[:2] > 1).all()
    assert (ids[2:4] == tokenizer.pad_id).all()
    end = ids[0, lengths[0] - 1]
    assert end == ids[4, 5]  # a truncated text still ends with the end token
    assert torch.equal(tokenizer(["RED APPLE"])[0], ids[:1])  # case is folded
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json", max_length=6)
    assert torch.equal(again(texts)[0], tokenizer(texts)[0]) and again.pad_id == tokenizer.pad_id
    assert Tokenizer.train(texts, vocab_size=320, max_length=6).vocab_size == tokenizer.vocab_size


def test_tokenizer_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no such tokenizer file"):
        Tokenizer.load(tmp_path / "none.json", max_length=4)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad.json: not a tokenizer.json"):
        Tokenizer.load(tmp_path / "bad.json", max_length=4)
