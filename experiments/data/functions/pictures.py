"""Pictures of predictions beside what there was to predict."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.data.batch_streams import generator_of
from experiments.data.functions import gaussian_process
from experiments.data.functions.batches import Sizes
from experiments.data.functions.function_sets import GaussianProcess, Groups, Pictures, Predict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4  # context sizes in a picture
_GRID = 200
_SHOWN = 8  # draws of z


def curves(sets: Mapping[str, GaussianProcess], sizes: Sizes, predict: Predict, seed: int) -> "Figure":
    """A curve of each set by context size: prediction and samples, the exact process's prediction, and the truth."""
    figure, panels = _panels(len(sets), contexts := _context_sizes(sizes))
    for (name, functions), row in zip(sets.items(), panels, strict=True):
        generator = generator_of(0, "pictures", seed, name)
        low, high = functions.x_range
        points = max(contexts)
        observed = low + (high - low) * torch.rand(points, dtype=torch.float64, generator=generator)
        x = torch.cat([observed, torch.linspace(low, high, _GRID, dtype=torch.float64)]).unsqueeze(0)
        parameters = functions.kernel.parameters(1, generator)
        clean = functions.kernel.covariance(x.unsqueeze(-1) - x.unsqueeze(-2), parameters)
        noise = torch.randn(2, 1, x.shape[1], 1, dtype=torch.float64, generator=generator)
        f = (gaussian_process.cholesky(clean) @ noise[0]).squeeze(-1)
        y = f + functions.noise * noise[1].squeeze(-1)
        grid = x[:, points:]
        noisy = functions.covariance(x, parameters)
        for axes, c in zip(row, contexts, strict=True):
            _draw_prediction(axes, predict, (x[:, :c], y[:, :c]), grid)
            of_context, across = noisy[:, :c, :c], noisy[:, points:, :c]
            exact = gaussian_process.posterior(
                of_context, across, noisy.diagonal(dim1=-2, dim2=-1)[:, points:], y[:, :c]
            )
            for sign in (-2, 0, 2):
                label = {"label": "exact process, ± 2σ"} if sign == 0 else {}
                axes.plot(
                    grid[0], (exact.mean + sign * exact.std)[0], color="C1", linewidth=0.8, linestyle="--", **label
                )
            axes.plot(grid[0], f[0, points:], color="black", linewidth=1, label="truth")
            axes.plot(x[0, :c], y[0, :c], "k.", label="context")
            axes.set_title(f"{name}, {c} points", fontsize="small")
    panels[0][0].legend(fontsize="x-small")
    return figure


