"""The commands that look at a network: `summary` of a config's, and `show` of what a trained one does."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from experiments.core.command_line import Invocation, OptionParser
from experiments.core.errors import ExperimentError, building, write_figure, writing
from experiments.core.loading import RunSettings, checkpoint_in, load_task
from experiments.core.network_size import layer_table, layers, table, without_memory
from experiments.core.task import Data, Task

# Below so many bytes a network is built with its values: without, torch imports its compiler to call it.
_SMALL = 2**28

# By torch's optimizers: the numbers kept of each parameter, and the settings that add one each.
_KEPT = {
    "ASGD": (1,),
    "Adadelta": (2,),
    "Adagrad": (1,),
    "Adam": (2, "amsgrad"),
    "AdamW": (2, "amsgrad"),
    "Adamax": (2,),
    "NAdam": (2,),
    "RAdam": (2,),
    "RMSprop": (1, "momentum", "centered"),
    "Rprop": (2,),
    "SGD": (0, "momentum"),
}


def summary(invocation: Invocation) -> None:
    """Print the layers with their parameters, the multiply-adds, and the bytes that training keeps for the parameters.

    Raises ExperimentError for a config that cannot be built, or one that needs its data to be.
    """
    parser = OptionParser(prog="python -m experiments summary", add_help=False)
    for name in ("vocabulary_size", "answers"):
        parser.add_argument(f"--{name}", type=int, default=None)
    sizes, rest = parser.parse_known_args(invocation.argv[1:])
    if rest in ([], ["-h"], ["--help"]):
        sized = "[--vocabulary_size V] [--answers A]"
        print(f"usage: python -m experiments summary --config CONFIG {sized} [the options of fit]")
        return
    settings = RunSettings(["fit", *rest])
    given = {name: size for name, size in vars(sizes).items() if size is not None}
    for name, size in given.items():
        if size < 1:
            raise ExperimentError(f"--{name}: got {size}, expected at least 1.")
    print(_summary(settings.task, settings.data, given))


def show(invocation: Invocation) -> None:
    """Print what the task says of the checkpoint, and write its pictures, each as NAME.png.

    The data are those of the run's config.yaml. Raises ExperimentError where that is not beside the checkpoint, for a
    task with nothing to show, for a number of examples of one that shows none, and for a folder that cannot be written.
    """
    parser = OptionParser(
        prog="python -m experiments show", description="What a checkpoint does, in text and pictures."
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--config", type=Path, help="whose data to show (config.yaml of the checkpoint's run)")
    parser.add_argument("--output", type=Path, help="the pictures' folder (that of the checkpoint's run)")
    parser.add_argument("--examples", type=int, metavar="N", help="how many of the test, where a task shows some")
    options = parser.parse_args(invocation.argv[1:])
    checkpoint = checkpoint_in(options.checkpoint)
    task = load_task(checkpoint)
    if options.examples is not None:
        if task.examples is None:
            raise ExperimentError(f"--examples: a {type(task).__name__} shows no examples of the test.")
        if options.examples < 1:
            raise ExperimentError(f"--examples: got {options.examples}, expected at least 1.")
        task.examples = options.examples
    run = checkpoint.absolute().parent.parent
    config = options.config or run / "config.yaml"
    if not config.is_file():
        raise ExperimentError(f"{config}: there is no config of the checkpoint's run. Give one by --config CONFIG.")
    data = RunSettings(["validate", "--config", str(config)]).data
    if data is not None:
        data.prepare_data()
        data.setup("test")
    figures, text = task.pictures(data), task.show()
    if not (figures or text):
        raise ExperimentError(f"{checkpoint}: a {type(task).__name__} has nothing to show.")
    if text:
        print(text)
    folder = options.output or run
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        write_figure(path, figure, dpi=150)
        print(path)


def _summary(task: Task, data: Data | None, sizes: dict[str, int]) -> str:
    description = task.imagined(data, sizes)
    with without_memory(), building(f"{type(task).__name__}: the network"):
        task.network = task.build(description).eval()
    size = sum(parameter.numel() * parameter.element_size() for parameter in task.network.parameters())
    if size < _SMALL:
        task.network = task.build(description).eval()
    shapes, work, in_all = _called(task)
    rows = {f"for each of its {task.unit}": f"{in_all} multiply-adds forward"} if in_all else {}
    name, moments = _moments(task.settings["optimizer"])
    kept = f"parameters {_bytes(size)}, gradients {_bytes(size)}, {name}"
    if moments is None:
        rows["in memory"] = f"{kept}'s own not known"
    else:
        rows["in memory"] = f"{_bytes((2 + moments) * size)}: {kept} {_bytes(moments * size)}"
    columns = {"output": shapes, "multiply-adds": work} if shapes else {}
    return f"{layer_table(task.network, columns)}\n{table(rows)}"


def _called(task: Task) -> tuple[dict[str, str], dict[str, str], str]:
    """The shapes that the layers give in the task's example call, and the multiply-adds of their products, forward.

    The work is that for each of what the task counts: of every layer, and of the whole network. All are empty where the
    task knows no call.
    """
    network = task.network
    assert network is not None
    shapes: dict[str, str] = {}
    counter = _Counter()

    def enter(name: str) -> None:
        counter.inside.append(name)

    def leave(name: str, result: Any) -> None:
        counter.inside.remove(name)
        first = pytree.tree_leaves(result)[0]
        shapes[name] = " × ".join(map(str, first.shape)) if isinstance(first, torch.Tensor) else ""

    hooks = []
    try:
        has_values = not any(parameter.is_meta for parameter in network.parameters())
        with torch.no_grad(), nullcontext() if has_values else without_memory():
            example = task.example()
            for layer in layers(network):
                hooks.append(layer.module.register_forward_pre_hook(lambda *_, name=layer.name: enter(name)))
                hooks.append(layer.module.register_forward_hook(lambda *call, name=layer.name: leave(name, call[-1])))
            with counter:
                network(*example.arguments)
    except ExperimentError:
        return {}, {}, ""
    for hook in hooks:
        hook.remove()
    work = {name: f"{count // 2 // example.count:,}" for name, count in counter.flops.items()}
    return shapes, work, work.pop("", "0")


class _ByDispatch:
    """Counts as torch's `FlopCounterMode` does.

    That one imports the compiler, which takes two seconds: torch excludes the method below from being compiled where it
    is of a mode's own class.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside = [""]  # the layers whose calls are under way; "" is the network
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function.overloadpacket):
            self.flops.update(dict.fromkeys(self.inside, formula(*args, **(kwargs or {}), out_val=result)))
        return result


class _Counter(_ByDispatch, TorchDispatchMode):
    pass


def _moments(optimizer: dict[str, Any]) -> tuple[str, int | None]:
    """The optimizer's name, and how many numbers it keeps of each parameter; None for one that keeps other shapes.

    A table, since to make an optimizer imports torch's whole compiler.
    """
    name, given = optimizer["class_path"].rpartition(".")[2], optimizer.get("init_args", {})
    extra = sum(bool(given.get(setting)) for setting in _KEPT.get(name, (0,))[1:])
    return name, _KEPT[name][0] + extra if name in _KEPT else None


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
