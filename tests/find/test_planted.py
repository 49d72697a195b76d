"""A planted experiment: known experts, neurons that only follow the response's length, and pure noise."""

import math

import pytest
import torch
from torch import Tensor

from safeglasses.data.examples import Example, Text, Turn
from safeglasses.find.auroc import auroc_rows
from safeglasses.find.confounds import columns_of, confound_table, explained
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.find.selection import Selection
from safeglasses.find.uncertainty import stability
from safeglasses.model.sites import Site

SEEDS, SAMPLES, RATE = 200, 160, 0.05
EXPERTS, SPURIOUS, NOISE = 40, 40, 220
POOL = Pool("response", "max")
SITE, FOLLOWING = Site("layers.0.mlp.up_proj", "out"), Site("layers.1.mlp.up_proj", "out")


def planted(seed: int, *, shared: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return experts and noise, spurious neurons, labels, and response lengths (AUROC about 0.76).

    Experts differ by 0.8 to 2 standard deviations. Spurious neurons correlate with the standardised length by
    0.9. `shared` is the correlation among the noise neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(SAMPLES) % 2 == 0
    length = torch.randn(SAMPLES, generator=generator) + labels
    noise = torch.randn(EXPERTS + NOISE, SAMPLES, generator=generator) * math.sqrt(1 - shared)
    noise += torch.randn(SAMPLES, generator=generator) * math.sqrt(shared)
    noise[:EXPERTS] += labels * torch.linspace(0.8, 2.0, EXPERTS)[:, None]
    following = 0.9 * (length - length.mean()) / length.std()
    following = following + math.sqrt(1 - 0.81) * torch.randn(SPURIOUS, SAMPLES, generator=generator)
    return noise, following, labels, (30 + 8 * length).round().clamp(min=1).long()


def evidence_of(labels: Tensor, **values: Tensor) -> Evidence:
    sites = {"ours": SITE, "following": FOLLOWING}
    n_toxic = int(labels.sum())
    return Evidence(
        auroc={sites[name]: auroc_rows(rows, labels)[None] for name, rows in values.items()},
        held_out=None,
        pools=(POOL,),
        samples=((n_toxic, len(labels) - n_toxic),),
        held_out_samples=None,
        base_fingerprint="",
        source_sha256="",
    )


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_false_discoveries_keep_to_their_rate(shared: float) -> None:
    proportions, power = [], []
    for seed in range(SEEDS):
        ours, _, labels, _ = planted(seed, shared=shared)
        chosen = Selection.fdr(evidence_of(labels, ours=ours), POOL, RATE, held_out=False).masks[SITE]
        proportions.append(int(chosen[EXPERTS:].sum()) / max(1, int(chosen.sum())))
        power.append(float(chosen[:EXPERTS].double().mean()))
    realised = torch.tensor(proportions, dtype=torch.float64)
    assert realised.mean() <= RATE + 2 * realised.std() / math.sqrt(SEEDS)
    assert realised.mean() > 0.2 * RATE  # a rule that finds nothing would pass, too
    assert sum(power) / SEEDS > 0.9


def test_what_follows_the_length_is_flagged_and_experts_are_not() -> None:
    flagged: dict[str, list[float]] = {"spurious": [], "experts": []}
    for seed in range(SEEDS):
        ours, following, labels, length = planted(seed)
        masks = Selection.fdr(evidence_of(labels, ours=ours, following=following), POOL, RATE, held_out=False).masks
        found = {"spurious": following[masks[FOLLOWING]], "experts": ours[:EXPERTS][masks[SITE][:EXPERTS]]}
        assert len(found["spurious"]) > 0.9 * SPURIOUS  # significance does not see through them
        for name, values in found.items():
            (result,) = explained(values, labels, {"response_tokens": length})
            flagged[name] += result.flagged.double().tolist()
    share = {name: sum(all_of) / len(all_of) for name, all_of in flagged.items()}
    assert share["spurious"] >= 0.95
    assert share["experts"] <= 0.05


def test_the_whole_way_from_examples_to_the_neurons_that_stay() -> None:
    ours, following, labels, length = planted(7)
    examples = tuple(
        Example(
            id=str(i),
            messages=(Turn("user", (Text(f"prompt {i // 2}"),)),),
            response="x",
            label="toxic" if label else "non-toxic",
            pair_id=str(i // 2),
            language=("en", "de")[i // 2 % 2],
        )
        for i, label in enumerate(labels.tolist())
    )
    lengths = {"response_tokens": length, "prompt_tokens": torch.arange(SAMPLES) // 2}
    rivals = [row.name for row in confound_table(examples, lengths) if row.flagged]
    assert rivals == ["response_tokens"]
    evidence = evidence_of(labels, ours=ours, following=following)
    chosen = Selection.fdr(evidence, POOL, RATE, held_out=False)
    values = torch.cat([ours[chosen.masks[SITE]], following[chosen.masks[FOLLOWING]]])
    columns = columns_of(examples, lengths)
    (result,) = explained(values, labels, {name: columns[name] for name in rivals})
    ours_chosen = int(chosen.masks[SITE].sum())
    assert float(result.flagged[ours_chosen:].double().mean()) >= 0.95
    cutoff = min(float(evidence.auroc[site][0][mask].min()) for site, mask in chosen.masks.items())
    again = stability(values, labels, torch.arange(SAMPLES) // 2, cutoff, resamples=100)
    experts = again.found_again[: int(chosen.masks[SITE][:EXPERTS].sum())]
    noise = again.found_again[len(experts) : ours_chosen]
    assert float(experts.mean()) > 0.95
    assert again.low is not None
    assert again.low <= again.mean
    assert len(noise) == 0 or float(noise.mean()) < float(experts.mean())
