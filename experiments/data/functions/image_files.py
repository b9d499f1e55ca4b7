"""Images from disk: Omniglot's archives, and files in the IDX format of MNIST."""

import gzip
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError, choices_message

_IDX = {"images": (0x0803, 3), "labels": (0x0801, 1)}  # of unsigned bytes: the magic number, and the dimensions


def read_idx(path: Path) -> Tensor:  # (N, H, W) uint8
    """The images of an IDX file, packed by gzip or not.

    Raises ExperimentError for a file that is not there, is no such file, is cut off, or has no pixels.
    """
    return _read_idx(path, "images")


def read_labels(path: Path) -> Tensor:  # (N,) uint8
    """The labels of an IDX file. Raises ExperimentError as `read_idx` does."""
    return _read_idx(path, "labels")


def _read_idx(path: Path, what: str) -> Tensor:
    expected, dimensions = _IDX[what]
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise ExperimentError(f"{path}: {got}, expected an IDX file of {what}.")
    packed = path.read_bytes()
    try:
        content = gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed
    except (EOFError, OSError, zlib.error) as error:
        raise ExperimentError(f"{path}: damaged: gzip says {error}.") from error
    magic = int.from_bytes(content[:4], "big")
    header = 4 + 4 * dimensions
    if len(content) < header or magic != expected:
        got = f"the magic number {magic:#06x}" if len(content) >= header else f"{len(content)} bytes"
        such_as = "train-images-idx3-ubyte, not the labels" if what == "images" else "train-labels-idx1-ubyte"
        raise ExperimentError(
            f"{path}: got {got}, expected an IDX file of {what}, which begins with {expected:#06x}: such as {such_as}."
        )
    count, *size = struct.unpack(f">{dimensions}I", content[4:header])
    of = f" of {' × '.join(map(str, size))}" if size else ""
    if not (count and all(size)):
        raise ExperimentError(f"{path}: got {count} {what}{of}, expected some{', with pixels' if size else ''}.")
    if len(content) - header != (total := count * math.prod(size)):
        raise ExperimentError(
            f"{path}: got {len(content) - header} bytes of {'pixels' if size else what}, expected {total}: {count} "
            f"{what}{of}. The file is cut off, or is another one."
        )
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).view(count, *size)


def read_omniglot(root: Path, size: int) -> dict[str, Tensor]:  # (N, size, size) uint8 each
    """The characters by alphabet, ink white on black, from every `images_*.zip` in the folder or in its `omniglot`.

    The small archives share two alphabets: each is taken from the first that has it.
    Raises ExperimentError where there is no archive, or a damaged one.
    """
    archives = sorted(root.glob("images_*.zip")) or sorted(root.glob("omniglot/images_*.zip"))
    if not archives:
        raise ExperimentError(
            f"{root}: there is no images_*.zip, nor in its folder omniglot. Get images_background.zip of Omniglot "
            "(github.com/brendenlake/omniglot, python/), and give its folder by --data.root."
        )
    alphabets: dict[str, Tensor] = {}
    for archive in archives:
        try:
            with zipfile.ZipFile(archive) as file:
                found = _by_alphabet(file.namelist())
                new = {name: sorted(paths) for name, paths in found.items() if name not in alphabets}
                alphabets |= {name: torch.stack(list(_scaled(file, paths, size))) for name, paths in new.items()}
        except (zipfile.BadZipFile, OSError) as error:
            raise ExperimentError(f"{archive}: not an archive of images: {error}.") from error
    return alphabets


def held_out(alphabets: Iterable[str], chosen: Iterable[str], setting: str) -> list[str]:
    """The chosen alphabets. Raises ExperimentError for one that is not there."""
    for name in chosen:
        if name not in alphabets:
            raise ExperimentError(f"--data.{setting}: there is no alphabet '{name}'{choices_message(name, alphabets)}")
    return list(chosen)


def _by_alphabet(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths ARCHIVE/ALPHABET/CHARACTER/IMAGE.png by alphabet."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split("/")
        if len(parts) == 4 and path.endswith(".png"):
            found.setdefault(parts[1], []).append(path)
    return found


def _scaled(file: zipfile.ZipFile, paths: Iterable[str], size: int) -> Iterator[Tensor]:
    """Each image, black and white exchanged, at the size: a pixel is the mean of what it covers."""
    from PIL import Image, ImageOps

    for path in paths:
        with Image.open(io.BytesIO(file.read(path))) as image:
            scaled = ImageOps.invert(image.convert("L")).resize((size, size), Image.Resampling.BOX)
        yield torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).view(size, size)
