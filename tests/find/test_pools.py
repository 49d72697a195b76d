"""Pooling against plain loops, for every span and way, whatever the padding holds."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeglasses.errors import BadRow, SafeglassesError
from safeglasses.find.pools import MEANS, How, Pool, Window
from safeglasses.model.chat import Batch, Span

SPANS, HOWS = get_args(Span), get_args(How)


def batch_of(lengths: list[tuple[int, int, int]], *, left: bool) -> Batch:
    """Rows of (picture tokens, other prompt tokens, response tokens); the picture comes second.

    Of several response tokens the first is a thought.
    """
    width = max(map(sum, lengths))
    masks = torch.zeros(5, len(lengths), width, dtype=torch.bool)
    for row, (image, text, response) in enumerate(lengths):
        start = width - image - text - response if left else 0
        masks[0, row, start : start + image + text + response] = True
        masks[1, row, start : start + image + text] = True
        masks[2, row, start + image + text : start + image + text + response] = True
        masks[3, row, start + 1 : start + 1 + image] = True
        masks[4, row, start + image + text] = response > 1
    return Batch(
        inputs={"attention_mask": masks[0].long()},
        prompt_length=masks[1].sum(1),
        prompt_mask=masks[1],
        response_mask=masks[2],
        image_mask=masks[3],
        thought_mask=masks[4],
    )


def by_hand(values: Tensor, span: Tensor, how: str) -> Tensor:
    rows = [row[keep] for row, keep in zip(values, span, strict=True)]
    pooled = {
        "max": lambda r: r.max(0).values,
        "mean": lambda r: r.double().mean(0).float(),
        "last": lambda r: r[-1],
        "mean-abs": lambda r: r.double().abs().mean(0).float(),
        "rms": lambda r: r.double().square().mean(0).sqrt().float(),
    }
    return torch.stack([pooled[how](row) for row in rows])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(2, 4), st.integers(2, 4)), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(SPANS),
    st.sampled_from(HOWS),
)
def test_equals_loops_over_tokens(
    lengths: list[tuple[int, int, int]], left: bool, dtype: torch.dtype, span: Span, how: How
) -> None:
    batch = batch_of(lengths, left=left)
    values = torch.randn(*batch.prompt_mask.shape, 3).to(dtype)
    mask = batch.span(span)
    values[~mask] = torch.inf  # what lies outside the span must not leak in, not even times zero
    pool = Pool(span, how)
    found = Window.of(batch, pool, [str(i) for i in range(len(lengths))]).to(torch.device("cpu")).reduce(values)
    torch.testing.assert_close(found, by_hand(values, mask, how), rtol=1e-5, atol=1e-5)
    assert found.dtype == (torch.float32 if how in MEANS else dtype)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("how", HOWS)
def test_text_form_comes_back(span: Span, how: How) -> None:
    assert Pool.parse(str(Pool(span, how))) == Pool(span, how)
    assert str(Pool(span, how)) == f"{span}:{how}"


@pytest.mark.parametrize(
    "text", ["", "response", "response:", ":max", "response:max:", "answer:max", "all:min", "all: max"]
)
def test_other_texts_are_errors(text: str) -> None:
    with pytest.raises(SafeglassesError) as caught:
        Pool.parse(text)
    assert str(caught.value) == (
        "not a way of pooling\n"
        f"  given:    {text!r}\n"
        "  expected: SPAN:HOW with image | text | prompt | response | thought | all : "
        "max | mean | last | mean-abs | rms"
    )


def test_pools_sort_by_span_and_way() -> None:
    assert sorted([Pool("response", "max"), Pool("all", "mean"), Pool("all", "last")]) == [
        Pool("all", "last"),
        Pool("all", "mean"),
        Pool("response", "max"),
    ]


def test_a_row_without_a_token_is_named() -> None:
    with pytest.raises(BadRow) as caught:
        Window.of(batch_of([(1, 2, 2), (1, 2, 0)], left=False), Pool("response", "last"), ["first", "second"])
    assert str(caught.value) == (
        "nothing to pool response:last over\n"
        "  given:    example 'second' has no token in its response\n"
        "  expected: at least one response token in every example\n"
        "  do:       complete or remove the row, or pool over another span"
    )
