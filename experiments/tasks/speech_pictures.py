"""What a recogniser hears, drawn."""

from typing import TYPE_CHECKING

from torch import Tensor

from experiments.data.speech import FrontEnd, Units, Utterance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEEN = 0.1  # a label that is never likelier than that is not drawn
_SHIFT = 0.01  # seconds between two frames, before stacking


def posteriors(
    utterance: Utterance,
    probabilities: Tensor,  # (T, V)
    units: Units,
    front_end: FrontEnd,
) -> "Figure":
    """The spectrogram above, or the features that there are, and the labels' posteriors over time below."""
    from matplotlib.figure import Figure

    seconds = _SHIFT * front_end.stack
    duration = seconds * len(probabilities)
    spectrum = utterance.features.view(len(probabilities), front_end.stack, -1)[:, :, : front_end.static].flatten(0, 1)
    figure = Figure(figsize=(10, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.imshow(spectrum.T.numpy(), origin="lower", aspect="auto", extent=(0, duration, 0, front_end.static))
    upper.set_ylabel("mel band" if front_end.sample_rate else "cepstrum")
    upper.set_title(f"{utterance.name}: {utterance.text}", fontsize="small")
    times = [seconds * (t + 0.5) for t in range(len(probabilities))]
    lower.plot(times, probabilities[:, 0].numpy(), color="lightgray", label="blank")
    for label, symbol in enumerate(units.symbols, start=1):
        curve = probabilities[:, label].numpy()
        if curve.max() > _SEEN:
            lower.plot(times, curve, label="space" if symbol == " " else symbol)
    lower.set(xlabel="seconds", ylabel="posterior", ylim=(0, 1.02), xlim=(0, duration))
    lower.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="x-small", ncols=2)
    return figure
