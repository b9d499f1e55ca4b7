"""One direction of one layer: a cell, and what enters its step beside the input."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from multint.cells import Cell
from multint.engines import scan
from multint.errors import OptionError
from multint.integrators import RecurrentBatchNorm, outermost_integrators
from multint.recurrent.masks import StateDropout, locked_mask, select

_NORMALISED = "RecurrentBatchNorm: the rows of a batch see each other in it, and it keeps statistics"


class Direction(nn.Module):
    """One direction of one layer: a cell whose step also heeds lengths, resets, zoneout and locked dropout.

    They come as streams (T, B, ...) beside x, and what a step does depends on the streams alone: "x"; "valid", False
    past a sequence's end, where the state stays as it is; "reset", True where an episode starts, before which the state
    returns to the initial one; "zoneout.FIELD", True where that field of the state keeps its old value (without this
    stream the mean over such masks is taken); "dropout.NAME", the multiplier of z in the cell's integrator of that
    name; "time" (T,), the number of the step, where the cell has batch normalisation.

    Args:
        zoneout: for each field of the state, the probability of keeping the old value (Krueger et al. 2017).
        state_dropout: probability of dropping a feature of z in every integrator, the same at every step.
        weight_drop: probability of dropping an entry of the integrators' recurrent matrices (Merity et al. 2018).
        weight_noise: standard deviation of the noise added to every parameter of the cell (Graves 2013).
        learnt_state: the initial state is learnt: the cell's plus a parameter for each field, which starts at 0.

    Raises: OptionError where the cell has no integrator or no recurrent matrix to drop, or no parameter to be noisy.
    """

    # What a step writes to, and has put back at its end.
    _restored_by_step = ("hooks",)

    def __init__(
        self,
        cell: Cell,
        zoneout: dict[str, float],
        state_dropout: float,
        weight_drop: float,
        weight_noise: float = 0.0,
        learnt_state: bool = False,
    ) -> None:
        super().__init__()
        self.cell = cell
        first = cell.initial_state(1)
        self.form = type(first)(*(tuple(field.shape[1:]) for field in first))  # the shapes in one row
        fields = first._asdict() if learnt_state else {}
        self.start = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(value)) for name, value in fields.items()})
        self.zoneout = zoneout
        self.state_dropout = state_dropout
        self.weight_drop = weight_drop
        self.weight_noise = weight_noise
        integrators = outermost_integrators(cell)
        if state_dropout and not integrators:
            raise OptionError(f"state_dropout: {type(cell).__name__} has no integrator whose z could be dropped")
        self.hooks = {name: StateDropout(f.z_features) for name, f in integrators.items()} if state_dropout else {}
        for name, hook in self.hooks.items():
            integrators[name].register_forward_pre_hook(hook, with_kwargs=True)
        self.dropped_weights: list[str] = []
        if weight_drop:
            names = [f"cell.{name}.{weight}" for name, f in integrators.items() for weight in f.z_weights]
            if not names:
                raise OptionError(f"weight_drop: {type(cell).__name__} has no integrator that names its z_weights")
            # By the parameter, since one that stands in several places is to be dropped once.
            self.dropped_weights += {self.get_parameter(name): name for name in names}.values()
        self.batch_norms = self._batch_norms()
        self.has_steps = any(norm.max_steps > 1 for norm in self.batch_norms)  # with statistics of their own
        self.why_looped = _NORMALISED if self.batch_norms else ""  # which the engines ask
        self.noisy_weights: list[str] = []
        if weight_noise:
            # By name: a replica, or a functional call around this one, puts other tensors in the parameters' places.
            self.noisy_weights += [f"cell.{name}" for name, _ in cell.named_parameters()]
            if not self.noisy_weights:
                raise OptionError(f"weight_noise: {type(cell).__name__} has no parameters")

    def initial_state(self, batch_size: int) -> Any:
        """The state before the first step: the cell's, plus what was learnt."""
        state = self.cell.initial_state(batch_size)
        if not self.start:
            return state
        return type(state)(*(value + self.start[name] for name, value in state._asdict().items()))

    def run(self, streams: dict[str, Tensor], state: Any, engine: str) -> tuple[Tensor, Any]:
        """Scan with the noise of one training pass, or without it in evaluation."""
        if self.why_looped:
            streams = streams | {"time": torch.arange(len(streams["x"]), device=streams["x"].device)}
        if not self.training:
            return self(streams, state, engine)
        streams = streams | self._noise(streams["x"], state)
        if not (weights := self._perturbed_weights()):
            return self(streams, state, engine)
        return torch.func.functional_call(self, weights, (streams, state, engine))

    def _perturbed_weights(self) -> dict[str, Tensor]:
        """The parameters that differ in this training pass, by name: noise is added to them, then entries drop."""
        weights = {}
        for name in self.noisy_weights:
            weight = _attribute(self, name)
            weights[name] = weight + self.weight_noise * torch.randn_like(weight)
        for name in self.dropped_weights:
            weight = weights[name] if name in weights else _attribute(self, name)
            weights[name] = functional.dropout(weight, self.weight_drop)
        return weights

    def forward(self, streams: dict[str, Tensor], state: Any, engine: str) -> tuple[Tensor, Any]:
        """Scan with the streams and the weights that there are."""
        if self.batch_norms:
            self.batch_norms = self._batch_norms()  # a replica's are others
        for norm in self.batch_norms:
            norm.seen = []  # not those of a pass that failed, nor the list that the replicas of a network share
        result = scan(self, streams, state, engine)
        for norm in self.batch_norms:
            norm.end_pass()
        return result

    def step(self, streams: dict[str, Tensor], state: Any) -> Any:
        """The cell's step on the streams at one time, (B, ...)."""
        x = streams["x"]
        if "reset" in streams:
            state = select(streams["reset"], self.initial_state(x.shape[0]), state)
        # Without masks nothing is set: the body of an exported loop may write to nothing outside it.
        masked = {name: hook for name, hook in self.hooks.items() if f"dropout.{name}" in streams}
        for name, hook in masked.items():
            hook.mask = streams[f"dropout.{name}"]
        for norm in self.batch_norms:
            norm.now = streams["time"], streams.get("valid")
        try:
            new = self.cell.step(x, state)
        finally:
            for hook in masked.values():
                hook.mask = None
            for norm in self.batch_norms:
                norm.now = None
        if self.zoneout:
            new = self._zoned(streams, state._asdict(), new)
        return select(streams["valid"], new, state) if "valid" in streams else new

    def _batch_norms(self) -> list[RecurrentBatchNorm]:
        """Those of the cell."""
        return [part for part in self.cell.modules() if isinstance(part, RecurrentBatchNorm)]

    def _zoned(self, streams: dict[str, Tensor], old: dict[str, Tensor], new: Any) -> Any:
        """The new state, with old values kept where the masks say so or, without masks, in proportion."""
        values = new._asdict()
        for field, probability in self.zoneout.items():
            value, kept = values[field], streams.get(f"zoneout.{field}")
            before = old[field].to(value.dtype)
            values[field] = torch.lerp(value, before, probability) if kept is None else torch.where(kept, before, value)
        return new._replace(**values)

    def _noise(self, x: Tensor, state: Any) -> dict[str, Tensor]:
        """Draw the masks of one pass over T steps."""
        steps, batch_size = x.shape[:2]
        noise = {}
        for field, probability in self.zoneout.items():
            shape = (steps, *state._asdict()[field].shape)
            noise[f"zoneout.{field}"] = torch.rand(shape, device=x.device) < probability
        for name, hook in self.hooks.items():
            mask = locked_mask(x.new_empty(batch_size, hook.features), self.state_dropout)
            noise[f"dropout.{name}"] = mask.expand(steps, -1, -1)
        return noise


def _attribute(module: nn.Module, name: str) -> Any:
    """A parameter by its dotted name, or what a functional call has put in its place, which is no `nn.Parameter`."""
    return reduce(getattr, name.split("."), module)
