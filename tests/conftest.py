"""What every test runs under, and what the tests of the engines share."""

import gc
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from multint.engines.native import machine
from multint.engines.native.loop import Loop
from tests.both_engines import programs, replace_everywhere, worth_compiling

__all__ = ["eager", "no_inductor", "one_thread", "optimised", "poisoned", "programs", "worth_compiling"]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tests' tensors are small: a second thread costs more than it brings, and waits where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def quick_to_compile():
    """Native loops are not optimised: most tests ask for numbers alone, and compiling takes a third of the time."""
    before, machine._OPTIMISED = machine._OPTIMISED, "-O0"
    yield
    machine._OPTIMISED = before


@pytest.fixture(autouse=True, scope="module")
def quick_to_collect():
    """What the imports and the tests before have left is looked through once, and not at each collection of garbage.

    Tracing makes so many objects that Python would look for garbage all the time.
    """
    gc.set_threshold(50_000)
    gc.collect()
    gc.freeze()


@pytest.fixture
def optimised(monkeypatch):
    """Native loops are compiled as users get them."""
    monkeypatch.setattr(machine, "_OPTIMISED", "-O3")


CHECKOUT = Path(__file__).parent.parent
CACHES = {".git", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".venv", "__pycache__"}


def files():
    """All files and folders of the checkout, but for caches."""
    for folder, inner, names in os.walk(CHECKOUT):
        inner[:] = set(inner) - CACHES
        yield from (Path(folder, name) for name in (*inner, *names))


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_behind():
    """The checkout has no file after a module's tests that it had not before: runs belong into `tmp_path`."""
    before = set(files())
    yield
    left = sorted(str(path.relative_to(CHECKOUT)) for path in set(files()) - before)
    assert not left, f"the tests have left in the checkout: {', '.join(left)}"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small text to train on: 23 windows of 4 × 20 characters."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("".join(f"line {i} of a text with {i * i} in it.\n" for i in range(60)))
    return path


@pytest.fixture(scope="session")
def full_disk():
    """A context in which no file grows beyond 100 bytes, as on a full disk."""

    @contextmanager
    def full():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return full


@pytest.fixture
def interruptible():
    """Lightning ignores Ctrl-C once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that an engine takes without filling it is full of NaN."""

    def poison(original):
        def fill(*args, **kwargs):
            made = original(*args, **kwargs)
            if made.is_floating_point() and type(made) is Tensor:
                made.detach().fill_(float("nan"))  # a leaf that requires a gradient cannot be filled itself
            return made

        return fill

    monkeypatch.setattr(Loop, "_piece", poison(Loop._piece))  # which may have been used before
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def no_inductor(monkeypatch):
    """Native loops run where there are some, and all else op by op: Inductor takes seconds for each piece."""
    from multint.engines import kernel  # the tracer beneath it is slow to import

    replace_everywhere(monkeypatch, kernel.__name__, "Kernel._compile", lambda original: lambda self: self.eagerly)


@pytest.fixture
def eager():
    """Pieces run op by op: compiling takes seconds for each."""
    from multint.engines.kernel import eager_pieces  # the tracer beneath it is slow to import

    with eager_pieces():
        yield
