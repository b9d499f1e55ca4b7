"""The algebra in a config: compositions by name, and integrators in one word."""

import inspect
import re

import pytest
import torch
import yaml

import multint
from experiments.__main__ import main
from experiments.core.configs import CONFIGS
from multint import Additive, Diagonal, Hadamard, Integrator, LowRank, MultintError, Scaled, Sum, Swapped, Through
from multint.integrators import ScaledOf, SumOf, SwappedOf, ThroughOf, outermost_integrators, rank
from tests.catalogue import normal, randomise
from tests.test_configs import built

pytestmark = pytest.mark.runs

INTEGRATOR = "--model.network.recurrent.cell.integrator"
X, H = 64, 256  # the quickstart's

# What stands in the file after `integrator: `, and what it is for the sizes (X, Z, O).
IN_YAML = {
    "{class_path: SumOf, init_args: {first: Additive, second: {class_path: LowRank, init_args: {rank: 8}}}}": (
        lambda x, z, o: Sum(Additive(x, z, o), LowRank(x, z, o, rank=8))
    ),
    "{class_path: ScaledOf, init_args: {scale: 0.5, integrator: Hadamard}}": (
        lambda x, z, o: Scaled(0.5, Hadamard(x, z, o))
    ),
    "{class_path: SwappedOf, init_args: {integrator: {class_path: LowRank, init_args: {rank: 8}}}}": (
        lambda x, z, o: Swapped(LowRank(z, x, o, rank=8))
    ),
    "{class_path: ThroughOf, init_args: {outer: Additive, inner: Hadamard}}": (
        lambda x, z, o: Through(Additive(x, z, o), Hadamard(x, z, z))
    ),
    "{class_path: ThroughOf, init_args: {outer: Additive, inner: Hadamard, inner_features: 12}}": (
        lambda x, z, o: Through(Additive(x, 12, o), Hadamard(x, z, 12))
    ),
    """
            class_path: ThroughOf
            init_args:
              outer: {class_path: SwappedOf, init_args: {integrator: Diagonal}}
              inner: Additive
              inner_features: out
    """: (lambda x, z, o: Through(Swapped(Diagonal(o, x, o)), Additive(x, z, o))),
}


def cells(*options, cell="LSTMCell"):
    """The cell of the quickstart with these options."""
    commands = built(CONFIGS / "characters/quickstart.yaml", f"--model.network.recurrent.cell={cell}", *options)
    with torch.device("meta"):
        return commands.task._build_network(97).recurrent.directions[0].cell


def own_config(folder, integrator, cell="LSTMCell"):
    path = folder / "own.yaml"
    path.write_text(
        f"""
model:
  network:
    recurrent:
      cell:
        class_path: {cell}
        init_args:
          integrator: {integrator}
"""
    )
    return str(path)


@pytest.mark.parametrize("integrator", IN_YAML)
def test_a_config_names_a_composition(integrator, tmp_path):
    """In a GRU, which builds it twice, for two sizes of the output."""
    maps = outermost_integrators(cells("--config", own_config(tmp_path, integrator, "GRUCell"), cell="GRUCell"))
    assert len({f.out_features for f in maps.values()}) == 2
    for f in maps.values():
        g = IN_YAML[integrator](f.x_features, f.z_features, f.out_features)
        assert isinstance(f, type(g))
        assert {name: weight.shape for name, weight in f.state_dict().items()} == {
            name: weight.shape for name, weight in g.state_dict().items()
        }


