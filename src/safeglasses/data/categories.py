"""Categories of harm: which there are, and data about some of them only."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from safeglasses.data.records import Example, Examples
from safeglasses.errors import SafeglassesError

MINIMUM = 20
"""Fewest toxic rows of the find split from which a category gets evidence of its own, as `check_pairs` has it."""
OTHER = "other"


def categories_of(pairs: Examples) -> dict[str, int]:
    """Count the toxic rows of each category, by name; rows without a category count nowhere."""
    return dict(sorted(Counter(row.category for row in pairs.toxic if row.category is not None).items()))


def check_categories(pairs: Examples, wanted: Sequence[str]) -> None:
    """Refuse categories that no toxic row has.

    Raises:
        SafeglassesError: naming them, and those there are.
    """
    there = categories_of(pairs)
    unknown = [name for name in wanted if name not in there]
    if unknown or not wanted:
        raise SafeglassesError(
            "no such category of harm",
            given=", ".join(unknown) or "nothing",
            expected="some of " + ", ".join(f"{name} ({n})" for name, n in there.items())
            if there
            else 'toxic rows with a "category"',
        )


def about(pairs: Examples, wanted: Collection[str]) -> Examples:
    """Keep the toxic rows of these categories, and all that are not toxic: what evidence is made from."""
    return pairs.filter(lambda row: not row.is_toxic or row.category in wanted)


def without_others(pairs: Examples, wanted: Collection[str]) -> Examples:
    """Leave out the toxic rows of other categories, and what shares its prompt or its pair with these alone.

    Calibration neither turns such prompts down nor keeps the model as it is there: holding harm of other kinds up on
    purpose would be wrong, and turning it down is not what was asked.
    """
    mine = _partners(row for row in pairs.toxic if row.category in wanted)
    others = _partners(row for row in pairs.toxic if row.category not in wanted)
    return about(pairs, wanted).filter(lambda row: bool(_partners([row]) & mine) or not _partners([row]) & others)


def eliciting(prompts: Examples, wanted: Collection[str]) -> Examples:
    """Keep of the prompts to learn from and to choose on those of these categories, and all benign ones.

    The test split stays whole: whether other categories are left alone is to be measured.
    """
    return prompts.filter(lambda row: row.split == "test" or row.label == "non-toxic" or row.category in wanted)


def by_category(pairs: Examples, *, minimum: int = MINIMUM) -> dict[str, Examples]:
    """Cut pairs by the category of their toxic rows; every part has all rows that are not toxic.

    Categories with too few toxic rows in the find split for an AUROC, and rows without one, are ``other`` together; are
    these too few as well, they are in no part.

    Raises:
        SafeglassesError: no category has enough rows.
    """
    counts = categories_of(pairs.split("find"))
    large = [name for name, n in counts.items() if n >= minimum]
    if not large:
        raise SafeglassesError(
            "no category to learn strengths by",
            given=", ".join(f"{name} ({n})" for name, n in counts.items()) or "no toxic row with a category",
            expected=f"categories with at least {minimum} toxic rows in the find split",
            do="name the categories of more rows, or leave by_category out of the recipe",
        )
    parts = {name: about(pairs, [name]) for name in large}
    rest = pairs.filter(lambda row: not row.is_toxic or row.category not in large)
    if len(rest.split("find").toxic) >= minimum:
        parts[OTHER if OTHER not in parts else f"{OTHER} than these"] = rest
    return parts


def _partners(rows: Iterable[Example]) -> set[str]:
    """Keys of the prompts and pairs of rows."""
    keys = ((f"prompt:{row.prompt_key}", f"pair:{row.pair_id}" if row.pair_id is not None else "") for row in rows)
    return {key for pair in keys for key in pair if key}
