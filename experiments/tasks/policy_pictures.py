"""What a policy does, drawn."""

from typing import TYPE_CHECKING

import numpy as np

from experiments.environments.environment import Film
from experiments.environments.evaluation import Played

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FRAMES_IN_A_ROW = 8


def draw_returns(played: Played) -> "Figure":
    """The return over the plane of the contexts, or over each of their numbers where these are not two."""
    from matplotlib.figure import Figure

    returns, features = played.returns, played.contexts.shape[1]
    if features == 2:
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.subplots()
        of_x, of_y = (np.unique(column) for column in played.contexts.T)
        mean = np.full((len(of_y), len(of_x)), np.nan)
        for x, y in np.ndindex(len(of_x), len(of_y)):
            here = (played.contexts == (of_x[x], of_y[y])).all(1)
            if here.any():
                mean[y, x] = returns[here].mean()
        figure.colorbar(axes.pcolormesh(of_x, of_y, mean, shading="nearest"), label="return")
        axes.set(xlabel="context 1", ylabel="context 2")
    else:
        figure = Figure(figsize=(4 * features, 4), layout="constrained")
        for number, axes in enumerate(figure.subplots(1, features, squeeze=False)[0], 1):
            axes.plot(played.contexts[:, number - 1], returns, ".")
            axes.set(xlabel=f"context {number}", ylabel="return")
    figure.suptitle(f"{len(returns)} episodes, mean return {returns.mean():.1f}")
    return figure


def draw_episode(played: Played) -> "Figure":
    """What was seen, done and got in the first episode."""
    from matplotlib.figure import Figure

    length = int(played.are_part[:, 0].sum())
    figure = Figure(figsize=(8, 7), layout="constrained")
    rows = {"observation": played.observations, "action": played.actions, "reward": played.rewards[..., None]}
    for axes, (name, values) in zip(figure.subplots(3, 1, sharex=True), rows.items(), strict=True):
        axes.plot(values[:length, 0])
        axes.set_ylabel(name)
    figure.axes[-1].set_xlabel("step")
    context = ", ".join(f"{number:.2f}" for number in played.contexts[0])
    figure.suptitle(f"context ({context}), return {played.rewards[:, 0].sum():.1f}")
    return figure


def draw_film(film: Film, result: float) -> "Figure":
    """An episode's pictures, one after the other, row by row."""
    from matplotlib.figure import Figure

    rows = -(-len(film.frames) // _FRAMES_IN_A_ROW)
    columns = min(len(film.frames), _FRAMES_IN_A_ROW)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows + 0.5), layout="constrained")
    for step, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if step < len(film.frames):
            axes.imshow(film.frames[step])
            axes.set_title(film.captions[step], fontsize=8)
    figure.suptitle(f"{film.title}, return {result:.2f}")
    return figure
