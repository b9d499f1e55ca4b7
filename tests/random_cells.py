"""Cells at random: steps put together from small pieces of source, each tried on example rows as it is added.

A piece that does not run on what stands there is dropped, so that no rules of shapes are needed; a result that grows is
squashed, so that comparisons at 1e-9 mean something. The source that comes out can be read, printed and run.

Placeholders of a piece, each picked at random: `{a}` floats (B, n) or (B, k, n), `{b}` others, of the same shape where
there are some; `{v}`, `{u}` vectors (B, n); `{m}` matrices (B, k, n); `{z}`, `{i}`, `{c}` floats, integers and bools
(B,); `{x}`, `{h}` vectors of the streams and of the state; `{v_n}`, `{m_k}` sizes; `{r}` the result's name, `{k}` a new
attribute's; `{L}` a linear map that is there already; `{w}` a width, `{s}`, `{t}` numbers, `{g}` an integrator.
"""

from __future__ import annotations

import copy
import random
from collections import namedtuple
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.catalogue import IN_CELLS

_ROWS = 7  # of the examples; no feature has this size, so rows that land in another place are noticed
_MOST_FEATURES = 40


@dataclass
class Settings:
    scale: float


class FakeGradient(torch.autograd.Function):
    """The identity with another derivative."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


def scaled(factor):
    return lambda value: factor * value


def weight(*shape):
    return nn.Parameter(torch.randn(shape) / len(shape))


def chain(size):
    return nn.ParameterList(weight(size, size) for _ in range(2))


def tied(size):
    """Three linear maps, of which the first two have one weight."""
    maps = nn.ModuleList(nn.Linear(size, size) for _ in range(3))
    maps[1].weight = maps[0].weight
    return maps


NAMES = {
    "F": F,
    "FakeGradient": FakeGradient,
    "IN_CELLS": IN_CELLS,
    "Settings": Settings,
    "SimpleNamespace": SimpleNamespace,
    "chain": chain,
    "copy": copy,
    "namedtuple": namedtuple,
    "nn": nn,
    "np": numpy,
    "partial": partial,
    "scaled": scaled,
    "tied": tied,
    "torch": torch,
    "weight": weight,
}


@dataclass(frozen=True)
class Piece:
    """One instruction of a step: its code, what it needs in `__init__`, and what may change between two calls."""

    code: str
    init: str = ""
    changes: tuple[str, ...] = ()


def pieces(table: str) -> list[Piece]:
    """One piece a line: code ## init ## change ## change …, with ;; for a new line."""
    rows = [line.replace(" ;; ", "\n").split(" ## ") for line in table.strip().splitlines()]
    return [Piece(row[0], "".join(row[1:2]), tuple(row[2:])) for row in rows]


POINTWISE = pieces("""
{a}.tanh()
{a}.sigmoid() * {b}
{a}.relu() + 0.1 * {b}
F.softplus({a})
F.gelu({a})
F.leaky_relu({a}, 0.3)
{a}.clamp(-0.5, 0.7)
(0.5 * {a}).exp()
({a} + 9).log() * {b}
(1 + {a}.square()).rsqrt()
{a} * {b}
{a} - {b}
{a} / (1 + {b}.abs())
{s} * {a} + {t}
torch.where({a} > {b} + 0.0123, {a}, {s} * {b})
torch.where({a}.abs() < 0.5, {a}, 0.0)
{a}.masked_fill({a} > 0.3, {s})
torch.maximum({a}, {b} + 0.0123)
torch.lerp({a}, {b}, {s})
torch.atan2({a}, 1 + {b}.abs())
torch.addcmul({a}, {b}, {b}, value=0.3)
torch.heaviside({a}.detach(), {b}.detach()) * {b}
{a} + {a}.detach() * {b}
({a} > 0.1).to({a}.dtype) - {a}.detach() + {a}
({a} > 0.1) * {b}
{a}.float().to({a}.dtype)
{a} + torch.zeros({a}.shape[0], 1)
{v} + {v}.new_zeros({v}.shape[0], {v_n})
{a} * torch.ones_like({b})
torch.full_like({a}, {s}) * {b}
{v} * torch.arange({v_n}) * 0.2
{a} + torch.tensor({s})
{v} * torch.tensor([{s}] * {v_n})
{a} * (0.5 if self.training else -0.8)
""")

