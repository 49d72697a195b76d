import pytest

from safeglasses.data.categories import about, by_category, categories_of, check_categories, eliciting, without_others
from safeglasses.data.examples import Example, Examples, Text, Turn
from safeglasses.errors import SafeglassesError


def row(name: str, prompt: str, label: str | None, category: str | None, pair: str | None = None, **more) -> Example:
    return Example(name, (Turn("user", (Text(prompt),)),), "…", label, pair, category, **more)


PAIRS = Examples(
    (
        row("hate-t", "p1", "toxic", "hate", "1"),
        row("hate-n", "p1", "non-toxic", "hate", "1"),
        row("fraud-t", "p2", "toxic", "fraud", "2"),
        row("fraud-n", "p2", "non-toxic", "fraud", "2"),
        row("fraud-n2", "p2b", "non-toxic", "fraud", "2"),
        row("both-h", "p3", "toxic", "hate", "3"),
        row("both-f", "p3", "toxic", "fraud", "3"),
        row("both-n", "p3", "non-toxic", None, "3"),
        row("calm", "p4", "non-toxic", "weather"),
        row("unnamed", "p5", "toxic", None),
    )
)


def ids(examples: Examples) -> set[str]:
    return {e.id for e in examples}


def test_categories_are_those_of_toxic_rows() -> None:
    assert categories_of(PAIRS) == {"fraud": 2, "hate": 2}


def test_evidence_is_of_toxic_rows_of_the_category_against_all_that_are_not_toxic() -> None:
    assert ids(about(PAIRS, ["hate"])) == {"hate-t", "both-h", "hate-n", "fraud-n", "fraud-n2", "both-n", "calm"}
    assert ids(about(PAIRS, ["hate", "fraud"])) == ids(PAIRS) - {"unnamed"}


def test_nothing_is_learned_where_other_categories_are_elicited() -> None:
    assert ids(without_others(PAIRS, ["hate"])) == {"hate-t", "hate-n", "both-h", "both-n", "calm"}


def test_prompts_of_the_test_split_stay_whole() -> None:
    prompts = Examples(
        tuple(
            row(f"{split}-{category}-{label}", "p", label, category, split=split)
            for split in ("calibrate", "test")
            for category in ("hate", "fraud")
            for label in ("toxic", None, "non-toxic")
        )
    )
    left = ids(prompts) - ids(eliciting(prompts, ["hate"]))
    assert left == {"calibrate-fraud-toxic", "calibrate-fraud-None"}


def test_small_categories_and_rows_without_one_are_other_together() -> None:
    rows = [row(f"{c}{i}", "p", "toxic", c) for c, n in (("a", 3), ("b", 2), ("c", 1)) for i in range(n)]
    rows += [row("nameless", "p", "toxic", None), row("calm", "p", "non-toxic", "a")]
    parts = by_category(Examples(tuple(rows)), minimum=2)
    assert {name: ids(part) for name, part in parts.items()} == {
        "a": {"a0", "a1", "a2", "calm"}, "b": {"b0", "b1", "calm"}, "other": {"c0", "nameless", "calm"},
    }  # fmt: skip
    assert list(by_category(Examples(tuple(rows)), minimum=3)) == ["a", "other"]
    with pytest.raises(SafeglassesError, match="no category to learn strengths by") as error:
        by_category(Examples(tuple(rows)))
    assert error.value.given == "a (3), b (2), c (1)"


def test_an_unknown_category_names_those_there_are() -> None:
    check_categories(PAIRS, ["hate"])
    with pytest.raises(SafeglassesError, match="no such category of harm") as error:
        check_categories(PAIRS, ["hate", "weather", "x"])
    assert (error.value.given, error.value.expected) == ("weather, x", "some of fraud (2), hate (2)")
    with pytest.raises(SafeglassesError) as error:
        check_categories(about(PAIRS, []), ["hate"])
    assert error.value.expected == 'toxic rows with a "category"'
