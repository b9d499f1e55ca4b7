"""From C++ to a loaded library: compiled once on a machine, and kept beside what Inductor keeps."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from multint.engines import private
from multint.engines.failures import RefusedError

_FLAGS = (
    *("-std=gnu++20", "-O3", "-fPIC", "-shared", "-fopenmp"),
    # Without these a comparison or a square root keeps a loop from being vector code. NaN and infinity stay what they
    # are, and sums keep their order, but where a loop says otherwise.
    *("-fno-math-errno", "-fno-trapping-math"),
)


def library(source: str) -> ctypes.CDLL:
    """The C++ after `native.h`, compiled and loaded.

    Raises: RefusedError where there is no compiler, or one that fails.
    """
    code = header() + source
    command = [compiler(), *_FLAGS, *_instructions(torch.backends.cpu.get_cpu_capability())]
    key = hashlib.sha256("\n".join([*command, _processor(), _version(command[0]), code]).encode()).hexdigest()
    path = Path(private.cache_folder(), "multint", f"{key[:32]}.so")
    try:
        if not _is_whole(path):
            _compile(command, code, path)
    except OSError as error:
        raise RefusedError(f"what is compiled cannot be kept: {error}") from error
    return _loaded(str(path))


def _compile(command: list[str], code: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written, made = Path(folder, "loop.cpp"), Path(folder, "loop.so")
        written.write_text(code, encoding="utf-8")
        _run([*command, str(written), "-o", str(made)])
        with made.open("ab") as file:
            file.write(_END + made.stat().st_size.to_bytes(8, "little"))
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)  # at once: another process may look for it


# What stands behind a library, with its size: one cut short, by a full disk or a crash, would end the process.
_END = b"multint:"


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    code = path.read_bytes()
    return code.endswith(_END + max(0, len(code) - 16).to_bytes(8, "little"))


@cache
def _loaded(path: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise RefusedError(f"what was compiled cannot be loaded: {error}") from error


@cache
def header() -> str:
    """What every loop is compiled with."""
    return Path(__file__).with_name("native.h").read_text(encoding="utf-8")


@cache
def compiler() -> str:
    """The C++ compiler's path.

    Raises: RefusedError where there is none that runs.
    """
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
    told = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in told if line.startswith(("flags", "Features"))), platform.processor())


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RefusedError(f"the C++ compiler cannot be run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise RefusedError(f"the C++ compiler failed: {lines[0]}")
    return done.stdout
