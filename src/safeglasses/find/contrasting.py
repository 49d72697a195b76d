"""Measure a contrast: one pass over a probe, every rule, its noise and its stability."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.data.examples import Examples
from safeglasses.data.probes import Probe
from safeglasses.errors import SafeglassesError
from safeglasses.find.averages import Values
from safeglasses.find.contrast import COLUMNS, Column, Contrast
from safeglasses.find.engine import Job, Setup
from safeglasses.find.enough import FEWEST as MET
from safeglasses.find.finding import claim, identity_of, setup_for, weight_norm
from safeglasses.find.passes import Watch
from safeglasses.find.pools import Pool
from safeglasses.find.rules import RULES, Rule, top_k
from safeglasses.find.snip import check_responses, snip_scores
from safeglasses.find.statistic import Samples
from safeglasses.find.steadiness import HALVINGS, Draws, Steadiness
from safeglasses.find.world import World
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

log = logging.getLogger(__name__)

Tokens = Literal["last", "prompt", "text", "response"]
FEWEST = 4
"""Items of a class below which halves and resamples say nothing."""


def pools_of(tokens: str) -> tuple[Pool, ...]:
    """Return how activations are summarised: the value, and where it is a mean also its magnitude and square.

    Raises:
        SafeglassesError: no such tokens.
    """
    if tokens == "last":
        return (Pool("prompt", "last"),)
    span = next((span for span in get_args(Tokens) if span == tokens), None)
    if span is None:
        raise SafeglassesError("no such tokens", given=repr(tokens), expected=", ".join(get_args(Tokens)))
    return (Pool(span, "mean"), Pool(span, "mean-abs"), Pool(span, "rms"))


def feed_forward_sites(vlm: VLM) -> tuple[Site, ...]:
    """Return where safety neurons are looked for: the inputs of the feed-forward output maps of the decoder.

    Layers that do nothing but cross-attend to pictures are left out: inputs without a picture skip them. Fused experts
    are looked at one by one.

    Raises:
        SafeglassesError: the feed-forward blocks have no neurons of their own, or experts are modules of their own.
    """
    anatomy = vlm.anatomy
    expert = next((site for site in anatomy.neurons if site.expert is not None and not site.fused), None)
    if not anatomy.neurons or expert is not None:
        raise SafeglassesError(
            "the decoder has no feed-forward neurons to find safety neurons among",
            given=anatomy.ffn_reason if expert is None else f"experts, such as {expert}",
            expected="one feed-forward block per layer, of linear maps, or fused experts",
            do="take another model: experts that are modules of their own run on a token or not at all",
        )
    crossing = set(anatomy.cross_attention_layers)
    return tuple(site for site in anatomy.sites("neurons") if site.layer not in crossing)


def measure_contrast(
    vlm: VLM,
    probe: Probe,
    *,
    rules: Sequence[Rule] = (RULES["precise-shield"],),
    tokens: Tokens = "last",
    sites: Sequence[Site] | None = None,
    setup: Setup | None = None,
    resamples: int = 50,
    seed: int = 0,
    world: World | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Contrast:
    """Run the model once over a probe and measure what harmful and benign prompts do to every neuron.

    Values are kept by shard, in memory or in the folder of `setup`, and read again a layer at a time. The rule
    ``snip`` adds a pass with gradients, which is not resampled.

    Args:
        vlm: the model.
        probe: the prompts; responses are read for ``response`` tokens and ``snip`` alone.
        rules: by which neurons will be drawn.
        tokens: ``last`` of the prompt, the mean over all tokens of the ``prompt``, over its ``text`` tokens, or
            over those of the ``response``.
        sites: where to look; by default `feed_forward_sites`.
        setup: memory, folder and batch size; the engine is always the exact one.
        resamples: bootstrap resamples of whole items.
        seed: of shards and resamples.
        world: the processes that share the work.
        progress: called with examples done and in all.

    Raises:
        SafeglassesError: too few prompts, no such neurons, the folder holds another job, or as in `Job.by_site`.
    """
    pools = pools_of(tokens)
    left_out = vlm.anatomy.cross_attention_layers if sites is None else ()
    sites = feed_forward_sites(vlm) if sites is None else tuple(dict.fromkeys(sites))
    _check(vlm, probe, rules, sites)
    if left_out:
        log.warning("layers %s cross-attend to pictures only: their neurons are left out", list(left_out))
    world = world or World()
    rows = probe.examples if tokens == "response" else _prompts(probe.examples)
    setup = setup or setup_for(vlm, len(rows), sites=sites, pools=pools, engine="exact", seed=seed, world=world)
    setup = replace(setup, engine="exact", seed=seed)
    watch = Watch.on(vlm, sites, pools)
    if setup.folder is not None:
        with world.together():
            claim(setup.folder, identity_of(vlm, rows, None, watch, setup), write=world.is_first)
    samples = Samples.of(rows, pools, seed)
    job = Job(vlm, rows, samples, watch, setup, world=world, progress=progress)
    cluster = samples.clusters.tolist()
    draws = [
        Draws.of(
            [cluster[i] for i in probe.harmful[c]],
            [cluster[i] for i in probe.benign[c]],
            resamples,
            f"{c.language}-{seed}",
        )
        for c in probe.cells
    ]
    by_values = [rule for rule in rules if rule.name != "snip"]
    widths = {site: vlm.anatomy.width(site) for site in sites}
    norms = {site: weight_norm(vlm, site) for site in sites}
    column = {site: number for number, site in enumerate(sites)}
    steady = Steadiness.empty(len(by_values), len(probe.cells), len(sites), resamples)
    empty = {site: torch.zeros(len(probe.cells), 2, width) for site, width in widths.items()}
    columns = {name: {site: zeros.clone() for site, zeros in empty.items()} for name in COLUMNS}
    frequency = {r.name: {site: zeros[:, 0].clone() for site, zeros in empty.items()} for r in by_values}
    counting = next((rule for rule in rules if rule.name == "sn-tune"), rules[0])
    prompts = tuple((len(probe.harmful[cell]), len(probe.benign[cell])) for cell in probe.cells)
    met = torch.zeros(len(sites), len(probe.cells), 2, dtype=torch.int64)
    for site, values in job.by_site():
        norm = norms[site].double()
        nothing: list[list[Tensor]] = [[] for _ in by_values]
        for row, (cell, drawn) in enumerate(zip(probe.cells, draws, strict=True)):
            groups = (probe.harmful[cell], probe.benign[cell])
            if site.fused:  # NaN: the router sent no token of the prompt there
                there = [~values[0, 0, list(group)].isnan() for group in groups]
                met[column[site], row] = torch.tensor([int(some.sum()) for some in there])
                groups = tuple(
                    [i for i, yes in zip(g, t.tolist(), strict=True) if yes] for g, t in zip(groups, there, strict=True)
                )
                drawn = drawn.met(*there)
                if any(len(g) < min(MET, every) for g, every in zip(groups, prompts[row], strict=True)):
                    for halves in nothing:
                        halves.append(torch.zeros(HALVINGS, len(norm), dtype=torch.bool))
                    continue
            harmful, benign = (_values(values, group, norm, counting) for group in groups)
            for kind, side in enumerate((harmful, benign)):
                whole = side.averages(torch.ones(1, len(side.value), dtype=torch.float64)).at(0)
                for name in COLUMNS:
                    columns[name][site][row, kind] = getattr(whole, name).float()
            for number, rule in enumerate(by_values):
                place = (number, row, column[site])
                again, halves = steady.add(place, rule, harmful, benign, drawn, norm)
                frequency[rule.name][site][row] = again
                nothing[number].append(halves)
        for number, halves in enumerate(nothing):
            steady.add_idle(number, torch.stack(halves))
    for tensors in (*columns.values(), *frequency.values()):
        for tensor in tensors.values():
            world.add(tensor)
    steady.gather(world)
    world.add(met)
    listed = zip(sites, met.tolist(), strict=True)
    counts = {site: tuple((h, b) for h, b in rows) for site, rows in listed if site.fused}
    _say_unmet(counts, prompts)
    everything: dict[str, Column] = dict(columns)
    if any(rule.name == "snip" for rule in rules):
        everything["snip"] = snip_scores(vlm, probe, sites, batch_size=setup.batch_size, world=world)
    found = Contrast(
        cells=probe.cells,
        rules=tuple(rules),
        tokens=tokens,
        columns=everything,
        weight_norms=norms,
        prompts=prompts,
        base_fingerprint=vlm.fingerprint(),
        source_sha256=probe.examples.sha256,
        frequency=frequency,
        idle={rule.name: steady.idle_shares(number) for number, rule in enumerate(by_values)},
        left_out=tuple(left_out),
        met=counts,
    )
    rated = [[found.rated(site, row) for site in sites] for row in range(len(probe.cells))]
    certainty = {
        rule.name: {
            str(cell): steady.record((number, row), rule, widths, rated[row]) for row, cell in enumerate(probe.cells)
        }
        for number, rule in enumerate(by_values)
    }
    return replace(found, certainty=certainty)


def _say_unmet(met: Mapping[Site, Sequence[tuple[int, int]]], prompts: Sequence[tuple[int, int]]) -> None:
    """Say how many experts too few prompts have met."""
    few = [
        site
        for site, rows in met.items()
        if any(
            count < min(MET, every)
            for row, all_ in zip(rows, prompts, strict=True)
            for count, every in zip(row, all_, strict=True)
        )
    ]
    if few:
        log.warning(
            "%d of %d experts were met by fewer than %d harmful or benign prompts of some language and risk type: "
            "none of their neurons is selected there (%s); more prompts, or tokens='prompt', would rate more",
            *(len(few), len(met), MET, f"{few[0]}" + (" …" if len(few) > 1 else "")),
        )


def _values(
    pooled: Float[Tensor, "pool neuron sample"], rows: Sequence[int], norm: Float[Tensor, " neuron"], rule: Rule
) -> Values:
    parts = [part[:, list(rows)].T.double() for part in pooled]
    value = parts[0]
    magnitude, square = (value.abs(), value.square()) if len(parts) == 1 else (parts[1], parts[2].square())
    top = top_k(magnitude * norm, rule.k(value.shape[1])).double()
    return Values(value, magnitude, square, top)


def _prompts(examples: Examples) -> Examples:
    return Examples(tuple(replace(example, response=None) for example in examples), examples.skipped)


def _check(vlm: VLM, probe: Probe, rules: Sequence[Rule], sites: Sequence[Site]) -> None:
    if not rules or not sites or not probe.cells:
        raise SafeglassesError(
            "nothing to contrast",
            given=f"{len(probe.cells)} cells, {len(rules)} rules, {len(sites)} sites",
            expected="at least one of each",
        )
    names = [rule.name for rule in rules]
    if len(set(names)) < len(names):
        raise SafeglassesError("a rule is named twice", given=", ".join(names), expected="each rule once")
    outputs = [site for site in sites if site.side != "in"]
    if outputs:
        raise SafeglassesError(
            "importance needs the weights that read a neuron",
            given=f"{outputs[0]}, an output",
            expected="inputs, such as the default",
        )
    for rule in rules:
        for site in sites:
            rule.k(vlm.anatomy.width(site))
    if any(rule.name == "snip" for rule in rules):
        fused = next((site for site in sites if site.fused), None)
        if fused is not None:
            raise SafeglassesError(
                "SNIP scores need gradients at linear maps, which fused experts are not",
                given=str(fused),
                expected="sites of linear maps, or another rule",
                do="leave the rule out, or the sites of experts",
            )
        check_responses(probe)
    items = [row.pair_id or row.prompt_key for row in probe.examples]
    sizes = {c: [len({items[i] for i in group[c]}) for group in (probe.harmful, probe.benign)] for c in probe.cells}
    few = [cell for cell, both in sizes.items() if min(both) < FEWEST]
    if few:
        raise SafeglassesError(
            "too few prompts for halves and resamples",
            given=", ".join(f"{cell}: {sizes[cell][0]} harmful, {sizes[cell][1]} benign" for cell in few[:3]),
            expected=f"prompts of at least {FEWEST} items of each (rows that share a pair_id are one item)",
        )