def completions(functions: Pictures, sizes: Sizes, predict: Predict, seed: int, images: int = 3) -> "Figure":
    """Images as they are, and for each context size what is seen, the predicted brightness and its deviation."""
    from matplotlib.figure import Figure

    contexts = _context_sizes(sizes)
    generator = generator_of(0, "pictures", seed)
    chosen = torch.randperm(len(functions.images), generator=generator)[:images]
    height, width = functions.images.shape[1:]
    figure = Figure(figsize=(1.5 * (1 + len(contexts)), 1.6 * 3 * len(chosen)), layout="constrained")
    panels = figure.subplots(3 * len(chosen), 1 + len(contexts), squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for number, image in enumerate(chosen):
        values = functions.values(image.unsqueeze(0))
        order = torch.rand(len(functions.places), generator=generator).argsort()
        rows = panels[3 * number : 3 * number + 3]
        rows[0][0].imshow(values.view(height, width).numpy(), cmap="gray", vmin=0, vmax=1)
        rows[0][0].set_title("truth", fontsize="small")
        places = functions.places.unsqueeze(0)
        predicted = [_mixture(*predict(places[:, order[:c]], values[:, order[:c]], places)) for c in contexts]
        highest = max(float(std.max()) for _, std in predicted)
        for column, (c, (mean, std)) in enumerate(zip(contexts, predicted, strict=True), start=1):
            seen = order[:c]
            rgb = torch.tensor([0.15, 0.25, 0.6]).repeat(len(functions.places), 1)  # blue: not seen
            rgb[seen] = values[0, seen].expand(-1, 3)
            rows[0][column].imshow(rgb.view(height, width, 3).numpy())
            rows[0][column].set_title(f"{c} pixels", fontsize="small")
            for axes, shown, title, most in (
                (rows[1][column], mean, "mean", 1),
                (rows[2][column], std, f"deviation, 0 to {highest:.2f}", highest),
            ):
                axes.imshow(shown.view(height, width).numpy(), cmap="gray", vmin=0, vmax=most)
                axes.set_title(title, fontsize="x-small")
    return figure


def groups(functions: Groups, sizes: Sizes, predict: Predict, seed: int, x_name: str, y_name: str) -> "Figure":
    """Groups by context size: of one input the curve that is predicted, of several predicted against true values."""
    assert functions.count is not None
    contexts = _context_sizes(sizes)
    chosen = range(min(3, functions.count))
    figure, panels = _panels(len(chosen), contexts)
    for group, row in zip(chosen, panels, strict=True):
        size = int(functions.sizes[group])
        order = torch.randperm(size, generator=generator_of(group, "pictures", seed))
        x, y = functions.x[group, order], functions.y[group, order]
        for axes, wanted in zip(row, contexts, strict=True):
            c = min(wanted, size - 1)
            axes.set_title(f"{functions.names[group]}, {c} rows", fontsize="small")
            if functions.x_features == 1 and functions.y_features == 1:
                grid = torch.linspace(float(x.min()), float(x.max()), _GRID).unsqueeze(0)
                _draw_prediction(axes, predict, (x[:c].mT, y[:c].mT), grid)
                axes.plot(x[c:, 0], y[c:, 0], ".", color="gray", label="held out")
                axes.plot(x[:c, 0], y[:c, 0], "k.", label="context")
                axes.set(xlabel=x_name, ylabel=y_name)
                continue
            mean, std = _mixture(*predict(x[:c].unsqueeze(0), y[:c].unsqueeze(0), x[c:].unsqueeze(0)))
            axes.errorbar(y[c:, 0], mean[0, :, 0], 2 * std[0, :, 0], fmt=".", linewidth=0.5, label="± 2σ")
            axes.axline((0, 0), slope=1, color="black", linewidth=0.5)
            axes.set(xlabel=f"{y_name}, true", ylabel="predicted")
    panels[0][0].legend(fontsize="x-small")
    return figure


def _draw_prediction(axes: Any, predict: Predict, context: tuple[Tensor, Tensor], grid: Tensor) -> None:
    """The mean, the band of ± 2σ and, where there is a latent path, the means of some draws of z."""
    x, y = (values.float().unsqueeze(-1) for values in context)  # (1, C, 1)
    means, stds = predict(x, y, grid.float().unsqueeze(-1))
    mean, std = (values[0, :, 0] for values in _mixture(means, stds))
    axes.fill_between(grid[0], mean - 2 * std, mean + 2 * std, color="C0", alpha=0.2, label="prediction, ± 2σ")
    if len(means) > 1:
        axes.plot(grid[0], means[:_SHOWN, 0, :, 0].mT, color="C0", linewidth=0.5, alpha=0.5)
    axes.plot(grid[0], mean, color="C0", linewidth=1.2)


def _mixture(means: Tensor, stds: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the mixture over draws, (B, N, Y) each of (K, B, N, Y)."""
    mean = means.mean(0)
    return mean, (stds.square() + (means - mean).square()).mean(0).sqrt()


def _context_sizes(sizes: Sizes) -> list[int]:
    low, high = sizes.context
    steps = [low + round((high - low) * (step / (_COLUMNS - 1)) ** 2) for step in range(_COLUMNS)]  # denser below
    return sorted(set(steps))


def _panels(rows: int, contexts: list[int]) -> tuple["Figure", Any]:
    # Imported here because it takes a second, which who draws nothing need not wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(contexts), 2.4 * rows), layout="constrained")
    return figure, figure.subplots(rows, len(contexts), squeeze=False, sharey="row")
