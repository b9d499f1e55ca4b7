"""Policies: the environments are what their equations say, and soft actor-critic learns in them and goes on."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from experiments.core.errors import ExperimentError
from experiments.core.module import TaskModule
from experiments.data import AffineTasks
from experiments.environments import (
    ComplexODE,
    DoubleIntegrator,
    Environment,
    Experience,
    Gymnasium,
    Pendulum,
    Spaces,
    Transitions,
)
from experiments.tasks import SoftActorCritic
from models import Actor, ActorCritic, MeetingMLP
from multint import (
    Bilinear,
    Concat,
    Conditional,
    Diagonal,
    Hadamard,
    Hypernetwork,
    LowRank,
    MultiplicativeIntegration,
)
from multint.integrators import Projected
from tests.resuming import Record, assert_together, last, stopped, trainer

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed (extra policy)")
env_checker = pytest.importorskip("gymnasium.utils.env_checker")

small = partial(Conditional, hidden=8, layers=2, integrator=None)
Adam = partial(torch.optim.Adam, lr=3e-3)


def played(dynamics, controller):
    """The mean return over the test, of actions by `controller(state, context)`."""
    contexts = dynamics.contexts("test")
    state = dynamics.start(contexts, "test", np.random.default_rng(0))
    total = np.zeros(len(contexts))
    for _ in range(dynamics.horizon):
        state, rewards = dynamics.move(state, controller(state, contexts), contexts)
        total += rewards
    return total.mean()


def greedy(state, context):
    """The action of a grid that takes the point nearest to 0."""
    axis = np.linspace(-1, 1, 21)
    actions = np.array([(p, q) for p in axis for q in axis])
    a = 10 * (actions[:, 0] + 1j * actions[:, 1])
    steps = 0.01 * (context[:, :1] * a + context[:, 1:] * a**2).real
    return actions[np.abs(state + steps).argmin(1)]


def test_the_ode_has_the_published_returns():
    ode, generator = ComplexODE(), np.random.default_rng(0)
    assert len(ode.contexts("train")) == 16
    assert len(ode.contexts("test")) == 441
    assert played(ode, greedy) == pytest.approx(199.5, abs=0.1)
    assert played(ode, lambda state, _: np.zeros((len(state), 2))) == pytest.approx(10.0)
    assert played(ode, lambda state, _: generator.uniform(-1, 1, (len(state), 2))) == pytest.approx(4.3, abs=0.5)


def test_a_controller_that_heeds_the_sign_brings_the_mass_home():
    def controller(state, context):
        return np.clip(context[:, 1:] * context[:, :1] * (-2 * state[:, :2] - 2 * state[:, 2:]), -1, 1)

    def heedless(state, context):
        return controller(state, np.ones_like(context))

    assert played(DoubleIntegrator(), controller) > 60
    assert played(DoubleIntegrator(), heedless) < 40


@pytest.mark.parametrize("dynamics", [ComplexODE(), DoubleIntegrator()], ids=lambda d: type(d).__name__)
def test_one_copy_passes_gymnasiums_checker(dynamics):
    from experiments.environments.episodes import Episode

    env_checker.check_env(Episode(dynamics), skip_render_check=True)


# It would rather not see the wrapper, which is what is checked; and torques are within ± 2.
@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version")
@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric and normalized space")
def test_the_pendulum_passes_gymnasiums_checker_and_has_the_physics_that_it_tells():
    from experiments.environments.pendulum_context import PendulumContext

    contexts = np.array([[0.5, 2.0, 1.5], [1.5, 1.0, 0.5]])
    env = PendulumContext(gymnasium.make("Pendulum-v1").unwrapped, contexts)
    env_checker.check_env(env, skip_render_check=True)
    seen = set()
    for seed in range(10):
        observation, _ = env.reset(seed=seed)
        physics = env.unwrapped
        assert_close(
            observation["context"] * [10, 1, 1], np.array([physics.g, physics.m, physics.l]), rtol=1e-6, atol=0
        )
        seen.add(physics.m)
    assert seen == {1.0, 2.0}


def test_each_episode_of_an_evaluation_has_a_context_of_its_own():
    contexts = Pendulum().evaluation("test").reset(seed=0)[0]["context"]
    assert len(np.unique(contexts, axis=0)) == len(contexts) == 125
    task = learner(Pendulum())
    task.use(task.describe(None), "the data")
    returns = task.returns("val")
    assert returns.shape == (27,)
    assert (returns < 0).all()


@pytest.mark.parametrize("environment", [ComplexODE(), DoubleIntegrator(), Pendulum()], ids=lambda e: type(e).__name__)
def test_an_environment_is_the_same_under_a_seed_and_agrees_with_its_spaces(environment):
    def episode(seed):
        env = environment.training(3)
        generator = np.random.default_rng(1)
        seen = [env.reset(seed=seed)[0]]
        for _ in range(5):
            actions = generator.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            observation, rewards, *_ = env.step(actions)
            seen.append({**copy.deepcopy(observation), "reward": rewards})
            assert env.observation_space.contains(observation)
        return seen

    first, again, other = (episode(seed) for seed in (0, 0, 1))
    for one, same in zip(first, again, strict=True):
        assert_close(one, same)
    assert any(not np.allclose(first[0][name], other[0][name]) for name in first[0])


def test_copies_begin_anew_where_their_episodes_end():
    env = ComplexODE([(1.0, 0.0)]).training(2)
    env.reset(seed=0)
    cut = [env.step(np.zeros((2, 2)))[3].all() for _ in range(401)]
    assert [n for n, is_cut in enumerate(cut, 1) if is_cut] == [200, 401]  # the step between begins the second one


def test_a_resumed_environment_goes_on_where_it_was():
    def env():
        made = DoubleIntegrator().training(2)
        made.reset(seed=3)
        return made

    one, other = env(), env()
    action = np.full((2, 2), 0.5)
    for _ in range(99):
        one.step(action)
    other.load_state_dict(one.state_dict())
    for _ in range(4):  # over the end of an episode
        for mine, others in zip(one.step(action), other.step(action), strict=True):
            assert_close(mine, others)


def test_the_log_density_is_that_of_the_transformed_normal():
    actor = Actor(3, 2, 2, small).double()
    observation, context, noise = (torch.randn(5, n, dtype=torch.float64) for n in (3, 2, 2))
    mean, s = actor.network(observation, context).chunk(2, -1)
    std = (-5 + 3.5 * (s.tanh() + 1)).exp()
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, std), torch.distributions.TanhTransform(cache_size=1)
    )
    action = actor.sample(observation, context, noise)
    assert_close(action.value, (mean + std * noise).tanh())
    assert_close(action.log_density, squashed.log_prob(action.value).sum(-1))
    assert_close(actor(observation, context), mean.tanh())


def test_the_losses_are_those_of_soft_actor_critic():
    """Of a batch with ends and without; and each moves its own weights alone."""
    torch.manual_seed(0)
    task = learner(discount=0.9, follow_rate=0.25)
    task.use(task.describe(None), "the data")
    network, alpha = task.network.double(), math.exp(-1)
    network.log_temperature.data.fill_(-1)
    for parameter in network.targets.parameters():
        parameter.add_(torch.randn_like(parameter))
    o, c, a, r, next_o, next_c = (torch.randn(6, n, dtype=torch.float64) for n in (1, 2, 2, 1, 1, 2))
    r, ended = r.squeeze(1), torch.tensor([0.0, 1, 0, 0, 1, 0]).double()
    torch.manual_seed(1)
    told = task.measure(Transitions(o, c, a, r, next_o, next_c, ended), "train")
    told["loss"].value.backward()

    torch.manual_seed(1)
    following, drawn = network.actor.sample(next_o, next_c), network.actor.sample(o, c)
    later = torch.minimum(*(q(next_o, next_c, following.value) for q in network.targets))
    target = torch.where(ended == 1, r, r + 0.9 * (later - alpha * following.log_density)).detach()
    of_critics = sum((q(o, c, a) - target).square().mean() for q in network.critics)
    of_actor = (alpha * drawn.log_density - torch.minimum(*(q(o, c, drawn.value) for q in network.critics))).mean()
    assert_close(told["critic_loss"].value, of_critics)
    assert_close(told["actor_loss"].value, of_actor)
    for part, loss in ((network.critics, of_critics), (network.actor, of_actor)):
        weights = list(part.parameters())
        assert_close([w.grad for w in weights], list(torch.autograd.grad(loss, weights, retain_graph=True)))
    entropy = -drawn.log_density.mean().detach()
    assert_close(network.log_temperature.grad, alpha * (entropy + 2))  # it falls where the entropy is above −2
    assert all(w.grad is None for w in network.targets.parameters())


MEETINGS = [Concat, Diagonal, Projected, Hadamard, MultiplicativeIntegration, Bilinear, LowRank, Hypernetwork]


@pytest.mark.parametrize("integrator", MEETINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [Conditional, MeetingMLP], ids=lambda f: f.__name__)
def test_observation_and_context_meet_by_any_integrator(kind, integrator):
    network = ActorCritic(3, 2, 1, partial(kind, hidden=8, integrator=integrator))
    observation, context, action = torch.randn(4, 3), torch.randn(4, 2), torch.rand(4, 1)
    with network.constant_critics():
        lesser = torch.minimum(*network.values(observation, context, network(observation, context)))
    lesser.sum().backward()
    assert all(p.grad is None for p in network.critics.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.actor.parameters())
    before = copy.deepcopy(network.targets)
    with torch.no_grad():
        for p in network.critics.parameters():
            p.add_(1.0)
    network.follow(0.25)
    for old, new, leader in zip(
        before.parameters(), network.targets.parameters(), network.critics.parameters(), strict=True
    ):
        assert_close(new, old + 0.25 * (leader - old))
    assert_close(network.target(observation, context, action).shape, torch.Size([4]))


def learner(environment=None, **settings):
    given = {"random_steps": 20, "capacity": 500, "batch_size": 16, "epoch": 10, "network": small, "optimizer": Adam}
    return SoftActorCritic(environment or ComplexODE([(1.0, 0.0)]), **{**given, **settings})


@pytest.mark.runs
@pytest.mark.parametrize(("copies", "step", "in_validation"), [(1, 4, False), (1, 10, True), (3, 13, False)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, copies, step, in_validation):
    """With all it remembers, which by then is overwritten in part."""

    def run(folder, *callbacks, ckpt_path=None):
        torch.manual_seed(0)
        task = learner(copies=copies, capacity=30)
        fitted = trainer(tmp_path / folder, *callbacks, ckpt_path=ckpt_path, max_steps=25)
        fitted.fit(TaskModule(task), ckpt_path=ckpt_path, weights_only=True)
        return callbacks[0]

    def of_batch(batch):
        return [part.sum().item() for part in batch]

    whole = run("whole", Record(of_batch))
    first = stopped(run, "part", Record(of_batch), step, in_validation)
    rest = run("part", Record(of_batch), ckpt_path=last(tmp_path / "part"))
    assert len(whole.steps) == 25
    assert_together([first, rest], whole)


def test_a_batch_follows_each_transition_that_is_played():
    def act(seen, generator):
        return torch.zeros(len(seen.observation), 2)

    experience = Experience(ComplexODE(), act, 1000, 4, 10, 10_000, 4, seed=0)
    for given, _ in enumerate(experience, 1):
        assert given <= experience._played - 10 <= given + 6  # 12 random ones, and up to 4 at once
    assert given == len(experience) == 1000


def test_what_an_episode_ends_with_is_remembered():
    """The last step of an episode leads to its own last state, and no transition leads to the next one's start."""
    experience = Experience(ComplexODE([(1.0, 0.0)]), lambda *_: torch.zeros(1, 2), 10, 4, 450, 1000, 1, seed=0)
    next(iter(experience))
    rows = experience._rows[: experience._played]
    x, c, a, _, following, *_, ended = rows.split([1, 2, 2, 1, 1, 2, 1], 1)
    step = 0.01 * (5 * c[:, :1] * 10 * a[:, :1])  # c₁ = 0
    assert_close(following, (x + step).clamp(-20, 20), rtol=0, atol=1e-5)
    assert not ended.any()


