"""The wrapper by which a pendulum's physics are drawn, and told."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

_MOST = 10.0


class PendulumContext(gymnasium.Wrapper, RecordConstructorArgs):
    """Draws gravity, mass and length of gymnasium's pendulum when an episode begins, and tells them as `context`.

    Args:
        env: `Pendulum-v1`.
        contexts: those that are drawn from, as shares (K, 3) of the values that the pendulum has when it is wrapped,
            each below 10.
    """

    def __init__(self, env: gymnasium.Env, contexts: np.ndarray) -> None:
        RecordConstructorArgs.__init__(self, contexts=contexts)  # gymnasium builds it again from these
        gymnasium.Wrapper.__init__(self, env)
        self._contexts, self._context = np.asarray(contexts, np.float32), np.zeros(3, np.float32)
        physics: Any = env.unwrapped
        self._usual = physics.g, physics.m, physics.l
        box = spaces.Box(0.0, _MOST, (3,), np.float32)  # the same for all contexts, so that copies fit together
        self.observation_space = spaces.Dict({"context": box, "observation": env.observation_space})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        physics: Any = self.env.unwrapped
        self._context = self._contexts[physics.np_random.integers(len(self._contexts))]
        physics.g, physics.m, physics.l = (float(u * c) for u, c in zip(self._usual, self._context, strict=True))
        return self._seen(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, ended, is_cut, info = self.env.step(action)
        return self._seen(observation), float(reward), ended, is_cut, info

    def _seen(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return {"context": self._context.copy(), "observation": observation}
