"""What `export` needs of a language model's checkpoint."""

from pathlib import Path

import torch

from experiments.core.export import Exportable
from experiments.core.programs import Example
from experiments.sample import load


def exportable(checkpoint: Path) -> Exportable:
    """The checkpoint's network, a call of it, its settings and its vocabulary.

    Raises ExperimentError for a checkpoint of something else.
    """
    task = load(checkpoint)
    assert task.network is not None
    assert task.vocabulary is not None
    network = task.network.eval()
    tokens = torch.zeros(3, 2, dtype=torch.long)  # (T, B), which differ: else their axes would be taken for one
    _, state = network(tokens)
    fields = network.recurrent.directions[0].cell.initial_state(1)._fields
    example = Example(
        (tokens, state),
        {"tokens": {0: "T", 1: "B"}} | {name: {1: "B"} for name in fields},
        ("logits", *(f"new_{name}" for name in fields)),
    )
    settings = torch.load(checkpoint, map_location="cpu", weights_only=True)["hyper_parameters"]["network"]
    arguments = {"vocabulary_size": len(task.vocabulary), **settings["init_args"]}
    return Exportable(
        network,
        example,
        {"class_path": settings["class_path"], "init_args": arguments},
        {"vocabulary": task.vocabulary.state_dict()},
    )
