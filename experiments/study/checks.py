"""What the parts of a study's file have in common: mappings, numbers, seeds, and settings that are not theirs."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.core.errors import ExperimentError, choices_message

# The study says these itself, for each run.
_OWN = ("seed_everything", "name", "ckpt_path", "config", "base", "trainer.default_root_dir", "trainer.fast_dev_run")


def mapping(value: Any, place: str) -> dict[Any, Any]:
    """The value. Raises ExperimentError for one that is no mapping."""
    if not isinstance(value, dict):
        raise ExperimentError(f"{place}: got {value!r}, expected lines of NAME: VALUE.")
    return value


def refuse_unknown(given: Mapping[Any, Any], known: tuple[str, ...], place: str) -> None:
    """Raises ExperimentError for a key that is none of those known."""
    for key in given:
        if key not in known:
            raise ExperimentError(f"study: {place}there is no key '{key}'{choices_message(str(key), known)}")


def refuse_own(key: str, place: str) -> None:
    """Raises ExperimentError for a setting that the study makes itself."""
    if key in _OWN:
        raise ExperimentError(f"{place}: the study itself sets '{key}' for each run. Take it out.")


def read_seeds(given: Any, place: str = "seeds") -> list[int]:
    """The seeds. Raises ExperimentError for anything but a list of different ones."""
    is_list = isinstance(given, list) and bool(given)
    if not is_list or any(type(seed) is not int or not 0 <= seed < 2**32 for seed in given):
        raise ExperimentError(f"study: {place}: got {given!r}, expected a list of whole numbers from 0 to {2**32 - 1}.")
    if twice := sorted({seed for seed in given if given.count(seed) > 1}):
        raise ExperimentError(f"study: {place}: {twice[0]} stands twice. Each seed is run once.")
    return given


def is_number(value: Any) -> bool:
    """Whether it is one; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_digits(text: str) -> bool:
    """Whether it is a number from 0 on, written out."""
    return text.replace(".", "", 1).isdecimal()


def are_equal(values: Sequence[Any]) -> bool:
    """Whether any two are, as text too."""
    return any(len(set(of)) < len(values) for of in (values, list(map(str, values))))
