"""Properties are rated as SciPy and scikit-learn rate them, chance gives 0.5, and followers are told from experts."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score
from torch import Tensor

from safeglasses.data.examples import Example, Text, Turn
from safeglasses.errors import SafeglassesError
from safeglasses.find.auroc import auroc_rows
from safeglasses.find.confounds import (
    FOLDS,
    Confound,
    Explained,
    columns_of,
    confound_table,
    explained,
    explaining,
)
from safeglasses.find.statistics import standard_error
from safeglasses.find.strata import adjusted, strata_of

Fields = Callable[[int], Mapping[str, object]]


def rows(n: int, fields: Fields = lambda i: {}, seed: int = 0) -> tuple[Example, ...]:
    """Text-only examples, about half of them toxic, with fields that depend on their number."""
    toxic = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5).tolist()
    return tuple(
        replace(
            Example(
                id=str(i),
                messages=(Turn("user", (Text(f"prompt {seed} {i}"),)),),
                response="a" * (1 + i % 7),
                label="toxic" if toxic[i] else "non-toxic",
            ),
            **fields(i),
        )
        for i in range(n)
    )


def lengths(n: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("response_tokens", "prompt_tokens", "image_tokens")
    return {name: torch.randint(1, 40, (n,), generator=generator) for name in names}


def table_of(examples: tuple[Example, ...], given: Mapping[str, Tensor]) -> dict[str, Confound]:
    return {row.name: row for row in confound_table(examples, given)}


def test_numbers_are_rated_like_neurons() -> None:
    examples, given = rows(80), lengths(80)
    labels = [example.is_toxic for example in examples]
    given["prompt_tokens"] += 12 * torch.tensor(labels)
    given["image_tokens"] = torch.full((80,), 576)
    table = table_of(examples, given)
    assert list(table) == ["response_tokens", "prompt_tokens", "image_tokens", "response_characters"]
    given["response_characters"] = torch.tensor([1 + i % 7 for i in range(80)])
    n = sum(labels)
    for name, column in given.items():
        row = table[name]
        auroc = roc_auc_score(labels, column)
        half = 1.959964 * standard_error(torch.tensor(auroc), n, 80 - n).item()
        assert row.kind == "numeric"
        assert [row.auroc, row.low, row.high] == pytest.approx([auroc, auroc - half, auroc + half], abs=1e-6)
    is_toxic = torch.tensor(labels)
    column = given["prompt_tokens"].double().numpy()
    plain = mannwhitneyu(column[is_toxic], column[~is_toxic], method="asymptotic", use_continuity=False)
    assert table["prompt_tokens"].p == pytest.approx(plain.pvalue, rel=0.05)
    assert (table["image_tokens"].auroc, table["image_tokens"].p) == (0.5, 1.0)
    assert [name for name, row in table.items() if row.flagged] == ["prompt_tokens"]
    assert table["image_tokens"].to_json() == {
        "name": "image_tokens",
        "kind": "numeric",
        "auroc": 0.5,
        "low": pytest.approx(0.5 - half_at_chance(n, 80 - n)),
        "high": pytest.approx(0.5 + half_at_chance(n, 80 - n)),
        "p": 1.0,
        "flagged": False,
    }


def half_at_chance(n_pos: int, n_neg: int) -> float:
    return 1.959964 * standard_error(torch.tensor(0.5), n_pos, n_neg).item()


@pytest.mark.parametrize("values", [1, 2, 5, 40, 10_000])
def test_chance_gives_a_half_whatever_the_number_of_categories(values: int) -> None:
    found = []
    for seed in range(60):
        pick = torch.randint(values, (100,), generator=torch.Generator().manual_seed(seed)).tolist()
        examples = rows(100, lambda i, pick=pick: {"source": f"s{pick[i]}"}, seed=seed)
        table = table_of(examples, lengths(100))
        found += [table["source"].auroc] if "source" in table else []
    if values == 1:
        assert found == []
        return
    mean = torch.tensor(found)
    assert abs(float(mean.mean()) - 0.5) < 3 * float(mean.std()) / len(found) ** 0.5 + 1e-9
    if values == 10_000:
        assert float((mean - 0.5).abs().max()) < 0.05  # nearly every value unseen in the other folds


def test_small_classes_and_few_rows_are_rated_too() -> None:
    examples = rows(2, lambda i: {"language": "en" if i else "de", "label": "toxic" if i else "non-toxic"})
    row = table_of(examples, lengths(2))["language"]
    assert (row.auroc, row.flagged) == (0.5, False)


def test_a_category_that_gives_the_label_away_is_flagged() -> None:
    examples = rows(120)
    examples = tuple(replace(e, source="forum" if e.is_toxic else None) for e in examples)
    row = table_of(examples, lengths(120))["source"]
    assert row.kind == "category"
    assert row.auroc == row.high == 1.0
    assert row.flagged


def test_pairs_lie_in_one_fold() -> None:
    examples = tuple(
        replace(e, pair_id=str(i // 2), source=str(i // 2), label=("toxic", "non-toxic")[i % 2])
        for i, e in enumerate(rows(60))
    )
    assert table_of(examples, lengths(60))["source"].auroc == 0.5  # no pair is known from another fold


def test_a_large_difference_must_be_significant_to_be_flagged() -> None:
    assert Confound("x", "numeric", 0.7, 0.6, 0.8, 0.001).flagged
    assert Confound("x", "numeric", 0.3, 0.2, 0.4, 0.001).flagged
    assert not Confound("x", "numeric", 0.7, 0.4, 1.0, 0.02).flagged
    assert not Confound("x", "numeric", 0.59, 0.55, 0.63, 0.001).flagged


def test_categories_with_more_than_one_value_are_rated() -> None:
    examples = rows(
        60,
        lambda i: {
            "language": ("en", "de", None)[i % 3],
            "source": "here",
            "category": ("insult", "threat")[i % 2],
            "condition": ("standard", "adversarial")[i % 2],
        },
    )
    columns = columns_of(examples, lengths(60))
    names = ["language", "category", "condition"]
    assert list(columns)[4:] == names
    assert columns["language"] == [e.language for e in examples]


def test_a_kind_of_harm_that_only_toxic_rows_have_is_no_confound() -> None:
    examples = tuple(
        replace(
            e, category=("insult", "threat")[i % 2] if e.is_toxic else None, modality="text" if e.is_toxic else None
        )
        for i, e in enumerate(rows(60))
    )
    assert not {"category", "modality"} & columns_of(examples, lengths(60)).keys()


def test_numbers_of_pictures_are_a_category(make: Callable[..., Example]) -> None:
    examples = tuple(make(seed, pictures=1 + seed % 3) for seed in range(20))
    assert columns_of(examples, {})["n_images"] == [str(1 + seed % 3) for seed in range(20)]
    assert table_of(examples, {})["n_images"].kind == "category"


def test_order_of_rows_does_not_matter() -> None:
    examples = rows(90, lambda i: {"source": str(i % 4)})
    given = lengths(90)
    turned = {name: column.flip(0) for name, column in given.items()}
    assert table_of(examples, given) == table_of(examples[::-1], turned)


def test_one_class_is_an_error() -> None:
    with pytest.raises(SafeglassesError, match="AUROC needs both classes"):
        confound_table(tuple(replace(e, label="toxic") for e in rows(5)), lengths(5))
    assert FOLDS == 5


def followers_and_experts(n: int = 600) -> tuple[Tensor, Tensor, Tensor]:
    """Neurons 0 and 1 follow a length that differs between the classes (up, down), 2 and 3 follow the label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2 == 0
    length = torch.randn(n, generator=generator) + labels
    noise = 0.3 * torch.randn(4, n, generator=generator)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    return sign * (torch.stack([length, length, labels.float(), labels.float()]) + noise), labels, length


