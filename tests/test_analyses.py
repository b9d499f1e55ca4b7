"""Analyses: their numbers against equations written out by hand, and a training that does not feel them."""

import math
from functools import partial

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from torch.testing import assert_close

from experiments.analyses import GradientNorms, HiddenActivations, Interactions, StreamNorms
from experiments.analyses.recording import recorded
from experiments.core.callbacks import MetricsFile, RandomState
from experiments.core.errors import ExperimentError
from experiments.core.module import DataModule, TaskModule
from experiments.core.run_folder import Histogram, RunFolder, read_histograms, read_metrics, write_histograms
from experiments.core.saving import Checkpoints
from experiments.data import Adding, CopyMemory, StateMachine, TextData
from experiments.data.text import Batch
from experiments.tasks import LanguageModelling, Memory, StateTracking
from models import LanguageModel, SequenceLabeller, SequenceReader
from multint import Additive, Concat, GRUCell, LowRank, LSTMCell, MultiplicativeIntegration, Recurrent, RNNCell
from multint.integrators import Normalised, RecurrentBatchNorm, interaction

pytestmark = pytest.mark.runs

V, T, B, H = 5, 7, 3, 4
concat = partial(RNNCell, integrator=Concat)


def network(cell, embedding_size=None, **settings):
    torch.manual_seed(0)
    return LanguageModel(V, partial(Recurrent, hidden_size=H, cell=cell, **settings), embedding_size).eval()


def task_of(network):
    task = LanguageModelling(lambda symbols: network)
    task.network = network
    return task


def batch_of(steps=T):
    tokens = torch.randint(V, (steps + 1, B), generator=torch.Generator().manual_seed(1))
    return Batch(tokens[:-1], tokens[1:], starts=True)


@pytest.mark.parametrize("is_linear", [False, True])
def test_gradient_norms_are_those_of_the_written_out_jacobians(is_linear):
    """∂C/∂h_{t−1} = Uᵀ diag(α ⊙ Wx_t + β1) diag(φ'_t) ∂C/∂h_t from ∂C/∂h_T = Aᵀ(p − y), a sequence at a time."""
    net = network(partial(RNNCell, activation=torch.nn.Identity() if is_linear else torch.tanh))
    f, decoder = net.recurrent.directions[0].cell.integrator, net.decoder
    values = {name: value.detach().double() for name, value in f.named_parameters()}
    W, U, alpha = values["x_projection.weight"], values["z_projection.weight"], values["alpha"]
    beta1, beta2, bias = values["beta1"], values["beta2"], values["bias"]
    batch = batch_of()
    expected = torch.empty(T + 1, B, dtype=torch.float64)
    for b in range(B):
        h, slopes = torch.zeros(H, dtype=torch.float64), []
        for symbol in batch.inputs[:, b]:
            wx, uh = W[:, symbol], U @ h
            s = alpha * wx * uh + beta1 * uh + beta2 * wx + bias
            h = s if is_linear else s.tanh()
            slopes.append((alpha * wx + beta1) * (1 if is_linear else 1 - h**2))
        error = (decoder.weight.double() @ h + decoder.bias.double()).softmax(0)
        error[batch.targets[-1, b]] -= 1
        gradient = decoder.weight.double().T @ error
        for t in range(T, -1, -1):
            expected[t, b] = gradient.norm().log10()
            gradient = U.T @ (slopes[t - 1] * gradient)
    analysis = GradientNorms(range(T + 1), T)
    got = analysis.values(recorded(task_of(net), batch, T))
    assert list(got) == [f"log10_gradient_{t}" for t in range(T + 1)]
    assert_close(torch.stack(list(got.values())), expected.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "cell",
    [partial(LSTMCell, integrator=LowRank), GRUCell, partial(GRUCell, integrator=Concat, reset_after=True)],
    ids=["lstm", "gru", "gru_reset_after"],
)
def test_gradient_norms_of_a_stack_are_autograds(cell):
    net = network(cell, embedding_size=3, num_layers=2, learnt_state=True)
    got = GradientNorms([0, 4], T).values(recorded(task_of(net), batch_of(), T))
    assert list(got) == [f"log10_gradient_{t}_layer_{i}" for i in range(2) for t in (0, 4)]

    net, batch = net.double(), batch_of()
    states = net.recurrent.initial_states(B)
    states = [type(state)(*(value.detach().requires_grad_() for value in state)) for state in states]
    seen = [[state[0]] for state in states]
    for x in net.embedding(batch.inputs):
        for i, direction in enumerate(net.recurrent.directions):
            states[i] = direction.cell.step(x, states[i])
            x = states[i][0]
            x.retain_grad()
            seen[i].append(x)
    torch.nn.functional.cross_entropy(net.decoder(x), batch.targets[-1], reduction="sum").backward()
    for i in range(2):
        for t in (0, 4):
            assert_close(got[f"log10_gradient_{t}_layer_{i}"], seen[i][t].grad.norm(dim=-1).log10(), rtol=0, atol=1e-10)


