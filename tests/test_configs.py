"""Every ready config: it parses, its model builds, and its size is the published one."""

import re
from itertools import pairwise

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import Trainer

import multint
from experiments.__main__ import main
from experiments.core import inspection, loading
from experiments.core.configs import CONFIGS, ready_configs
from experiments.core.loading import RunSettings
from experiments.core.trust import trusting
from experiments.data import ReadingData
from experiments.data.text import Vocabulary
from experiments.data.text.corpora import pydoc
from experiments.study.arms import key_of
from experiments.tasks import (
    LanguageModelling,
    Memory,
    NeuralProcesses,
    ProximalPolicyOptimization,
    Reading,
    Regression,
    SentenceVectors,
    SoftActorCritic,
    Speech,
    StateTracking,
)
from models import Points, log_likelihood

pytestmark = pytest.mark.runs

READY = [path for paths in ready_configs().values() for path in paths]
VOCABULARY = {"pydoc": 97, "ptb": 50, "text8": 27, "enwik8": 205, "ptb-words": 10_000, "wikitext-103": 267_735}
PAPERS_MILLIONS = {"text8_mi_rnn": 4.3, "text8_mi_lstm": 4.3, "hutter_mi_lstm": 18.9}


def character_model(symbols, embedding, hidden, gates):
    """The parameters of an embedding (none for one-hot input), one MI layer, and a decoder, counted by hand."""
    table = symbols * embedding if embedding else 0
    inputs = embedding or symbols
    layer = gates * hidden * (inputs + hidden) + 4 * gates * hidden  # W and U; alpha, beta1, beta2 and the bias
    return table + layer + hidden * symbols + symbols


def word_model(symbols, embedding, hidden):
    """The same of a tied word model: the embedding, one LSTM layer, the projection, and the softmax's bias."""
    layer = 4 * hidden * (embedding + hidden) + 4 * hidden
    return symbols * embedding + layer + hidden * embedding + embedding + symbols


# The paper's counts for words are 88M, 105M and 110M, of which it does not determine the last.
COUNTED = {
    "ptb_words": word_model(10_000, 128, 256),
    "wikitext103_lstm": 88_214_999,
    "wikitext103_multdec": 105_008_631,
    "wikitext103_multencdec": 107_179_767,
    "quickstart": character_model(97, 64, 256, gates=4),
    "ptb": character_model(50, 64, 256, gates=4),
    "ptb_exploratory": character_model(50, None, 128, gates=1),
    "ptb_paper": character_model(50, None, 2048, gates=1),
}


def built(config, *options):
    with trusting():
        return RunSettings(["fit", "--config", str(config), *options], Trainer)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("characters/quickstart", []),
        # Without a setting of its own, where the default has some.
        ("regression/affine_tasks", ["--model.network.integrator=Diagonal"]),
    ],
)
def test_every_setting_is_what_jsonargparse_alone_resolves(config, options, monkeypatch):
    """The keys of studies are of these. Its own parser takes a second for what ours does in a tenth of that."""
    argv = ["fit", "--config", str(CONFIGS / f"{config}.yaml"), *options]
    with trusting():
        ours = key_of(RunSettings(argv).plain)
        monkeypatch.setattr(loading, "_Parser", ArgumentParser)
        monkeypatch.setattr(loading, "_parser", loading._parser.__wrapped__)
        assert ours == key_of(RunSettings(argv).plain)


def mlp(sizes):
    """The parameters of linear layers with biases."""
    return sum((size + 1) * following for size, following in pairwise(sizes))


# Of neural processes, by hand: the encoders' layers, and the decoder's of x with what they give.
POOLED = mlp([2, 128, 128, 128, 128]) + mlp([128, 128, 128])
LATENT = mlp([2, 128, 128, 128, 128]) + mlp([128, 128, 256])
DEEP = mlp([2, *[128] * 6]) + mlp([128] * 6)  # to before the last layer
PROCESSES = {
    "protocol_b_cnp": 2 * POOLED + mlp([257, 128, 128, 2]),
    "protocol_b_np": POOLED + LATENT + mlp([257, 128, 128, 2]),
    "protocol_a_cnp": DEEP + mlp([128, 128]) + mlp([129, *[128] * 5, 2]),
    "protocol_a_np": 2 * (mlp([2, *[128] * 6]) + mlp([128] * 6))
    + mlp([128, 128])
    + mlp([128, 256])
    + mlp([257, *[128] * 5, 2]),
}


# Of one layer of multiplicative interactions, W, U, V and b, by hand; then the same into 32 or 64 and from there on.
def multiplicative(x, z, out):
    return out * (z * x + z + x + 1)


def lstm(inputs, hidden):
    return 4 * hidden * (inputs + hidden + 1)


