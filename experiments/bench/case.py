"""One comparison of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from experiments.bench import by_jax


@dataclass(frozen=True)
class Case:
    """One comparison: our layer by the engine `fused` against a vendor's layer of the same sizes, and others.

    A subclass compares something else, as `build` and the properties say.
    """

    name: str
    size: tuple[int, int, int, int]  # T, B, X, H
    ours: Callable[..., nn.Module]
    vendor: Callable[..., nn.Module] = nn.Identity  # unused where the rivals are others
    at_least: float | None = None  # the ratio t(vendor) / t(ours) that is aimed at
    at_least_loop: float | None = None  # and t(loop) / t(ours)
    backward: bool = True
    dtype: torch.dtype = torch.float32  # of the products, by autocast
    packed: bool = False  # lengths uniform in [T/5, T]
    compiled_step: bool = False  # whether the loop over a step by torch.compile is a rival too
    jax: str = ""  # which of JAX's scans is a rival too, where JAX is installed

    @property
    def rivals(self) -> list[str]:
        """What our layer is measured against; nothing where it cannot run."""
        return ["vendor", "loop"] + ["compiled step"] * self.compiled_step + ["jax"] * self.has_jax

    @property
    def references(self) -> list[str]:
        """The rivals that compute the same, to check our layer by."""
        return ["loop"] + ["jax"] * self.has_jax

    @property
    def has_jax(self) -> bool:
        """Whether JAX's scan can be a rival here."""
        return bool(self.jax) and not by_jax.why_not()

    @property
    def told(self) -> list[str]:
        """The rivals whose memory is told."""
        return self.rivals[:1]

    def aim(self, rival: str) -> float | None:
        """The ratio that is aimed at."""
        return {"vendor": self.at_least, "loop": self.at_least_loop}.get(rival)

    def arguments(self) -> list[Tensor]:
        """The inputs and the cotangent of the output."""
        torch.manual_seed(0)
        steps, rows, inputs, hidden = self.size
        x = torch.randn(steps, rows, inputs, requires_grad=self.backward)
        return [x, torch.randn(steps, rows, hidden)]

    def build(self, contender: str) -> Callable[[], list[Tensor]]:
        """A function that runs the contender once and gives its output and gradients."""
        torch.manual_seed(0)
        _, _, inputs, hidden = self.size
        x, cotangent = self.arguments()
        lengths = torch.randint(self.size[0] // 5, self.size[0] + 1, self.size[1:2]) if self.packed else None
        if lengths is not None:
            lengths[0] = self.size[0]
        if contender == "vendor":
            module = self.vendor(inputs, hidden)
        else:
            module = self.ours(inputs, hidden, engine="fused" if contender == "ours" else "loop")
        if contender == "jax":
            return by_jax.contender(self.jax, module, x, cotangent, self.backward)
        if contender == "compiled step":
            torch.compiler.reset()  # its limit of compilations is for all cases together
            for direction in module.directions:
                direction.step = torch.compile(direction.step)

        def forward() -> Tensor:
            if lengths is None:
                return module(x)[0]
            if contender == "vendor":
                return module(pack_padded_sequence(x, lengths, enforce_sorted=False))[0].data
            return module(x, lengths=lengths)[0]

        def run() -> list[Tensor]:
            with (
                torch.set_grad_enabled(self.backward),
                torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32),
            ):
                output = forward()
            if not self.backward:
                return [output]
            leaves = [x, *module.parameters()]
            chosen = cotangent if output.ndim == 3 else cotangent.flatten(0, 1)[: len(output)]
            return [output, *torch.autograd.grad(output, leaves, chosen.to(output.dtype))]

        return run