FEATURES = pieces("""
{a}.softmax(-1)
{a}.log_softmax(-1)
{a}.cumsum(-1)
{a}.logcumsumexp(-1)
{a}.flip(-1)
{a}.roll(1, -1)
{a} / (1 + {a}.norm(dim=-1, keepdim=True))
F.normalize({a}, dim=-1)
F.layer_norm({a}, ({a_n},))
F.rms_norm({a}, ({a_n},))
F.group_norm({v}, 1)
{a} - {a}.mean(-1, keepdim=True)
{a}.sum(-1, keepdim=True) * {b}
{a}.amax(-1, keepdim=True) - {b}
{a}.var(-1, keepdim=True) + {b}
{a}.logsumexp(-1, keepdim=True) - {b}
F.cosine_similarity({a}, {b}, dim=-1).unsqueeze(-1) * {b}
({a} * {b}).sum(-1, keepdim=True) * {b}
torch.cat([{v}, {u}], -1)
torch.cat([{v}[:, :2], {u}], 1)
torch.stack([{v}, {u}], 1)
torch.stack([{v}, {u}], -1).flatten(1)
{v}.chunk(2, -1)[0].tanh() * {v}.chunk(2, -1)[1]
{v}.split([1, {v_n} - 1], -1)[1]
{v}[:, 1:] * {v}[:, :-1]
{v}[:, ::2]
{v}[..., -1:] * {u}
{v}.narrow(1, 0, 2)
{v}.unflatten(1, (2, -1)).mean(1)
{v}.reshape(-1, 2, {v_n} // 2)
{v}.reshape({v}.shape[0], -1, 1) * {u}.view(-1, 1, {u_n})
{v}.reshape(-1, 1).tanh().reshape({v}.shape)
{v}.repeat(1, 2)
{v}.unsqueeze(1).expand(-1, 3, -1)
F.pad({v}, (1, 1))
F.glu({v})
F.avg_pool1d({v}.unsqueeze(1), 2).squeeze(1)
{v}.sort(-1).values
{v}.topk(2, -1).values
{v}.unbind(-1)[0].unsqueeze(-1) * {u}
({s} * {v}.t()).t()
{v}.mean(-1)
({v} * {u}).sum(-1)
{z}.unsqueeze(-1) * {v}
""")

MATRICES = pieces("""
torch.bmm({v}.unsqueeze(2), {u}.unsqueeze(1))
{v}.unsqueeze(-1) * {u}.unsqueeze(-2)
torch.bmm({v}.unsqueeze(1), {m}).squeeze(1)
({m} @ {v}.unsqueeze(-1)).squeeze(-1)
torch.einsum("bkn,bn->bk", {m}, {v})
torch.baddbmm({m}, {v}.unsqueeze(2), {u}.unsqueeze(1))
{m}.transpose(1, 2)
({m} @ {m}.mT).softmax(-1) @ {m}
F.scaled_dot_product_attention({m}, {m}, {m})
F.scaled_dot_product_attention({v}.unsqueeze(1), {m}, {m}).squeeze(1)
{m}.flatten(1)
{m}.permute(0, 2, 1).reshape(-1, {m_k} * {m_n})
{m}.sum(1)
{m}.amax(1)
{m}[:, 0]
{m}[:, -1] * {v}
{m}.softmax(1)
{m}.mean(-1)
{m}.cumsum(1)
{m} / (1 + {m}.norm(dim=(1, 2), keepdim=True))
torch.cat([{m}[:, 1:], {v}.unsqueeze(1)], 1)
{m} + {v}.unsqueeze(1)
{m}.tril()
{m}.diagonal(dim1=1, dim2=2)
{m}.gather(1, ({i} % {m_k}).view(-1, 1, 1).expand(-1, 1, {m_n})).squeeze(1)
torch.where((torch.arange({m_k}) == ({i} % {m_k}).unsqueeze(1)).unsqueeze(-1), {v}.unsqueeze(1), {m})
""")

