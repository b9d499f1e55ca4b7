"""What stands in a copy of a cell for a thing whose inside cannot be followed."""

from __future__ import annotations

from typing import Any

from multint.errors import EngineError


class Tripwire:
    """Stands in a copy for what cannot be followed; any use of it is an error that names it."""

    def __init__(self, name: str, kind: str) -> None:
        object.__setattr__(self, "_described", f"{name} ({kind})")


def _trip(self: Tripwire, *_: Any, **__: Any) -> Any:
    described = object.__getattribute__(self, "_described")
    raise EngineError(f"fused: the step uses the cell's {described}, whose inside a trace cannot follow")


_TRIPS = (
    "getattribute setattr call iter next len bool contains getitem setitem eq lt gt le ge hash enter exit int float "
    "index add radd sub rsub mul rmul matmul rmatmul truediv rtruediv pow rpow neg abs"
)
for _name in _TRIPS.split():
    setattr(Tripwire, f"__{_name}__", _trip)