def test_stream_norms_are_those_of_the_products():
    net = network(partial(LSTMCell, integrator=Additive))
    got = StreamNorms(T).values(recorded(task_of(net), batch_of(), T))
    f, (h, _) = net.recurrent.directions[0].cell.gates, net.recurrent.directions[0].cell.initial_state(B)
    x = torch.nn.functional.one_hot(batch_of().inputs, V).float()
    h = torch.cat([h[None], net.recurrent(x)[0][:-1]])
    assert got.keys() == {"norm_wx", "norm_uh"}
    assert_close(got["norm_wx"].float(), (x @ f.x_projection.weight.T).norm(dim=-1).mean(0))
    assert_close(got["norm_uh"].float(), (h @ f.z_projection.weight.T).norm(dim=-1).mean(0))


def test_all_products_of_a_stream_are_one_vector():
    """Those of a GRU: gates and candidate, whose h is r ⊙ h."""
    net = network(GRUCell).double()
    got = StreamNorms(1).values(recorded(task_of(net), batch_of(), 1))
    cell, x = net.recurrent.directions[0].cell, torch.nn.functional.one_hot(batch_of().inputs, V).double()
    both = torch.cat([cell.gates.x_projection.weight, cell.candidate.x_projection.weight])
    products = (x @ both.T).norm(dim=-1)  # (T, B), each step a sequence of one
    assert_close(got["norm_wx"], products.flatten())
    after = network(partial(GRUCell, reset_after=True)).double()
    of_states = StreamNorms(T).values(recorded(task_of(after), batch_of(), T))["norm_uh"]
    assert (of_states > 0).all(), "the products of its zeros are not counted"


def test_interactions_are_those_of_what_each_integrator_meets():
    net = network(partial(GRUCell, reset_after=True), num_layers=2).double()
    got = Interactions(T).values(recorded(task_of(net), batch_of(), T))
    names = [f"interaction_layer_{i}_{name}" for i in range(2) for name in ("gates", "candidate")]
    assert got.keys() == {*names}
    cell, x = net.recurrent.directions[0].cell, torch.nn.functional.one_hot(batch_of().inputs, V).double()
    state, before = cell.initial_state(B), []
    for of_step in x:
        before.append(state.h)
        state = cell.step(of_step, state)
    expected = interaction(cell.gates, x, torch.stack(before))
    assert 0 < expected < 1
    assert_close(got[names[0]].item(), expected)
    additive = Interactions(T).values(recorded(task_of(network(partial(RNNCell, integrator=Additive))), batch_of(), T))
    assert additive["interaction"].item() < 1e-12


def test_batch_norms_have_no_interaction_of_two_streams():
    net = network(partial(LSTMCell, integrator=Normalised.of(Additive, norm=RecurrentBatchNorm)))
    with pytest.raises(ExperimentError, match=r"Interactions: .*RecurrentBatchNorm.*Leave the analysis out"):
        Interactions(T).values(recorded(task_of(net), batch_of(), T))


def test_windows_are_cut_into_sequences_from_the_initial_state():
    net = network(RNNCell)
    whole = GradientNorms([0], 3).values(recorded(task_of(net), batch_of(7), 3))["log10_gradient_0"]
    parts = [Batch(*(tokens[i : i + 3] for tokens in batch_of(7)[:2]), starts=True) for i in (0, 3)]
    each = [GradientNorms([0], 3).values(recorded(task_of(net), part, 3))["log10_gradient_0"] for part in parts]
    assert_close(whole, torch.cat(each))


def test_a_task_of_whole_sequences_is_cut_at_the_end():
    torch.manual_seed(0)
    data = StateMachine("addition", 3, length=6, test_length=6, batch_size=B, epoch=1, eval_examples=B)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    net = SequenceLabeller(3, 3, partial(Recurrent, hidden_size=H, cell=RNNCell)).double()
    task = StateTracking(lambda symbols, states: net)
    task.network = net
    got = GradientNorms([4], 4).values(recorded(task, batch, 4))["log10_gradient_4"]
    h = net.recurrent(math.sqrt(3) * torch.nn.functional.one_hot(batch.symbols[:4], 3).double())[0][-1].detach()
    h.requires_grad_()
    torch.nn.functional.cross_entropy(net.decoder(h), batch.states[3], reduction="sum").backward()
    assert_close(got, h.grad.norm(dim=-1).log10())


