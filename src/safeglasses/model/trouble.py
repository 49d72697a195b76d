"""What is said where a model does not have what is asked of its anatomy."""

from collections.abc import Iterable, Sequence

from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.model.blocks import ATTENTION
from safeglasses.model.sites import Site

_LIST = "list the model's sites with `safeglasses inspect MODEL`"


def no_linears(layers: int, path: str) -> SafeglassesError:
    """Nothing in the layers is a linear map."""
    return SafeglassesError(
        "the decoder has no linear maps",
        given=f"{layers} layers under {path!r}",
        expected="torch.nn.Linear or Conv1D modules inside the layers",
        do="load the model unquantised, or in a format whose layers are torch.nn.Linear",
    )


def no_blocks(reason: str, linears: Iterable[str]) -> SafeglassesError:
    """No feed-forward block was found among these linear maps."""
    kinds = "the attention's linear maps only" if all(map(ATTENTION.search, linears)) else "the linear maps that exist"
    return SafeglassesError(
        "the decoder's feed-forward blocks have no linear maps of their own",
        given=reason,
        expected="one linear map per layer, outside attention, that writes the residual stream",
        do=f'use sites="linears": on this model it acts on {kinds}',
    )


def no_side(site: Site) -> PartialMatch:
    """The side is one of experts, not of this linear map."""
    return PartialMatch(
        f"a linear map has no side {site.side!r}",
        given=str(site),
        expected=f"{site.path}:in or {site.path}:out; halves of a fused map are parts of its :out",
        do=_LIST,
    )


def no_modules(fused: Sequence[str]) -> PartialMatch:
    """Linear maps are wanted, and these are fused experts."""
    return PartialMatch(
        "fused experts are no modules: this works on linear maps alone",
        given=f"{', '.join(fused[:3])}{' …' if len(fused) > 3 else ''}: slices of 3-D parameters",
        expected="linear maps",
        do='use sites="linears", which leaves fused experts out',
    )


def missing(paths: Sequence[str], asked: int, linears: Sequence[str]) -> PartialMatch:
    """Of the paths asked for, these are no linear maps."""
    known = f"one of {len(linears)}, {linears[0]} … {linears[-1]}" if linears else ""
    return PartialMatch(
        f"{len(paths)} of {asked} modules are not linear maps of this decoder",
        given=", ".join(paths[:3]) + (" …" if len(paths) > 3 else ""),
        expected=known or "none: the decoder has no linear maps",
        do=_LIST,
    )


def merged(site: Site) -> SafeglassesError:
    """The map reads the decoder's tokens and the encoder's."""
    return SafeglassesError(
        "keys and values of the decoder and of the encoder go through one map",
        given=str(site),
        expected="a map that reads one kind of tokens",
        do="leave the site out; glasses on it can be worn and folded",
    )


def other_tokens(site: Site) -> PartialMatch:
    """The map reads other tokens than the decoder's."""
    return PartialMatch(
        "this works on what the decoder's own tokens pass",
        given=f"{site}: its tokens are not the decoder's",
        expected="linear maps of the decoder",
        do="leave the site out",
    )