INTEGERS = pieces("""
({i} + 1) % 5
({v} + 0.05 * torch.arange({v_n})).argmax(-1)
({v} > 0.1).sum(-1)
({v} > 0.2).any(-1)
{c} ^ ({v}.sum(-1) > 0.123)
~{c}
{i} * {c}
torch.where({c}.unsqueeze(-1), {v}, {s} * {v})
torch.where({i}.unsqueeze(-1) > 2, {v}, {s} * {v})
{i}.to({v}.dtype).unsqueeze(-1) * 0.2 * {v}
{v} * ({i} == 1).unsqueeze(-1)
{v}.gather(1, ({i} % {v_n}).unsqueeze(1)) * {u}
F.one_hot({i} % 4, 4).to({v}.dtype) - {v}.mean(-1, keepdim=True)
{v}.scatter_add(1, ({i} % {v_n}).unsqueeze(1), {u}[:, :1])
self.{k}({i} % 4) ## self.{k} = nn.Embedding(4, {w})
self.{k}({i} % 4) + {v} ## self.{k} = nn.Embedding(4, {v_n}, padding_idx=1)
self.{k}[{i} % 4] ## self.{k} = weight(4, {w})
""")

IN_PLACE = pieces("""
{r} = {a}.clone() ;; {r}.mul_({s})
{r} = {a} * 1.0 ;; {r} += {b}
{r} = {v}.clone() ;; {r}[:, 0] = {u}[:, 1]
{r} = {x}.clone() ;; {r}[:, 0] = {x}[:, 1]
{r} = torch.zeros_like({v}) ;; {r}[:, :2] = {u}[:, :2]
{r} = {v}.new_zeros({v}.shape[0], {v_n}) ;; {r}[:, 1:] = {v}[:, :-1]
{r} = {a}.sigmoid().mul_({s})
{r} = {v}.clone() ;; {r}.view(-1, {v_n})[:, 0].add_({s})
{r} = {a}.clone() ;; {r}[{a} > 0.3] = {s}
{r} = ({a} + 0).masked_fill_({a} > 0.2, {s})
{r} = {v}.clone() ;; {r}.scatter_(1, ({i} % {v_n}).unsqueeze(1), {s})
{r} = {v}.clone() ;; {r}[:, 0].copy_({u}[:, 0])
{r} = {h}.clone().clamp_(-0.4, 0.4)
""")

PRODUCTS = pieces("""
self.{k}({a}) ## self.{k} = nn.Linear({a_n}, {w})
self.{k}({a}) ## self.{k} = nn.Linear({a_n}, {w}, bias=False)
self.{k}({h}) ## self.{k} = nn.Linear({h_n}, {w})
self.{k}({x}) ## self.{k} = nn.Linear({x_n}, {w})
self.{L}({a})
self.{k}({v}) ## self.{k} = nn.Linear({v_n}, {w}).requires_grad_(False)
{a} @ self.{k} ## self.{k} = weight({a_n}, {w})
{v} @ self.{k} ## self.{k} = weight({v_n}, {w}).requires_grad_(False)
self.{k} @ {m} ## self.{k} = weight({w}, {m_k})
({v} @ self.{k}).tanh() @ self.{k}.t() ## self.{k} = weight({v_n}, {w})
(({v} @ self.{k}) @ self.{k}.t()).sin() ## self.{k} = weight({v_n}, {w})
{v} @ F.normalize(self.{k}, dim=0) ## self.{k} = weight({v_n}, {w})
{v} @ (self.{k}.softmax(0) * 2 @ self.{k}.t()) ## self.{k} = weight({v_n}, {w})
{v} @ self.{k}[:, 1:] ## self.{k} = weight({v_n}, {w})
torch.addmm(self.{k}[0], {v}, self.{k}) ## self.{k} = weight({v_n}, {w})
torch.einsum("bi,ij,bj->bi", {v}, self.{k}, {u}) ## self.{k} = weight({v_n}, {u_n})
torch.einsum("bi,ijo,bj->bo", {v}, self.{k}, {u}) ## self.{k} = weight({v_n}, {u_n}, {w})
{v} * self.{k} ## self.{k} = weight({v_n})
{v} + self.{k}.expand({v}.shape[0], -1) ## self.{k} = weight({v_n})
{v} * self.{k}.sigmoid() + self.{k}.cumsum(0) ## self.{k} = weight({v_n})
self.{k}({v}, {u}) ## self.{k} = nn.Bilinear({v_n}, {u_n}, {w})
self.{k}({v}, {u}) ## self.{k} = nn.GRUCell({v_n}, {u_n})
self.{k}({v}, {h}) ## self.{k} = IN_CELLS["{g}"]({v_n}, {h_n}, {w})
self.{k}({x}, {v}) ## self.{k} = IN_CELLS["{g}"]({x_n}, {v_n}, {w})
F.conv1d({v}.unsqueeze(1), self.{k}, padding=1).flatten(1) ## self.{k} = weight(2, 1, 3)
{r} = {v} ;; for w in self.{k}: ;;     {r} = ({r} @ w).tanh() ## self.{k} = chain({v_n})
self.{k}[1](self.{k}[0]({v})) - self.{k}[2]({v}) ## self.{k} = tied({v_n}) ## cell.{k}[1].weight = cell.{k}[2].weight
self.{k}b(self.{k}({v}).tanh()) ## self.{k} = nn.Linear({v_n}, {v_n}) ;; self.{k}b = self.{k} ## cell.{k}b = nn.Tanh()
self.{k}[1](self.{k}[0]({v}).tanh()) ## self.{k} = nn.ModuleList([nn.Linear({v_n}, {v_n})] * 2)
{v} * self.{k} ## self.register_buffer("{k}", torch.ones({v_n})) ## cell.{k} = -cell.{k} ## cell.{k}.mul_(-1)
{v} @ self.{k} ## self.register_buffer("{k}", torch.randn({v_n}, {w}), persistent=False) ## cell.{k}.neg_()
self.{k}({a}) ## self.{k} = nn.LayerNorm({a_n}) ## cell.{k}.eps = 0.3
self.{k}({v}) ## self.{k} = nn.Sequential(nn.Linear({v_n}, {w}), nn.Tanh()) ## cell.{k}[1] = nn.Sigmoid()
""")

