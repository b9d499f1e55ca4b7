"""Every operation on numbers that native code has gives what torch gives, at the edges of float32 too."""

import ctypes
import itertools
import math
import shutil
from typing import NamedTuple

import pytest
import torch

from multint.engines import decompositions, kernel, private
from multint.engines.native import elements, loops, machine

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(shutil.which("g++") is None, reason="native code needs a C++ compiler"),
]

aten = torch.ops.aten


def signed(*sizes):
    return [*sizes, *(-size for size in sizes), math.nan]


# The values of the operands, by their number. Around 9 tanh becomes 1, around 88 exp leaves float32, around 104 its
# inverse does; the others are where an activation has a corner, and what an exploded one has. With two operands, no sum
# of a product is near the largest number, where its rounding decides.
GRID = {
    1: signed(
        *(0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-8, 1e-4, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.3, 5.0, 6.0, 8.0),
        *(8.4, 8.7, 9.0, 9.02, 10.0, 15.0, 20.0, 21.0, 44.3, 87.5, 88.5, 88.73, 89.0, 103.5, 104.0, 110.0, 1e10),
        *(1.9e19, 1e30, 3.4e38, math.inf),
    ),
    2: signed(0.0, 1e-40, 1e-30, 0.3, 0.5, 1.0, 2.0, 2.5, 3.0, 20.0, 1e20, 3.4e38, math.inf),
    3: [0.0, -0.0, 0.5, -1.5, 1e18, math.inf, -math.inf, math.nan],
}
COTANGENTS = (1.0, -2.5, 0.0)

# What else an operation is given, where its defaults do not tell enough.
SETTINGS = {
    aten.pow.Tensor_Scalar: [
        {"exponent": e} for e in (*signed(0.5, 1 / 3, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, math.inf), 0, 2)
    ],
    aten.clamp.default: [
        {"min": low, "max": high} for low, high in ((None, 1.5), (-0.5, None), (0, 6.0), (3.0, -1.5), (math.nan, 1.0))
    ],
    aten.hardtanh.default: [{}, {"min_val": 0, "max_val": 6}],
    aten.elu.default: [{}, {"alpha": 1.6733, "scale": 1.0507}],
    aten.softplus.default: [{}, {"beta": 2, "threshold": 5}],
    aten.gelu.default: [{}, {"approximate": "tanh"}],
    **{op: [{}, {"alpha": -0.5}] for op in (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)},
}

# An error of the rounding of 1 is in these by torch's own formulas, and some of its kernels leave the sign of a 0 open.
ROUND_NEAR_1 = {aten.tanh.default, aten.gelu.default}

# The sign of its zeros is another one in torch 2.12.
ZEROS_OF_ANY_SIGN = {aten.frac.default}

# Their derivatives have no native code. Steps that use the first run from Python, and sgn is in derivatives alone.
WITHOUT_DERIVATIVE = {aten.log_sigmoid_forward.default, aten.sgn.default}


def operations():
    """What has a rule or a decomposition, and takes numbers to numbers."""
    found = [op for op in (*elements._RULES, *decompositions.plainer()) if private.is_operation(op)]
    # A derivative is tested with its operation; these take one number for all, or go by places.
    others = {aten.fill.Tensor, aten.masked_fill.Tensor, aten.linalg_vector_norm.default, aten.slice_scatter.default}
    others |= {aten.tril.default, aten.triu.default, aten.diag_embed.default, aten.mm.default, aten.baddbmm.default}
    joined = (aten.sum, aten.mean, aten.var, aten.std, aten.var_mean, aten.any, aten.all, aten.argmax, aten.argmin)
    others |= {getattr(packet, name) for packet in joined for name in packet.overloads()}
    return [op for op in dict.fromkeys(found) if "backward" not in str(op) and op not in others and tensors(op)]


def tensors(op):
    """How many operands it has; 0 where it wants more than numbers."""
    wanted = [str(a.type) for a in op._schema.arguments if not a.has_default_value() and not a.is_out]
    is_of_numbers = not any(a.is_out for a in op._schema.arguments) and set(wanted) <= {"Tensor", "number", "float"}
    return wanted.count("Tensor") if is_of_numbers else 0


class Case(NamedTuple):
    """An operation on operands of some dtypes, with some settings."""

    op: object
    dtypes: tuple[torch.dtype, ...]
    settings: dict

    def run(self, floats, bools):
        chosen = [f if dtype == torch.float32 else b for f, b, dtype in zip(floats, bools, self.dtypes, strict=True)]
        result = self.op(*chosen, **self.settings)
        return result[0] if isinstance(result, tuple) else result

    def gradients(self, floats, bools, cotangent):
        """Those of the operands that are no bools; None where torch has none."""
        leaves = [f.clone().requires_grad_() for f in floats]
        result = self.run(leaves, bools)
        if self.op in WITHOUT_DERIVATIVE or not (result.requires_grad and result.dtype == torch.float32):
            return None
        wanted = [leaf for leaf, dtype in zip(leaves, self.dtypes, strict=True) if dtype == torch.float32]
        try:
            return torch.autograd.grad(result, wanted, cotangent, allow_unused=True, materialize_grads=True)
        except RuntimeError:  # such as that of a power whose exponent is a bool
            return None