@pytest.mark.parametrize("data", [Adding(5, 4, epoch=1, seed=0), CopyMemory(3, 2, 1, 4, epoch=1, seed=0)], ids=type)
def test_the_loss_of_a_memory_task_is_that_of_its_last_answers(data):
    data.setup()
    batch = next(iter(data.train_dataloader()))
    task = Memory(lambda inputs, outputs: SequenceReader(inputs, outputs, partial(Recurrent, hidden_size=H)))
    task.network = task.build(task.describe(data))
    loss = recorded(task, batch, 5).loss
    output, answers = task.network.double()(batch.xs.double())[-1], batch.answers[-1]
    of_numbers = isinstance(data, Adding)
    expected = (output[:, 0] - answers) ** 2 if of_numbers else output.logsumexp(1) - output[range(4), answers]
    assert_close(loss, expected.sum())
    with pytest.raises(ExperimentError, match="have 5 steps, and the analysis 4"):
        recorded(task, batch, 4)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: GradientNorms([51]), ["step 51", "0 … 50"]),
        (lambda: GradientNorms([0], 0), ["length is 0"]),
        (lambda: HiddenActivations(saturated=1.0), ["saturated=1.0", "between 0 and 1"]),
        (lambda: recorded(task_of(network(RNNCell)), batch_of(4), 5), ["4 symbols", "at least 5", "eval_length"]),
        (lambda: recorded(task_of(torch.nn.Linear(1, 1)), None, 5), ["Linear", "no recurrent stack"]),
        (
            lambda: StreamNorms().values(recorded(task_of(network(concat)), batch_of(), T)),
            ["a matrix that x alone enters by", "Additive"],
        ),
    ],
)
def test_what_cannot_be_looked_at_is_an_error(make, parts):
    with pytest.raises(ExperimentError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def test_histograms_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "h.csv"
    written = [Histogram(3, "", [-1.0, 0.0, 1.0], [4, 5]), Histogram(6, "a,b", [-1.0, -1 / 3, 1.0], [0, 7])]
    write_histograms(path, written)
    assert read_histograms(path) == written
    path.write_text(path.read_text().replace("count", "number"))
    with pytest.raises(ExperimentError, match="no file of histograms"):
        read_histograms(path)
    assert read_histograms(tmp_path / "absent.csv") == []


class Losses(Callback):
    """The losses of the training steps."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


class Outputs(Losses):
    """All activations of the last validation too."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.hook = pl_module.network.recurrent.register_forward_hook(lambda m, i, out: self.seen.append(out[0]))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.hook.remove()

    def on_validation_end(self, trainer, pl_module):
        self.last, self.seen = torch.cat([h.flatten() for h in self.seen]), []


def run(folder, text, *callbacks, until, resume=False):
    """Of 23 steps an epoch, with a validation after every tenth, and after the last."""
    seed_everything(1, verbose=False)
    files = RunFolder(folder, "run", folder / "run/version_0/checkpoints/last.ckpt" if resume else None)
    files.make()
    stack = partial(Recurrent, hidden_size=12, cell=partial(LSTMCell, integrator=MultiplicativeIntegration))
    task = LanguageModelling(lambda v: LanguageModel(v, stack, 8, dropout=0.3), partial(torch.optim.Adam, lr=0.3))
    metrics = MetricsFile(files)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        callbacks=[*callbacks, RandomState(), Checkpoints(files), metrics],
        max_steps=until,
        max_epochs=-1,
        val_check_interval=10,
        default_root_dir=files.path,
        log_every_n_steps=1,
        **quiet,
    )
    data = TextData(path=str(text), batch_size=4, length=20, eval_batch_size=2, eval_length=40)
    trainer.fit(TaskModule(task), DataModule(data), ckpt_path=files.last if resume else None, weights_only=True)
    return files


def analyses():
    return GradientNorms([0, 20], 20), HiddenActivations(bins=8), StreamNorms(20), Interactions(20)


def test_training_does_not_feel_the_analyses_and_resuming_keeps_their_records(text, tmp_path):
    without, with_them, resumed = Losses(), Outputs(), Losses()
    run(tmp_path / "without", text, without, until=20)
    whole = run(tmp_path / "with", text, with_them, *analyses(), until=20)
    assert with_them.losses == without.losses

    rows = [row for row in read_metrics(whole.metrics) if "val/bpc" in row]
    assert [row["step"] for row in rows] == ["10", "20"]
    names = {"log10_gradient_0", "log10_gradient_20", "saturated", "norm_wx", "norm_uh", "interaction"}
    assert {f"val/{name}" for name in names} < rows[0].keys()
    histograms = read_histograms(whole.path / "activations.csv")
    assert [histogram.step for histogram in histograms] == [10, 20]
    edges = torch.tensor(histograms[-1].edges, dtype=torch.float64)
    expected = torch.histogram(with_them.last.double(), edges).hist
    assert_close(torch.tensor(histograms[-1].counts), expected.long())
    share = (with_them.last.abs() > 0.9).float().mean()
    assert 0 < share < 1
    assert_close(torch.tensor(float(rows[-1]["val/saturated"])), share)

    run(tmp_path / "resumed", text, *analyses(), until=13)
    run(tmp_path / "resumed", text, resumed, *analyses(), until=20, resume=True)
    assert resumed.losses == without.losses[13:]
    again = read_histograms(tmp_path / "resumed/run/version_0/activations.csv")
    assert [again[0], again[-1]] == histograms
    assert [histogram.step for histogram in again] == [10, 13, 20]


def test_values_beyond_the_bins_are_in_the_outermost_and_no_numbers_in_none():
    analysis = HiddenActivations(bins=4)
    analysis._count("", None, None, (torch.tensor([-7.0, -1.0, -0.3, 0.2, 0.95, 3.0, math.nan, math.inf]), None))
    assert analysis._counts[""].tolist() == [2, 1, 1, 2, 4]
