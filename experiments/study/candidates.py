"""What a study's search tries: every combination of the values of some settings, or so many drawn at random."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from random import Random
from typing import Any, NamedTuple

from experiments.core.errors import ExperimentError
from experiments.study.checks import are_equal, is_number, mapping, read_seeds, refuse_own, refuse_unknown

MAX_STEPS = "trainer.max_steps"
_RANGES: dict[str, Callable[[Random, float, float], float]] = {
    "uniform": Random.uniform,
    "log_uniform": lambda random, low, high: low * (high / low) ** random.random(),
}


class Search(NamedTuple):
    """Settings of which each arm gets the best values."""

    settings: list[str]
    candidates: list[tuple[float | str, ...]]  # values of these settings, together
    seeds: list[int]  # none of the study's
    max_steps: int | None = None  # of its runs; None: as many as the study's


def read_search(given: Any, seeds: Sequence[int]) -> Search | None:
    """The search that a study's file asks for.

    Its keys: `settings`, each with a list of values, all combinations of which are tried; `seeds`, none of the study's;
    and optionally `max_steps` of these runs. With `draws: N`, N combinations are drawn at random instead, the same ones
    for all arms and in every call. A setting may then have `{uniform: [LOW, HIGH]}` or `{log_uniform: [LOW, HIGH]}`.
    """
    if given is None:
        return None
    whole = mapping(given, "study: search")
    refuse_unknown(whole, ("settings", "draws", "seeds", "max_steps"), "search: ")
    settings, draws, steps = whole.get("settings"), whole.get("draws"), whole.get("max_steps")
    if not isinstance(settings, dict) or not settings:
        raise ExperimentError(
            f"study: search: settings: got {settings!r}, expected some with their values, as "
            "{model.optimizer.init_args.lr: [0.001, 0.002]}."
        )
    for setting, values in settings.items():
        refuse_own(setting, f"study: search: {setting}")
        _check_values(values, f"study: search: {setting}: got {values!r}, expected", draws is not None)
    own = read_seeds(whole.get("seeds"), "search: seeds")
    if both := sorted(set(own) & set(seeds)):
        raise ExperimentError(f"study: search: seeds: {both[0]} is one of the study's too, expected other seeds.")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ExperimentError(f"study: search: max_steps: got {steps!r}, expected a whole number of at least 1.")
    if steps is not None and MAX_STEPS in settings:
        raise ExperimentError(f"study: search: it searches for {MAX_STEPS}, expected no max_steps of its own.")
    of_settings = list(settings.values())
    candidates = list(product(*of_settings)) if draws is None else _drawn(of_settings, draws)
    return Search(list(settings), candidates, own, steps)


def _check_values(values: Any, message: str, are_drawn: bool) -> None:
    """Raises ExperimentError for what is neither a list nor, where values are drawn, a range."""
    if are_drawn and isinstance(values, dict):
        kind, bounds = next(iter(values.items()), (None, None))
        is_range = isinstance(bounds, list) and len(bounds) == 2 and all(map(is_number, bounds)) and len(values) == 1
        if kind not in _RANGES or not is_range or not -math.inf < bounds[0] < bounds[1] < math.inf:
            raise ExperimentError(f"{message} a list, {{uniform: [LOW, HIGH]}} or {{log_uniform: [LOW, HIGH]}}.")
        if kind == "log_uniform" and bounds[0] <= 0:
            raise ExperimentError(f"{message} positive numbers.")
        return
    are_values = isinstance(values, list) and all(isinstance(value, str) or is_number(value) for value in values)
    if not are_values or len(values) < 2:
        raise ExperimentError(
            f"{message} a list of two or more numbers or names{'' if are_drawn else ', or a range with draws: N'}. Of "
            "one value there is nothing to find: put it into the study's settings."
        )
    if are_equal(values):
        raise ExperimentError(f"{message} all different, as text too.")


def _drawn(of_settings: Sequence[Any], draws: Any) -> list[tuple[float | str, ...]]:
    """So many different combinations. More draws begin with the same ones, so that their runs are kept."""
    are_lists = all(isinstance(values, list) for values in of_settings)
    most = math.prod(map(len, of_settings)) if are_lists else math.inf
    if type(draws) is not int or not 1 < draws < most:
        below = f", below the {most} combinations that there are" if are_lists else ""
        raise ExperimentError(f"study: search: draws: got {draws!r}, expected a whole number above 1{below}.")
    random, found = Random(0), dict[tuple[float | str, ...], None]()
    for _ in range(1000 * draws):
        found[tuple(_one(random, values) for values in of_settings)] = None
        if len(found) == draws:
            return list(found)
    raise ExperimentError(f"study: search: draws: {draws} of three digits each are not different, expected fewer.")


def _one(random: Random, values: Any) -> float | str:
    if isinstance(values, list):
        return random.choice(values)
    [(kind, (low, high))] = values.items()
    return float(f"{_RANGES[kind](random, low, high):.3g}")  # what a report can show whole
