"""Training batches. Batch `step` is a pure function of the seed and of `step`.

There is no iterator state to save: which pins, which neighbors and which crops follow from counters,
so that a resumed run, or a run on another number of ranks, sees the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pinclip.data.store import PinStore
from pinclip.data.tokenizer import Tokenizer
from pinclip.data.transforms import EvalTransform, TrainTransform
from pinclip.errors import DataError
from pinclip.graph.neighbors import NeighborSampler

_ORDER, _CROP, _WORDS = 1, 2, 3  # streams of the counter-based generator


@dataclass
class PinBatch:
    """One rank's share of a global batch of `N` pins; `b` local pins, of which some lack image or text.

    Positions named `global` index the N slots of the whole batch, in rank order.
    """

    step: int
    pins: torch.Tensor  # int64 [b]  index of each pin in the store
    images: torch.Tensor  # uint8 [Bi, 3, H, W]
    image_rows: torch.Tensor  # int64 [Bi]  which local slots have an image
    tokens: torch.Tensor  # int64 [Bt, L]
    token_lengths: torch.Tensor  # int32 [Bt]
    text_rows: torch.Tensor  # int64 [Bt]  which local slots have a text
    partner: torch.Tensor  # int64 [b]  global slot of the sampled neighbor, -1 for none
    known_indptr: torch.Tensor  # int64 [b + 1]  CSR of global slots that hold known neighbors
    known_indices: torch.Tensor  # int64 [nnz]
    log_q: torch.Tensor  # fp32 [b]  log-probability that a slot holds this pin

    def __len__(self) -> int:
        return len(self.pins)

    @property
    def has_image(self) -> torch.Tensor:
        return _mask(self.image_rows, len(self))

    @property
    def has_text(self) -> torch.Tensor:
        return _mask(self.text_rows, len(self))

    def to(self, device: torch.device) -> PinBatch:
        """Move what the model and the losses read. Lengths and rows stay: they shape the step on the host."""
        host = {"step", "token_lengths", "image_rows", "text_rows"}
        moved = {
            field.name: value if field.name in host else value.to(device, non_blocking=True)
            for field in fields(self)
            for value in [getattr(self, field.name)]
        }
        return PinBatch(**moved)

    def pin_memory(self) -> PinBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return PinBatch(**{k: v.pin_memory() if torch.is_tensor(v) else v for k, v in values.items()})

    def micro(self, index: int, count: int) -> PinBatch:
        """Part `index` of `count` equal parts, for the towers only: pair structure stays with the whole."""
        size = len(self) // count
        low, high = index * size, (index + 1) * size
        image = (self.image_rows >= low) & (self.image_rows < high)
        text = (self.text_rows >= low) & (self.text_rows < high)
        empty = self.known_indices[:0]
        return PinBatch(
            step=self.step,
            pins=self.pins[low:high],
            images=self.images[image.to(self.images.device)],
            image_rows=self.image_rows[image] - low,
            tokens=self.tokens[text.to(self.tokens.device)],
            token_lengths=self.token_lengths[text],
            text_rows=self.text_rows[text] - low,
            partner=self.partner[low:high],
            known_indptr=self.known_indptr.new_zeros(size + 1),
            known_indices=empty,
            log_q=self.log_q[low:high],
        )


class PinBatches(Dataset):
    """The global batches of a run, each rank its contiguous share.

    Without neighbors a batch is `batch_size` slots of consecutive epochs, each a fresh permutation of the
    training pins.  With neighbors the even slots are such anchors and the odd slots their sampled
    neighbors (another anchor where a pin has none).
    """

    def __init__(
        self,
        store: PinStore,
        pins: np.ndarray,
        tokenizer: Tokenizer,
        transform: TrainTransform,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        neighbors: NeighborSampler | None,
        token_dropout: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size % world_size:
            raise DataError(
                f"train.batch_size = {batch_size} is not a multiple of the {world_size} processes"
            )
        if len(pins) < 2:
            raise DataError(f"{store.root}: {len(pins)} usable training pins; at least 2 are needed")
        self.store, self.train_pins, self.transform = store, np.asarray(pins), transform
        self.batch_size, self.steps, self.seed, self.neighbors = batch_size, steps, seed, neighbors
        self.token_dropout = token_dropout
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.tokens, self.token_lengths = tokenizer(store.texts)
        self.pad_id = tokenizer.pad_id

    def __len__(self) -> int:
        return self.steps

    def slots(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The whole batch: (pin of every slot [N], global slot of its neighbor or -1 [N])."""
        if self.neighbors is None:
            return self._anchors(step * self.batch_size, self.batch_size), np.full(self.batch_size, -1)
        half = self.batch_size // 2
        anchors = self._anchors(step * half, half)
        neighbors = self.neighbors.sample(anchors, step)
        lonely = neighbors < 0
        slots = np.stack([anchors, np.where(lonely, np.roll(anchors, 1), neighbors)], axis=1).reshape(-1)
        partner = np.arange(self.batch_size) ^ 1
        partner[np.repeat(lonely, 2)] = -1
        return slots, partner

    def _anchors(self, start: int, count: int) -> np.ndarray:
        """Places `start … start + count` of the endless sequence of epoch permutations."""
        epochs = range(start // len(self.train_pins), (start + count - 1) // len(self.train_pins) + 1)
        orders = [_generator(self.seed, _ORDER, epoch).permutation(self.train_pins) for epoch in epochs]
        begin = start - epochs[0] * len(self.train_pins)
        return np.concatenate(orders)[begin : begin + count]

    def __getitem__(self, step: int) -> PinBatch:
        slots, partner = self.slots(step)
        pins = slots[self.share]
        image_rows = np.flatnonzero(self.store.has_image[pins])
        text_rows = torch.nonzero(self.token_lengths[pins]).flatten()
        tokens, token_lengths = self._texts(step, pins, text_rows)
        if self.neighbors is None:
            known = np.zeros(len(pins) + 1, np.int64), np.zeros(0, np.int64)
            log_q = np.zeros(len(pins), np.float32)
        else:
            known = self.neighbors.known(pins, slots)
            log_q = self.neighbors.log_q(pins)
        return PinBatch(
            step=step,
            pins=torch.from_numpy(pins),
            images=self._images(step, pins, image_rows),
            image_rows=torch.from_numpy(image_rows),
            tokens=tokens,
            token_lengths=token_lengths,
            text_rows=text_rows,
            partner=torch.from_numpy(partner[self.share]),
            known_indptr=torch.from_numpy(known[0]),
            known_indices=torch.from_numpy(known[1]),
            log_q=torch.from_numpy(log_q),
        )

    def _texts(self, step: int, pins: np.ndarray, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, lengths = self.tokens[pins][rows], self.token_lengths[pins][rows]
        if not self.token_dropout:
            return tokens, lengths
        # All slots' numbers are drawn and this rank's taken, so that the world size changes nothing.
        draws = _generator(self.seed, _WORDS, step).random((self.batch_size, tokens.shape[1]), np.float32)
        dropped = torch.from_numpy(draws[self.share])[rows] < self.token_dropout
        return drop_tokens(tokens, lengths, dropped, self.pad_id)

    def _images(self, step: int, pins: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        size = self.transform.size
        images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
        for image, row in zip(images, rows):
            slot = self.share.start + int(row)
            random = _generator(self.seed, _CROP, step * self.batch_size + slot)
            image.copy_(self.transform(self.store.image(int(pins[row]), self.transform.least_size), random))
        return images

    def loader(self, start: int, workers: int, pin_memory: bool) -> DataLoader:
        """Batches `start …`, made ahead in `workers` processes."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(start, self.steps),
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            pin_memory=pin_memory,
        )


class PinChunks(Dataset):
    """All pins of a store in order, in chunks, as evaluation and serving read them."""

    def __init__(self, store: PinStore, tokenizer: Tokenizer, transform: EvalTransform, chunk: int = 256):
        self.store, self.transform, self.chunk = store, transform, chunk
        self.tokens, self.token_lengths = tokenizer(store.texts)
        self.usable = ~store.bad

    def __len__(self) -> int:
        return -(-len(self.store) // self.chunk)

    def __getitem__(self, index: int) -> PinBatch:
        if index >= len(self):
            raise IndexError(index)
        pins = np.arange(index * self.chunk, min((index + 1) * self.chunk, len(self.store)))
        usable = self.usable[pins]
        image_rows = np.flatnonzero(self.store.has_image[pins] & usable)
        size = self.transform.size
        images = torch.empty(len(image_rows), 3, size, size, dtype=torch.uint8)
        for image, row in zip(images, image_rows):
            image.copy_(self.transform(self.store.image(int(pins[row]), self.transform.size)))
        lengths = self.token_lengths[pins]
        text_rows = torch.nonzero((lengths > 0) & torch.from_numpy(usable)).flatten()
        none = torch.zeros(0, dtype=torch.int64)
        return PinBatch(
            step=index,
            pins=torch.from_numpy(pins),
            images=images,
            image_rows=torch.from_numpy(image_rows),
            tokens=self.tokens[pins][text_rows],
            token_lengths=lengths[text_rows],
            text_rows=text_rows,
            partner=torch.full((len(pins),), -1),
            known_indptr=torch.zeros(len(pins) + 1, dtype=torch.int64),
            known_indices=none,
            log_q=torch.zeros(len(pins)),
        )


def drop_tokens(
    tokens: torch.Tensor, lengths: torch.Tensor, dropped: torch.Tensor, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove the `dropped` tokens [n, L], but never a text's last (the end token), nor all the others."""
    place = torch.arange(tokens.shape[1])
    last = lengths.long()[:, None] - 1
    inner = place < last
    dropped = dropped & inner
    dropped &= (inner & ~dropped).any(dim=1, keepdim=True)
    kept = (place <= last) & ~dropped
    order = (~kept).to(torch.int8).argsort(dim=1, stable=True)
    lengths = kept.sum(dim=1, dtype=lengths.dtype)
    return tokens.gather(1, order).masked_fill(place >= lengths[:, None], pad_id), lengths


def _generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    """Philox keyed by (seed, stream), at `counter`: the same numbers whoever asks, in whatever order."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, counter]))


def _mask(rows: torch.Tensor, size: int) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[rows] = True
    return mask