# What a step reads beside tensors: every form in which a cell can hold a number or a function.
ATTRIBUTES = pieces("""
{a} * self.{k} ## self.{k} = {s} ## cell.{k} = {t}
{a} * self._{k} ## self._{k} = {s} ## cell._{k} = {t}
{a} if self.{k} else -{a} ## self.{k} = True ## cell.{k} = not cell.{k}
{r} = {a} ;; for _ in range(self._{k}): ;;     {r} = {r}.sin() + {b} ## self._{k} = 2 ## cell._{k} = 1
{a} * self.{k}[0] ## self.{k} = [{s}, 2] ## cell.{k}[0] = {t}
{a} * self._{k}['by'] ## self._{k} = {{'by': {s}}} ## cell._{k}['by'] = {t}
{a} * self.{k}.scale ## self.{k} = Settings({s}) ## cell.{k}.scale = {t} ## cell.{k} = Settings({t})
{a} * self.{k}.by[0] ## self.{k} = SimpleNamespace(by=[{s}]) ## cell.{k}.by[0] = {t}
{a} * self.{k} ## type(self).{k} = {s} ## type(cell).{k} = {t}
{a} * K{k} ## global K{k} ;; K{k} = {s} ## type(cell).step.__globals__["K{k}"] = {t}
{a} * self.{k} ## self._{k} = {s} ;; type(self).{k} = property(lambda self: self._{k}) ## cell._{k} = {t}
{a} if 1 in self.{k} else -{a} ## self.{k} = {{1, 2}} ## cell.{k}.discard(1)
{a} * float(self.{k}[0]) ## self.{k} = np.array([{s}, 2.0]) ## cell.{k}[0] = {t}
self.{k}({a}) ## self.{k} = partial(torch.mul, other={s}) ## cell.{k} = partial(torch.mul, other={t})
self.{k}({a}) ## self.{k} = lambda value: {s} * value ## cell.{k} = lambda value: {t} * value
self.{k}({a}) ## self.{k} = scaled({s}) ## cell.{k} = scaled({t}) ## cell.{k}.__closure__[0].cell_contents = {t}
self.{k}({a}) ## type(self).{k} = lambda self, value: value.sin() ## type(cell).{k} = lambda self, v: v.cos()
self.{k}({a}) ## self.{k} = torch.tanh ## cell.{k} = torch.sigmoid
self.{k}({a}) ## self.{k} = nn.LeakyReLU(0.3) ## cell.{k}.negative_slope = -0.5 ## cell.{k} = nn.Sigmoid()
self.{k}({a}) * self.{k}.gain ## self.{k} = nn.Tanh() ;; self.{k}.gain = {s} ## cell.{k}.gain = {t}
""")

