"""What rules about safety neurons look at: averages of a neuron's values over some prompts."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Averages:
    """Of one class of prompts; leading axes, if any, are resamples of the prompts."""

    count: Float[Tensor, "*resample"]
    """Prompts, those drawn twice counted twice."""
    mean: Float[Tensor, "*resample neuron"]
    """Mean value, each prompt alike: negative and positive values cancel."""
    mean_abs: Float[Tensor, "*resample neuron"]
    """Mean magnitude; over several tokens of a prompt the mean of their magnitudes."""
    sd: Float[Tensor, "*resample neuron"]
    """Standard deviation over prompts, with n − 1; NaN for a single prompt."""
    rms: Float[Tensor, "*resample neuron"]
    """Root mean square over tokens and prompts, each prompt alike."""
    in_top: Float[Tensor, "*resample neuron"]
    """Share of the prompts on which the neuron is among the layer's k most important."""

    def at(self, resample: int) -> "Averages":
        """Return those of one resample."""
        parts = (self.count, self.mean, self.mean_abs, self.sd, self.rms, self.in_top)
        return Averages(*(part[resample] for part in parts))


@dataclass(frozen=True)
class Values:
    """Values of one layer's neurons on some prompts, float64."""

    value: Float[Tensor, "prompt neuron"]
    """The activation at the last token, or its mean over the tokens looked at."""
    magnitude: Float[Tensor, "prompt neuron"]
    """The same of magnitudes."""
    square: Float[Tensor, "prompt neuron"]
    """The same of squares."""
    top: Float[Tensor, "prompt neuron"]
    """1 where the neuron is among the layer's k most important on that prompt."""

    def take(self, rows: list[int]) -> "Values":
        """Return those of some prompts."""
        return Values(*(part[rows] for part in (self.value, self.magnitude, self.square, self.top)))

    def averages(self, weights: Float[Tensor, "resample prompt"]) -> Averages:
        """Average over prompts, each counted as often as its weight says; of none (see ``count``) they say nothing."""
        count = weights.sum(dim=1)
        every = count.clamp(min=1)[:, None]  # an expert may be met by no prompt of a half
        offset = self.value.mean(dim=0)  # large means do not cancel in the spread
        off = self.value - offset
        shift = weights @ off / every
        spread = weights @ off.square() - every * shift.square()
        return Averages(
            count=count,
            mean=offset + shift,
            mean_abs=weights @ self.magnitude / every,
            sd=(spread.clamp(min=0) / (every - 1)).sqrt(),
            rms=(weights @ self.square / every).sqrt(),
            in_top=weights @ self.top / every,
        )