def test_followers_are_told_from_experts_on_either_side() -> None:
    values, labels, length = followers_and_experts()
    (found,) = explained(values, labels, {"response_tokens": length})
    assert found.flagged.tolist() == [True, True, False, False]
    again = adjusted(values, labels, strata_of(length))
    assert torch.equal(found.auroc, again.auroc)
    assert found.comparable == again.comparable
    assert found.to_json() == {
        "confound": "response_tokens",
        "neurons": 4,
        "flagged": 2,
        "comparable": again.comparable,
    }


def test_categories_explain_too_and_the_best_explanation_is_named() -> None:
    values, labels, length = followers_and_experts()
    language = ["en" if x > 0.5 else "de" for x in length.tolist()]
    results = explained(values, labels, {"language": language, "length": length})
    assert [r.name for r in results] == ["language", "length"]
    assert explaining(results) == ("length", "length", None, None)
    assert explaining(()) == ()


def test_chance_is_explained_by_anything() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2 == 0
    values = torch.randn(400, 200, generator=generator)
    (found,) = explained(values, labels, {"x": torch.randn(200, generator=generator)})
    assert float(found.flagged.double().mean()) > 0.85


def test_a_property_that_is_the_label_explains_everything() -> None:
    values, labels, _ = followers_and_experts()
    (found,) = explained(values, labels, {"source": ["a" if label else "b" for label in labels.tolist()]})
    assert found.flagged.all()
    assert found.comparable == 0
    assert found.auroc.tolist() == [0.5] * 4
    assert float(auroc_rows(values, labels)[2]) > 0.9


def test_nothing_given_explains_nothing() -> None:
    values, labels, _ = followers_and_experts()
    assert explained(values, labels, {}) == ()
    empty = explained(values[:0], labels, {"x": torch.arange(600)})
    assert [(type(r), len(r.flagged)) for r in empty] == [(Explained, 0)]