FACTORIES = {
    "sum": (lambda: SumOf(7, 5, 5, Additive, Hadamard), lambda: Sum(Additive(7, 5, 5), Hadamard(7, 5, 5))),
    "scaled": (lambda: ScaledOf(7, 5, 5, 0.5, Hadamard), lambda: Scaled(0.5, Hadamard(7, 5, 5))),
    "swapped": (lambda: SwappedOf(7, 5, 5, Hadamard), lambda: Swapped(Hadamard(5, 7, 5))),
    "through": (
        lambda: ThroughOf(7, 5, 5, Additive, Hadamard, 3),
        lambda: Through(Additive(7, 3, 5), Hadamard(7, 5, 3)),
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_composition_by_name_is_the_composition(name):
    f, g = (make().double() for make in FACTORIES[name])
    g.load_state_dict(randomise(f).state_dict())
    x, z = normal(6, 7), normal(6, 5, seed=2)
    torch.testing.assert_close(f(x, z), g(x, z), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(f.terms(), g.terms(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (f.x_weights, f.z_weights, rank(f)) == (g.x_weights, g.z_weights, rank(g))


@pytest.mark.parametrize(("inner_features", "expected"), [("x", 7), ("z", 5), ("out", 3), (4, 4)], ids=str)
def test_the_features_between_are_a_number_or_those_of_a_stream(inner_features, expected):
    assert ThroughOf(7, 5, 3, Additive, Hadamard, inner_features).inner.out_features == expected


def test_the_command_line_names_a_composition_and_its_parts():
    parts = (f"{INTEGRATOR}.first=Additive", f"{INTEGRATOR}.second=LowRank", f"{INTEGRATOR}.second.rank=8")
    gates = cells(f"{INTEGRATOR}=SumOf", *parts).gates
    assert [type(f) for f in (gates, gates.first, gates.second)] == [SumOf, Additive, LowRank]
    assert gates.second.rank == 8
    film = (f"{INTEGRATOR}.outer=SwappedOf", f"{INTEGRATOR}.outer.integrator=Diagonal", f"{INTEGRATOR}.inner=Tucker")
    gates = cells(f"{INTEGRATOR}=ThroughOf", *film, f"{INTEGRATOR}.inner_features=out").gates
    assert type(gates.outer.integrator) is Diagonal
    assert gates.inner.out_features == 4 * H


def test_film_in_a_cell_starts_as_the_map_that_it_scales():
    f = ThroughOf(7, 5, 20, lambda *sizes: SwappedOf(*sizes, Diagonal), Additive, "out").double()
    x, z = normal(6, 7), normal(6, 5, seed=2)
    torch.testing.assert_close(f(x, z), f.inner(x, z))
    randomise(f)
    D = f.outer.integrator
    scale, shift = x @ D.scale_projection.weight.T + D.scale_bias, x @ D.shift_projection.weight.T + D.shift_bias
    torch.testing.assert_close(f(x, z), scale * f.inner(x, z) + shift)


def test_a_diagonal_form_scales_an_rnns_state_as_it_is():
    """h' = tanh(a(x) ⊙ h + b(x)): in an RNN O = H, so nothing else is needed."""
    f = cells(f"{INTEGRATOR}=SwappedOf", f"{INTEGRATOR}.integrator=Diagonal", cell="RNNCell").integrator
    assert (f.x_features, f.z_features, f.out_features) == (X, H, H)
    assert type(f.integrator) is Diagonal


def nameable():
    """Every public integrator that a cell can build from its sizes alone."""
    for cls in vars(multint.integrators).values():
        if isinstance(cls, type) and issubclass(cls, Integrator) and not inspect.isabstract(cls):
            parameters = list(inspect.signature(cls).parameters.values())
            first, others = [p.name for p in parameters[:3]], parameters[3:]
            if first == ["x_features", "z_features", "out_features"] and all(p.default is not p.empty for p in others):
                yield cls.__name__


@pytest.mark.parametrize("name", sorted(set(nameable()) - {"Diagonal", "SigmoidScale"}))
def test_one_word_of_a_config_swaps_the_integrator(name, tmp_path):
    assert type(cells("--config", own_config(tmp_path, name)).gates).__name__ == name


def test_these_can_be_named_in_one_word():
    assert {"Additive", "LowRank", "Tucker", "Hypernetwork", "Normalised", "Krause", "Diagonal"} <= set(nameable())
    with pytest.raises(MultintError, match=r"expected x_features \(64\).* Projected .* ThroughOf and SwappedOf"):
        cells(f"{INTEGRATOR}=Diagonal")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["", "=SumOf", ".first=Additive", ".second=Pairwise"], r"integrator\.second: 'Pairwise' is no Integrator"),
        (["", "=SumOf", ".first=Additive", ".second=Sum"], r"integrator\.second: 'Sum' does not fit.* mean 'SumOf'"),
        (["", "=SumOf", ".first=Additive", ".secnd=Additive"], r"no setting 'secnd' of SumOf\. Did you mean 'second'"),
        (["", "=ScaledOf", ".integrator=Additive"], "'scale' is missing, which ScaledOf requires"),
        (["", "=ScaledOf", ".integrator=Additive", ".scale=x"], r"integrator\.scale: 'x' does not fit: expected float"),
        (["", "=SwappedOf", ".integrator=Diagonal"], r"Diagonal: out_features is 1024, expected x_features \(256\)"),
        (
            ["", "=ThroughOf", ".outer=Additive", ".inner=Additive", ".inner_features=y"],
            r"integrator\.inner_features: 'y' does not fit: expected int or 'x' or 'z' or 'out'",
        ),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_a_composition_is_one_message(options, message, capsys, tmp_path):
    run = ("--config", str(CONFIGS / "characters/quickstart.yaml"), f"--trainer.default_root_dir={tmp_path}")
    assert main(["fit", *run, *(f"{INTEGRATOR}{option}" for option in options[1:])]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    assert re.search(message, shown), shown


def plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(part) for key, part in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize("integrator", [*list(IN_YAML)[:1], *list(IN_YAML)[-1:], "Tucker"])
def test_a_checkpoint_rebuilds_a_composition(integrator, tmp_path, capsys):
    text = tmp_path / "tiny.txt"
    text.write_text("".join(f"line {i} of a text with {i * i} in it.\n" for i in range(60)))
    small = ("--model.network.recurrent.hidden_size=16", "--data.batch_size=4", "--data.length=20")
    quiet = ("--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
    run = (f"--data.path={text}", "--trainer.max_steps=3", f"--trainer.default_root_dir={tmp_path}", "--name=run")
    config = str(CONFIGS / "characters/quickstart.yaml"), "--config", own_config(tmp_path, integrator)
    steps = "--trainer.log_every_n_steps=1"
    assert main(["fit", "--config", *config, *small, *quiet, *run, steps]) == 0
    last = tmp_path / "run/version_0/checkpoints/last.ckpt"
    settings = torch.load(last, weights_only=True)["hyper_parameters"]
    assert plain(settings)
    named = settings["network"]["init_args"]["recurrent"]["init_args"]["cell"]["init_args"]["integrator"]
    written = yaml.safe_load(integrator)
    assert named["class_path"].endswith(written if isinstance(written, str) else written["class_path"])
    capsys.readouterr()
    assert main(["sample", str(last), "--length=20", "--prompt=line "]) == 0
    assert capsys.readouterr().out.startswith("line ")
