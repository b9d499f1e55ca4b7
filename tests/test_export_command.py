"""The command `export`: what it writes gives the network's own numbers, where this library is not there too."""

import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml

from experiments.__main__ import main
from experiments.core.configs import CONFIGS
from experiments.core.errors import ExperimentError
from experiments.core.export import load_network, trace
from experiments.core.loading import load_task
from experiments.core.task import Example

pytestmark = pytest.mark.runs

# Settings of each network, over those of the quickstart: an embedding and an MI-LSTM.
NETWORKS = {
    "lstm-mi": "{recurrent: {hidden_size: 9}}",
    "gru-low-rank": """
        embedding_size: null
        dropout: 0.3
        recurrent:
          hidden_size: 9
          num_layers: 2
          dropout: 0.2
          zoneout: 0.1
          state_dropout: 0.2
          cell: {class_path: GRUCell, init_args: {integrator: {class_path: LowRank, init_args: {rank: 3}}}}
        """,
    "rnn-bilinear-tied": """
        embedding_size: 9
        tied: true
        recurrent: {hidden_size: 9, cell: {class_path: RNNCell, init_args: {integrator: Bilinear}}}
        """,
}
SUFFIXES = {"safetensors": ".safetensors", "torch_export": ".pt2", "onnx": ".onnx"}  # by format
CALLS = [(3, 2), (1, 1), (7, 5)]  # (T, B), the first one that of the export
DATA = ("batch_size=4", "length=20")
TRAINER = (
    "max_steps=1",
    "limit_val_batches=1",
    "limit_test_batches=1",
    "accelerator=cpu",
    "log_every_n_steps=1",
    "enable_model_summary=false",
    "enable_progress_bar=false",
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of each network, by its name."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "tiny.txt"
    text.write_text("".join(f"line {i} of a text with {i * i} in it, \u00fe and \u2028.\n" for i in range(60)))
    run = ["--config", str(CONFIGS / "characters/quickstart.yaml"), f"--data.path={text}"]
    run += [*(f"--data.{setting}" for setting in DATA), *(f"--trainer.{setting}" for setting in TRAINER)]
    found = {}
    for name, network in NETWORKS.items():
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump({"model": {"network": yaml.safe_load(network)}}))
        options = (f"--config={config}", f"--name={name}", f"--trainer.default_root_dir={folder}")
        assert main(["fit", *run, *options]) == 0
        found[name] = folder / name / "version_0" / "checkpoints" / "best.ckpt"
    return found


def exported(checkpoint, form, *options):
    assert main(["export", str(checkpoint), "--format", form, *options]) == 0
    return checkpoint.with_suffix(SUFFIXES[form])


def calls(network):
    """Inputs of several sizes, a state among them that is not 0, and what the network makes of them."""
    generator = torch.Generator().manual_seed(0)
    for steps, rows in CALLS:
        tokens = torch.randint(network.vocabulary_size, (steps, rows), generator=generator)
        with torch.no_grad():
            _, state = network(tokens.flip(0))
            logits, new = network(tokens, state)
        states, news = ((s,) if isinstance(s, torch.Tensor) else tuple(s) for s in (state, new))
        yield (tokens, *states), (logits, *news)


@pytest.fixture(params=NETWORKS)
def trained(request, checkpoints):
    """A checkpoint, and its network."""
    path = checkpoints[request.param]
    return path, load_task(path).network.eval()


