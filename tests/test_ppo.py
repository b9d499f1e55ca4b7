"""Policies with a memory: proximal policy optimisation is what its equations say, learns, and goes on."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from experiments.core.errors import ExperimentError
from experiments.core.module import TaskModule
from experiments.data import AffineTasks
from experiments.environments import BabyAI, ComplexODE, HiddenContext, Spaces
from experiments.environments.rollouts import Acted, Rollouts, advantages
from experiments.tasks import ProximalPolicyOptimization, SoftActorCritic
from models import InstructedImage, MeetingMLP, RecurrentActorCritic
from multint import GRU, LSTM, Bilinear, Concat, Hypernetwork, LowRank, MultiplicativeIntegration
from multint.errors import OptionError
from multint.integrators import Projected
from tests.resuming import Record, assert_together, last, stopped, trainer
from tests.test_policies import Given, Wrong

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed (extra policy)")
env_checker = pytest.importorskip("gymnasium.utils.env_checker")
pytest.importorskip("minigrid", reason="minigrid is not installed (extra policy)")

RED_BALL, LOCAL, PICKUP = "BabyAI-GoToRedBallGrey-v0", "BabyAI-GoToLocal-v0", "BabyAI-PickupLoc-v0"
small = partial(MeetingMLP, hidden=16)
small_image = partial(InstructedImage, channels=4, word_features=4)
Adam = partial(torch.optim.Adam, lr=1e-2)


def learner(environment=None, network=small, memory=LSTM, **settings):
    sizes = {"copies": 4, "steps": 10, "batch_size": 2, "passes": 2, "epoch": 6, "features": 16, "hidden": 16}
    quick = partial(memory, engine="loop")  # so few steps do not pay for what is compiled
    given = {**sizes, "memory": quick, "optimizer": Adam, **settings}
    return ProximalPolicyOptimization(environment or Given(Cue), network, **given)


def ready(task):
    task.use(task.describe(None), "the data")
    return task


class Brief(ComplexODE):
    horizon = 25


class Cue(gymnasium.Env):
    """The context is shown in the first of three steps; in the last, what it was is to be chosen."""

    def __init__(self):
        box = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"context": box, "observation": box})
        self.action_space = gymnasium.spaces.Discrete(2, start=5)

    def _seen(self):
        cue = 2.0 * self._cue - 1 if self._step == 0 else 0.0
        return {"context": np.full(1, cue, np.float32), "observation": np.full(1, self._step / 2, np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._cue, self._step = int(self.np_random.integers(2)), 0
        return self._seen(), {}

    def step(self, action):
        assert action in (5, 6)
        self._step += 1
        is_last = self._step == 3
        return self._seen(), float(is_last and action == 5 + self._cue), is_last, False, {}


def test_the_advantages_are_the_discounted_sums_of_the_errors():
    generator = np.random.default_rng(0)
    T, N, discount, decay = 7, 5, 0.9, 0.8
    reward, value = generator.normal(size=(T, N)), generator.normal(size=(T + 1, N))
    ended, is_cut = generator.random((2, T, N)) < 0.25
    expected = np.zeros((T, N))
    for start, n in np.ndindex(T, N):
        for t in range(start, T):
            following = 0.0 if ended[t, n] else value[t + 1, n]
            error = reward[t, n] + discount * following - value[t, n]
            expected[start, n] += (discount * decay) ** (t - start) * error
            if ended[t, n] or is_cut[t, n]:
                break
    given = map(torch.from_numpy, (reward, value, ended, ended | is_cut))
    assert_close(advantages(*given, discount, decay), torch.from_numpy(expected))


@pytest.mark.parametrize("environment", [Given(Cue), HiddenContext(ComplexODE())], ids=["discrete", "continuous"])
def test_the_loss_is_the_clipped_objective(environment):
    """Of steps that count alone; and of a policy that has gone far from the one that played, in both directions."""
    torch.manual_seed(0)
    task = ready(learner(environment, clip=0.1, value_weight=0.7, entropy_weight=0.3))
    batch = next(iter(task.train_dataloader()))
    with torch.no_grad():
        for weight in task.network.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    told = {name: mean.value for name, mean in task.measure(batch, "train").items()}

    policy, value, _ = task.network(batch.observation, batch.context, batch.begins, batch.state)
    log_density = policy.log_prob(batch.action)
    of_policy, of_value, entropy, divergence = [], [], [], []
    assert batch.is_step.all() == (environment is not None and not isinstance(environment, Given))
    for t, b in np.ndindex(*batch.is_step.shape):
        if not batch.is_step[t, b]:
            continue
        ratio, advantage = (log_density[t, b] - batch.log_density[t, b]).exp(), batch.advantage[t, b]
        of_policy.append(-min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage))
        of_value.append((value[t, b] - batch.target[t, b]) ** 2 / 2)
        entropy.append(policy.entropy()[t, b])
        divergence.append(ratio - 1 - ratio.log())
    parts = [torch.stack([torch.as_tensor(x) for x in part]).mean() for part in (of_policy, of_value, entropy)]
    assert_close([told["policy_loss"], told["value_loss"], told["entropy"]], parts)
    assert_close(told["loss"], parts[0] + 0.7 * parts[1] - 0.3 * parts[2])
    assert_close(told["kl"], torch.stack(divergence).mean(), atol=1e-6, rtol=1e-4)
    assert told["kl"] > 1e-3


def test_without_training_every_batch_is_of_the_policy_that_played():
    """Of a second rollout too, whose sequences begin within episodes."""
    task = ready(learner())
    for parameter in task.network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    batches = list(task.train_dataloader())
    assert batches[0].state is None
    assert not batches[-1].begins[0].any()
    for batch in batches:
        assert_close(task.measure(batch, "train")["kl"].value, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_steps_that_lead_over_to_the_next_episode_are_marked_and_only_an_end_is_one():
    def act(seen, begins, memory, generator):
        begun.append(begins.tolist())
        count = len(begins)
        return Acted(torch.zeros(count, 1), torch.zeros(count), torch.ones(count), None)

    begun = []
    made = partial(Wrong, reward=1.0, length=3)
    rollouts = Rollouts(Given(made), act, 1, 9, 2, 1, 2, discount=0.5, decay=0.0, reward_scale=2.0, seed=0)
    [batch] = rollouts
    begins = [True, False, False, False] * 2 + [True]
    assert [row[0] for row in begun] == [*begins, False]
    assert batch.begins[:, 0].tolist() == begins
    assert batch.is_step[:, 1].tolist() == [True, True, True, False] * 2 + [True]
    assert_close(batch.observation[:4, 0, 0], torch.tensor([0.0, 1, 2, 3]))
    assert_close(batch.target[:3, 0], torch.tensor([2.5, 2.5, 2.0]))  # 2 · reward + ½ · the value of what follows
    assert batch.told == {"frames": 14.0, "return": 3.0, "length": 3.0}
    assert_close(batch.advantage[batch.is_step].std(correction=0), torch.tensor(1.0))

    cut = partial(gymnasium.wrappers.TimeLimit, Wrong(reward=1.0), 3)
    [batch] = Rollouts(Given(cut), act, 1, 9, 1, 1, 1, discount=0.5, decay=0.0, reward_scale=2.0, seed=0)
    assert_close(batch.target[:3, 0], torch.tensor([2.5, 2.5, 2.5]))
    assert batch.is_step[:, 0].tolist() == [True, True, True, False] * 2 + [True]


@pytest.mark.parametrize("memory", [LSTM, GRU])
def test_a_sequence_is_its_steps_and_a_reset_is_a_new_beginning(memory):
    torch.manual_seed(0)
    network = RecurrentActorCritic(3, 2, 4, small, partial(memory, learnt_state=True), 8, 8).double()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    T, B = 9, 3
    observation, context = torch.randn(T, B, 3).double(), torch.randn(T, B, 2).double()
    begins = torch.zeros(T, B, dtype=torch.bool)
    begins[0], begins[4, 1] = True, True
    whole = network(observation, context, begins)
    state, logits, values = None, [], []
    for step in zip(observation, context, begins, strict=True):
        judged = network(*(part[None] for part in step), state)
        state = judged.state
        logits.append(judged.policy.logits[0])
        values.append(judged.value[0])
    assert_close(whole.policy.logits, torch.stack(logits))
    assert_close(whole.value, torch.stack(values))
    alone = network(observation[4:, 1:2], context[4:, 1:2], begins[4:, :1])
    assert_close(whole.value[4:, 1:2], alone.value)
    later = network(observation[5:], context[5:], begins[5:], network(observation[:5], context[:5], begins[:5]).state)
    assert_close(later.value, whole.value[5:])


@pytest.mark.parametrize("integrator", [Projected, Concat, MultiplicativeIntegration, LowRank, Bilinear, Hypernetwork])
def test_image_and_instruction_meet_by_any_integrator(integrator):
    torch.manual_seed(0)
    network = InstructedImage(147, 72, 8, 8, 4, integrator).double()
    for weight in network.meeting.parameters():  # FiLM starts as the identity
        torch.nn.init.normal_(weight)
    image, words = torch.zeros(2, 3, 7, 7, 3), torch.zeros(2, 3, 72)
    image[0, 0, 3, 2], words[0, 1, :3] = torch.tensor([10.0, 5.0, 2.0]), torch.tensor([4.0, 32.0, 1.0])
    y = network(image.flatten(2), words)
    assert y.shape == (2, 3, 8)
    assert not torch.allclose(y[0, 0], y[1, 0])
    assert not torch.allclose(y[0, 1], y[1, 1])
    assert_close(y[0, 2], y[1, 2])
    assert_close(network(image.flatten(2)[0, 1], words.flip(-1)[0, 1]), y[0, 1])  # a bag of words, padded anywhere
    y.sum().backward()
    for name in (*network.x_weights, *network.z_weights):
        assert network.get_parameter(name).grad.abs().sum() > 0


def test_what_the_network_cannot_read_is_told():
    with pytest.raises(ValueError, match="x has 100 features, expected 3 symbols for each place of a square"):
        InstructedImage(100, 72, 8)
    network, image = InstructedImage(27, 2, 8, words=9), torch.tensor([1.0, 5.0, 1.0]).repeat(9)
    with pytest.raises(OptionError, match=r"symbols up to \[1, 6, 1\], expected .* below \[11, 6, 3\]"):
        network(torch.tensor([1.0, 6.0, 1.0]).repeat(9), torch.zeros(2))  # it is no symbol of the next kind
    with pytest.raises(OptionError, match="expected those from 0 and below"):
        network(-image, torch.zeros(2))
    with pytest.raises(OptionError, match="words from 0 to 10, expected those from 0 to 9"):
        network(image, torch.tensor([0.0, 10.0]))
    with pytest.raises(OptionError, match="the memory is bidirectional or batch_first, expected neither"):
        RecurrentActorCritic(3, 2, 4, small, partial(LSTM, bidirectional=True))


@pytest.mark.parametrize("levels", [[RED_BALL], [LOCAL, PICKUP]], ids=["one level", "two levels"])
def test_babyai_passes_gymnasiums_checker_and_its_copies_agree_with_their_spaces(levels):
    from experiments.environments.babyai_levels import Instructed

    env_checker.check_env(Instructed(levels, "train"), skip_render_check=True)

    def episode(seed):
        env = BabyAI(levels).training(3)
        seen = [env.reset(seed=seed)[0]]
        for action in np.random.default_rng(0).integers(7, size=(80, 3)):
            observation, rewards, ended, is_cut, _ = env.step(action)
            assert env.observation_space.contains(observation)
            seen.append({**observation, "over": np.stack([rewards, ended, is_cut])})
        return seen

    first, again, other = (episode(seed) for seed in (0, 0, 1))
    assert_close(first, again)
    assert any(not np.array_equal(a["image"], b["image"]) for a, b in zip(first, other, strict=True))


def test_an_instruction_is_told_by_its_words():
    from experiments.environments.babyai_levels import WORDS

    env = BabyAI([RED_BALL, PICKUP]).evaluation("val")
    contexts = env.reset(seed=0)[0]["context"]
    spoken = {number: word for word, number in WORDS.items()}
    told = [" ".join(spoken[n] for n in row if n) for row in contexts]
    assert set(told[::2]) == {"go to the red ball"}
    assert all(text.startswith("pick up ") for text in told[1::2])
    spaces = env.single_observation_space
    network = InstructedImage(147, 72, 8)
    assert spaces["context"].high.max() == len(WORDS) == network.words.num_embeddings - 1
    assert tuple(spaces["image"].high[0, 0] + 1) == network.counts


def test_the_episodes_of_training_validation_and_test_are_others():
    def seeds(env):
        env.reset(seed=0)
        return {copy.state_dict()["seed"] for copy in env.copies}

    babyai = BabyAI([RED_BALL], episodes=8)
    of_stages = [seeds(babyai.training(8)), *(seeds(babyai.evaluation(stage)) for stage in ("val", "test"))]
    assert len(set.union(*of_stages)) == 24
    assert seeds(babyai.evaluation("test")) == of_stages[2]


def test_babyai_goes_on_within_its_episodes_and_an_evaluations_copies_rest_after_theirs():
    actions = np.random.default_rng(0).integers(3, size=(100, 3))
    one, other = (BabyAI([RED_BALL, LOCAL]).training(3) for _ in range(2))
    one.reset(seed=3)
    for action in actions[:70]:
        one.step(action)
    other.reset(seed=3)
    other.load_state_dict(one.state_dict())
    for action in actions[70:]:
        assert_close(one.step(action)[:4], other.step(action)[:4])

    env = BabyAI([RED_BALL], episodes=3).evaluation("val")
    env.reset(seed=0)
    steps = [env.step(action) for action in actions]
    assert steps[-1][2].all()
    assert_close(steps[-1][0], steps[-2][0])


def test_a_hidden_context_is_not_told_but_what_was_done_and_got():
    from experiments.environments.episodes import Episode

    env_checker.check_env(Episode(HiddenContext(ComplexODE())), skip_render_check=True)
    hidden, told = (e.training(3) for e in (HiddenContext(ComplexODE()), ComplexODE()))
    seen, of_told = hidden.reset(seed=0)[0], told.reset(seed=0)[0]
    assert_close(seen["observation"], np.pad(of_told["observation"], ((0, 0), (0, 3))))
    action = np.random.default_rng(0).uniform(-1, 1, (3, 2)).astype(np.float32)
    seen, rewards, *_ = hidden.step(action)
    of_told, as_told, *_ = told.step(action)
    assert_close(rewards, as_told)
    expected = np.concatenate([of_told["observation"], action, rewards[:, None]], 1, dtype=np.float32)
    assert_close(seen["observation"], expected)
    assert not seen["context"].any()


@pytest.mark.runs
@pytest.mark.parametrize(
    ("environment", "network", "memory", "step", "in_validation"),
    [
        (BabyAI([RED_BALL, LOCAL], episodes=4), small_image, LSTM, 5, False),
        (HiddenContext(Brief([(1.0, 0.0), (0.0, 1.0)])), small, GRU, 6, True),
    ],
    ids=["BabyAI", "hidden context"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, environment, network, memory, step, in_validation):
    """Within what was played, and before what is played next."""

    def run(folder, *callbacks, ckpt_path=None):
        torch.manual_seed(0)
        task = learner(environment, network, memory=memory)
        fitted = trainer(tmp_path / folder, *callbacks, ckpt_path=ckpt_path, max_steps=14)
        fitted.fit(TaskModule(task), ckpt_path=ckpt_path, weights_only=True)
        return callbacks[0]

    def of_batch(batch):
        return [part.sum().item() for part in batch[:8]]

    whole = run("whole", Record(of_batch))
    first = stopped(run, "part", Record(of_batch), step, in_validation)
    rest = run("part", Record(of_batch), ckpt_path=last(tmp_path / "part"))
    assert len(whole.steps) == 14
    assert_together([first, rest], whole)


@pytest.mark.runs
def test_it_learns_to_remember_a_cue():
    torch.manual_seed(0)
    env = Given(Cue)
    env.rewards_success = True
    env.evaluation = lambda stage: env.training(50)
    task = ready(learner(env, copies=32, batch_size=16, passes=4, steps=12, epoch=240, discount=0.9))
    optimizer = task.optimizer()
    for batch in task.train_dataloader():
        optimizer.zero_grad()
        task.measure(batch, "train")["loss"].value.backward()
        optimizer.step()
    told = {name: mean.value.item() for name, mean in task.measure("val", "val").items()}
    assert told["success"] == told["return"] == 1.0, "who forgets gets ½"
    assert told["success_sampled"] > 0.8
    assert batch.told["success"] > 0.8
    assert told["length"] == 3


@pytest.mark.parametrize(
    ("environment", "network", "names"),
    [
        (BabyAI([RED_BALL], episodes=2), small_image, {"episode"}),
        (HiddenContext(Brief([(1.0, 0.0)])), small, {"episode", "returns"}),
        (Given(Cue), small, {"episode", "returns"}),
    ],
    ids=["BabyAI", "hidden context", "discrete"],
)
def test_an_episode_is_drawn(environment, network, names):
    torch.manual_seed(0)
    task = ready(learner(environment, network))
    figures = task.pictures(None)
    assert set(figures) == names
    if isinstance(environment, BabyAI):
        played = task.play("val")
        length = int(played.are_part[:, 0].sum())
        titles = [axes.get_title() for axes in figures["episode"].axes if axes.get_title()]
        assert len(titles) == length + 1
        assert figures["episode"].get_suptitle() == f"go to the red ball, return {played.returns[0]:.2f}"


@pytest.mark.parametrize("learns", [learner, partial(SoftActorCritic, network=small)], ids=["PPO", "SAC"])
def test_returns_are_drawn_over_contexts_that_the_agent_is_not_told(learns):
    figure = ready(learns(HiddenContext(Brief([(1.0, 0.0)])))).pictures(None)["returns"]
    assert figure.axes[0].collections[0].get_array().size == 21 * 21


def test_an_evaluations_actions_are_those_that_the_environment_took():
    task = ready(learner(HiddenContext(Brief([(1.0, 0.0)]))))
    torch.nn.init.constant_(task.network.actor.bias, 3.0)
    played = task.play("val", is_drawn=True)
    assert np.abs(played.actions).max() == 1.0
    assert_close(played.observations[1:, :, 1:3], played.actions[:-1])


DISCRETE = gymnasium.spaces.Discrete(2)
NO_CONTEXT = gymnasium.spaces.Dict({"observation": gymnasium.spaces.Box(-1, 1, (2,), np.float32)})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (Given(partial(Wrong, reward=float("nan"), actions=DISCRETE)), "the reward .*nan.*, expected finite"),
        (Given(partial(Wrong, space=NO_CONTEXT)), "expected a Dict with `context`"),
        (Given(partial(Wrong, actions=gymnasium.spaces.MultiBinary(2))), "MultiBinary.*, expected .*, or Discrete"),
        (BabyAI(["BabyAI-GoToRedBalGrey-v0"]), "no level 'BabyAI-GoToRedBalGrey-v0'. Did you mean '.*RedBallGrey-v0'"),
    ],
    ids=["NaN reward", "no context", "actions", "level"],
)
def test_an_environment_that_does_not_fit_is_told(environment, message):
    with pytest.raises(ExperimentError, match=message):
        next(iter(ready(learner(environment)).train_dataloader()))


def test_soft_actor_critic_takes_no_discrete_actions():
    with pytest.raises(ExperimentError, match=r"action space is Discrete.*, expected a bounded Box of continuous"):
        SoftActorCritic(Given(Cue), small).describe(None)


def test_without_minigrid_it_is_told_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "experiments.environments.babyai_levels", raising=False)
    monkeypatch.setitem(sys.modules, "minigrid", None)
    with pytest.raises(ExperimentError, match=r"environments are minigrid's: install the extra: pip install .*policy"):
        BabyAI([RED_BALL]).training(1)


def test_data_and_a_checkpoint_of_other_sizes_are_refused():
    with pytest.raises(ExperimentError, match="the data are AffineTasks, expected none"):
        learner().describe(AffineTasks())
    state = ready(learner()).train_dataloader().state_dict()
    with pytest.raises(ExperimentError, match="steps 10, got 12"):
        ready(learner(steps=12)).train_dataloader().load_state_dict(state)


@pytest.mark.parametrize(
    "settings",
    [
        {"copies": 0},
        {"steps": 1},
        {"batch_size": 3},
        {"passes": 0},
        {"epoch": 0},
        {"discount": 1.5},
        {"decay": -0.1},
        {"clip": 0.0},
        {"value_weight": -1.0},
        {"entropy_weight": float("inf")},
        {"reward_scale": 0.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_setting_out_of_range_is_told(settings):
    with pytest.raises(ExperimentError, match=f"{next(iter(settings))} is .*, expected"):
        learner(**settings)


@pytest.mark.parametrize(
    "settings", [{"levels": []}, {"levels": [RED_BALL], "episodes": 0}], ids=["levels", "episodes"]
)
def test_a_setting_of_babyai_out_of_range_is_told(settings):
    with pytest.raises(ExperimentError, match=r"BabyAI: (levels|episodes) is .*, expected"):
        BabyAI(**settings)


def test_discrete_actions_are_the_environments_own():
    env = Given(Cue).training(3)
    spaces = Spaces.of(env, takes_discrete=True)
    assert spaces.features == (1, 1, 2)
    assert spaces.scaled(np.array([0, 1, 0]), env).tolist() == [5, 6, 5]
