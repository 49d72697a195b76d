"""SNIP scores of neurons: how much the loss would change without their weights, from gradients."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from safeglasses.data.examples import Example
from safeglasses.data.probes import Probe
from safeglasses.errors import BadRow
from safeglasses.find.passes import plan
from safeglasses.find.world import World
from safeglasses.model.anatomy import module
from safeglasses.model.hooks import tap
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.model.weights import whole


def snip_scores(
    vlm: VLM,
    probe: Probe,
    sites: Sequence[Site],
    *,
    batch_size: int | str = "auto",
    world: World | None = None,
) -> dict[Site, Float[Tensor, "cell class _neuron"]]:
    """Return per neuron the mean over examples of Σ_o |W[o, i] · ∂L/∂W[o, i]| over its outgoing weights.

    L is the mean negative log-likelihood of the response's tokens: a refusal after harmful prompts (class 0), an
    answer after benign ones. Weights are left as they are.

    Source: Wei et al. 2024, arXiv 2402.05162, equations of SNIP; they score single weights.

    Args:
        vlm: the model.
        probe: the prompts, with responses.
        sites: inputs of linear maps.
        batch_size: examples per pass.
        world: the processes that share the examples.

    Raises:
        BadRow: an example without a response.
    """
    check_responses(probe)
    world = world or World()
    weights = {site: whole(module(vlm.model, vlm.anatomy, site).get_parameter("weight")) for site in sites}
    linear = {site: isinstance(module(vlm.model, vlm.anatomy, site), torch.nn.Linear) for site in sites}
    total = {site: torch.zeros(len(probe.cells), 2, vlm.anatomy.width(site)) for site in sites}
    share = torch.zeros(len(probe.cells), 2, len(probe.examples))  # of each example in each class's mean
    for row, cell in enumerate(probe.cells):
        for kind, group in enumerate((probe.harmful, probe.benign)):
            share[row, kind, list(group[cell])] = 1 / len(group[cell])
    batches = plan(vlm, probe.examples, batch_size)
    for rows in batches[world.rank :: world.size]:
        examples = [probe.examples[i] for i in rows]
        for site, (read, delta) in _gradients(vlm, examples, sites).items():
            weight = weights[site] if linear[site] else weights[site].T  # Conv1D keeps (in, out)
            for i, row_read, row_delta in zip(rows, read, delta, strict=True):
                score = (weight * (row_delta.T @ row_read)).abs().sum(dim=0).float().cpu()
                total[site] += share[:, :, i, None] * score
    for site in sites:
        world.add(total[site])
    return total


def check_responses(probe: Probe) -> None:
    """Check that every prompt has a response.

    Raises:
        BadRow: one has none.
    """
    missing = next((example.id for example in probe.examples if not (example.response or "").strip()), None)
    if missing is not None:
        raise BadRow(
            "SNIP scores need responses",
            given=f"example {missing!r} has none",
            expected="a refusal to every harmful prompt and an answer to every benign one",
            do="complete the row, or leave the rule out",
        )


def _gradients(
    vlm: VLM, examples: Sequence[Example], sites: Sequence[Site]
) -> dict[Site, tuple[Float[Tensor, "sample token _neuron"], Float[Tensor, "sample token _out"]]]:
    """Return what each map reads, and ∂L/∂ of what it writes; nothing is accumulated in the model."""
    batch = vlm.encode([example.chat() for example in examples]).to(vlm.device)
    shape = batch.ids.shape
    read: dict[Site, Tensor] = {}
    written: dict[Site, Tensor] = {}

    def keep(site: Site, value: Tensor) -> None:
        if site.side == "in":
            read[site] = value.detach().reshape(*shape, -1)
        else:
            if not value.requires_grad:  # frozen weights up to here: gradients start at this map
                value.requires_grad_()
            written[Site(site.path, "in")] = value

    both = [one for site in sites for one in (site, Site(site.path, "out"))]
    with torch.enable_grad(), tap(vlm.model, vlm.anatomy, both, keep):
        logits = vlm.forward(batch)
    answer = batch.response_mask[:, 1:]
    losses = cross_entropy(logits[:, :-1][answer].float(), batch.ids[:, 1:][answer], reduction="none")
    each = answer.sum(dim=1)
    loss = (losses / each.repeat_interleave(each)).sum()  # a sum: no sample is in another's gradient
    deltas = torch.autograd.grad(loss, [written[site] for site in sites])
    return {site: (read[site], delta.reshape(*shape, -1)) for site, delta in zip(sites, deltas, strict=True)}
