"""From C++ to a loaded library: compiled once for a user, and kept in a folder that nobody else can write to."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from multint.engines.failures import RefusedError
from multint.engines.tables import libraries, warn_once

_OPTIMISED = "-O3"  # less is quicker to compile, for tests of numbers alone
_FLAGS = (
    # The C++ of 2014: what <cmath> has of later standards takes the compiler .2 s to read, a fifth of a loop's time.
    *("-std=gnu++14", "-fPIC", "-shared", "-fopenmp"),
    # Without these a comparison or a square root keeps a loop from being vector code. NaN and infinity stay what they
    # are, and sums keep their order, but where a loop says otherwise.
    *("-fno-math-errno", "-fno-trapping-math"),
)

_TIME_LIMIT = 120.0  # seconds: the compiler takes a few, on a busy machine some dozens


def library(source: str, dtype: torch.dtype = torch.float32) -> ctypes.CDLL:
    """The C++ after `native.h`, compiled for numbers of that dtype, and loaded.

    Raises: RefusedError where there is no compiler, or one that fails.
    """
    code = ("#define DOUBLE\n" if dtype == torch.float64 else "") + header() + source
    command = [compiler(), _OPTIMISED, *_FLAGS, *_instructions(torch.backends.cpu.get_cpu_capability())]
    told = "\n".join([*command, _processor(), _version(command[0]), code])
    name = f"{hashlib.sha256(told.encode(errors='surrogateescape')).hexdigest()[:32]}.so"
    if name not in libraries:
        with _cache_folder() as folder:
            libraries[name] = _load(folder, name) or _make(folder, name, command, code)
    return libraries[name]


def _make(folder: int | None, name: str, command: list[str], code: str) -> ctypes.CDLL:
    """Compile it, keep it if there is a folder, and load it: from there, or from where it was made."""
    try:
        with tempfile.TemporaryDirectory(prefix="multint-") as aside:
            written, made = Path(aside, "loop.cpp"), Path(aside, "loop.so")
            written.write_text(code, encoding="utf-8")
            _run([*command, str(written), "-o", str(made)])
            if not made.exists():
                raise RefusedError("the C++ compiler has written nothing")
            _keep(folder, name, made.read_bytes())
            try:
                return _load(folder, name) or ctypes.CDLL(str(made))
            except OSError:
                _remove(folder, name)
                raise
    except OSError as error:
        raise RefusedError(f"its C++ cannot be compiled and loaded: {error}") from error


# ---- The folder. A library runs in the process that loads it, so nothing is loaded that another user can have written.
# All is done by a descriptor of the folder. Who can write to one above it can put another one in its place, but none
# that is the user's own and that nobody else has written to.


@contextlib.contextmanager
def _cache_folder() -> Iterator[int | None]:
    """A descriptor of the user's folder for what is compiled; None where there is none to trust, or none at all."""
    named = os.environ.get("MULTINT_CACHE_DIR", "")
    path = os.path.abspath(os.path.expanduser(named)) if named else _default_folder()
    folder, reason = None, ""
    try:
        if os.path.isabs(path):  # else the user has no home
            for made in (os.path.dirname(path), path):
                os.makedirs(made, mode=0o700, exist_ok=True)
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            reason = _distrusted(os.fstat(folder))
    except OSError as error:
        if os.path.islink(path):
            reason = "it is a link"
        elif named:  # a home that cannot be written to is none of the user's mistakes
            reason = f"it cannot be made ({error.strerror})"
    try:
        if reason:
            warn_once(
                f"multint: compiled loops are not kept in {path}, since {reason}, so every process compiles its own. "
                "Let MULTINT_CACHE_DIR name a folder of yours that nobody else can write to."
            )
        yield None if reason else folder
    finally:
        if folder is not None:
            os.close(folder)


def _default_folder() -> str:
    """That of the XDG base directories, which ignore a path that is not absolute."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "multint", "loops")


def _distrusted(status: os.stat_result) -> str:
    """Why a folder or a file may have been written by another user; empty if it cannot."""
    if status.st_uid != os.geteuid():
        return "it is another user's"
    return "others can write to it" if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def _load(folder: int | None, name: str) -> ctypes.CDLL | None:
    """What was kept by that name; None where it is missing or damaged, or not to be trusted."""
    if folder is None:
        return None
    with contextlib.suppress(OSError):
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        with open(file, "rb") as opened:
            status = os.fstat(file)
            content = opened.read() if stat.S_ISREG(status.st_mode) and not _distrusted(status) else b""
        if content[-_DIGEST:] == _digest(content[:-_DIGEST]):
            return ctypes.CDLL(f"/proc/self/fd/{folder}/{name}")
    return None


def _keep(folder: int | None, name: str, content: bytes) -> None:
    """Write it aside and move it: another process may look for it. Where there is no room, nothing is kept."""
    if folder is None:
        return
    aside = f"{name}.{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        try:
            file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
            with open(file, "wb") as opened:
                opened.write(content + _digest(content))
                opened.flush()
                os.fsync(file)
            os.replace(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            _remove(folder, aside)
            raise


def _remove(folder: int | None, name: str) -> None:
    if folder is not None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder)


def _digest(content: bytes) -> bytes:
    """What stands behind a library in its file: a damaged one would end the process that loads it."""
    return hashlib.sha256(content).digest()


_DIGEST = hashlib.sha256().digest_size


# ---- The compiler and the processor.


@cache
def header() -> str:
    """What every loop is compiled with."""
    return Path(__file__).with_name("native.h").read_text(encoding="utf-8")


@cache
def compiler() -> str:
    """The C++ compiler's path.

    Raises: RefusedError where there is none that runs.
    """
    if os.name != "posix":
        raise RefusedError(f"native code is not made for {platform.system()}")
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        if found := name and shutil.which(name):
            with contextlib.suppress(RefusedError):
                _version(found)
                return found
    raise RefusedError("there is no C++ compiler")


def has_compiler() -> bool:
    """Whether there is a C++ compiler."""
    try:
        compiler()
    except RefusedError:
        return False
    return True


@cache
def _instructions(capability: str) -> tuple[str, ...]:
    """Flags for what the processor can do, as far as torch uses it (ATEN_CPU_CAPABILITY)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ("-mcpu=native",)
    if capability == "DEFAULT":
        return ()
    return ("-march=native", "-mprefer-vector-width=512" if capability == "AVX512" else "-mno-avx512f")


@cache
def _version(path: str) -> str:
    return _run([path, "--version"])


@cache
def _processor() -> str:
    """What tells processors apart that need other code, where a folder is shared by machines."""
    cpuinfo = Path("/proc/cpuinfo")
    told = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    return next((line for line in told if line.startswith(("flags", "Features"))), platform.processor())


def _run(command: list[str]) -> str:
    """What a command prints. Nothing of it runs on when this returns or raises."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that what it has started can be ended with it
        )
    except OSError as error:
        raise RefusedError(f"the C++ compiler cannot be run: {error}") from error
    try:
        printed, errors = (output.decode(errors="replace") for output in process.communicate(timeout=_TIME_LIMIT))
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RefusedError(f"the C++ compiler has not ended after {_TIME_LIMIT} s") from error
        raise
    if process.returncode:
        lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines() or ["?"]
        raise RefusedError(f"the C++ compiler failed: {lines[0]}")
    return printed