def test_weights_and_settings_rebuild_the_network(trained):
    checkpoint, network = trained
    rebuilt = load_network(exported(checkpoint, "safetensors"))
    assert not rebuilt.training
    assert repr(rebuilt) == repr(network)
    torch.testing.assert_close(rebuilt.state_dict(), network.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(list(calls(rebuilt)), list(calls(network)), rtol=0, atol=0)


def test_onnxruntime_gives_the_networks_numbers(trained):
    checkpoint, network = trained
    session = onnxruntime.InferenceSession(exported(checkpoint, "onnx"), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    assert names[0] == "tokens"
    assert [one.name for one in session.get_outputs()] == ["logits", *(f"new_{name}" for name in names[1:])]
    assert [one.shape[:2] for one in session.get_inputs()] == [["T", "B"], *([len(s), "B"] for s in states(network))]
    for inputs, expected in calls(network):
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        results = tuple(map(torch.from_numpy, session.run(None, given)))
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)


def states(network):
    inputs, _ = next(calls(network))
    return inputs[1:]


# Run without the environment and the site, whose path leads to this library; the site's packages are put there by hand.
ELSEWHERE = """
import importlib.util, sys
sys.path.append(sys.argv[1])
assert not any(importlib.util.find_spec(name) for name in ("multint", "models", "experiments"))
import torch
for path in sys.argv[2:]:
    program = torch.export.load(path + ".pt2").module()
    for inputs, expected in torch.load(path + ".calls"):
        torch.testing.assert_close(program(*inputs), expected)
"""


def test_programs_run_in_a_process_without_this_library(checkpoints, tmp_path):
    paths = []
    for name, checkpoint in checkpoints.items():
        paths.append(str(tmp_path / name))
        output = f"{paths[-1]}.pt2"
        exported(checkpoint, "torch_export", f"--output={output}")
        torch.save(list(calls(load_task(checkpoint).network.eval())), f"{paths[-1]}.calls")
    packages = str(Path(torch.__file__).parent.parent)
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", ELSEWHERE, packages, *paths]
    subprocess.run(command, check=True, cwd=tmp_path)


def message(capsys, *argv):
    """The one message of a command that fails with the exit code 2."""
    capsys.readouterr()
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1
    return text


def test_it_says_what_it_wrote(checkpoints, capsys):
    exported(checkpoints["lstm-mi"], "safetensors")
    out = capsys.readouterr().out
    for shown in ("best.safetensors: ", "parameters", "best.safetensors.yaml", "vocabulary"):
        assert shown in out


def test_mistakes_are_one_message(checkpoints, capsys, tmp_path):
    checkpoint = str(checkpoints["lstm-mi"])
    assert "no such checkpoint" in message(capsys, "export", "nowhere", "--format=onnx")
    assert "--format" in message(capsys, "export", checkpoint)
    assert "invalid choice: 'onxx'" in message(capsys, "export", checkpoint, "--format=onxx")
    for form, suffix in SUFFIXES.items():
        nowhere = f"--output={tmp_path}/nowhere/best{suffix}"
        assert "nowhere" in message(capsys, "export", checkpoint, f"--format={form}", nowhere)


@pytest.mark.parametrize("form", SUFFIXES)
def test_no_export_overwrites_what_it_reads(form, checkpoints, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, suffix = checkpoints["lstm-mi"].read_bytes(), SUFFIXES[form]
    given = ["a.ckpt", f"b{suffix}.yaml", *([] if form == "safetensors" else [f"c{suffix}"])]
    for name in given:
        Path(name).write_bytes(content)
    Path(f"link{suffix}").symlink_to("a.ckpt")
    Path(f"hard{suffix}").hardlink_to("a.ckpt")
    # By a link, by another name, by another path, where its settings would be, and by the name that it has by default.
    ways = [("a.ckpt", f"link{suffix}"), ("a.ckpt", f"hard{suffix}"), ("a.ckpt", f"../{tmp_path.name}/link{suffix}")]
    ways += [(given[1], f"b{suffix}"), *((name, None) for name in given[2:])]
    for name, output in ways:
        options = [f"--output={output}"] if output else []
        assert "the checkpoint itself" in message(capsys, "export", name, f"--format={form}", *options)
    assert suffix in message(capsys, "export", f"link{suffix}", f"--format={form}", "--output=a.ckpt")
    assert [Path(name).read_bytes() for name in given] == [content] * len(given)
    assert {path.name for path in tmp_path.iterdir()} == {*given, f"link{suffix}", f"hard{suffix}"}


@pytest.mark.parametrize("form", SUFFIXES)
def test_weights_that_are_not_finite_are_not_exported(form, checkpoints, capsys, tmp_path):
    checkpoint = torch.load(checkpoints["lstm-mi"], weights_only=True)
    checkpoint["state_dict"]["network.decoder.bias"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    assert "decoder.bias" in message(capsys, "export", str(tmp_path / "nan.ckpt"), f"--format={form}")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.ckpt"]


@pytest.mark.parametrize("form", SUFFIXES)
def test_a_full_disk_leaves_the_export_of_before(form, checkpoints, capsys, tmp_path, full_disk):
    output = tmp_path / f"best{SUFFIXES[form]}"
    output.write_text("before")
    with full_disk():
        shown = message(capsys, "export", str(checkpoints["lstm-mi"]), f"--format={form}", f"--output={output}")
    assert f"{output}: cannot be written" in shown
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


class Branching(torch.nn.Module):
    """What depends on values, which no program does."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_network_that_no_program_holds_is_one_message():
    with pytest.raises(ExperimentError, match=r"torch\.export cannot hold this network: ") as raised:
        trace(Branching(), Example((torch.ones(3, 2),), {"x": {0: "T"}}, ("y",), 3))
    assert len(str(raised.value).splitlines()) == 1


def test_a_missing_library_is_one_message(checkpoints, capsys, monkeypatch):
    for name, form in (("safetensors", "safetensors"), ("onnxscript", "onnx")):
        monkeypatch.setitem(sys.modules, name, None)
        assert 'pip install -c constraints.txt -e ".[export]"' in message(
            capsys, "export", str(checkpoints["lstm-mi"]), f"--format={form}"
        )


def test_weights_without_their_settings_are_refused(checkpoints, tmp_path):
    path = exported(checkpoints["lstm-mi"], "safetensors")
    (tmp_path / "alone.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(ExperimentError, match=r"alone\.safetensors\.yaml"):
        load_network(tmp_path / "alone.safetensors")
