"""The benchmark: it writes what it measures, and times nothing that is wrong."""

import csv
import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch

from experiments.__main__ import main
from experiments.bench import command, measure
from experiments.bench.case import Case
from experiments.bench.cases import BilinearCase, SoftmaxCase, StepCase, cases
from experiments.bench.conditioning import FORMS, ConditionalCase, bilinear_einsum, conditional_cases
from experiments.bench.gradbench import DiagonalLSTM, GradBenchCase
from experiments.core.errors import ExperimentError
from multint import LSTM, Additive, Bilinear, LSTMCell, from_torch
from multint.engines.kernel import eager_pieces

pytestmark = pytest.mark.runs

SMALL = Case("small", (4, 3, 5, 6), LSTM, torch.nn.LSTM)


def test_the_command_writes_a_table_and_a_plot(tmp_path, capsys):
    assert main(["bench", "bilinear", "--quick", "--rounds=2", f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "bilinear" in printed
    (row,) = csv.DictReader((tmp_path / "cpu.csv").read_text().splitlines())
    assert float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"])
    assert (tmp_path / "cpu.png").stat().st_size > 1000


@pytest.mark.parametrize("arguments", [["lstm"], ["--rounds=many"], ["--rounds=0"], ["--threads=0"]])
def test_mistakes_are_one_message(arguments, capsys):
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", [*FORMS, "generated"])
def test_a_conditional_layer_is_what_is_written_today(name):
    (case,) = (case for case in conditional_cases() if case.name.startswith(f"{name}-") and case.size[2] < 1024)
    small = dataclasses.replace(case, size=(1, 5, 8, 8), context=4)
    assert small.rivals
    measure.check(small)


def test_a_conditional_layer_that_is_off_is_not_timed():
    case = ConditionalCase("off", (1, 5, 8, 8), Bilinear, context=4, written={"einsum": bilinear_einsum})
    measure.check(case)
    half = dataclasses.replace(case, written={"half": lambda f: bilinear_einsum(f)._replace(named=halved)})
    with pytest.raises(ExperimentError, match=r"our gradient 3 is off by 1\.0e\+00 from the half's"):
        measure.check(half)


def halved(gradients):
    return {name: gradient / 2 for name, gradient in gradients.items()}


def test_a_case_without_a_rival_tells_its_time_and_what_it_takes_above_its_gradients(monkeypatch, tmp_path, capsys):
    wide = SoftmaxCase("softmax-10000", (4, 4, 8, 10_000), torch.nn.Identity, alone=True)
    monkeypatch.setattr(command, "cases", lambda: [wide])
    fresh = measure.Fresh(0.5, 10 * 2**20, 4 * 2**20)
    monkeypatch.setattr(command, "first_calls", lambda case: ({}, fresh, fresh))
    assert main(["bench", "--rounds=2", f"--out={tmp_path}"]) == 0
    (row,) = csv.DictReader((tmp_path / "cpu.csv").read_text().splitlines())
    assert float(row["ours_ms"]) > 0
    assert (row["rival"], row["ratio"], row["ours_MiB"], row["ours_above_MiB"]) == ("", "", "10", "6")
    assert "(6 above outputs and gradients)" in capsys.readouterr().out


def test_a_step_is_one_step_of_either_cell():
    case = StepCase("step", (1, 2, 5, 6), functools.partial(LSTMCell, integrator=Additive), torch.nn.LSTMCell)
    measure.check(case)
    for contender in ("ours", "vendor"):
        h, c = case.build(contender)()
        assert h.shape == c.shape == (2, 6)
        assert not h.requires_grad
        assert not torch.equal(h, c)


def test_names_are_unique():
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("changes", [{}, {"packed": True}, {"backward": False}, {"dtype": torch.bfloat16}])
def test_contenders_do_the_same(changes):
    """Ours agrees with the loop in all, and with the vendor's layer of the same weights in the output."""
    vendor = torch.nn.LSTM(5, 6)

    def ours(inputs, hidden, engine):
        converted = from_torch(vendor)
        converted.engine = engine
        return converted

    case = Case("same", (10, 3, 5, 6), ours, lambda *_: vendor, **changes)
    fault = measure.vendor_fault(case)
    with eager_pieces():
        results = {who: case.build(who)() for who in ("ours", "loop")}
    tolerance = 0.1 if case.dtype == torch.bfloat16 else 1e-4
    assert len(results["ours"]) == len(results["loop"]) == (1 if changes == {"backward": False} else 5)
    for actual, expected in zip(results["ours"], results["loop"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    if fault is not None:
        pytest.skip(f"ours agrees with the loop; the vendor's layer cannot run here: {fault}")
    results["vendor"] = case.build("vendor")()
    if changes.get("packed"):  # the same steps in another order
        sums = [results[who][0].float().sum() for who in ("ours", "vendor")]
        torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(results["ours"][0], results["vendor"][0], rtol=tolerance, atol=tolerance)


def by_hand(case):
    """GradBench's loss and its gradient in NumPy, backwards step by step."""
    text, state, output = (tensor.detach().numpy() for tensor in case.arguments())
    weights, biases, scale = (p.detach().numpy() for p in DiagonalLSTM(case.size[2]).double().parameters())
    h, c = [state[1], state[0]], [state[3], state[2]]  # of the lower layer and the upper one
    kept, loss = [], 0.0
    for x, expected in itertools.pairwise(text):
        layers, incoming = [], x * scale
        for k in range(2):
            f, i, o, g = ((h[k] if n in (1, 3) else incoming) * weights[k, n] + biases[k, n] for n in range(4))
            f, i, o, g = 1 / (1 + np.exp(-f)), 1 / (1 + np.exp(-i)), 1 / (1 + np.exp(-o)), np.tanh(g)
            new = f * c[k] + i * g
            layers.append((incoming, h[k], c[k], f, i, o, g, np.tanh(new)))
            c[k], h[k] = new, o * np.tanh(new)
            incoming = h[k]
        y = incoming * output[0] + output[1]
        total = 2 + np.exp(y).sum(-1, keepdims=True)
        loss -= (expected * (y - np.log(total))).sum()
        kept.append((layers, incoming, -expected + expected.sum(-1, keepdims=True) * np.exp(y) / total))
    d_weights, d_biases, d_scale, d_output = (np.zeros_like(a) for a in (weights, biases, scale, output))
    d_h, d_c = [np.zeros_like(a) for a in h], [np.zeros_like(a) for a in c]
    for x, (layers, top, d_y) in zip(text[-2::-1], reversed(kept), strict=True):
        d_output += np.stack([(d_y * top).sum(0), d_y.sum(0)])
        d_h[1] = d_h[1] + d_y * output[0]
        for k in (1, 0):
            incoming, before, memory, f, i, o, g, tanh = layers[k]
            d_new = d_c[k] + d_h[k] * o * (1 - tanh**2)
            d_gates = [
                d_new * memory * f * (1 - f),
                d_new * g * i * (1 - i),
                d_h[k] * tanh * o * (1 - o),
                d_new * i * (1 - g**2),
            ]
            for n, d_gate in enumerate(d_gates):
                d_weights[k, n] += (d_gate * (before if n in (1, 3) else incoming)).sum(0)
                d_biases[k, n] += d_gate.sum(0)
            d_incoming = d_gates[0] * weights[k, 0] + d_gates[2] * weights[k, 2]
            d_h[k], d_c[k] = d_gates[1] * weights[k, 1] + d_gates[3] * weights[k, 3], d_new * f
            if k:
                d_h[0] = d_h[0] + d_incoming
        d_scale += (d_incoming * x).sum(0)
    return [loss / text[1:].size, *(d / text[1:].size for d in (d_weights, d_biases, d_scale, d_output))]


@pytest.mark.parametrize("contender", ["ours", "loop", "jax"])
def test_gradbenchs_loss_and_gradient_are_numpys(contender):
    case = GradBenchCase("small", (9, 2, 5, 5), torch.nn.Identity)
    if contender == "jax":
        pytest.importorskip("jax")
    for actual, expected in zip(case.build(contender)(), by_hand(case), strict=True):
        torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), rtol=1e-12, atol=1e-12)


class Unable(torch.nn.LSTM):
    """A vendor's layer on a processor that it does not know."""

    def forward(self, *arguments):
        raise RuntimeError("could not create a primitive descriptor\nand more")


def test_what_the_vendor_cannot_run_is_left_out_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    chosen = [dataclasses.replace(SMALL, name="unable", vendor=Unable), SMALL]
    monkeypatch.setattr(command, "cases", lambda: chosen)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with eager_pieces():
        assert main(["bench", "--quick", "--rounds=1", f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "left out, as the vendor's layer cannot run here: RuntimeError: could not create a primitive desc" in printed
    assert "and more" not in printed
    assert "held to AVX2" in printed
    rows = csv.DictReader((tmp_path / "cpu.csv").read_text().splitlines())
    assert [(row["case"], row["rival"]) for row in rows] == [("small", "vendor"), ("small", "loop")]


def test_what_ours_cannot_run_is_an_error(monkeypatch, tmp_path):
    broken = dataclasses.replace(SMALL, ours=lambda inputs, hidden, engine: Unable(inputs, hidden))
    monkeypatch.setattr(command, "cases", lambda: [broken])
    with pytest.raises(RuntimeError, match="primitive descriptor"):
        main(["bench", "--quick", "--rounds=1", f"--out={tmp_path}"])


def build_bilinear(right, self, contender):
    run = right(self, contender)
    return (lambda: [0 * result for result in run()]) if contender == "ours" else run


def test_an_output_folder_that_cannot_be_is_a_message(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["bench", "bilinear", f"--out={tmp_path / 'file'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_no_bench_overwrites_another(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_measure", lambda case, rounds, quick: [{"case": case.name}])
    for _ in range(2):
        assert main(["bench", "bilinear"]) == 0
    first = tmp_path / "runs/bench/version_0"
    assert {path.name for path in first.parent.iterdir()} == {"version_0", "version_1"}
    assert "case 1 of 1: bilinear" in capsys.readouterr().err, "before it is measured"
    before = (first / "cpu.csv").read_bytes()
    assert main(["bench", "bilinear", f"--out={first}"]) == 2
    assert "earlier bench" in capsys.readouterr().err
    assert (first / "cpu.csv").read_bytes() == before


def test_a_full_disk_leaves_the_results_of_before(monkeypatch, tmp_path, capsys, full_disk):
    monkeypatch.setattr(command, "cases", lambda: [SMALL, dataclasses.replace(SMALL, name="second" * 20)])
    monkeypatch.setattr(command, "COLUMNS", ("case",))
    monkeypatch.setattr(command, "_measure", lambda case, rounds, quick: [{"case": case.name}])
    with full_disk():
        assert main(["bench", f"--out={tmp_path}"]) == 2
    assert "File too large" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.csv"]
    assert (tmp_path / "cpu.csv").read_text().split() == ["case", "small"]


def test_nothing_is_timed_that_is_wrong(monkeypatch):
    with eager_pieces():
        measure.check(SMALL)
        right = Case.build

        def build(self, contender):
            run = right(self, contender)
            return (lambda: [1.01 * result for result in run()]) if contender == "ours" else run

        monkeypatch.setattr(Case, "build", build)
        monkeypatch.setattr(BilinearCase, "build", lambda *a, b=BilinearCase.build: build_bilinear(b, *a))
        (bilinear,) = (case for case in cases() if case.name == "bilinear")
        with pytest.raises(ExperimentError, match="our output is off"):
            measure.check(bilinear)
        with pytest.raises(ExperimentError, match=r"our output is off by 1\.0e-02 from the loop's"):
            measure.check(SMALL)


def test_times_are_taken_in_turns(monkeypatch):
    order = []
    monkeypatch.setattr(Case, "build", lambda self, contender: functools.partial(order.append, contender))
    rounds = measure.side_by_side(SMALL, "loop", 5)
    assert len(rounds.ratios) == 5
    assert order[:6] == ["ours", "loop"] * 3


def test_memory_and_first_call_come_from_a_process_of_their_own():
    fresh = measure._in_process("bilinear", "vendor", "/nonexistent")
    assert fresh.first_call > 0
    assert fresh.peak is None or fresh.peak < 2**30
    with pytest.raises(ExperimentError, match="in a process of its own"):
        measure._in_process("no such case", "vendor", "/nonexistent")
