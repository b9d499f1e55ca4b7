"""Which audio files there are, and what is said in them."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.core.errors import ExperimentError, choices_message
from experiments.data.speech.units import one_spaced

SPLITS = ("train", "valid", "test")
_SUFFIXES = {".wav", ".flac"}
_COLUMNS = ("path", "text", "speaker", "split")


class Row(NamedTuple):
    """An audio file with its transcript."""

    path: Path
    text: str
    speaker: str = ""
    split: str | None = None


def read_manifest(path: Path) -> list[Row]:
    """The rows of a CSV file with a header, or of a file of JSON lines (`.jsonl`).

    Each has `path`, from the manifest's folder if it is relative, and `text`; it may have `speaker`, and `split`, which
    is train, valid or test. Others are not looked at.

    Raises ExperimentError for a file that cannot be read or is empty, and for a row without one of the two, or with
    another split.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: no manifest in UTF-8 ({error}). Give yours by --data.path.") from error
    try:
        if path.suffix in (".jsonl", ".json"):
            rows: list[Any] = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (json.JSONDecodeError, csv.Error) as error:
        raise ExperimentError(f"{path}: no {'JSON lines' if path.suffix != '.csv' else 'CSV'}: {error}.") from error
    if not rows:
        raise ExperimentError(f"{path}: the manifest is empty, expected rows of {', '.join(_COLUMNS[:2])}.")
    return [_row(path, number, row) for number, row in enumerate(rows, start=1)]


def rows_by_name(folder: Path, words: Mapping[str, str] | None) -> list[Row]:
    """The WAV and FLAC files of a folder whose names hold their words, with `_` between them.

    Args:
        words: what the parts of a name stand for; None: they are the words.

    Raises ExperimentError for a folder without such files, and a name with another part.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise ExperimentError(f"{folder}: no WAV or FLAC files, expected some. Say by --data.path where they are.")
    return [Row(path, words_of(path, words)) for path in files]


def words_of(path: Path, words: Mapping[str, str] | None) -> str:
    """The words in a file's name. Raises ExperimentError for a part of it that stands for none."""
    parts = [part for part in path.stem.split("_") if part]
    for part in parts:
        if words is not None and part not in words:
            raise ExperimentError(
                f"{path}: its name has '{part}'{choices_message(part, words)} See --data.words, or give a manifest."
            )
    return " ".join(parts if words is None else [words[part] for part in parts])


def _row(manifest: Path, number: int, row: Any) -> Row:
    where = f"{manifest}, row {number}"
    cells = row if isinstance(row, dict) else {}
    for name in _COLUMNS[:2]:
        if not isinstance(cells.get(name), str) or not cells[name].strip():
            raise ExperimentError(f"{where}: it has no '{name}', expected {', '.join(_COLUMNS[:2])} in every row.")
    split = cells.get("split") or None
    if split is not None and split not in SPLITS:
        raise ExperimentError(f"{where}: the split is {split!r}, expected {', '.join(SPLITS)}.")
    path = manifest.parent / Path(cells["path"].strip()).expanduser()
    return Row(path, one_spaced(cells["text"]), str(cells.get("speaker") or ""), split)
