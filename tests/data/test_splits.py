"""What rows share stays in one split, whatever the order of the rows."""

import logging
from collections import Counter, defaultdict
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeglasses.data.examples import SPLITS, Example, Picture, Split, Text, Turn, assign_splits, split_of


def example(index: int, pictures: list[int], prompt: str, pair: int | None) -> Example:
    content = (*(Picture(data=bytes([picture])) for picture in pictures), Text(prompt))
    return Example(str(index), (Turn("user", content),), pair_id=None if pair is None else str(pair))


Plan = list[tuple[list[int], str, int | None]]
PLANS = st.lists(
    st.tuples(st.lists(st.integers(0, 20), max_size=2), st.sampled_from("abcdef"), st.none() | st.integers(0, 20)),
    min_size=1,
    max_size=20,
)
FEW = settings(max_examples=50, deadline=None)


def rows(plan: Plan) -> list[Example]:
    return [example(index, *parts) for index, parts in enumerate(plan)]


def splits_of(examples: list[Example], named: dict[str, Split] | None = None) -> dict[str, Split]:
    named = named or {}
    given = [replace(row, split=named.get(row.id, "find")) for row in examples]
    return {row.id: row.split for row in assign_splits(given, [row.id in named for row in given])}


@given(PLANS)
@FEW
def test_pairs_pictures_and_bare_prompts_never_straddle_splits(plan: Plan) -> None:
    examples = rows(plan)
    splits = splits_of(examples)
    seen: dict[object, set[Split]] = defaultdict(set)
    for row in examples:
        ties = [("picture", picture.key) for picture in row.pictures] or [("prompt", row.prompt_key)]
        for tie in [*ties, *([("pair", row.pair_id)] if row.pair_id else [])]:
            seen[tie].add(splits[row.id])
    assert all(len(found) == 1 for found in seen.values())


@given(PLANS, st.data())
@FEW
def test_the_order_of_the_rows_does_not_matter(plan: Plan, data: st.DataObject) -> None:
    examples = rows(plan)
    shuffled = [examples[index] for index in data.draw(st.permutations(range(len(plan))))]
    assert splits_of(shuffled) == splits_of(examples)


@given(PLANS, st.data())
@FEW
def test_a_named_split_stays_and_holds_for_what_hangs_on_it(plan: Plan, data: st.DataObject) -> None:
    examples = rows(plan)
    chosen = examples[data.draw(st.integers(0, len(plan) - 1))]
    split = data.draw(st.sampled_from(SPLITS))
    splits = splits_of(examples, {chosen.id: split})
    tied = {
        row.id
        for row in examples
        if set(row.pictures) & set(chosen.pictures) or (row.pair_id and row.pair_id == chosen.pair_id)
    }
    assert {splits[name] for name in tied | {chosen.id}} == {split}


def test_pairs_and_prompts_about_one_picture_agree() -> None:
    for picture in range(20):
        pairs = splits_of([example(0, [picture], "x", picture), example(1, [picture], "y", picture)])
        prompts = splits_of([example(0, [picture], "z", None)])
        assert set(pairs.values()) == set(prompts.values())


def test_shares_are_50_20_30() -> None:
    counts = Counter(split_of(str(index)) for index in range(5_000))
    assert [round(counts[split] / 5_000, 1) for split in SPLITS] == [0.5, 0.2, 0.3]


def test_splits_are_pinned() -> None:
    """Anyone can recompute them: the first 8 bytes of the SHA-256 of the key, big-endian, as a fraction."""
    row = example(0, [1], "x", 5)
    fraction = int.from_bytes(sha256(f"a-picture:{sha256(bytes([1])).hexdigest()}".encode()).digest()[:8]) / 2**64
    expected = "find" if fraction < 0.5 else "calibrate" if fraction < 0.7 else "test"
    assert splits_of([row]) == {"0": expected}
    assert [split_of(letter) for letter in "abcdefgh"] == [
        "test",
        "find",
        "find",
        "find",
        "find",
        "find",
        "test",
        "calibrate",
    ]


def test_named_splits_that_leak_are_told(caplog: pytest.LogCaptureFixture) -> None:
    examples = [example(index, [1], "x", None) for index in range(3)]
    with caplog.at_level(logging.WARNING):
        splits = splits_of(examples, {"0": "test", "1": "calibrate"})
    assert splits == {"0": "test", "1": "calibrate", "2": "calibrate"}
    assert caplog.messages == [
        "1 group(s) of rows that share a picture, a pair_id or a prompt lie in more than one split: "
        "what is measured on them has been seen before"
    ]


def test_one_large_group_is_told(caplog: pytest.LogCaptureFixture) -> None:
    examples = [example(index, [0 if index else 1], "x", None) for index in range(4)]
    with caplog.at_level(logging.WARNING):
        splits_of(examples)
    assert caplog.messages == [
        "3 of 4 rows hang together through shared pictures or pair_ids and so lie in one split; "
        'give the rows a "split" if that is not meant'
    ]
