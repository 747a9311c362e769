"""Windows to this rank's batches: pure, resumable at any sample, the same global order for every number of ranks."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from conf.schema import Refused
from data.batch import IGNORE, Batch
from data.source import Window, Windows


class Loader:
    """Batches of `source` for one rank.

    Sample n of the run is window n of the source under `seed`, whatever the number of ranks; a step that takes
    `num_samples` of them gives rank r the r-th contiguous share. A batch is a function of the samples consumed before
    it and of nothing else.

    depth: how many further targets each input has, and tokens ahead that it is given (multi-token prediction).
    prefetch: how many batches a stream makes ahead.
    first: the first sample of this length that there is.
    Raises Refused where the source has no window of this length.
    """

    def __init__(
        self,
        source: Windows,
        *,
        sequence_length: int,
        depth: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        first: int = 0,
    ) -> None:
        if sequence_length < 1 or depth < 0 or prefetch < 1:
            raise Refused(
                f"sequence length {sequence_length}, depth {depth} and prefetch {prefetch} must be at least 1, 0 and 1."
            )
        if not 0 <= rank < world_size:
            raise Refused(f"rank {rank} is not one of {world_size}.")
        self.source = source
        self.sequence_length = sequence_length
        self.depth = depth
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.prefetch = prefetch
        self._window(first)  # an impossible length is refused here, not in mid-run

    def batch(self, consumed: int, num_samples: int) -> Batch:
        """This rank's share of samples [consumed, consumed + num_samples). Raises Refused where shares are uneven."""
        share = self._share(num_samples)
        first = consumed + self.rank * share
        return self._assemble(range(first, first + share))

    def stream(self, consumed: int, num_samples: int) -> Stream:
        """`batch` for ever, `num_samples` at a time from `consumed` on, made ahead by a background thread."""
        self._share(num_samples)
        return Stream(lambda step: self.batch(consumed + step * num_samples, num_samples), self.prefetch)

    def fixed(self, num_samples: int | None, batch_size: int) -> Iterator[Batch]:
        """The same batches on every call: `num_samples` windows spread evenly over an epoch, or all of it where it has
        no more; None means all. Of an endless source, the first.

        Every target of an epoch counts once. The last batch is filled up with the last window, in which nothing is
        scored then, so that every rank sees as many batches, each of `batch_size` windows over all ranks.
        """
        share = self._share(batch_size)
        total = self.num_windows
        if num_samples is None and total is None:
            raise Refused("this source is endless; say how many samples to validate on.")
        count = min(n for n in (num_samples, total) if n is not None)
        for begin in range(0, count, batch_size):
            mine = range(begin + self.rank * share, begin + (self.rank + 1) * share)
            filled = [min(n, count - 1) for n in mine]  # a window behind them may lie in an epoch still to be drawn
            # neighbours are often of one document, and a few documents say little of a corpus
            places = [n if total is None else n * total // count for n in filled]
            inputs = [self._inputs(place) if n < count else 0 for n, place in zip(mine, places, strict=True)]
            yield self._assemble(places, np.array(inputs))

    @property
    def num_windows(self) -> int | None:
        """Windows that an epoch needs, the last one partly in the next epoch; None where there are no epochs."""
        tokens = self.source.num_tokens
        return None if tokens is None else -(-tokens // self.sequence_length)

    def _share(self, num_samples: int) -> int:
        if num_samples < 1 or num_samples % self.world_size:
            raise Refused(
                f"{num_samples} samples cannot be shared evenly by {self.world_size} data-parallel ranks; "
                f"take a multiple of {self.world_size}."
            )
        return num_samples // self.world_size

    def _window(self, index: int) -> Window:
        return self.source.window(index, self.sequence_length, 1 + self.depth, self.seed)

    def _inputs(self, index: int) -> int:
        """Inputs of window `index` that belong to the first epoch."""
        if self.source.num_tokens is None:
            return self.sequence_length
        return min(self.source.num_tokens - index * self.sequence_length, self.sequence_length)

    def _assemble(self, indices: Sequence[int], inputs: NDArray[np.integer] | None = None) -> Batch:
        """`inputs` [B]: in each row the targets of only the first so many inputs count; None: all."""
        S = self.sequence_length
        windows = [self._window(index) for index in indices]
        tokens = np.stack([w.tokens for w in windows]).astype(np.int64, copy=False)
        if tokens.max() >= self.source.vocab or tokens.min() < 0:
            raise ValueError(
                f"the data holds token id {tokens.max()}, beyond its vocabulary of {self.source.vocab}; "
                "the files are damaged: remove the corpus and prepare it again."
            )
        document, position = _pieces(windows, tokens.shape)
        ids = tokens[:, :S]
        targets = np.full((1 + self.depth, *ids.shape), IGNORE, dtype=np.int64)
        following = np.full((self.depth, *ids.shape), IGNORE, dtype=np.int64)
        may_count = _may_count(windows, tokens.shape)
        for d in range(1 + self.depth):
            ahead = slice(1 + d, S + 1 + d)
            counts = document[:, ahead] == document[:, :S]
            if d < self.depth:
                np.copyto(following[d], tokens[:, ahead], where=counts)
            if may_count is not None:
                counts &= may_count[:, ahead]
            if inputs is not None:
                counts &= np.arange(S) < inputs[:, None]
            np.copyto(targets[d], tokens[:, ahead], where=counts)
        return Batch(
            ids=torch.from_numpy(np.ascontiguousarray(ids)),
            targets=torch.from_numpy(targets),
            ahead=torch.from_numpy(following),
            position=torch.from_numpy(np.ascontiguousarray(position[:, :S])),
            document=torch.from_numpy(np.ascontiguousarray(document[:, :S])),
            scored=int(np.count_nonzero(targets[0] != IGNORE)),
            documents=int(document[:, S - 1].max()) + 1,
            digest=_digest(indices, tokens, windows),
        )


class Stream(Iterator[Batch]):
    """Batches made ahead by a thread. An exception there is raised here; `close`, or leaving `with`, ends it."""

    def __init__(self, make: Callable[[int], Batch], ahead: int) -> None:
        self._made: queue.Queue[Batch | Exception] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        # The thread knows the queue but not this object, so that a stream nobody holds any more ends as well.
        self._thread = threading.Thread(target=_produce, args=(make, self._made, self._stop), daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                item = self._made.get(timeout=0.5)
                if isinstance(item, Exception):
                    self.close()
                    raise item
                return item
        raise StopIteration

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop.set()


def _produce(make: Callable[[int], Batch], made: queue.Queue[Batch | Exception], stop: threading.Event) -> None:
    step = 0
    while not stop.is_set():
        try:
            item: Batch | Exception = make(step)
        except Exception as error:
            item = error
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=0.1)
                break
        if isinstance(item, Exception):
            return
        step += 1


def _pieces(windows: list[Window], shape: tuple[int, ...]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Index of each token's document piece in its row, and its position in the piece; [B, L] each."""
    num_rows, length = shape
    starts = np.concatenate([row * length + w.starts for row, w in enumerate(windows)])
    lengths = np.diff(starts, append=num_rows * length)
    in_row = np.concatenate([np.arange(len(w.starts), dtype=np.int32) for w in windows])
    document = np.repeat(in_row, lengths)
    position = np.arange(num_rows * length, dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)
    return document.reshape(shape), position.reshape(shape)


def _may_count(windows: list[Window], shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    if all(w.scored is None for w in windows):
        return None
    return np.stack([np.ones(shape[1], np.bool_) if w.scored is None else w.scored for w in windows])


def _digest(indices: Sequence[int], tokens: NDArray[np.int64], windows: list[Window]) -> str:
    """See Batch.digest."""
    total = 0
    for index, row, window in zip(indices, np.ascontiguousarray(tokens), windows, strict=True):
        digest = hashlib.blake2b(row.data, digest_size=8)
        digest.update(window.starts.tobytes())
        digest.update(index.to_bytes(8, "little"))
        total += int.from_bytes(digest.digest(), "little")
    return f"{total % 2**64:016x}"
