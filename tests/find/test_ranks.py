"""Exact ranks against scikit-learn, however the samples come in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from safeglasses.errors import SafeglassesError
from safeglasses.find import ranks as module
from safeglasses.find.ranks import Ranks
from safeglasses.find.statistic import HALF_A, HALF_B, LEFT_OUT, TOXIC, Samples
from value_batches import batches, cuts

laws = settings(max_examples=40, deadline=None)


def samples_of(*groups: list[int]) -> Samples:
    return Samples(torch.tensor(groups, dtype=torch.int8), torch.arange(len(groups[0])))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("left_out", [False, True])
def test_columns_are_scikit_learns(parts: int, left_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2000)  # several runs of neurons
    generator = torch.Generator().manual_seed(parts)
    values = torch.randn(2, 9, 90, generator=generator).round(decimals=1)
    groups = torch.randint(-1 if left_out else 0, 3, (2, 90), generator=generator).to(torch.int8)
    ranks = Ranks()
    for rows in torch.arange(90).chunk(parts):
        ranks.add(values[:, :, rows], Samples(groups[:, rows], rows))
    found = ranks.finish()
    assert set(found) == {"auroc", "null"}
    for pool in range(2):
        counted, half = groups[pool] != LEFT_OUT, groups[pool] > TOXIC
        for neuron in range(9):
            row = values[pool, neuron]
            auroc = roc_auc_score(groups[pool, counted] == TOXIC, row[counted])
            null = roc_auc_score(groups[pool, half] == HALF_A, row[half])
            assert float(found["auroc"][pool, neuron]) == pytest.approx(auroc, abs=1e-12)
            assert float(found["null"][pool, neuron]) == pytest.approx(null, abs=1e-12)
    assert found["auroc"].dtype == torch.float64


@given(st.data())
@laws
def test_any_cut_and_any_merge_give_the_same_bits(data: st.DataObject) -> None:
    values, samples = data.draw(batches())
    whole = Ranks()
    whole.add(values, samples)
    parts = []
    for rows in data.draw(cuts(samples)):
        part = Ranks()
        part.add(values[:, :, rows], samples.take(rows))
        parts.append(part)
    while len(parts) > 1:
        left = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts[data.draw(st.integers(0, len(parts) - 1))].merge(left)
    found = parts[0].finish()
    for name, column in whole.finish().items():
        assert torch.equal(found[name], column)


def test_merging_with_what_has_seen_nothing_changes_nothing() -> None:
    values, samples = torch.tensor([[[1.0, 0.0]]]), samples_of([TOXIC, HALF_A])
    full, empty = Ranks(), Ranks()
    full.add(values, samples)
    full.merge(Ranks())
    empty.merge(full)
    assert full.finish()["auroc"].tolist() == empty.finish()["auroc"].tolist() == [[1.0]]


def test_a_missing_class_gives_one_half() -> None:
    ranks = Ranks()
    groups = [TOXIC, TOXIC, LEFT_OUT], [HALF_A, HALF_A, HALF_A], [TOXIC, HALF_A, HALF_A], [LEFT_OUT] * 3
    ranks.add(torch.arange(12.0).view(4, 1, 3), samples_of(*groups))
    found = ranks.finish()
    assert found["auroc"][:, 0].tolist() == [0.5, 0.5, 0.0, 0.5]
    assert found["null"][:, 0].tolist() == [0.5, 0.5, 0.5, 0.5]


def test_values_are_kept_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2, 5, 4)
    seen: list[int] = []

    def rows(some: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(some.data_ptr())
        return torch.full((len(some),), 0.25, dtype=torch.float64)

    monkeypatch.setattr(module, "auroc_rows", rows)
    ranks = Ranks()
    ranks.add(values, samples_of([TOXIC, HALF_A, TOXIC, HALF_A], [TOXIC, TOXIC, HALF_A, HALF_A]))
    ranks.finish()
    assert seen == [values[0].data_ptr(), values[1].data_ptr()]


@pytest.mark.parametrize("parts", [1, 2])
def test_nan_is_an_error_that_names_the_neuron(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 64)
    values = torch.zeros(1, 40, 8)
    values[0, 33, 4] = torch.nan
    ranks = Ranks()
    for rows in torch.arange(8).chunk(parts):
        ranks.add(values[:, :, rows], samples_of([TOXIC, HALF_A] * 4).take(rows))
    with pytest.raises(SafeglassesError) as caught:
        ranks.finish()
    assert str(caught.value) == (
        "a value is not a number (NaN)\n"
        "  given:    neuron 33\n"
        "  do:       look for overflow: load the model in bfloat16 or float32"
    )


def test_nan_of_a_sample_that_is_left_out_does_no_harm() -> None:
    ranks = Ranks()
    ranks.add(torch.tensor([[[1.0, 0.0, torch.nan]]]), samples_of([TOXIC, HALF_B, LEFT_OUT]))
    assert ranks.finish()["auroc"].tolist() == [[1.0]]


def test_shapes_must_fit() -> None:
    ranks = Ranks()
    with pytest.raises(SafeglassesError) as caught:
        ranks.add(torch.zeros(1, 2, 3), samples_of([0, 1]))
    assert str(caught.value) == (
        "the samples do not fit the values\n"
        "  given:    groups (1, 2) and clusters (2,)\n"
        "  expected: groups (1, 3) and clusters (3,) for values (1, 2, 3)"
    )
    ranks.add(torch.zeros(1, 2, 2), samples_of([0, 1]))
    other = Ranks()
    other.add(torch.zeros(1, 4, 2), samples_of([0, 1]))
    with pytest.raises(SafeglassesError) as caught:
        ranks.merge(other)
    assert str(caught.value) == (
        "these are other neurons than before\n  given:    1 pools × 4 neurons\n  expected: 1 pools × 2 neurons"
    )


def test_nothing_is_an_error() -> None:
    with pytest.raises(SafeglassesError) as caught:
        Ranks().finish()
    assert str(caught.value) == "there is nothing to rank\n  given:    no batch\n  expected: at least one"