@pytest.mark.runs
def test_an_arm_learns_the_ode_of_one_context():
    torch.manual_seed(0)
    network = partial(MeetingMLP, hidden=32)
    hasty = {"discount": 0.9, "follow_rate": 0.02, "critic_rate": 3e-3, "temperature": 0.02}
    sizes = {"batch_size": 64, "random_steps": 400, "epoch": 500, "capacity": 2000}
    task = learner(ComplexODE([(1.0, 0.0)]), network=network, **hasty, **sizes)
    task.use(task.describe(None), "the data")
    optimizer = task.optimizer()
    for batch in task.train_dataloader():
        optimizer.zero_grad()
        task.measure(batch, "train")["loss"].value.backward()
        optimizer.step()
    [result] = task.returns("val")
    assert result > 150, "the best gets 192, who does nothing 10"
    assert set(task.pictures(None)) == {"returns", "episode"}


class Given(Environment):
    """One environment of gymnasium's, as it is."""

    def __init__(self, make):
        self._make = make

    def training(self, copies):
        return gymnasium.vector.SyncVectorEnv([self._make] * copies)

    def evaluation(self, stage):
        return self.training(1)


class Wrong(gymnasium.Env):
    """Gives what it should not."""

    def __init__(self, reward=0.0, x=0.0, width=1, space=None, actions=None, length=None):
        box = gymnasium.spaces.Box(-9, 9, (1,), np.float32)
        self.observation_space = space or gymnasium.spaces.Dict({"context": box, "observation": box})
        self.action_space = actions or gymnasium.spaces.Box(-2, 4, (1,), np.float32)
        self._reward, self._x, self._width, self._length = reward, x, width, length

    def _observation(self, x=0.0):
        return {"context": np.zeros(self._width, np.float32), "observation": np.full(1, x, np.float32)}

    def reset(self, *, seed=None, options=None):
        self._steps = 0
        return self._observation(), {}

    def step(self, action):
        self._steps += 1
        x = self._steps if self._length else self._x
        return self._observation(x), self._reward, self._steps == self._length, False, {}


