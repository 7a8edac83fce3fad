"""Sorting and numbering what does not fit into memory: arrays on disk, sorted runs, and their merge.

The scheme is the classical external merge sort. Rows are sorted a buffer at a time and written as runs; a
sample of every run says where to cut the order of the values into ranges; the slices of one range, one from
each run, fit into memory, are sorted there, and range after range is the whole in order. What is done to a
value depends on the value alone, so neither buffer size nor number of threads changes the result.

Values are NumPy arrays of integers, or Arrow arrays of large_string in the order of their UTF-8 bytes (which
is the order of Python's str); `factorize` and `join` are all that tells the two apart.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pinclip.errors import DataError

_HEADER = 128
# Samples of a full run. A range is off its wanted size by at most one sample step for each run.
_SAMPLES = 1024

Values = np.ndarray | pa.LargeStringArray
Item = TypeVar("Item")
Result = TypeVar("Result")


class DiskArray:
    """A one-dimensional .npy file, written piece by piece and read by slices.

    It is not mapped into memory: what is read counts only as long as it is held. Once `finish` is called the
    file is one that `numpy.load` reads. Raises OSError with its errno where the disk does not take it.
    """

    def __init__(self, path: str | os.PathLike, dtype: np.typing.DTypeLike):
        self.path = Path(path)
        self.dtype = np.dtype(dtype)
        self._length = 0
        self._file = open(self.path, "w+b", buffering=0)  # noqa: SIM115

    def __len__(self) -> int:
        return self._length

    def append(self, values: np.ndarray) -> None:
        self.put(self._length, values)

    def put(self, start: int, values: np.ndarray) -> None:
        """Write `values` at `start`, growing the array where it ends before."""
        values = np.ascontiguousarray(values, self.dtype)
        if len(values):
            _write_all(self._file.fileno(), memoryview(values).cast("B"), self._place(start))
            self._length = max(self._length, start + len(values))

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(self._length)
        assert step == 1
        values = np.empty(max(stop - start, 0), self.dtype)
        if len(values):
            _read_all(self._file.fileno(), memoryview(values).cast("B"), self._place(start))
        return values

    def finish(self) -> DiskArray:
        """Write the header."""
        self._file.seek(0)
        shape = {"descr": self.dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, shape)
        assert self._file.tell() == _HEADER
        return self

    def remove(self) -> None:
        """Delete the file, which frees its place on the disk."""
        self._file.close()
        self.path.unlink()

    def close(self) -> None:
        self._file.close()

    def _place(self, index: int) -> int:
        return _HEADER + index * self.dtype.itemsize


class DiskTexts:
    """An array of texts on disk, appended to and read by slices."""

    def __init__(self, path: str | os.PathLike):
        self._ends = DiskArray(path, np.int64)
        self._bytes = DiskArray(f"{path}.text", np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, values: pa.LargeStringArray) -> None:
        offsets, data = _buffers(values)
        self._ends.append(offsets[1:] - offsets[0] + len(self._bytes))
        self._bytes.append(data)

    def __getitem__(self, where: slice) -> pa.LargeStringArray:
        start, stop, step = where.indices(len(self))
        assert step == 1
        ends = self._ends[start:stop]
        first = int(self._ends[start - 1 : start][0]) if start else 0
        data = self._bytes[first : int(ends[-1]) if len(ends) else first]
        offsets = np.concatenate((np.zeros(1, np.int64), ends - first))
        return pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(data))

    def remove(self) -> None:
        self._ends.remove()
        self._bytes.remove()


class Runs:
    """Sorted runs on disk, to be read range by range of their values."""

    def __init__(self, path: str | os.PathLike):
        self._path = path
        self._ends = [0]
        self._samples: list[list] = []
        self._steps: list[int] = []
        self._store: DiskArray | DiskTexts | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def append(self, run: Values) -> None:
        """Add a run; its values must rise."""
        if self._store is None:
            integers = isinstance(run, np.ndarray)
            self._store = DiskArray(self._path, run.dtype) if integers else DiskTexts(self._path)
        self._store.append(run)
        self._steps.append(max(len(run) // _SAMPLES, 1))
        self._samples.append(run[:: self._steps[-1]].tolist())
        self._ends.append(self._ends[-1] + len(run))

    def disk_like(self, path: str | os.PathLike) -> DiskArray | DiskTexts:
        """An empty array on disk for values of the kind of the runs."""
        return DiskArray(path, self._store.dtype) if isinstance(self._store, DiskArray) else DiskTexts(path)

    def span(self, run: int) -> slice:
        """The place of a run among the values of all runs."""
        return slice(self._ends[run], self._ends[run + 1])

    def ranges(self, rows: int, align: Callable = lambda value: value) -> Iterator[list[slice]]:
        """Yield, range after range of rising values, the slices of the runs that lie in it.

        rows:  a range has no more values than this, if it is twice the sum of all runs' sample steps.
        align: turns a value at which two ranges would be parted into the one at which they are.
        """
        starts = self._ends[:-1]
        for cut in (*self._cuts(rows, align), None):
            stops = self._ends[1:]
            if cut is not None:
                stops = [self._place(run, cut) for run in range(len(self._samples))]
            slices = [slice(a, b) for a, b in zip(starts, stops, strict=True) if a < b]
            if slices:
                yield slices
            starts = stops

    def read(self, slices: Sequence[slice]) -> Values:
        """The values of the slices, end to end."""
        return join([self._store[where] for where in slices])

    def remove(self) -> None:
        if self._store is not None:
            self._store.remove()

    def _cuts(self, rows: int, align: Callable) -> Iterator:
        """Where to part the values. A sample stands for the values up to the next one of its run."""
        pairs = zip(self._samples, self._steps, strict=True)
        samples = sorted((value, step) for run, step in pairs for value in run)
        room, inside, last = max(rows - sum(self._steps), 1), 0, None
        for value, step in samples:
            if inside + step > room and inside and align(value) != last:
                last, inside = align(value), 0
                yield last
            inside += step

    def _place(self, run: int, cut) -> int:
        """Where in `run` the values from `cut` on begin."""
        after = bisect_left(self._samples[run], cut)
        if after == 0:
            return self._ends[run]
        start = self._ends[run] + (after - 1) * self._steps[run] + 1
        stop = min(start + self._steps[run] - 1, self._ends[run + 1])
        return start + bisect_left(self._store[start:stop].tolist(), cut)


def number(
    runs: Runs, ids: DiskArray | DiskTexts, ranks: DiskArray, rows: int, threads: int, tick: Callable
) -> int:
    """Number the distinct values of all runs by their rank; returns how many there are.

    ids:   is appended the distinct values, rising.
    ranks: is given the rank of every value of the runs, in their places.
    rows:  as many values are merged at a time.
    tick:  is told of every so many values that are done.
    """

    def merge(slices: list[slice]) -> tuple:
        return slices, *factorize(runs.read(slices))

    base = 0
    for slices, distinct, codes in ordered_map(merge, runs.ranges(rows), threads):
        ids.append(distinct)
        codes = codes.astype(ranks.dtype)
        codes += base
        done = 0
        for where in slices:
            count = where.stop - where.start
            ranks.put(where.start, codes[done : done + count])
            done += count
        base += len(distinct)
        tick(done)
    return base


def factorize(values: Values) -> tuple[Values, np.ndarray]:
    """(the distinct values, rising; the rank of each value among them, int32)."""
    if isinstance(values, np.ndarray):
        order = np.argsort(values)
        rising = values[order]
        first = first_of_each(rising)
        codes = np.empty(len(values), np.int32)
        codes[order] = np.cumsum(first, dtype=np.int32) - np.int32(1)
        return rising[first], codes
    encoded = values.dictionary_encode()
    order = pc.array_sort_indices(encoded.dictionary)
    rank = np.empty(len(order), np.int32)
    rank[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    return encoded.dictionary.take(order), rank[encoded.indices.to_numpy()]


def first_of_each(rising: np.ndarray) -> np.ndarray:
    """Where in a rising array a new value begins: bool."""
    first = np.empty(len(rising), bool)
    first[:1] = True
    np.not_equal(rising[1:], rising[:-1], out=first[1:])
    return first


def join(parts: Sequence[Values]) -> Values:
    """The parts end to end."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else pa.concat_arrays(parts)


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield function(item) in the order of the items; at most `threads` + 1 are under way or waiting."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                del item
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _buffers(values: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int64 [n + 1], the bytes from the first to the last of them)."""
    _, offsets, data = values.buffers()
    if len(values) == 0:
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    offsets = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
    data = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return offsets, data[offsets[0] : offsets[-1]]


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _read_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise DataError("a temporary file of the build is shorter than it was written")
        view, offset = view[count:], offset + count
