"""Which modules a config, a command line or a checkpoint may name.

Naming a class imports its module, and importing runs code. So every import path that jsonargparse takes from a value,
wherever it stands and however short it is written, must lie in a trusted module, or nothing is imported. What the path
leads to is checked again by where it is defined: `torch.os.system` is `os.system`.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import set_parsing_settings

TRUSTED = ("multint", "models", "experiments", "torch", "lightning")

# Inside trusted modules: what runs code or loads files that a value names. No experiment needs to name them.
REFUSED = (
    "torch.classes",
    "torch.compile",
    "torch.hub",
    "torch.jit",
    "torch.load",
    "torch.multiprocessing",
    "torch.ops",
    "torch.package",
    "torch.serialization",
    "torch.utils.collect_env",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "lightning.fabric.cli",
    "lightning.pytorch.cli",
)


_added: list[str] = []  # the modules that the command under way trusts


def refusal(path: str) -> str | None:
    """Why a value may not name what lies at the import path; None where it may, and for what is no path.

    As in jsonargparse, the longest entry that the path lies below decides.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(map(str.isidentifier, parts)):
        return None
    trusted = (*TRUSTED, *_added)
    for length in range(len(parts), 0, -1):
        entry = ".".join(parts[:length])
        if entry in trusted:
            return None
        if entry in REFUSED:
            return f"'{path}' is refused: it runs code or loads files that a config names"
    modules = ", ".join(trusted)
    return f"'{path}' is in no trusted module ({modules}), so it is refused. If you trust it, add --trust {parts[0]}"


@contextmanager
def trusting(
    modules: Sequence[str] = (),
) -> Iterator[None]:
    """Within, values may name what lies in `TRUSTED` and in the modules given; everything else is an error.

    The policy is jsonargparse's own and global to the process: it stays in force afterwards, without `modules`.
    """
    # "*" denies what no other entry allows; of several entries the longest decides.
    set_parsing_settings(
        import_path_denylist=["*", *REFUSED],
        import_path_allowlist=[*TRUSTED, *modules],
        instantiate_subclass_spec_in_any=False,
    )
    _added[:] = modules
    try:
        yield
    finally:
        _added.clear()
        set_parsing_settings(import_path_denylist=[module for module in modules if module not in TRUSTED])


def take_classes_for_factories(module: str) -> None:
    """Let a constructor's `type[Integrator]` mean `Callable[[int, int, int], Integrator]` in a config.

    jsonargparse takes the one for a class without settings, and a config could not give it any. The sizes that a caller
    gives are those that the class itself requires. Of the constructors in a module and in those below it.
    """
    below = [name for name in sys.modules if f"{name}.".startswith(f"{module}.")]
    for name in below:
        for cls in vars(sys.modules[name]).values():
            if isinstance(cls, type) and cls.__module__ == name and "__init__" in vars(cls):
                _take_for_factories(vars(cls)["__init__"])


def _take_for_factories(constructor: Any) -> None:
    try:
        hints = get_type_hints(constructor)
    except Exception:  # of a name that is imported for type checkers alone: jsonargparse will say what it lacks
        return
    for name, hint in hints.items():
        base = get_args(hint)[0] if get_origin(hint) is type else None
        if isinstance(base, type):
            given = [p for p in inspect.signature(base).parameters.values() if p.annotation in (int, "int")]
            sizes = [int for parameter in given if parameter.default is parameter.empty]
            if sizes:
                constructor.__annotations__[name] = Callable[sizes, base]