class Drawing(Wrong):
    """Rewards that each episode draws."""

    def reset(self, *, seed=None, options=None):
        gymnasium.Env.reset(self, seed=seed)
        self._reward = self.np_random.random()
        return super().reset()


def test_the_episodes_of_the_test_are_not_those_that_the_validation_chose_by():
    task = learner(Given(partial(Drawing, length=3)))
    task.use(task.describe(None), "the data")
    val, again, test = (task.returns(stage) for stage in ("val", "val", "test"))
    assert_close(val, again)
    assert not np.allclose(val, test)


def test_only_an_end_of_the_episode_itself_is_remembered_as_one():
    env = Given(partial(Wrong, reward=1.0, length=3))
    experience = Experience(env, lambda *_: torch.zeros(2, 1), 10, 4, 12, 100, 2, seed=0)
    next(iter(experience))
    x, _, _, reward, following, _, ended = experience._rows[:12].split([1] * 7, 1)
    steps = torch.tensor([0.0, 0, 1, 1, 2, 2] * 2)[:, None]
    assert_close(x, steps)
    assert_close(following, steps + 1)
    assert_close(ended, (steps == 2).float())
    assert_close(reward, torch.ones(12, 1))


BOX = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
NAMED = {"context": gymnasium.spaces.Discrete(3), "observation": BOX}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": float("nan")}, "the reward .*nan.*, expected finite"),
        ({"x": float("inf")}, "'observation' is .*inf.*, expected finite"),
        ({"space": BOX}, "observation space is Box.*, expected a Dict with `context`"),
        ({"space": gymnasium.spaces.Dict({"observation": BOX})}, "expected a Dict with `context`"),
        ({"space": gymnasium.spaces.Dict(NAMED)}, "'context' in Discrete.*, expected a Box"),
        ({"width": 2}, "what it gave does not fit its observation space: .*wrong shape"),
        ({"actions": gymnasium.spaces.Box(0, 3, (1,), np.int64)}, "action space is .*int64.*, expected a bounded Box"),
    ],
)
def test_an_environment_that_does_not_fit_is_told(settings, message):
    task = learner(Given(partial(Wrong, **settings)))

    def train():
        task.use(task.describe(None), "the data")
        next(iter(task.train_dataloader()))

    with pytest.raises(ExperimentError, match=message):
        train()


