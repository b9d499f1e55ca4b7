"""The state of torch's random generators, as values that a checkpoint can hold."""

from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """The states of the CPU's generator and of every CUDA device's, as byte tensors."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators into a state that `random_state` gave; devices that are not here are passed over."""
    torch.set_rng_state(state["cpu"].cpu())
    for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state.cpu(), device)