# What `fused` may refuse; whatever it takes must be right. The last ones are legal, and to be refused by name: tensors
# that are neither parameters nor buffers.
ODD = pieces("""
{a} - {a}.mean(0)
{a} / (1 + {a}.abs().max())
{a}.cumsum(0)
{a}.softmax(0)
{a}.flip(0)
{a}.roll(1, 0)
{a} - {a}[:1]
{a} * {a}.norm()
({v} @ {v}.t()).softmax(-1) @ {v}
{v}.reshape(-1).cumsum(0).reshape({v}.shape)
{v}[{i} % {v}.shape[0]]
{v} / (1 + {i}.max())
torch.where(({x}.abs() > 50).any(), {s} * {a}, {a})
torch.where({x} > 50, {x}.mean(0), {x})
{a} * ({x}.abs() > 50).any()
torch.where(({i} > 3).any(), {s} * {a}, {a})
{a} if {a}.sum() > 0 else -{a}
{a} if ({x}.abs() < 50).all() else -{a}
{a} * {a}.mean().item()
{a} * ({a}.shape[0] if {a}.shape[0] > 3 else 0.5)
{a} * (1.0 if {a}.shape[0] != 3 else 0.5)
{a} / {a}.shape[0]
{a} / len({a})
F.dropout({a}, 0.5, self.training)
{a} + torch.rand_like({a})
{a} * {h}.data.mean(-1, keepdim=True)
{x}.data * {s} + {x}.tanh()
{v} * self.{L}.weight.data.mean()
{a} * self.{L}.weight.mean().item()
FakeGradient.apply({a})
{a} if {h}.requires_grad else {s} * {a}
{a} if {x}.requires_grad else {s} * {a}
{a} if self.{L}.weight.requires_grad else {s} * {a}
{a} if torch.is_grad_enabled() else {s} * {a}
{a} * torch.from_numpy({a}.detach().numpy())
{a} * torch.tensor({a}.tolist())
{h}.mul_({s})
{x}.mul_({s})
with torch.no_grad(): ;;     {r} = {a}.square() ;; {r} = {r} + {b}
{r} = {a} * 1.0 ;; {r}.requires_grad and {r}.register_hook(lambda gradient: {s} * gradient)
{r} = {a} ;; self.{k} = {a} ## self.{k} = None
self.{k} = self.{k} + 1 ;; {r} = {a} / self.{k} ## self.{k} = 0
self._{k}.append(1) ;; {r} = {a} / len(self._{k}) ## self._{k} = []
self.{k}.add_(1) ;; {r} = {a} / self.{k} ## self.register_buffer("{k}", torch.ones(()))
{r} = {a} / self.{k} ;; self.{k} = self.{k} + 1 ## self.register_buffer("{k}", torch.ones(()))
self.{k}({v}) ## self.{k} = nn.Dropout(0.5)
self.{k}({v}) ## self.{k} = nn.BatchNorm1d({v_n})
{a} * self.{k} ## self.{k} = torch.tensor({s}) ## cell.{k} = torch.tensor({t}) ## cell.{k}.fill_({t})
{a} * self._{k}[0] ## self._{k} = [torch.tensor({s})] ## cell._{k}[0] = torch.tensor({t})
{a} * self.{k}.scale ## self.{k} = Settings(torch.tensor({s})) ## cell.{k}.scale.fill_({t})
self.{k}({a}) ## self.{k} = partial(torch.mul, other=torch.tensor({s})) ## cell.{k}.keywords['other'].neg_()
""")

GROUPS = {
    "pointwise": (5, POINTWISE),
    "features": (5, FEATURES),
    "products": (6, PRODUCTS),
    "matrices": (3, MATRICES),
    "integers": (3, INTEGERS),
    "in place": (1, IN_PLACE),
    "attributes": (2, ATTRIBUTES),
}


