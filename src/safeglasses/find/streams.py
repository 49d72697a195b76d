"""Whose tokens a way of pooling finds at a site: the decoder's, an encoder's, or the patches of a picture.

Patches are no columns of a batch: a tower cuts pictures as it likes and may put those of several chats into one row.
So where such sites are watched one chat runs at a time, and a value is pooled over all that the map wrote (or read) for
the chat's pictures, whatever the tower pads itself with included.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find.blocks import nan_error
from safeglasses.find.pools import Pool, Window
from safeglasses.model.anatomy import Anatomy
from safeglasses.model.chat import Batch
from safeglasses.model.outside import Stream
from safeglasses.model.sites import Site

Windows = Mapping[Stream, Sequence[Window | None]]
"""Per stream, for every pool where its tokens lie; None: it has none there (of patches: see `reaches`)."""


def reaches(pool: Pool, stream: Stream, of_both: bool) -> bool:
    """Tell whether a pool's span has tokens of a stream.

    Patches are the span ``image``, so ``prompt`` and ``all`` hold them too, but do not end with one.

    Args:
        pool: the way of pooling.
        stream: whose tokens.
        of_both: whether the model is an encoder–decoder, whose decoder reads no prompt.
    """
    if stream == "picture":
        return pool.span == "image" or (pool.span in ("prompt", "all") and pool.how != "last")
    if stream == "encoder":
        return pool.span not in ("response", "thought")
    return not (of_both and pool.span in ("image", "text"))


def streams_of(anatomy: Anatomy, sites: Sequence[Site], pools: Sequence[Pool]) -> dict[Site, Stream]:
    """Return whose tokens are at every site.

    Raises:
        SafeglassesError: no way of pooling has tokens at a site, or one has tokens at no site.
    """
    found: dict[Site, Stream] = {site: anatomy.stream(site) for site in sites}
    of_both = anatomy.encoder_path is not None
    kinds: set[Stream] = set(found.values())
    bare = next((s for s, stream in found.items() if not any(reaches(p, stream, of_both) for p in pools)), None)
    idle = next((p for p in pools if not any(reaches(p, stream, of_both) for stream in kinds)), None)
    if bare is not None:
        raise _nothing("no token to pool over at this site", f"{bare} with {', '.join(map(str, pools))}", found[bare])
    if idle is not None and found:
        raise _nothing("this way of pooling has no token anywhere", str(idle), next(iter(found.values())))
    return found


def _nothing(what: str, given: str, stream: Stream) -> SafeglassesError:
    wanted: dict[Stream, str] = {
        "picture": "image:max, image:mean or another pool over image; prompt or all but not their last token",
        "encoder": "a pool over image, text, prompt or all: an encoder reads no response",
        "decoder": "a pool over prompt (the start token, which has seen the whole prompt), response or all",
    }
    return SafeglassesError(
        what,
        given=given,
        expected=wanted[stream],
        do="add a way of pooling that has tokens there, or leave the site out",
    )


def gaps_of(anatomy: Anatomy, sites: Sequence[Site], pools: Sequence[Pool]) -> Bool[Tensor, " neuron"] | None:
    """Return at which neurons of these sites samples may lack a value; None: at none."""
    of_both = anatomy.encoder_path is not None
    parts = []
    for site in sites:
        stream: Stream = "decoder" if anatomy.expert(site) is not None else anatomy.stream(site)
        lacking = stream == "picture" or not all(reaches(pool, stream, of_both) for pool in pools)
        parts.append(torch.full((anatomy.width(site),), lacking or anatomy.expert(site) is not None))
    gaps = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)
    return gaps if gaps.any() else None


def windows_of(batch: Batch, pools: Sequence[Pool], streams: set[Stream], ids: Sequence[str]) -> Windows:
    """Find the pools' tokens in a batch.

    Args:
        batch: encoded chats.
        pools: which tokens, and how they are summarised.
        streams: whose tokens are wanted.
        ids: names of the rows for error messages.

    Raises:
        BadRow: a row has no token in a span.
    """
    of_both = batch.encoder is not None
    sides: dict[Stream, Batch] = {"decoder": batch, "encoder": batch.asked}
    return {
        stream: [Window.of(sides[stream], p, ids) if reaches(p, stream, of_both) else None for p in pools]
        for stream in streams
        if stream != "picture"
    }


def pooled_patches(
    site: Site, values: Sequence[Float[Tensor, "..."]], pools: Sequence[Pool], width: int, dtype: torch.dtype
) -> Float[Tensor, "pool 1 _neuron"]:
    """Summarise all that a map wrote for one chat's pictures; NaN where a pool has no patches, or there are none.

    Raises:
        SafeglassesError: a value is NaN.
    """
    rows = [value.reshape(1, -1, width) for value in values]
    if not rows:
        return torch.full((len(pools), 1, width), torch.nan, dtype=dtype)
    patches = torch.cat(rows, dim=1)
    n = patches.shape[1]
    every = ((slice(0, n), None),)
    count, last = torch.full((1, 1), n, device=patches.device), torch.full((1,), n - 1, device=patches.device)
    pooled = [
        Window(pool.how, every, count, last).reduce(patches).to(dtype)
        if reaches(pool, "picture", False)
        else patches.new_full((1, width), torch.nan, dtype=dtype)
        for pool in pools
    ]
    for pool, one in zip(pools, pooled, strict=True):
        if reaches(pool, "picture", False):
            check_numbers(site, one)
    return torch.stack(pooled)


def check_numbers(site: Site, pooled: Float[Tensor, "sample _neuron"]) -> None:
    """Refuse NaN where it would be taken for a sample without a value.

    Raises:
        SafeglassesError: naming the first neuron.
    """
    nan = pooled.isnan()
    if bool(nan.any()):
        neuron = int(nan.nonzero()[0, 1])
        error = nan_error(neuron)
        raise SafeglassesError(error.what, given=site.neuron(neuron), do=error.do)