def reader(size, mi=0):
    """Of 50 words and 10 answers, with a size for all: two bidirectional LSTMs, attention, its vector, and the rest."""
    layers = 4 * (lstm(size, size) + mi * 4 * size)
    return 50 * size + layers + size * (4 * size + 2) + 2 * size * (4 * size + 1) + mlp([2 * size, 10])


def skip_thought(words, embedding, hidden, mi=0):
    """An embedding, the encoder, two decoders that start from its state, and a softmax; of MI, its vectors."""
    gru = 3 * hidden * (embedding + hidden + 1)
    return words * embedding + 3 * gru + 3 * mi * hidden + mlp([hidden, words])


def soft_actor_critic(X, C, A):
    """An actor and two critics of two hidden layers of 256, and the temperature."""
    return mlp([X + C, 256, 256, 2 * A]) + 2 * mlp([X + C + A, 256, 256, 1]) + 1


def recurrent_policy_heads(actions):
    """What follows 128 features: an MI-LSTM, the layers of the actions and of the value."""
    return lstm(128, 128) + 3 * 4 * 128 + mlp([128, actions + 1])


# Symbols, words, two convolutions, FiLM after a linear map, and a linear layer of what is left, 3 × 3 places.
INSTRUCTED = (20 + 33) * 32 + 2 * mlp([9 * 32, 32]) + 32 * 32 + 2 * mlp([32, 32]) + mlp([9 * 32, 128])

MADE = {
    "babyai_red_ball": INSTRUCTED + recurrent_policy_heads(7),
    "babyai_mixture": INSTRUCTED + recurrent_policy_heads(7),
    "hidden_ode": mlp([4, 128]) + mlp([128 + 2, 128]) + mlp([128, 128]) + recurrent_policy_heads(2) + 2,
    "ode": soft_actor_critic(1, 2, 2),
    "sign_flips": soft_actor_critic(4, 2, 2),
    "pendulum": soft_actor_critic(3, 3, 1),
    "books": skip_thought(8000, 128, 256),
    "skip_thought": skip_thought(20_000, 620, 2400),  # 125,673,600
    "skip_thought_mi": skip_thought(20_000, 620, 2400, mi=3),  # 21,600 more: α, β₁ and β₂
    "bilinear_form": multiplicative(8, 8, 1),
    "teacher_student": multiplicative(8, 8, 32) + multiplicative(32, 8, 1),
    "affine_tasks": multiplicative(8, 8, 64) + multiplicative(64, 8, 8),
    "state_machine": 64 * 2 * 64 + mlp([64, 2]),
    "regular_language": 64 * 2 * 64 + mlp([64, 2]),
    "adding": lstm(2, 64) + mlp([64, 1]),
    "copy": lstm(10, 64) + mlp([64, 8]),
    "digits": lstm(1, 64) + mlp([64, 10]),
    # With γ of both products and of c, and a β.
    "digits_batch_norm": lstm(1, 64) + 2 * 4 * 64 + 2 * 64 + mlp([64, 10]),
    "babi": reader(32),
    "novels": reader(32),
    "cnn_lstm": reader(240),
    "cnn_mi_lstm": reader(240, mi=3),  # α, β₁ and β₂
    "yesno": 2 * lstm(24 * 23, 64) + mlp([128, 3]),
    # Two directions of MI-LSTMs, with α, β₁ and β₂; the bias is counted in `lstm`.
    "an4": 2 * (lstm(9 * 13, 128) + 2 * lstm(256, 128) + 3 * 3 * 4 * 128) + mlp([256, 28]),
}


