"""Text to token ids: a Hugging Face `tokenizers` tokenizer, trained on the pins' own text or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pinclip.errors import DataError
from pinclip.io import write_text

PAD, END = "<pad>", "</s>"


class Tokenizer:
    """Encodes texts to right-padded int64 ids; every non-empty text ends with the end token.

    A text that is empty (or only white space) has length 0: its pin lacks the text modality.
    """

    def __init__(self, inner: HFTokenizer, max_length: int):
        self.pad_id = _pad_id(inner)
        self.max_length = max_length
        self._inner = inner
        self._inner.no_padding()
        self._inner.enable_truncation(max_length)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, max_length: int) -> Tokenizer:
        """Byte-level BPE over case-folded NFKC text. Deterministic for the same texts in the same order."""
        inner = HFTokenizer(models.BPE())
        inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[PAD, END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator((text for text in texts if text.strip()), trainer)
        end = inner.token_to_id(END)
        inner.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
        return cls(inner, max_length)

    @classmethod
    def load(cls, path: str | Path, *, max_length: int) -> Tokenizer:
        """Read a `tokenizer.json`."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such tokenizer file")
        try:
            inner = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise DataError(f"{path}: not a tokenizer.json: {error}") from None
        return cls(inner, max_length)

    def save(self, path: str | Path) -> None:
        write_text(path, self._inner.to_str(pretty=True))

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """`texts` to (ids int64 [n, max_length], lengths int32 [n])."""
        rows = [encoding.ids for encoding in self._inner.encode_batch(list(texts))]
        ids = torch.full((len(rows), self.max_length), self.pad_id, dtype=torch.int64)
        lengths = torch.zeros(len(rows), dtype=torch.int32)
        for i, (text, row) in enumerate(zip(texts, rows)):
            if text.strip():
                ids[i, : len(row)] = torch.tensor(row)
                lengths[i] = len(row)
        return ids, lengths


def _pad_id(inner: HFTokenizer) -> int:
    """The file's own padding id; else `<pad>`; else `</s>`, with which SigLIP's texts were padded; else 0."""
    if inner.padding is not None:
        return inner.padding["pad_id"]
    ids = (inner.token_to_id(token) for token in (PAD, END))
    return next((id_ for id_ in ids if id_ is not None), 0)
