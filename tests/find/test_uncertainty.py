"""Bootstrap against repeated rows, the approximation against the bootstrap, and noise against its formula."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.find import uncertainty as module
from safeglasses.find.auroc import auroc_rows
from safeglasses.find.statistics import delong_standard_error
from safeglasses.find.uncertainty import Stability, noise, stability, stability_from_errors

laws = settings(max_examples=30, deadline=None)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@st.composite
def samples(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Values with and without ties, labels and clusters; both classes, two clusters at least."""
    n, neurons = draw(st.integers(2, 25)), draw(st.integers(1, 4))
    few = st.sampled_from([0.0, -0.0, 1.0, 2.5, -1.0, float("inf"), -float("inf")])
    value = draw(st.sampled_from([few, st.floats(allow_nan=False, width=16)]))
    values = torch.tensor([draw(st.lists(value, min_size=n, max_size=n)) for _ in range(neurons)])
    labels = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    clusters = torch.tensor(draw(st.lists(st.integers(-3, 8), min_size=n, max_size=n)))
    assume(0 < int(labels.sum()) < n)
    assume(len(clusters.unique()) > 1)
    return values.to(draw(st.sampled_from(FLOATS))), labels, clusters


def shifted(neurons: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a toxic and a non-toxic sample; later neurons differ more, every third one is coarse."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2 == 0
    values = torch.randn(neurons, n, generator=generator) + labels * torch.linspace(0, 1.5, neurons)[:, None]
    values[::3] = (values[::3] * 2).round()
    return values, labels, torch.arange(n) // 2


def same(one: Stability, other: Stability) -> bool:
    return torch.equal(one.found_again, other.found_again) and one.to_json() == {
        **other.to_json(),
        "standard_error": one.to_json()["standard_error"],
    }


@laws
@given(samples())
def test_weights_equal_repeated_rows(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    values, labels, clusters = sample
    number = torch.unique(clusters, return_inverse=True)[1]
    for weights in module._draws(labels, number, 6, seed=1):
        found = module._weighted_auroc(values, labels, weights)
        for i, weight in enumerate(weights.long()):
            y = labels.repeat_interleave(weight).numpy()
            for row, a in zip(values, found[:, i], strict=True):
                order = torch.unique(row.double(), return_inverse=True)[1]  # scikit-learn takes no infinities
                assert a.item() == pytest.approx(roc_auc_score(y, order.repeat_interleave(weight)), abs=1e-12)


@laws
@given(samples())
def test_draws_take_whole_clusters_and_as_many_as_there_are(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    _, labels, clusters = sample
    number = torch.unique(clusters, return_inverse=True)[1]
    weights = torch.cat(list(module._draws(labels, number, 9, seed=2)))
    assert len(weights) == 9
    for weight in weights:
        per_cluster = [weight[clusters == cluster] for cluster in clusters.unique()]
        assert all((some == some[0]).all() for some in per_cluster)
        assert sum(float(some[0]) for some in per_cluster) == len(per_cluster)
        assert weight[labels].sum() > 0
        assert weight[~labels].sum() > 0


def test_equals_a_bootstrap_with_repeated_rows() -> None:
    values, labels, clusters = shifted(9, 60)
    found = stability(values, labels, clusters, 0.6, resamples=50, seed=3)
    aurocs = []
    for weight in torch.cat(list(module._draws(labels, clusters, 50, seed=3))).long():
        rows = torch.arange(60).repeat_interleave(weight)
        aurocs.append([roc_auc_score(labels[rows], row[rows]) for row in values])
    expected = np.array(aurocs).T
    assert found.found_again.tolist() == pytest.approx((expected >= 0.6).mean(axis=1).tolist())
    assert found.standard_error.tolist() == pytest.approx(expected.std(axis=1, ddof=1).tolist())
    share = (expected >= 0.6).mean(axis=0)
    assert [found.mean, found.low, found.high] == pytest.approx([share.mean(), *np.quantile(share, [0.025, 0.975])])


@laws
@given(samples())
def test_relabelled_clusters_and_monotone_maps_change_nothing(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    values, labels, clusters = sample
    one = stability(values, labels, clusters, 0.6, resamples=20)
    assert same(one, stability(values, labels, clusters * 7 + 5, 0.6, resamples=20))
    ranks = torch.stack([torch.unique(row.double(), return_inverse=True)[1] for row in values])
    assert same(one, stability(ranks.double().exp2(), labels, clusters, 0.6, resamples=20))


@laws
@given(samples(), st.randoms(use_true_random=False))
def test_neurons_and_samples_may_come_in_any_order(sample: tuple[Tensor, Tensor, Tensor], random: object) -> None:
    values, labels, clusters = sample
    one = stability(values, labels, clusters, 0.6, resamples=20)
    order = list(range(len(labels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert same(one, stability(values[:, order], labels[order], clusters[order], 0.6, resamples=20))
    turned = stability(values.flip(0), labels, clusters, 0.6, resamples=20)
    assert torch.equal(turned.found_again.flip(0), one.found_again)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels, clusters = shifted(9, 60)
    expected = stability(values, labels, clusters, 0.6, resamples=30)
    monkeypatch.setattr(module, "_BLOCK", 60 * 7)
    found = stability(values, labels, clusters, 0.6, resamples=30)
    assert same(found, expected)
    torch.testing.assert_close(found.standard_error, expected.standard_error)


def test_wide_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 6000  # 2 × 3000 × 3000 > 2^24
    values, labels, clusters = shifted(2, n)
    (weights,) = module._draws(labels, clusters, 2, seed=0)
    assert weights.dtype == torch.float64
    found = module._weighted_auroc(values, labels, torch.ones_like(weights))
    assert torch.equal(found[:, 0], auroc_rows(values, labels))


def test_errors_agree_with_delong_where_samples_are_independent() -> None:
    values, labels, _ = shifted(12, 300)
    found = stability(values, labels, torch.arange(300), 0.5, resamples=500).standard_error
    torch.testing.assert_close(found, delong_standard_error(values, labels), rtol=0.15, atol=0)


def test_repeated_rows_do_not_add_certainty() -> None:
    values, labels, _ = shifted(12, 150)
    once = stability(values, labels, torch.arange(150), 0.6, resamples=300)
    often = stability(values.repeat(1, 4), labels.repeat(4), torch.arange(150).repeat(4), 0.6, resamples=300)
    assert same(once, often)
    torch.testing.assert_close(once.standard_error, often.standard_error)


def test_a_rare_class_is_in_every_draw() -> None:
    labels = torch.arange(30) == 4
    found = stability(torch.arange(30.0)[None], labels, torch.arange(30), 0.0, resamples=100)
    assert found.found_again.tolist() == [1.0]
    assert found.low == found.mean == found.high == 1.0


def test_record_of_a_separating_and_a_constant_neuron() -> None:
    labels = torch.arange(40) % 2 == 0
    found = stability(torch.stack([labels.float(), torch.ones(40)]), labels, torch.arange(40) // 2, 0.7, resamples=10)
    assert found.found_again.tolist() == [1.0, 0.0]
    assert found.to_json() == {
        "method": "bootstrap",
        "neurons": 2,
        "cutoff": 0.7,
        "resamples": 10,
        "clusters": 20,
        "found_again": 0.5,
        "low": 0.5,
        "high": 0.5,
        "standard_error": 0.0,
    }


def test_nothing_to_resample_is_an_error() -> None:
    values, labels, clusters = shifted(2, 10)
    with pytest.raises(SafeglassesError) as caught:
        stability(values, labels, torch.zeros_like(clusters), 0.6)
    assert str(caught.value) == (
        "nothing to resample\n  given:    1 clusters, 200 resamples\n  expected: at least two of each"
    )
    with pytest.raises(SafeglassesError, match="5 clusters, 1 resamples"):
        stability(values, labels, clusters, 0.6, resamples=1)
    values[1, 3] = torch.nan
    with pytest.raises(SafeglassesError, match="NaN"):
        stability(values, labels, clusters, 0.6)


def test_an_empty_set_has_no_stability() -> None:
    _, labels, clusters = shifted(1, 10)
    for attempt in (
        lambda: stability(torch.zeros(0, 10), labels, clusters, 0.6),
        lambda: stability_from_errors(torch.zeros(0), torch.zeros(0), 0.6),
    ):
        with pytest.raises(SafeglassesError) as caught:
            attempt()
        assert str(caught.value) == (
            "no neuron was selected\n  do:       select more loosely: an empty set has no stability"
        )


def test_approximation_is_normal_and_says_so() -> None:
    auroc, errors = torch.tensor([0.7, 0.6, 0.65, 0.6, 0.5]), torch.tensor([0.05, 0.04, 0.0, 0.0, 0.0])
    found = stability_from_errors(auroc.double(), errors.double(), 0.6)
    exactly = [norm.cdf((float(auroc[0]) - 0.6) / float(errors[0])), 0.5, 1, 1, 0]
    assert found.found_again.tolist() == pytest.approx(exactly, abs=1e-6)
    record = found.to_json()
    assert record["method"] == "normal approximation"
    assert (record["low"], record["high"], record["resamples"]) == (None, None, 0)
    assert record["found_again"] == pytest.approx(sum(exactly) / 5, abs=1e-6)


def test_approximation_is_near_the_bootstrap() -> None:
    values, labels, _ = shifted(30, 400)
    exact = stability(values, labels, torch.arange(400), 0.65, resamples=400)
    near = stability_from_errors(auroc_rows(values, labels), delong_standard_error(values, labels), 0.65)
    assert float((exact.found_again - near.found_again).abs().max()) < 0.1
    assert near.mean == pytest.approx(exact.mean, abs=0.02)


def test_noise_of_pure_noise_is_what_the_null_says() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) < 40
    null = auroc_rows(torch.randn(20_000, 90, generator=generator), labels)
    found = noise(null, (40, 50), cutoff=0.6)
    assert found.neurons == 20_000
    assert found.expected_sd == pytest.approx(((40 + 50 + 1) / 12 / 40 / 50) ** 0.5)
    assert found.sd == pytest.approx(found.expected_sd, rel=0.03)
    assert found.mean == pytest.approx(0.5, abs=0.002)
    assert [found.low, found.high] == pytest.approx(norm.ppf([0.001, 0.999], 0.5, found.expected_sd), abs=0.01)
    assert found.beyond == float((null >= 0.6).double().mean())
    assert found.expected_beyond == pytest.approx(norm.sf(0.1 / found.expected_sd))
    assert found.beyond == pytest.approx(found.expected_beyond, abs=0.006)
    assert found.to_json() == vars(found)


def test_cutoffs_are_compared_in_standard_deviations() -> None:
    generator = torch.Generator().manual_seed(0)
    null = 0.5 + 0.1 * torch.randn(5000, generator=generator).double()
    wide, narrow = (25, 25), (100, 100)
    z = 0.05 / noise(null, narrow).expected_sd
    found = noise(null, wide, cutoff=0.55, cutoff_counts=narrow)
    assert found.expected_beyond == pytest.approx(norm.sf(z))
    assert found.beyond == float((null >= 0.5 + z * found.expected_sd).double().mean())
    assert noise(null, wide).beyond is None
    assert noise(null, wide).expected_beyond is None


def test_noise_of_nothing_is_an_error() -> None:
    with pytest.raises(SafeglassesError) as caught:
        noise(torch.zeros(3), (0, 4))
    assert str(caught.value) == (
        "a null needs neurons and two halves\n  given:    3 neurons, 0 and 4 samples\n  expected: at least one of each"
    )
