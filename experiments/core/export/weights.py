"""A network's weights in safetensors, and the network rebuilt from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from torch import nn

from experiments.core.errors import ExperimentError, building
from experiments.core.trust import trusting


def write_weights(network: nn.Module, path: Path) -> None:
    """Write the network's parameters and buffers by their names; a tensor with several names once.

    Raises: OSError where the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    try:
        save_model(network, str(path))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def settings_path(path: Path) -> Path:
    """Where the settings of an exported file lie: beside it, with `.yaml` after its whole name."""
    return path.with_name(path.name + ".yaml")


def load_network(
    path: str | Path,
    trust: Sequence[str] = (),
) -> nn.Module:
    """The network that `export --format safetensors` wrote, in evaluation mode, on the CPU.

    Args:
        path: the file of the weights, with its settings beside it.
        trust: modules of your own whose classes the settings may name; see `experiments.core.trust`.

    Raises: ExperimentError where a file is missing or damaged, or the two do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    path = Path(path)
    try:
        settings = yaml.safe_load(settings_path(path).read_text(encoding="utf-8"))["network"]
        network = _build(settings, trust)
        load_model(network, path)
    except (OSError, yaml.YAMLError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ExperimentError(f"{path}: no network that `export` wrote with its settings beside it: {error}") from error
    return network.eval()


def _build(settings: dict[str, Any], trust: Sequence[str]) -> nn.Module:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    with trusting(trust), building("the network"):
        network: nn.Module = parser.instantiate(parser.parse_object({"network": settings})).network
    return network
