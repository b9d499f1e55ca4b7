"""Contiguous windows over parallel streams of one text: the batches of truncated back-propagation."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from experiments.core.errors import ExperimentError


class Batch(NamedTuple):
    """One window of every stream: `targets` are the symbols that follow `inputs`."""

    inputs: Tensor  # (T, B) int64
    targets: Tensor  # (T, B) int64
    starts: bool  # these windows begin their streams: the carried state must be dropped


class Windows:
    """Windows of `length` symbols over `batch_size` parallel contiguous streams, used directly as a dataloader.

    With S = ⌊(N-1) / B⌋, stream b reads symbols b·S … (b+1)·S - 1 and predicts each one's successor. So every symbol
    but the first is predicted exactly once, except a remainder of less than B at the end (none where B = 1). Column b
    of a batch goes on where column b of the batch before it ended; the last window may be shorter.

    `state_dict` and `load_state_dict` are Lightning's protocol for resuming within an epoch: the next pass after a load
    goes on at the next window, later passes start at the beginning. A pass that was over when saved starts anew.

    `resume_at` gives the window to go on at after a load, asked when the first window is drawn (past the last one: the
    pass is over); without it, that is the saved one. It is there because Lightning alone knows whether a batch that
    was handed out counts as done, and whether a new epoch follows the last one.

    Of several processes, each has its own block of the streams: that of `rank` among `processes`. In evaluation there
    may be fewer streams than processes; a process without one has batches of no columns, as many as the others.

    Raises ExperimentError where the text has no target for each stream, or a size is below 1.
    """

    def __init__(
        self,
        ids: Tensor,  # (N,) any integer type
        batch_size: int,
        length: int,
        resume_at: Callable[[], int] | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if batch_size < 1 or length < 1:
            raise ExperimentError(f"Windows: got batch_size={batch_size}, length={length}, expected at least 1 each.")
        stream = (len(ids) - 1) // batch_size
        if stream < 1:
            raise ExperimentError(
                f"Windows: the text has {len(ids)} symbols, expected at least {batch_size + 1} for {batch_size} "
                "streams. Lower the batch size or use a longer text."
            )
        used = stream * batch_size
        self._batch_size = batch_size
        self._inputs = ids[:used].view(batch_size, stream).tensor_split(processes)[rank]
        self._targets = ids[1 : used + 1].view(batch_size, stream).tensor_split(processes)[rank]
        self._length = length
        self._resume_at = resume_at
        self._position = 0  # windows handed out in this pass
        self._resuming = False

    def __len__(self) -> int:
        return -(-self._inputs.shape[1] // self._length)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning may draw an iterator and drop it: the first one after a load resumes, whether or not it is used.
        resuming, self._resuming = self._resuming, False
        self._position = self._position % len(self) if resuming else 0
        return self._windows(self._position, self._resume_at if resuming else None)

    def state_dict(self) -> dict[str, int]:
        """The windows handed out in this pass, and the sizes that give that number its meaning."""
        return {"position": self._position, **self._sizes()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next pass go on after the saved window.

        Raises ExperimentError where the text, the batch size or the length is not the saved one.
        """
        saved = {name: state[name] for name in self._sizes()}
        if saved != self._sizes():
            raise ExperimentError(
                f"Windows: the checkpoint was saved with {_listed(saved)}, got {_listed(self._sizes())}. "
                "Resume with the same text and the same data settings."
            )
        self._position = state["position"]
        self._resuming = True

    def _sizes(self) -> dict[str, int]:
        return {"stream": self._inputs.shape[1], "batch_size": self._batch_size, "length": self._length}

    def _windows(self, first: int, resume_at: Callable[[], int] | None) -> Iterator[Batch]:
        if resume_at is not None:
            first = resume_at()
        for index in range(first, len(self)):
            self._position = index + 1
            window = slice(index * self._length, (index + 1) * self._length)
            # Compact ids become int64 here, a window at a time.
            yield Batch(
                self._inputs[:, window].T.contiguous().long(),
                self._targets[:, window].T.contiguous().long(),
                starts=index == 0,
            )


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