def cases(op, floats, bools):
    """All that torch can compute, and that is a float32 or a bool."""
    required = [a.name for a in op._schema.arguments if str(a.type) != "Tensor" and not a.has_default_value()]
    settings = SETTINGS.get(op, [dict.fromkeys(required, number) for number in (1.5, 0.0)[: 1 + len(required)]])
    found = []
    for dtypes in itertools.product((torch.float32, torch.bool), repeat=len(floats)):
        for case in (Case(op, dtypes, some) for some in settings):
            try:
                result = case.run(floats, bools)
            except RuntimeError:
                continue
            if result.dtype in (torch.float32, torch.bool):
                found.append(case)
        if found and len(floats) > 2:  # one choice of dtypes is enough
            break
    return found


def operands(count):
    """All combinations of the grid's values in columns, by rows of one cotangent each; the same as bools."""
    columns = torch.tensor(list(itertools.product(GRID[count], repeat=count)), dtype=torch.float32)
    # Torch computes the last few numbers in memory by other code, which may have other rules for NaN.
    columns = torch.cat([columns, columns.new_ones(-len(columns) % 64, count)]).T
    floats = [column.repeat(len(COTANGENTS), 1) for column in columns]
    return floats, [f > 0 for f in floats], torch.tensor(COTANGENTS)[:, None].expand(floats[0].shape).contiguous()


class Function(NamedTuple):
    """The native code of an operation's cases and their gradients: what it reads, what each result is and should be."""

    text: str
    inputs: list[torch.Tensor]
    names: list[str]
    expected: list[torch.Tensor]

    def exported(self, number):
        """Its C++, with a function that runs it for all rows."""
        given = [("const ", tensor) for tensor in self.inputs] + [("", tensor) for tensor in self.expected]
        kinds = {torch.float32: "float", torch.bool: "bool"}
        rows = [
            f"({const}{kinds[tensor.dtype]} *)data[{i}] + row * {tensor.shape[1]}"
            for i, (const, tensor) in enumerate(given)
        ]
        return (
            f"{self.text.replace(loops.NAME, f'piece{number}')}\n"
            f'extern "C" void run{number}(void **data) {{\n'
            f"  for (int64_t row = 0; row < {len(COTANGENTS)}; ++row) piece{number}({', '.join(rows)});\n}}\n"
        )


def native(op):
    """An operation as a Function."""
    floats, bools, cotangent = operands(tensors(op))
    count, names, expected, functions = len(floats), [], [], []
    for case in cases(op, floats, bools):
        name = f"{op} {case.settings} of {[str(dtype) for dtype in case.dtypes]}"
        names.append(name)
        expected.append(case.run(floats, bools))
        functions.append(lambda fs, bs, d, case=case: [case.run(fs, bs)])
        gradients = case.gradients(floats, bools, cotangent)
        if gradients is not None:
            names += [f"gradient {i} of {name}" for i in range(len(gradients))]
            expected += gradients
            functions.append(lambda fs, bs, d, case=case: vjp(case, fs, bs, d))

    def all_results(*inputs):
        return [r for function in functions for r in function(inputs[:count], inputs[count:-1], inputs[-1])]

    inputs = [*floats, *bools, cotangent]
    world = private.StandIns()
    stand_ins = [world.rows(tensor) for tensor in inputs]
    graph = kernel.plain(world.trace(all_results, stand_ins), world)
    text = loops.function_of(graph, [False] * len(expected)).text
    return Function(text, inputs, names, [tensor.contiguous() for tensor in expected])


def vjp(case, floats, bools, cotangent):
    """The gradients as the engine traces them."""
    places = [i for i, dtype in enumerate(case.dtypes) if dtype == torch.float32]

    def of(*some):
        found = dict(zip(places, some, strict=True))
        return case.run([found.get(i, f) for i, f in enumerate(floats)], bools)

    return list(torch.func.vjp(of, *(floats[i] for i in places))[1](cotangent))


@pytest.fixture(scope="module")
def functions():
    """Each operation's function, and the library with all of them."""
    found = {op: native(op) for op in operations()}
    text = "\n".join(function.exported(i) for i, function in enumerate(found.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_OPTIMISED", "-O3")  # as users get it
        return found, machine.library(text)


@pytest.mark.parametrize("op", operations(), ids=str)
def test_numbers_and_gradients_are_torchs(op, functions):
    """NaN where torch has it, zeros by their sign, all else up to rounding."""
    found, library = functions
    function = found[op]
    actual = [torch.full_like(tensor, 7) for tensor in function.expected]
    data = [tensor.data_ptr() for tensor in (*function.inputs, *actual)]
    getattr(library, f"run{list(found).index(op)}")((ctypes.c_void_p * len(data))(*data))
    rounds_near_1 = op in ROUND_NEAR_1
    tolerances = {"rtol": 1e-5, "atol": 1e-6 if rounds_near_1 else 2e-38}  # some processors have no smaller numbers
    for name, ours, theirs in zip(function.names, actual, function.expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerances, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")
        zeros = (ours == 0) & (theirs == 0)
        if ours.dtype == torch.float32 and not rounds_near_1 and op not in ZEROS_OF_ANY_SIGN:
            torch.testing.assert_close(ours.signbit() & zeros, theirs.signbit() & zeros, msg=f"{name}: the sign of 0")