@dataclass(frozen=True)
class Kind:
    """A stream or a field of the state: the shape of a row, and its dtype; None for the cell's own."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    def draw(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        if self.dtype is None:
            return torch.randn(*sizes, *self.shape, dtype=dtype)
        return torch.randint(2 if self.dtype is torch.bool else 5, (*sizes, *self.shape)).to(self.dtype)


@dataclass(frozen=True)
class Program:
    """A random cell: its source, what it is run on, and what of it may change between two calls."""

    source: str
    streams: list[Kind]  # one of the name "" is no dict
    fields: list[Kind]
    changes: list[str]
    legal: bool

    def build(self) -> tuple[type[nn.Module], type]:
        """The classes of the cell and of its state."""
        names = dict(NAMES)
        exec(self.source, names)
        return names["Random"], names["State"]


class _Picks(dict[str, Any]):
    """The values of a piece's placeholders, picked when they are first asked for."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__()
        self.writer = writer

    def __missing__(self, key: str) -> Any:
        head, _, size = key.partition("_")
        if size:
            shape = self.writer.values[self[head]].shape
            self[key] = shape[-1] if size == "n" else shape[1]
        else:
            self[key] = self.writer.pick(head, self)
        return self[key]


@dataclass
class _Writer:
    """A program in the making, and the example values of what it has computed so far."""

    random: random.Random
    streams: list[Kind]
    fields: list[Kind]
    init: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=lambda: dict(NAMES))
    count: int = 0

    def __post_init__(self) -> None:
        example = {kind.name: kind.draw(_ROWS, dtype=torch.float64) for kind in (*self.streams, *self.fields)}
        state = namedtuple("State", [kind.name for kind in self.fields])
        self.names["state"] = state(*(example[kind.name] for kind in self.fields))
        self.names["x"] = example.get("", example)
        self.names["self"] = type("Example", (nn.Module,), {})().double()
        for kind in self.streams:
            self.values[f'x["{kind.name}"]' if kind.name else "x"] = example[kind.name]
        self.values |= {f"state.{kind.name}": example[kind.name] for kind in self.fields}
        self.inputs = list(self.values)
        self.unused += self.inputs

    def pick(self, key: str, picks: _Picks) -> Any:
        """Something for a placeholder; LookupError where there is nothing of its kind."""
        if key in ("r", "k"):
            self.count += 1
            return f"{'v' if key == 'r' else 'p'}{self.count}"
        if key == "w":
            return self.random.randint(2, 5)
        if key in ("s", "t"):
            return round(self.random.uniform(0.3, 0.9) * (1 if key == "s" else -1), 2)
        if key == "g":
            return self.random.choice(sorted(IN_CELLS))
        if key == "L":
            return self.random.choice([line[5:].split(" = ")[0] for line in self.init if " = nn.Linear(" in line])
        found = [name for name, value in self.values.items() if self._fits(key, name, value)]
        if key == "b" and self.random.random() < 0.7:
            shape = self.values[picks["a"]].shape
            found = [name for name in found if self.values[name].shape == shape]
        fresh = [name for name in found if name in self.unused]
        return self.random.choice(fresh if fresh and self.random.random() < 0.7 else found)

    def _fits(self, key: str, name: str, value: Tensor) -> bool:
        if key in "ic":
            return value.ndim == 1 and value.dtype in ((torch.bool,) if key == "c" else (torch.int64, torch.int32))
        if key in "xh" and (name not in self.inputs or name.startswith("state") != (key == "h")):
            return False
        dims = {"z": (1,), "m": (3,), "a": (2, 3), "b": (2, 3)}.get(key, (2,))
        return value.is_floating_point() and value.ndim in dims

    def add(self, piece: Piece) -> str | None:
        """Add a piece if it runs on the examples; the name of its result."""
        picks = _Picks(self)
        try:
            code = piece.code if "{r}" in piece.code else "{r} = " + piece.code
            code, init = code.format_map(picks), piece.init.format_map(picks)
            changes = [change.format_map(picks) for change in piece.changes]
            exec(init, self.names)
            self.names["self"].double()
            exec(code, self.names)
        except Exception:  # the piece does not fit what there is
            return None
        name, value = picks["r"], self.names[picks["r"]]
        floating = value.is_floating_point()
        features = value[0].numel() if value.shape[:1] == (_ROWS,) else 0
        if not 0 < features <= _MOST_FEATURES or value.ndim > 3 or _ROWS in value.shape[1:]:
            return None
        if floating and (not value.isfinite().all() or value.dtype != torch.float64):
            return None
        if floating and value.abs().max() > 2:
            squash = self.random.choice((f"{name} = {name}.tanh()", f"{name} = 2 * ({name} / 4).sin()"))
            code += "\n" + squash
            exec(squash, self.names)
        self.init += init.splitlines()
        self.code += code.splitlines()
        self.changes += changes
        used = [pick for pick in picks.values() if pick in self.unused]
        self.unused = [other for other in self.unused if other not in used] + [name]
        self.values[name] = self.names[name]
        return name

    def close(self, kind: Kind, last: bool) -> str:
        """An expression for the state's field, which takes up values that nothing has used yet."""
        old = f"state.{kind.name}"
        if kind.dtype is not None:
            key = "c" if kind.dtype is torch.bool else "i"
            found = [name for name, value in self.values.items() if self._fits(key, name, value)]
            return f"{self.random.choice(found[-2:])}.to({kind.dtype})"
        floats = [name for name in self.unused if self.values[name].is_floating_point() and name != old]
        taken = floats if last else floats[: self.random.randint(1, 2)]
        self.unused = [name for name in self.unused if name not in taken]
        terms = [self._fit(name, kind.shape) for name in taken]
        total = " + ".join(terms)
        if not terms:
            return self.random.choice((old, f"0.9 * {old}.sin()"))
        return self.random.choice((f"({total}).tanh()", f"0.5 * {old} + 0.5 * ({total}).tanh()", f"({total}).sin()"))

    def _fit(self, name: str, shape: tuple[int, ...]) -> str:
        value = self.values[name]
        if value.shape[1:] == shape:
            return name
        self.count += 1
        size = torch.Size(shape).numel()
        self.init.append(f"self.p{self.count} = weight({value[0].numel()}, {size})")
        flat = f"{name}.unsqueeze(1)" if value.ndim == 1 else f"{name}.flatten(1)" if value.ndim == 3 else name
        product = f"{flat} @ self.p{self.count}"
        return product if len(shape) == 1 else f"({product}).reshape({', '.join(map(str, (-1, *shape)))})"


