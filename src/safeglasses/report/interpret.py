"""Describe the neurons that glasses turn down most: what they promote, fire on, and are driven by."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.data.examples import Example, Picture, Text, Video
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import SafeglassesError
from safeglasses.find.capture import Activations, capture
from safeglasses.find.evidence import Evidence
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.report.directions import Direction, Words, direction, words
from safeglasses.report.record import THUMBNAIL, Drive, Expertise, Firing, NeuronCard

SEARCHED = 192
"""Examples among which the most active ones are looked for."""
CROSSED = 12
"""Pairs of examples whose pictures and texts are swapped: two captures of 24 examples."""
FEWEST_PAIRS = 4
"""Below that there is no share of picture and text."""
_Pair = tuple[Example, Example]


@dataclass(frozen=True)
class _Neuron:
    """One chosen neuron and the pooling that found it."""

    site: Site
    """Where it is."""
    index: int
    """Its index in the site."""
    factor: float
    """Its effective factor."""
    pool: int
    """Index of the pooling with the highest AUROC."""

    def of(self, activations: Activations) -> Float[Tensor, " sample"]:
        """Return its pooled activations, float32."""
        return activations.values[self.site][self.pool, self.index].float().cpu()


def top_neurons(
    vlm: VLM, glasses: Glasses, evidence: Evidence, examples: Sequence[Example], k: int = 12
) -> list[NeuronCard]:
    """Describe the neurons that the glasses turn down most; among equals the highest AUROC first.

    Promoted tokens are read through the logit lens; see `directions.direction` for which vector that is. The
    most active examples, and picture against text, go by the pooling in which the neuron's AUROC is highest.

    *Picture or text* is a two-way analysis of variance. Up to twelve pairs of examples (one toxic, one not,
    other picture, other text) are crossed: both as they are, and both with the pictures exchanged. A pair's
    four pooled activations split into the main effect of the picture, that of the text (prompt and response
    together) and their interaction, whose squares are summed over pairs and divided by their total. So a
    share of 0.8 for text means: 80 % of what varies inside the pairs follows the text, whichever picture it
    comes with. There is no such number with fewer than four pairs, or if nothing varies.

    Args:
        vlm: the untouched model.
        glasses: whose neurons.
        evidence: AUROC per site and pool; every changed site must be in it.
        examples: labelled examples with responses, e.g. the find split; at most 192 of them are run.
        k: how many neurons.

    Raises:
        SafeglassesError: a changed site is not in the evidence, or an example cannot be run.
    """
    chosen = _ranked(glasses, evidence, k)
    usable = [e for e in examples if e.response]
    if not chosen or not usable:
        return []
    sites = tuple(dict.fromkeys(n.site for n in chosen))
    seen = _both_classes(usable, SEARCHED)
    activations = capture(vlm, seen, sites=sites, pools=evidence.pools)
    drives = _drives(vlm, chosen, sites, evidence, usable)
    directions = [direction(vlm, n.site, n.index) for n in chosen]
    return [
        NeuronCard(
            neuron=vlm.anatomy.address(neuron.site, neuron.index),
            factor=neuron.factor,
            expertise=_expertise(evidence, neuron),
            promoted=read.promoted,
            demoted=read.demoted,
            direction=found.said,
            fires_on=_fires_on(neuron, activations, seen),
            fires_pool=str(evidence.pools[neuron.pool]),
            drive=drive,
        )
        for neuron, found, read, drive in zip(chosen, directions, _read(vlm, directions), drives, strict=True)
    ]


def prompt_text(example: Example) -> str:
    """Return the words of a prompt; the roles are named if there is more than one turn."""
    turns = [" ".join(p.text for p in turn.content if isinstance(p, Text)).strip() for turn in example.messages]
    if len(turns) == 1:
        return turns[0]
    return "\n".join(f"{turn.role}: {text}" for turn, text in zip(example.messages, turns, strict=True))


def thumbnails(example: Example, size: int = THUMBNAIL) -> tuple[bytes, ...]:
    """Return the prompt's pictures as PNG of at most `size` pixels a side; of a video the first, middle and last frame.

    Raises:
        BadRow: a picture has gone or has been damaged since it was read.
    """
    shown = (_some_frames(part) if isinstance(part, Video) else (part,) for part in example.media)
    return tuple(thumbnail(picture, size) for pictures in shown for picture in pictures)


def thumbnail(picture: Picture, size: int = THUMBNAIL) -> bytes:
    """Return one picture as PNG of at most `size` pixels a side, metadata left out.

    Raises:
        BadRow: as in `thumbnails`.
    """
    image = picture.open()
    image.info.clear()
    image.thumbnail((size, size))
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _some_frames(video: Video) -> list[Picture]:
    last = len(video.frames) - 1
    return [video.frames[place] for place in sorted({0, last // 2, last})]


def _ranked(glasses: Glasses, evidence: Evidence, k: int) -> list[_Neuron]:
    found: list[tuple[float, float, int, _Neuron]] = []
    rated = [evidence.rated(pool) for pool in evidence.pools]
    for order, (site, factors) in enumerate(glasses.effective().items()):
        rows = torch.nonzero(factors != 1)[:, 0].tolist()
        if not rows:
            continue
        if site not in evidence.auroc:
            raise SafeglassesError(
                "the glasses change neurons that the evidence does not know",
                given=str(site),
                expected=f"one of its {len(evidence.auroc)} sites",
                do="describe glasses with the evidence that they were made from",
            )
        known = torch.stack([masks[site] for masks in rated])
        best, pool = evidence.auroc[site].where(known, 0).max(dim=0)
        found += [
            (float(factors[i]), -float(best[i]), order, _Neuron(site, i, float(factors[i]), int(pool[i]))) for i in rows
        ]
        found = sorted(found, key=lambda f: f[:3])[:k]  # stable: equal neurons stay in order of index
    return [neuron for *_, neuron in found]


def _expertise(evidence: Evidence, neuron: _Neuron) -> tuple[Expertise, ...]:
    values, errors = evidence.auroc[neuron.site], evidence.standard_error(neuron.site)
    met = evidence.met(neuron.site) if neuron.site.fused else None
    return tuple(
        Expertise(
            str(pool),
            float(values[p, neuron.index]),
            float(errors[p, neuron.index]),
            None if met is None else (int(met[0][p, neuron.index]), int(met[1][p, neuron.index])),
        )
        for p, pool in enumerate(evidence.pools)
    )


def _read(vlm: VLM, directions: Sequence[Direction]) -> Iterator[Words]:
    """Read all directions at once; those without a vector give nothing."""
    vectors = [d.vector for d in directions if d.vector is not None]
    read = iter(words(vlm, torch.stack(vectors))) if vectors else iter(())
    for found in directions:
        yield Words((), ()) if found.vector is None else next(read)


def _fires_on(neuron: _Neuron, activations: Activations, examples: Sequence[Example], k: int = 3) -> tuple[Firing, ...]:
    """Return the most active examples, no prompt and response twice."""
    values = neuron.of(activations)
    place = {name: i for i, name in enumerate(activations.ids)}
    met = [e for e in examples if not values[place[e.id]].isnan()]  # a router may have sent none of an example's tokens
    ranked = sorted(met, key=lambda e: -float(values[place[e.id]]))
    kept: dict[tuple[str, str | None], Example] = {}
    for example in ranked:
        if len(kept) < k:
            kept.setdefault((prompt_text(example), example.response), example)
    return tuple(
        Firing(
            id=e.id,
            activation=float(values[place[e.id]]),
            toxic=None if e.label is None else e.is_toxic,
            prompt=prompt_text(e),
            response=e.response or "",
            pictures=thumbnails(e),
        )
        for e in kept.values()
    )


def _drives(
    vlm: VLM,
    chosen: Sequence[_Neuron],
    sites: Sequence[Site],
    evidence: Evidence,
    examples: Sequence[Example],
) -> list[Drive | None]:
    pairs = cross(examples)
    if len(pairs) < FEWEST_PAIRS:
        return [None] * len(chosen)
    own = [e for pair in pairs for e in pair]
    swapped = [e for a, b in pairs for e in (with_pictures_of(a, b), with_pictures_of(b, a))]
    with_own = capture(vlm, own, sites=sites, pools=evidence.pools)
    with_other = capture(vlm, swapped, sites=sites, pools=evidence.pools)
    found = []
    for neuron in chosen:
        a, b = _in_order(neuron, with_own, own), _in_order(neuron, with_other, swapped)
        whole = ~(a.isnan() | b.isnan()).any(dim=1)  # an expert may have met neither word nor picture
        found.append(drive(a[whole], b[whole]) if int(whole.sum()) >= FEWEST_PAIRS else None)
    return found


def _in_order(neuron: _Neuron, activations: Activations, examples: Sequence[Example]) -> Float[Tensor, "pair 2"]:
    place = {name: i for i, name in enumerate(activations.ids)}
    return neuron.of(activations)[[place[e.id] for e in examples]].reshape(-1, 2)


def drive(own: Float[Tensor, "pair 2"], swapped: Float[Tensor, "pair 2"]) -> Drive | None:
    """Split variance inside pairs into picture, text and both.

    Args:
        own: activations of (text a, picture a) and (text b, picture b).
        swapped: activations of (text a, picture b) and (text b, picture a).

    Returns:
        None if nothing varies.
    """
    a, b, text_a, text_b = *own.double().T, *swapped.double().T
    picture = (a + text_b - b - text_a).square().sum().item()
    text = (a + text_a - b - text_b).square().sum().item()
    both = (a + b - text_a - text_b).square().sum().item()
    total = picture + text + both
    if not total > 0:
        return None
    return Drive(picture / total, text / total, both / total, len(own))


def cross(examples: Sequence[Example], k: int = CROSSED) -> list[_Pair]:
    """Pair a toxic example with another one of as many pictures and frames, but other ones and other words."""
    shown = [e for e in examples if e.media]
    toxic = _spread([e for e in shown if e.is_toxic], k)
    others = _spread([e for e in shown if not e.is_toxic], 4 * k)
    pairs: list[_Pair] = []
    for a in toxic:
        b = next((b for b in others if _differ(a, b)), None)
        if b is not None:
            others.remove(b)
            pairs.append((a, b))
    return pairs


def _differ(a: Example, b: Example) -> bool:
    keys = ([p.key for p in e.pictures] for e in (a, b))
    same_words = (prompt_text(a), a.response) == (prompt_text(b), b.response)
    return _kinds(a) == _kinds(b) and not same_words and all(x != y for x, y in zip(*keys, strict=True))


def _kinds(example: Example) -> tuple[int, ...]:
    """Return the frames of each video and 0 for each picture, in order."""
    return tuple(len(part.frames) if isinstance(part, Video) else 0 for part in example.media)


def with_pictures_of(example: Example, other: Example) -> Example:
    """Return an example with the pictures and videos of another in place of its own, in order."""
    media = iter(other.media)
    messages = tuple(
        replace(turn, content=tuple(p if isinstance(p, Text) else next(media) for p in turn.content))
        for turn in example.messages
    )
    return replace(example, id=f"{example.id} with pictures of {other.id}", messages=messages)


def _both_classes(examples: Sequence[Example], k: int) -> list[Example]:
    """Return at most `k` examples, half of them toxic where there are as many."""
    toxic = _spread([e for e in examples if e.is_toxic], k // 2)
    return [*toxic, *_spread([e for e in examples if not e.is_toxic], k - len(toxic))]


def _spread(items: Sequence[Example], k: int) -> list[Example]:
    """Return at most `k` items, evenly spaced."""
    return list(items) if len(items) <= k else [items[i * len(items) // k] for i in range(k)]


__all__ = ["prompt_text", "thumbnail", "thumbnails", "top_neurons"]