@pytest.mark.parametrize("contexts", [[], [(1.0,)], [(1.0, 2.0, 3.0)], [(1.0, float("nan"))]], ids=str)
def test_contexts_that_are_no_pairs_are_refused(contexts):
    with pytest.raises(ExperimentError, match=r"training_contexts are .*, expected pairs of finite numbers"):
        ComplexODE(contexts)


def test_data_are_refused():
    with pytest.raises(ExperimentError, match="the data are AffineTasks, expected none"):
        learner().describe(AffineTasks())


def test_a_checkpoint_of_another_capacity_is_refused():
    state = learner().train_dataloader().state_dict()
    with pytest.raises(ExperimentError, match="capacity 500, got 400"):
        learner(capacity=400).train_dataloader().load_state_dict(state)


def test_copies_that_begin_anew_in_the_same_step_are_refused():
    made = partial(gymnasium.vector.SyncVectorEnv, [Wrong])
    with pytest.raises(ExperimentError, match=r"autoreset mode is .*SAME_STEP, expected NEXT_STEP"):
        Spaces.of(made(autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP))


def test_a_context_of_another_width_is_told():
    spaces = Spaces.of(ComplexODE().training(1))
    wrong = {"context": np.zeros((1, 3)), "observation": np.zeros((1, 1))}
    with pytest.raises(ExperimentError, match=r"'context' of the shape \(3,\), expected \(2,\)"):
        spaces.streams(wrong)


def test_actions_fill_the_environments_own_bounds():
    env = gymnasium.vector.SyncVectorEnv([Wrong])
    spaces = Spaces.of(env)
    assert_close(spaces.scaled(np.array([[-1.0], [0.0], [1.0]]), env), np.array([[-2.0], [1.0], [4.0]], np.float32))


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("Pendulum-v9", "Pendulum-v9: .*"),
        ("Pendulumm-v1", "Did you mean 'Pendulum-v1'"),
        ("os:Pendulum-v1", "no trusted module"),
        ("Pendulum-v1", "expected a Dict with `context`"),
    ],
)
def test_an_id_that_does_not_fit_is_told(id, message):
    with pytest.raises(ExperimentError, match=message):
        learner(Gymnasium(id)).describe(None)


@pytest.mark.parametrize(
    "settings",
    [
        {"copies": 0},
        {"epoch": 0},
        {"batch_size": 0},
        {"capacity": 0},
        {"random_steps": -1},
        {"discount": 1.5},
        {"follow_rate": -0.1},
        {"critic_rate": 0.0},
        {"temperature": 0.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_setting_out_of_range_is_told(settings):
    with pytest.raises(ExperimentError, match=f"{next(iter(settings))} is .*, expected"):
        learner(**settings)
