"""Sets of neurons obey the algebra of sets, and rules draw exactly what they say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, norm

from safeglasses.errors import SafeglassesError
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.find.selection import Selection
from safeglasses.model.sites import Site

SITES = tuple(Site(f"layers.{i}.mlp.up_proj", "out") for i in range(3))
WIDTHS = (4, 1, 6)
PROMPT, RESPONSE = Pool("prompt", "last"), Pool("response", "max")
laws = settings(max_examples=40, deadline=None)


def evidence_of(scores: list[float], *, held_out: list[float] | None = None, n: int = 200) -> Evidence:
    """Evidence whose second pool has the scores, and whose first pool has their opposites."""

    def per_site(flat: list[float]) -> dict[Site, torch.Tensor]:
        row = torch.tensor(flat, dtype=torch.float64)
        return dict(zip(SITES, torch.stack([1 - row, row]).split(WIDTHS, dim=1), strict=True))

    return Evidence(
        auroc=per_site(scores),
        held_out=None if held_out is None else per_site(held_out),
        pools=(PROMPT, RESPONSE),
        samples=((n, n),) * 2,
        held_out_samples=None if held_out is None else ((n, n),) * 2,
        base_fingerprint="sg1-test",
        source_sha256="",
    )


scores = st.lists(st.floats(0, 1), min_size=sum(WIDTHS), max_size=sum(WIDTHS))
tied = st.lists(st.sampled_from([0.4, 0.5, 0.7]), min_size=sum(WIDTHS), max_size=sum(WIDTHS))
sets = st.lists(st.booleans(), min_size=sum(WIDTHS), max_size=sum(WIDTHS)).map(
    lambda bits: Selection(dict(zip(SITES, torch.tensor(bits).split(WIDTHS), strict=True)))
)


@laws
@given(sets, sets, sets)
def test_algebra_of_sets(a: Selection, b: Selection, c: Selection) -> None:
    assert a & b == b & a
    assert a | b == b | a
    assert (a & b) & c == a & (b & c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a | (a & b) == a == a & a == a | a
    assert a - b == a - (a & b)
    assert (a - b) | (a & b) == a
    assert len((a - b) & b) == 0
    assert len(a | b) == len(a) + len(b) - len(a & b)


@laws
@given(sets, sets)
def test_agrees_with_pythons_sets(a: Selection, b: Selection) -> None:
    assert set(a & b) == set(a) & set(b)
    assert set(a | b) == set(a) | set(b)
    assert set(a - b) == set(a) - set(b)
    assert len(list(a)) == len(set(a)) == len(a)
    assert all(neuron in a for neuron in a)
    assert all(neuron not in b for neuron in a - b)
    assert (set(a) == set(b)) == (a == b)


@laws
@given(sets, sets)
def test_overlap_counts(a: Selection, b: Selection) -> None:
    both, either = len(set(a) & set(b)), len(set(a) | set(b))
    assert a.overlap(b) == {
        "intersection": both,
        "union": either,
        "jaccard": both / either if either else None,
        "of_self": both / len(a) if len(a) else None,
        "of_other": both / len(b) if len(b) else None,
    }


@laws
@given(scores | tied, st.integers(0, sum(WIDTHS)))
def test_top_has_exactly_k_members_whatever_the_ties(values: list[float], k: int) -> None:
    chosen = Selection.top(evidence_of(values), RESPONSE, k)
    flat = torch.cat(list(chosen.masks.values())).tolist()
    assert len(chosen) == sum(flat) == k
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))  # ties: earlier sites, then indices, first
    assert {i for i, member in enumerate(flat) if member} == set(order[:k])


@laws
@given(tied, st.integers(0, sum(WIDTHS) - 1))
def test_top_grows_by_one(values: list[float], k: int) -> None:
    evidence = evidence_of(values)
    assert len(Selection.top(evidence, RESPONSE, k + 1) - Selection.top(evidence, RESPONSE, k)) == 1


@laws
@given(scores, st.floats(0, 1))
def test_above_is_strictly_above(values: list[float], threshold: float) -> None:
    chosen = torch.cat(list(Selection.above(evidence_of(values), RESPONSE, threshold).masks.values()))
    assert chosen.tolist() == [value > threshold for value in values]


@laws
@given(scores, scores, st.floats(0.001, 0.5))
def test_fdr_is_benjamini_and_hochbergs_over_all_neurons(values: list[float], others: list[float], q: float) -> None:
    evidence = evidence_of(values, held_out=others)
    sd = ((200 + 200 + 1) / (12 * 200 * 200)) ** 0.5
    rejected = false_discovery_control(norm.sf((torch.tensor(values).double() - 0.5) / sd)) <= q
    found = torch.cat(list(Selection.fdr(evidence, RESPONSE, q, held_out=False).masks.values()))
    assert found.tolist() == rejected.tolist()
    checked = torch.cat(list(Selection.fdr(evidence, RESPONSE, q).masks.values()))
    assert checked.tolist() == [r and other > 0.5 for r, other in zip(rejected, others, strict=True)]


def test_pools_are_kept_apart() -> None:
    evidence = evidence_of([0.9] * 3 + [0.1] * 8)
    assert len(Selection.above(evidence, RESPONSE, 0.5)) == 3
    assert len(Selection.above(evidence, PROMPT, 0.5)) == 8


def test_members_and_table() -> None:
    chosen = Selection.top(evidence_of([0.1, 0.9, 0.1, 0.1, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.7]), RESPONSE, 3)
    assert [site.neuron(index) for site, index in chosen] == [
        "layers.0.mlp.up_proj:out#1",
        "layers.1.mlp.up_proj:out#0",
        "layers.2.mlp.up_proj:out#5",
    ]
    assert chosen.table()[2] == {
        "site": "layers.2.mlp.up_proj:out",
        "layer": 2,
        "kind": "mlp.up_proj:out",
        "selected": 1,
        "neurons": 6,
    }
    assert "layers.0" not in chosen
    assert (SITES[0], 99) not in chosen
    assert (Site("layers.9.mlp.up_proj", "out"), 0) not in chosen
    assert chosen != "a set"


@pytest.mark.parametrize("k", [-1, 12])
def test_top_of_too_many_is_an_error(k: int) -> None:
    with pytest.raises(SafeglassesError) as caught:
        Selection.top(evidence_of([0.5] * 11), RESPONSE, k)
    assert str(caught.value) == f"no such number of neurons\n  given:    k={k}\n  expected: 0 to 11"


def test_fdr_without_held_out_values_is_an_error() -> None:
    with pytest.raises(SafeglassesError) as caught:
        Selection.fdr(evidence_of([0.5] * 11), RESPONSE)
    assert str(caught.value) == (
        "the evidence has no held-out values\n"
        "  do:       measure it with held-out examples (a calibrate split), or pass held_out=False"
    )


def test_sets_over_different_sites_do_not_mix() -> None:
    one = Selection.top(evidence_of([0.5] * 11), RESPONSE, 2)
    with pytest.raises(SafeglassesError) as caught:
        _ = one & Selection({SITES[0]: one.masks[SITES[0]]})
    assert str(caught.value) == (
        "selections over different sites cannot be combined\n"
        "  given:    3 and 1 sites\n"
        "  expected: the same sites with the same numbers of neurons"
    )
    with pytest.raises(SafeglassesError, match="different sites"):
        _ = one | Selection({site: torch.zeros(9, dtype=torch.bool) for site in SITES})
