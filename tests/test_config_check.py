"""The check before parsing: every mistake is one message, and no valid config is rejected."""

import pytest

from experiments.__main__ import main
from experiments.core.configs import CONFIGS, ready_configs
from tests.test_command_line import INTEGRATOR, QUICKSTART, SMALL, message
from tests.test_configs import built

pytestmark = pytest.mark.runs

READY = [path for task in ("characters", "words") for path in ready_configs()[task]]
CELL = "--model.network.recurrent.cell"
# Forty lines that stand for 2^40 values.
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


def one_message(capsys, *options):
    shown = message(capsys, "fit", *SMALL, *options)
    assert shown.count("\n") == 1
    return shown


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([f"{INTEGRATOR}=LowRnk"], ["cell.integrator", "'LowRnk'", "Did you mean 'LowRank'", "Bilinear"]),
        ([f"{INTEGRATOR}.alfa=2"], ["cell.integrator.alfa", "'alpha'", "MultiplicativeIntegration", "beta2"]),
        ([f"{INTEGRATOR}=SumOf", f"{INTEGRATOR}.first=LowRank"], ["cell.integrator", "'second' is missing", "SumOf"]),
        ([f"{INTEGRATOR}=LowRank", f"{INTEGRATOR}.rank=x"], ["integrator.rank", "'x'", "int"]),
        ([f"{INTEGRATOR}=torch.nn.Linear"], ["cell.integrator", "torch.nn.Linear", "LowRank"]),
        (["--model.network.recurrent.cell=LSTNCell"], ["recurrent.cell", "'LSTNCell'", "'LSTMCell'", "GRUCell"]),
        (["--model.network.initialise.scle=1"], ["network.initialise.scle", "Uniform", "'scale'"]),
        (["--model.netwrk=3"], ["model.netwrk", "Did you mean 'network'", "halve_after"]),
        (["--model.optimizer=Adm"], ["model.optimizer", "'Adm'", "'Adam'"]),
        (["--model.optimizer.lr=x"], ["model.optimizer.lr", "'x'", "float"]),
        (["--model.network.embedding_size=x"], ["network.embedding_size", "'x'", "int"]),
        (["--threads=0"], ["threads"]),
        (["--model=LanguageModel"], ["model", "'LanguageModelling'"]),
        (["--trainer.callbacks+=EarlyStoping"], ["trainer.callbacks", "'EarlyStopping'"]),
        (["--model.halve_after=0"], ["halve_after"]),
        ([f"{INTEGRATOR}=LowRank", f"{INTEGRATOR}.rank=0"], ["LowRank", "rank is 0"]),
        (["--config=quickstat.yaml"], ["quickstat.yaml", "does not exist"]),
        (["--data.path=nowhere"], ["nowhere", "no such file"]),
        (["--ckpt_path=nowhere"], ["nowhere", "no such checkpoint"]),
        (["--nme=x"], ["'nme'", "'name'"]),
        ([f"{INTEGRATOR}=Swapped"], ["cell.integrator", "'Swapped' does not fit", "3 arguments", "mean 'SwappedOf'"]),
        ([f"{INTEGRATOR}=Pairwise"], ["cell.integrator: 'Pairwise' is no Integrator", "k ≥ 2 streams", "LowRank"]),
        (["--model.network.recurrent.cell=LowRank"], ["recurrent.cell: 'LowRank' is no Cell", "GRUCell"]),
        ([f"{INTEGRATOR}=Integrator"], ["cell.integrator", "'Integrator' does not fit", "abstract", "LowRank"]),
        ([f"{INTEGRATOR}="], ["cell.integrator: '' is no class"]),
        (["--model.network.recurrent=Recurent"], ["network.recurrent", "Did you mean 'Recurrent'"]),
        (["--model.network.recurrent.bidirectional=true"], ["the network", "recurrent.bidirectional is true"]),
        (["--model.optimizer.lr=-1"], ["the optimizer", "-1"]),
        (["--trainer.accelerator=foo"], ["the trainer", "foo"]),
        (["--trainer.max_epochs=-5"], ["max_epochs", "-5"]),
        (["--trainer.max_time=foo"], ["foo", "DD:HH:MM:SS"]),
        (["--trainer.enable_checkpointing=false"], ["enable_checkpointing"]),
        (["--data.unit=words"], ["data.unit: 'words' does not fit", "characters, bytes"]),
        (["--data.batch_size=1.5"], ["data.batch_size: '1.5' does not fit: expected int"]),
        (["--data.valid=0.99"], ["error: --data.valid, --data.test: got 0.99 and 0.05, expected fractions"]),
        (["--data.batch_size=0"], ["error: --data.batch_size: got 0, expected at least 1."]),
        (["--model.network.initialise.scale=-1"], ["error: Uniform: scale is -1.0"]),
        (["--data.path="], ["--data.path: got an empty text"]),
        (["--data=Table", "--data.path=null"], ["data: the setting 'path' is missing, which Table requires"]),
        (["--data.root="], ["--data.root: got an empty text"]),
        (["--name="], ["name: '' is empty"]),
        (["--ckpt_path="], ["ckpt_path: '' is empty"]),
        (["--trainer.default_root_dir="], ["trainer.default_root_dir: '' is empty"]),
        (["--seed_everything=-1"], ["seed_everything: -1 does not fit: expected 0 to 4294967295"]),
        (["--seed_everything=4294967296"], ["seed_everything: 4294967296 does not fit"]),
        (["--seed_everything=x"], ["seed_everything: 'x' does not fit: expected bool or int"]),
        (["--trainer.max_step=3"], ["trainer.max_step", "Did you mean 'max_steps'"]),
        (["--conf=x"], ["there is no setting 'conf'. Did you mean 'config'"]),
        (["--trainer.precision=8"], ["trainer.precision: '8' does not fit", "bf16-mixed"]),
        (["--trainer.logger=CSVLoger"], ["trainer.logger: 'CSVLoger'", "Did you mean 'CSVLogger'"]),
        (["--trainer=foo"], ["trainer: 'foo' does not fit: expected settings"]),
        (["--trainer.callbacks=[{class_path: EarlyStopping}]"], ["trainer.callbacks", "'monitor' is missing"]),
        (["--trainer.callbacks.monitor=x"], ["trainer.callbacks: 'monitor' is given, but no class", "EarlyStopping"]),
        (["--model.optimizer.betas=x"], ["model.optimizer.betas: 'x' does not fit: expected tuple"]),
        ([f"{CELL}.memory_norm=LayerNorm"], ["'LayerNorm' may be torch.", "give the whole path"]),
        ([f"{CELL}=multint.LSTNCell"], ["recurrent.cell: 'multint.LSTNCell' is no class", "Did you mean 'LSTMCell'"]),
        ([f"{CELL}=torch.nn"], ["recurrent.cell: 'torch.nn' is no class"]),
        ([f"{CELL}=os.path:join"], ["recurrent.cell: 'os.path:join' is no class"]),
        ([f"{CELL}=torch.nn.functional.relu"], ["recurrent.cell: 'torch.nn.functional.relu' is no class"]),
        ([f"{CELL}=RNNCell", f"{CELL}.activation=stranger.f"], ["cell.activation", "--trust stranger"]),
        ([f"{CELL}={{class_path: LSTMCell, peepholes: true}}"], ["'peepholes' stands beside class_path"]),
        ([f"{CELL}.init_args=3"], ["recurrent.cell: '3' does not fit: expected init_args to hold settings"]),
        ([f"{CELL}=laughs.yaml"], ["recurrent.cell: more than 100,000 values"]),
        (["--data.batch_size=laughs.yaml"], ["data.batch_size: 'laughs.yaml' does not fit: expected int"]),
        ([f"{CELL}=bytes.bin"], ["'bytes.bin' is not text in UTF-8"]),
        ([f"{CELL}={{integrator: &a [*a]}}"], ["the anchor 'a' holds itself"]),
        (["--config=."], ["config: '.' is no file"]),
        (["--config=quickstart"], ["does not exist. Did you mean '", "configs/characters/quickstart.yaml'?"]),
        (["--config={data: {corpus: ptbb}}"], ["data.corpus: 'ptbb'", "'ptb'", "text8"]),
    ],
    ids=lambda value: value[-1] if value[0].startswith("--") else "",
)
def test_a_mistake_is_one_line(options, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laughs.yaml").write_text(LAUGHS)
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe")
    shown = one_message(capsys, *options)
    for part in parts:
        assert part in shown


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\xff\xfe\x00binary", "is not text in UTF-8"),
        (b"- a\n- b\n", "holds no settings"),
        (b"", "holds no settings"),
        (b"name: !!bool x", "no YAML"),
        (b"name: a\nname2: *b", "no YAML: found undefined alias"),
        (b"#" * 1_000_001, "is larger than"),
        (LAUGHS.encode(), "more than 100,000 values"),
        (b"a: &a [*a]", "the anchor 'a' holds itself"),
        (b"[" * 100_000, "100 levels"),
        (b"base: nowhere.yaml", "nowhere.yaml' does not exist"),
        (b"base: bad.yaml", "in a circle"),
        (b"1: 2", "there is no setting '1'"),
        (b"trainer: 3", "trainer: '3' does not fit: expected settings"),
        (b"data.batch_sie: 3", "data.batch_sie: there is no setting 'batch_sie' of TextData"),
        (b"model: {init_args: 3}", "model: '3' does not fit: expected init_args"),
        (
            b"model: {network: {recurrent: {hiden_size: 3}}}",
            "network.recurrent.hiden_size: there is no setting 'hiden_size' of Recurrent. Did you mean 'hidden_size'",
        ),
        (
            b"model: {network: {recurrent: {cell: LSTNCell}}}",
            "network.recurrent.cell: 'LSTNCell' is no class to choose here. Did you mean 'LSTMCell'",
        ),
        (
            b"model: {optimzer: {class_path: Adam}}",
            "model.optimzer: there is no setting 'optimzer' of LanguageModelling. Did you mean 'optimizer'",
        ),
        (b"trainer: {max_stps: 3}", "trainer.max_stps: there is no setting 'max_stps' of Trainer. Did you mean 'max_"),
        (b"dta: {corpus: ptb}", "dta: there is no setting 'dta'. Did you mean 'data'"),
        (b"model: [unclosed", "line 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_file_that_cannot_be_used_is_one_line(content, part, capsys, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert part in one_message(capsys, "--config", str(path))
    # As a base of another too.
    (tmp_path / "good.yaml").write_text("base: bad.yaml")
    one_message(capsys, f"--config={tmp_path / 'good.yaml'}")


@pytest.mark.parametrize(
    ("part", "name", "choice"),
    [
        ("encoder", "LatentEncoder", "PooledEncoder"),
        ("encoder", "torch.nn.Linear", "AttentiveEncoder"),
        ("decoder", "PooledEncoder", "ConcatMLP"),
        ("decoder", "torch.nn.Linear", "Conditional"),
    ],
)
def test_a_neural_processs_parts_are_of_their_kind(part, name, choice, capsys):
    curves = str(CONFIGS / "functions/curves.yaml")
    shown = message(capsys, "fit", "--config", curves, f"--model.network.{part}={name}")
    assert shown.count("\n") == 1
    assert f"model.network.{part}: '{name}' is no" in shown
    assert choice in shown


def test_without_a_model_a_config_is_asked_for(capsys):
    assert "the setting 'model' is missing. Start from a config" in message(capsys, "fit")
    assert "'halve_after' is given, but no class was named" in message(capsys, "fit", "--model.halve_after=2")


STOPPING = "{class_path: EarlyStopping, init_args: {monitor: val/bpc, patience: 5}}"
FILES = {
    "stopping.yaml": f"trainer: {{callbacks: [{STOPPING}]}}",
    "patience.yaml": "trainer.callbacks: [{init_args: {patience: 8}}]\nmodel.halve_after: 3",
    "more.yaml": "trainer: {callbacks+: {class_path: LearningRateMonitor}}",
    "anchors.yaml": "data: {batch_size: &n 4, length: *n}",
    "sgd.yaml": "model: {optimizer: {class_path: SGD, init_args: {lr: 1e-2, momentum: 0.9}}}",
    "cell.yaml": "{class_path: RNNCell, init_args: {integrator: Additive, activation: torch.relu}}",
    "warm_up.yaml": """
        trainer:
          callbacks:
            class_path: experiments.core.optimisation.LearningRate
            init_args:
              schedule:
                class_path: experiments.core.optimisation.InTurn
                init_args:
                  schedules:
                    - {class_path: LinearLR, init_args: {start_factor: 0.1, total_iters: 100}}
                    - {class_path: CosineAnnealingLR, init_args: {T_max: -1}}
                  milestones: [100]
        """,
    "whole.yaml": "config: stopping.yaml",
    "lstm.yaml": "model: {network: {recurrent: {class_path: multint.LSTM, init_args: {hidden_size: 8, "
    "zoneout: {h: 0.1, c: 0.2}, weight_drop: 0.4, memory_norm: torch.nn.LayerNorm, device: cpu}}}}",
}
VALID = [
    ["--model", "LanguageModelling"],
    ["--model={halve_after: 3}"],
    ["--model.init_args.network.init_args.recurrent.cell=GRUCell", f"{CELL}.reset_after=true"],
    ['--model.network={"recurrent": {"hidden_size": 3, "cell": {"class_path": "GRUCell"}}}'],
    ["--model.network.recurrent=LSTM", "--model.network.recurrent.peepholes=true"],
    [f"{CELL}=GRUCell", f"{INTEGRATOR}.beta1=0.3"],
    [f"{CELL}.class_path=GRUCell"],
    [f"{CELL}=RNNCell", f"{CELL}.activation=torch.relu"],
    [f"{CELL}.memory_norm=torch.nn.LayerNorm", f"{CELL}.memory_norm.eps=0.1"],
    [f"{CELL}.memory_norm=multint.integrators.normalised.layer_norm"],
    [f"{INTEGRATOR}=Normalised", f"{INTEGRATOR}.integrator=LowRank", f"{INTEGRATOR}.integrator.rank=16"],
    [f"{INTEGRATOR}=Normalised", f"{INTEGRATOR}.integrator.alpha=3"],
    [f"{INTEGRATOR}={{alpha: 3}}"],
    ["--model.network.recurrent.zoneout.h=0.1"],
    ["--model.network.initialise.scale=0.1"],
    ["--model.network.initialise=Uniform", "--model.network.initialise.scale=0.1"],
    ["--model.optimizer=SGD", "--model.optimizer.momentum=0.9", "--model.optimizer.lr", "1e-2"],
    ["--model.optimizer={class_path: SGD, init_args: {lr: 1}, dict_kwargs: {momentum: 0.9}}"],
    ["--config=sgd.yaml", "--model.optimizer=Adam", "--model.optimizer.betas=[0.8, 0.9]"],
    ["--config=lstm.yaml"],
    ["--config=anchors.yaml"],
    ["-c", "stopping.yaml", "--config", "patience.yaml"],
    ["--config=stopping.yaml", "--trainer.callbacks+=LearningRateMonitor"],
    ["--config=stopping.yaml", "--config=more.yaml", "--trainer.callbacks.logging_interval=step"],
    ["--config=whole.yaml"],
    ["--config=warm_up.yaml"],
    ["--config={data: {corpus: ptb}}"],
    [f"{CELL}=cell.yaml"],
    [f"--trainer.callbacks={STOPPING}"],
    ["--trainer.callbacks=[LearningRateMonitor]", "--trainer.callbacks+=[LearningRateMonitor, Callback]"],
    ["--trainer.callbacks=null"],
    ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.train_time_interval=00:00:10"],
    ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"],
    ["--trainer.logger=[{class_path: CSVLogger, init_args: {save_dir: x}}]"],
    ["--trainer.profiler=simple"],
    ["--trainer.profiler=SimpleProfiler"],
    ["--trainer.precision=bf16-mixed"],
    ["--trainer.deterministic=warn"],
    ["--trainer.limit_val_batches=0.5"],
    ["--trainer.max_time={minutes: 3}"],
    ["--trainer.max_time.minutes=3"],
    ["--trainer.max_steps", "-1"],
    ["--trainer={max_steps: 3}"],
    ["--seed_everything=true"],
    ["--seed_everything=4294967295"],
    ["--data.unit=null"],
    ["--model.network.embedding_size=null"],
    ["--name={a: b}"],
    ["--name", "-a b"],
    ["--name=stranger.name"],
]


@pytest.mark.parametrize("options", VALID, ids=lambda options: options[-1])
def test_valid_options_are_not_rejected(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    built(QUICKSTART, *options)


@pytest.mark.parametrize("config", READY, ids=lambda path: path.stem)
def test_a_ready_config_is_taken_with_another_integrator(config):
    built(config, f"{INTEGRATOR}=Additive")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--help"], "--trainer.max_steps"),
        (["-h"], "--trainer.max_steps"),
        (["--model.help"], "--model.optimizer"),
        (["--model.help=LanguageModelling"], "halve_after"),
        (["--print_config"], "max_steps"),
        (["--config", QUICKSTART, "--print_config"], "MultiplicativeIntegration"),
        (["--config", QUICKSTART, f"{INTEGRATOR}.help", "LowRank"], "rank"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_help_is_shown(options, part, capsys):
    assert main(["fit", *options]) == 0
    assert part in capsys.readouterr().out


def test_what_the_check_does_not_see_is_refused_by_the_wall_behind_it(capsys, tmp_path, monkeypatch):
    """A file that another names as its `config`, which only jsonargparse reads."""
    monkeypatch.chdir(tmp_path)
    recurrent = "{class_path: multint.Recurrent, init_args: {hidden_size: 3, cell: stranger.Cell}}"
    (tmp_path / "strange.yaml").write_text(
        f"model: {{class_path: LanguageModelling, init_args: {{network: {{recurrent: {recurrent}}}}}}}"
    )
    (tmp_path / "whole.yaml").write_text("config: strange.yaml")
    assert "--trust stranger" in message(capsys, "fit", *SMALL, "--config", "whole.yaml")