_SHAPES = [(3,), (4,), (4,), (5,), (6,), (2, 3), (3, 4), ()]


def random_program(seed: str) -> Program:
    """The cell that belongs to a seed."""
    chance = random.Random(seed)
    torch.manual_seed(chance.randrange(2**31))
    streams = [Kind("", (chance.choice((3, 4, 5)),))]
    if chance.random() < 0.5:
        others = [
            Kind("mask", (), torch.bool),
            Kind("word", (), torch.int64),
            Kind("memory", (2, 4)),
            Kind("context", (4,)),
            Kind("gain", ()),
        ]
        streams = [Kind("signal", streams[0].shape), *chance.sample(others, chance.randint(0, 2))]
    fields = [Kind("h", chance.choice(_SHAPES[:-1]))]
    for name in "efg"[: chance.choice((0, 0, 1, 1, 2, 3))]:
        dtype = chance.choice((None, None, None, torch.int64, torch.int32, torch.bool))
        fields.append(Kind(name, chance.choice(_SHAPES) if dtype is None else (), dtype))
    writer = _Writer(chance, streams, fields)
    writer.add(PRODUCTS[2])  # a step without a product of the state is rarely a cell
    size, odd = len(writer.code) + chance.randint(2, 9), chance.random() < 0.35
    groups, shares = [group for _, group in GROUPS.values()], [share for share, _ in GROUPS.values()]
    while len(writer.code) < size:
        writer.add(chance.choice(chance.choices(groups, shares)[0]))
    while odd and not writer.add(chance.choice(ODD)):
        pass
    for _ in range(chance.randint(0, 2)):
        writer.add(chance.choice(chance.choices(groups, shares)[0]))
    last = [kind for kind in fields if kind.dtype is None][-1]
    new = [writer.close(kind, last=kind is last) for kind in fields]
    state = f'namedtuple("{{}}", "{" ".join(kind.name for kind in fields)}")'
    given, after = ("State", "After") if chance.random() < 0.1 else ("State", "State")
    source = [f"State = {state.format(given)}", *([f"After = {state.format(after)}"] if after != given else [])]
    source += ["class Random(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    source += [f"        {line}" for line in writer.init]
    source += ["    def step(self, x, state):", *(f"        {line}" for line in writer.code)]
    source += [f"        return {after}({', '.join(new)})"]
    return Program("\n".join(source), streams, fields, writer.changes, not odd)
