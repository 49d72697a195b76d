"""Factors per site, and the few things done with them everywhere."""

from collections.abc import Iterable, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.model.sites import Site

FOLD = "fold them into the checkpoint, which any runtime serves then: safeglasses fold MODEL --glasses FOLDER --out OUT"
Factors = Mapping[Site, Float[Tensor, " _neuron"]]
"""One vector per site; sites have different widths."""


def in_order(sites: Iterable[Site]) -> list[Site]:
    """Sort sites by layer, then by path and side: the order of every file."""
    return sorted(sites, key=lambda site: (site.layer, site.path, site.side))


def effective(factors: Factors, strength: float | int) -> dict[Site, Float[Tensor, " _neuron"]]:
    """Return factors as they act at a strength λ: 1 − λ(1 − α), float32; λ = 1 gives the very same."""
    if strength == 1:
        return dict(factors)
    return {site: (1 - strength * (1 - row.double())).float() for site, row in factors.items()}


def by_head(factors: Factors, heads: Mapping[Site, int]) -> dict[Site, Float[Tensor, " _neuron"]]:
    """Give all neurons of an attention head the mean of their factors; sites without heads stay as they are.

    Args:
        factors: per site; gradients flow through.
        heads: per site how many heads lie one behind the other.
    """
    return {
        site: row.view(heads[site], -1).mean(dim=1).repeat_interleave(len(row) // heads[site]) if site in heads else row
        for site, row in factors.items()
    }


def changed(factors: Factors) -> dict[Site, Float[Tensor, " _neuron"]]:
    """Leave out the sites where every factor is 1."""
    return {site: row for site, row in factors.items() if bool((row != 1).any())}


def count(factors: Factors) -> int:
    """Count the neurons whose factor is not 1."""
    return sum(int((row != 1).sum()) for row in factors.values())


def refuse_fused(factors: Factors, what: str, do: str = FOLD) -> None:
    """Refuse factors of fused experts where only linear maps can be scaled.

    Args:
        factors: per site.
        what: is without a place for them, e.g. ``an IA3 adapter``.
        do: what else there is.

    Raises:
        SafeglassesError: naming the first such site, and how many there are.
    """
    why = f"{what} cannot carry factors of fused experts: they are slices of parameters, not modules"
    _refuse([site for site in in_order(factors) if site.fused], factors, why, "factors of linear maps", do)


def refuse_outside(factors: Factors, what: str, do: str = FOLD) -> None:
    """Refuse factors beyond the decoder where what reads the file looks at the decoder alone.

    Args:
        factors: per site.
        what: leaves them out, e.g. ``a LoRA for servers``.
        do: what else there is.

    Raises:
        SafeglassesError: naming the first such site, and how many there are.
    """
    why = f"{what} reaches the language decoder alone: on vision towers, projectors and encoders it would do nothing"
    _refuse([site for site in in_order(factors) if site.outside], factors, why, "factors of the decoder's own maps", do)


def _refuse(found: Sequence[Site], factors: Factors, why: str, expected: str, do: str) -> None:
    if found:
        given = f"{found[0]}, one of {len(found):,} such sites of {len(factors):,}"
        raise SafeglassesError(why, given=given, expected=expected, do=do)


def check_factors(factors: Factors) -> None:
    """Refuse factors that are no finite vectors.

    Raises:
        SafeglassesError: naming the site.
    """
    for site, row in factors.items():
        infinite = int((~row.isfinite()).sum())
        if row.ndim != 1 or not row.is_floating_point() or infinite:
            raise SafeglassesError(
                "factors must be finite numbers, one per neuron",
                given=f"{site}: shape {tuple(row.shape)}, {row.dtype}, {infinite} not finite",
            )