@pytest.mark.parametrize("config", READY, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config(config):
    settings = built(config)
    task, data, name = settings.task, settings.data, settings.config.name
    assert name in (config.stem, f"{config.stem}_{config.parent.name}")
    assert config.read_text().splitlines()[0].startswith("# "), "the overview shows the first line"
    with torch.device("meta"):
        network = NETWORKS[type(task)](task, data)
    count = sum(p.numel() for p in network.parameters())
    if name in PAPERS_MILLIONS:
        assert count / 1e6 == pytest.approx(PAPERS_MILLIONS[name], abs=0.1)
    elif expected := (COUNTED | PROCESSES | MADE).get(name):
        assert count == expected
    else:
        assert isinstance(task, NeuralProcesses), "count the parameters"


def language_model(task, data):
    """The task's network, after one call."""
    network = task._build_network(VOCABULARY[data.corpus])
    logits, _ = network(torch.zeros(2, 1, dtype=torch.long))
    assert logits.shape == (2, 1, VOCABULARY[data.corpus])
    return network


def neural_process(task, data):
    """The task's network, after one call."""
    assert isinstance(task, NeuralProcesses)
    network = task.build(task.describe(data))
    points = Points(*(torch.zeros(2, 3, features) for features in data.features))
    assert log_likelihood(network, points, points).marginal.shape == (2,)
    return network


def regression(task, data):
    """The task's network, after one call."""
    network = task.build(task.describe(data))
    X, Z, outputs = data.features
    assert network(torch.zeros(2, X), torch.zeros(2, Z)).shape == (2, outputs)
    return network


def state_tracking(task, data):
    """The task's network, after one call."""
    network = task.build(task.describe(data))
    assert network(torch.zeros(3, 2, dtype=torch.long)).shape == (3, 2, data.states)
    return network


def memory(task, data):
    """The task's network, after one call."""
    learnt = task.describe(data)
    network = task.build(learnt)
    assert network(torch.zeros(3, 2, learnt["inputs"]), 2).shape == (2, 2, learnt["outputs"])
    return network


def speech(task, data):
    """The task's network, after one call."""
    labels = {"yesno": 3, "an4": 28}[type(data).__name__.lower()]
    network = task.build(task.imagined(data, {"vocabulary_size": labels}))
    assert network(torch.zeros(3, 2, data.front_end.width)).shape == (3, 2, labels)
    return network


def reading(task, data):
    """The task's network, after one call."""
    assert isinstance(data, ReadingData)
    network = task._build_network(50, 10)
    words, lengths = torch.zeros(3, 2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    logits, weights = network(words, lengths, words, lengths)
    assert (logits.shape, weights.shape) == ((2, 10), (3, 2))
    return network


def sentence_vectors(task, data):
    """The task's network, after one call."""
    network = task.build(task.imagined(data, {}))
    assert network(torch.zeros(3, 2, dtype=torch.long), torch.ones(2, dtype=torch.long)).shape[0] == 2
    return network


def policy(task, data):
    """The task's network, without the slow copies, after one call."""
    pytest.importorskip("gymnasium", reason="gymnasium is not installed (extra policy)")
    assert data is None
    description = task.describe(None)
    X, C, A = description["features"]
    network = task.build(description)
    assert network(torch.zeros(2, X), torch.zeros(2, C)).shape == (2, A)
    del network.targets
    return network


def recurrent_policy(task, data):
    """The task's network, after one call."""
    pytest.importorskip("minigrid", reason="minigrid is not installed (extra policy)")
    assert data is None
    description = task.describe(None)
    X, C, A = description["features"]
    network = task.build(description)
    judged = network(torch.zeros(2, 3, X), torch.zeros(2, 3, C), torch.zeros(2, 3, dtype=torch.bool))
    assert (judged.value.shape, judged.policy.mean.shape[:2]) == ((2, 3), (2, 3))
    assert (network.log_std is None) == description["is_discrete"] == (A == 7)
    return network


NETWORKS = {
    LanguageModelling: language_model,
    Memory: memory,
    NeuralProcesses: neural_process,
    ProximalPolicyOptimization: recurrent_policy,
    Reading: reading,
    Regression: regression,
    SentenceVectors: sentence_vectors,
    SoftActorCritic: policy,
    Speech: speech,
    StateTracking: state_tracking,
}


def test_one_option_swaps_a_neural_processs_decoder():
    decoder = "--model.network.decoder"
    options = (f"{decoder}=Conditional", f"{decoder}.integrator=LowRank", f"{decoder}.integrator.rank=16")
    settings = built(CONFIGS / "functions/protocol_b_np.yaml", *options, f"{decoder}.hidden=144")
    with torch.device("meta"):
        network = settings.task._build_network(1, 1)
    assert {layer.rank for layer in network.modules() if type(layer).__name__ == "LowRank"} == {16}


def test_options_choose_how_skip_thoughts_are_made():
    network = "--model.network"
    options = [f"{network}.conditioning=step", f"{network}.meet=LowRank", f"{network}.meet.rank=8"]
    options += [f"{network}.combine.hidden_size=32", f"{network}.combine.bidirectional=true"]
    settings = built(CONFIGS / "sentences/books.yaml", *options)
    with torch.device("meta"):
        network = settings.task.build(settings.task.imagined(settings.data, {}))
    assert [meet.rank for meet in network.meets] == [8, 8]
    assert network.vector_size == 256 + 2 * 32


def test_one_option_swaps_the_integrator_whatever_the_config_named():
    option = "--model.network.recurrent.cell.integrator"
    settings = built(CONFIGS / "characters/text8_mi_lstm.yaml", f"{option}=LowRank", f"{option}.rank=16")
    with torch.device("meta"):
        cell = settings.task._build_network(27).recurrent.directions[0].cell
    assert type(cell.gates).__name__ == "LowRank"


def test_an_option_can_be_null():
    settings = built(CONFIGS / "characters/quickstart.yaml", "--model.network.embedding_size=null")
    with torch.device("meta"):
        assert settings.task._build_network(97).embedding is None


def recurrent(*options):
    settings = built(CONFIGS / "characters/quickstart.yaml", *options)
    with torch.device("meta"):
        return settings.task._build_network(97).recurrent


def test_a_config_normalises_any_integrator_by_a_class():
    option = "--model.network.recurrent.cell.integrator"
    gates = recurrent(f"{option}=Normalised", f"{option}.integrator=LowRank", f"{option}.integrator.rank=16")
    gates = gates.directions[0].cell.gates
    assert [type(f).__name__ for f in (gates, gates.integrator)] == ["Normalised", "LowRank"]
    assert gates.integrator.rank == 16
    assert isinstance(gates.integrator.x_factor.norm, torch.nn.LayerNorm)
    cell = "--model.network.recurrent.cell"
    norms = f"{option}=Normalised", f"{option}.norm=torch.nn.RMSNorm", f"{cell}.memory_norm=torch.nn.LayerNorm"
    cell = recurrent(*norms).directions[0].cell
    assert isinstance(cell.gates.integrator.x_projection.norm, torch.nn.RMSNorm)
    assert isinstance(cell.memory_norm, torch.nn.LayerNorm)
    by_batch = f"{option}=Normalised", f"{option}.norm=RecurrentBatchNorm", f"{option}.norm.max_steps=3"
    norm = recurrent(*by_batch).directions[0].cell.gates.integrator.z_projection.norm
    assert (type(norm).__name__, tuple(norm.mean.shape)) == ("RecurrentBatchNorm", (3, 1024))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_a_config_names_a_drop_in_with_its_options(kind, tmp_path):
    """The layer itself in the hole of the whole recurrent stack."""
    config = tmp_path / "own.yaml"
    config.write_text(
        f"""
        model:
          network:
            recurrent:
              class_path: multint.{kind}
              init_args:
                hidden_size: 32
                num_layers: 2
                integrator: Additive
                zoneout: 0.1
                input_dropout: 0.2
                state_dropout: 0.3
                weight_drop: 0.4
                engine: loop
        """
    )
    layer = recurrent("--config", str(config))
    assert type(layer) is getattr(multint, kind)
    assert (layer.hidden_size, layer.num_layers, layer.input_dropout, layer.engine) == (32, 2, 0.2, "loop")
    direction = layer.directions[0]
    assert direction.zoneout["h"] == 0.1
    assert (direction.state_dropout, direction.weight_drop) == (0.3, 0.4)


@pytest.mark.parametrize(
    ("config", "count"),
    [("wikitext103_lstm", "88,214,999"), ("wikitext103_multdec", "105,008,631")],
)
def test_the_summary_counts_without_data(config, count, capsys):
    assert main(["summary", "--config", str(CONFIGS / "words" / f"{config}.yaml")]) == 0
    out = capsys.readouterr().out
    assert f"in all  {count} parameters" in out
    assert "Adam" in out


def test_the_summary_needs_the_size_of_an_unknown_vocabulary(capsys):
    quickstart = ["summary", "--config", str(CONFIGS / "characters/quickstart.yaml")]
    assert main([*quickstart, "--data.path=text.txt"]) == 2
    assert "--vocabulary_size" in capsys.readouterr().err
    assert main(quickstart) == 0, "pydoc is Python's own"
    symbols = len(Vocabulary.of(pydoc()))
    out = capsys.readouterr().out
    assert f"{character_model(symbols, 64, 256, gates=4):,} parameters" in out
    # 4·256·(64 + 256) of two products, and α, β1, β2 and b.
    assert re.search(r"^ +gates +MultiplicativeIntegration +2 × 1024 +327,680 +331,776$", out, re.MULTILINE)
    assert main([*quickstart, "--vocabulary_size=97", "--model.network.embedding_size=null"]) == 0
    # 4·256·(97 + 256) of the recurrent layer and 256·97 of the softmax, and no embedding.
    assert "386,304 multiply-adds" in capsys.readouterr().out


OPTIMIZERS = [(name, {}) for name in inspection._KEPT]
OPTIMIZERS += [
    ("SGD", {"momentum": 0.9}),
    ("Adam", {"amsgrad": True}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
]


@pytest.mark.parametrize(("name", "settings"), OPTIMIZERS, ids=str)
def test_the_summary_knows_how_many_numbers_an_optimizer_keeps(name, settings):
    parameter = torch.nn.Parameter(torch.zeros(5, 7))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1, **settings)
    parameter.grad = torch.ones(5, 7)
    optimizer.step()
    kept = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    expected = sum(value.numel() == parameter.numel() for value in kept)
    assert inspection._moments({"class_path": f"torch.optim.{name}", "init_args": settings}) == (name, expected)


def test_the_overview_shows_the_commands_and_the_configs(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 90
    for word in (
        "fit",
        "validate",
        "test",
        "sample",
        *(path.name for path in READY),
    ):
        assert word in text
