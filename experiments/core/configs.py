"""The ready configs: where they lie, what they say of themselves, and those that build on another."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from experiments.core.errors import ExperimentError

CONFIGS = Path(__file__).parent.parent / "configs"


def ready_configs() -> dict[str, list[Path]]:
    """The configs that a run can start from, by the folder that they lie in; `_NAME.yaml` is for others to build on."""
    ready: dict[str, list[Path]] = {}
    for path in sorted(CONFIGS.glob("*/[!_]*.yaml")):
        ready.setdefault(path.parent.name, []).append(path)
    return ready


def first_line(config: Path) -> str:
    """What the config says of itself: its first line, a comment."""
    return config.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def with_bases(argv: Sequence[str]) -> list[str]:
    """The arguments, with each `--config FILE` preceded by those that the file builds on, `base: OTHER.yaml`.

    A base is found beside the file that names it. Raises ExperimentError for configs that build on each other in a
    circle.
    """
    expanded: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            file = next(arguments, None)
            expanded += [argument] if file is None else [f"--config={path}" for path in _chain(Path(file))]
        elif argument.startswith("--config="):
            expanded += [f"--config={path}" for path in _chain(Path(argument.removeprefix("--config=")))]
        else:
            expanded.append(argument)
    return expanded


def _chain(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    if path in above:
        raise ExperimentError(f"{path}: the configs build on each other in a circle (base).")
    base = _base(path)
    if base is not None:
        yield from _chain(path.parent / base, (*above, path))
    yield path


def _base(path: Path) -> str | None:
    """What the file names as its base; None also for a file that cannot be read, which its reader will say."""
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return None
    base = content.get("base") if isinstance(content, dict) else None
    return base if isinstance(base, str) else None
