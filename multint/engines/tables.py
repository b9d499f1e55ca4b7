"""What the engines keep from call to call in a process, with how much there may be; the caches of functions aside."""

from __future__ import annotations

import ctypes
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

# Tracing and compiling go by states of the whole process: one thread at a time.
TRACING = threading.RLock()

# Structures of cells, graphs with a program, and graphs of one structure. Each takes some megabytes at most, and a
# program as many seconds to make again, so that this is for what makes new ones for ever.
MOST = 64


class Latest(OrderedDict[Hashable, Any]):
    """The entries that were used last; those that go are told to forget."""

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep an entry as the last one."""
        self[key] = value
        self.move_to_end(key)
        while len(self) > MOST:
            self.popitem(last=False)[1].forget()


class Last(NamedTuple):
    """How a cell's last scan ran, without keeping its program alive."""

    reason: str  # why the loop did
    program: weakref.ref[Any] | None = None
    size: tuple[int, int] = (0, 0)  # T, B


@dataclass
class Record:
    """What is kept of a cell.

    Attributes:
        structure, step, calls: how its step is matched with a graph; see `step.py`.
        last: how its last scan by "auto" or "fused" ran; None before the first.
        stepped: its steps by the loop so far under "auto".
        in_pieces: whether it has no native loops.
    """

    structure: Hashable = None
    step: Any = None
    calls: dict[Hashable, Any] = field(default_factory=dict)
    last: Last | None = None
    stepped: int = 0
    in_pieces: bool = False


# By identity: what a user's cell says of equality and of its hash does not make two cells one.
_records: dict[int, Record] = {}

steps = Latest()  # guarded ones, by structure
graphs = Latest()  # that have a program
programs: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()  # by what their graphs compute
libraries: dict[str, ctypes.CDLL] = {}  # of native loops, by the names of their files
told: set[str] = set()  # warnings that were given


def record_of(cell: nn.Module) -> Record:
    """The cell's record, a new one at the first call."""
    record = _records.get(id(cell))
    if record is None:
        record = _records[id(cell)] = Record()
        weakref.finalize(cell, _records.pop, id(cell)).atexit = False
    return record


def report(reason: str, effect: str = "the compiled scan is not used") -> None:
    """Warn of an internal failure, once for each reason: the result is the loop's all the same."""
    warn_once(
        f"multint: {effect}, since {reason}. The results are right, and slower to come by. "
        "Please report this with the cell's step."
    )


def warn_once(message: str) -> None:
    """Warn, once for each message."""
    if message not in told:
        told.add(message)
        warnings.warn(message, stacklevel=3)
