"""Figures are what plotly accepts, and say what the numbers say."""

import json
import math

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

import made_up_report as made_up
from safeglasses.report import HeatMap, Histogram, TradeOff, Trial
from safeglasses.report.figures import front, harm, trade_off
from safeglasses.report.maps import auroc, experts_map, strength_map
from safeglasses.report.plotting import Figure, short_kind


def plain(value):
    """Replace the colour tokens, as the page does."""
    if isinstance(value, str):
        return "#123456" if value.startswith("@") else value
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def check(figure: Figure | None) -> go.Figure:
    """Let plotly's own validators read a figure."""
    assert figure is not None
    json.dumps(figure, allow_nan=False)
    return go.Figure(plain(figure))


def test_harm_draws_each_rate_once_with_its_interval() -> None:
    figure = check(harm(made_up.make_summary()))
    markers = [t for t in figure.data if t.type == "scatter"]
    assert [t.name for t in markers] == ["without glasses", "AurA", "SGM, parameter-free", "with glasses"]
    assert all(len(t.x) == 6 for t in markers)
    wilson = made_up.rate(0.483, 1400)
    assert markers[0].x[0] + markers[0].error_x.array[0] == pytest.approx(100 * wilson["high"])
    assert markers[0].x[0] - markers[0].error_x.arrayminus[0] == pytest.approx(100 * wilson["low"])


def test_harm_leaves_out_what_was_not_measured() -> None:
    rows = [r for r in made_up.summary_rows() if r["condition"] != "standard" and r["decoding"] == "greedy"]
    figure = check(harm(made_up.make_summary(rows=rows)))
    assert list(figure.layout.yaxis.ticktext) == ["<b>all</b><br>greedy"]  # adversarial would say the same twice
    for row in rows:
        row["harmful_rate"] = None
    assert harm(made_up.make_summary(rows=rows)) is None


def test_heat_maps_show_shares_and_gaps() -> None:
    heat = HeatMap(("a:out", "b:in"), (0, 1), ((4.0, 8.0), (2.0, 0.0)), ((1.0, 0.0), (2.0, 0.0)),
                   ((4.0, 2.0), (0.0, 0.0)), ((-1.0, 1.0), (0.0, 0.0)))  # fmt: skip
    assert [list(row) for row in check(experts_map(heat)).data[0].z] == [[25.0, 0.0], [100.0, None]]
    turned = check(strength_map(heat)).data[0]
    assert [list(row) for row in turned.z] == [[-25.0, 12.5], [0.0, None]]
    assert (turned.zmin, turned.zmax) == (-25.0, 25.0)  # amplified cells: both hues, white in the middle
    assert "1 experts, 4 changed of 4" in turned.text[0][0]
    for figure in (experts_map(made_up.make_heat(48)), strength_map(made_up.make_heat(1))):
        check(figure)


def test_kinds_in_short() -> None:
    assert [short_kind(k) for k in ("mlp.up_proj:out", "mlp.down_proj:in", "fc1:out")] == [
        "up_proj",
        "down_proj:in",
        "fc1",
    ]


@given(st.integers(2, 40), st.integers(2, 40))
def test_null_spread_is_that_of_random_ranks(m: int, n: int) -> None:
    """Independent oracle: the variance of a sum of m ranks drawn from m + n without replacement."""
    ranks = np.arange(1, m + n + 1)
    exact = m * ranks.var() * n / (m + n - 1) / (m * n) ** 2
    made = Histogram("p", (0.0, 1.0), (1,), m, n)
    assert made.null_sd == pytest.approx(math.sqrt(exact))


def test_null_curve_holds_as_many_neurons_as_the_bars() -> None:
    made = made_up.make_histograms()[0]
    figure = check(auroc(made))
    curve = figure.data[-1]
    area = np.trapezoid(curve.y, curve.x) / (made.edges[1] - made.edges[0])
    assert area == pytest.approx(sum(made.counts), rel=0.01)
    assert sum(y or 0 for trace in figure.data[:2] for y in trace.y) == sum(made.counts)


def test_a_histogram_with_one_bin_filled_still_draws() -> None:
    edges, counts = tuple(i / 10 for i in range(11)), (0,) * 5 + (7,) + (0,) * 4
    assert len(check(auroc(Histogram("response:max", edges, counts, 20, 20))).data) == 3
    assert len(check(auroc(Histogram("response:max", edges, counts, 0, 20))).data) == 2  # no chance to speak of


_COORDINATE = st.integers(0, 9).map(float)


@given(st.lists(st.tuples(_COORDINATE, _COORDINATE), max_size=30))
def test_front_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    def beaten(p: tuple[float, float]) -> bool:
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)

    assert {points[i] for i in front(points)} == {p for p in points if not beaten(p)}


def test_trade_off_marks_the_chosen_one_and_nothing_without_it() -> None:
    record = made_up.make_trade_off()
    star = check(trade_off(record, "kl")).data[-1]
    assert (star.x[0], star.y[0]) == (
        record.trials[record.chosen].kl,
        100 * record.trials[record.chosen].harm,
    )
    blind = TradeOff((Trial("only", 0.1, None, 0.2),), 0, "the only one")
    assert trade_off(blind, "utility_lost") is None
    check(trade_off(blind, "kl"))


def test_names_cannot_become_plotly_markup() -> None:
    evil = "<a href='https://example.org'>x</a>"
    figure = trade_off(TradeOff((Trial(evil, 0.1, 0.1, 0.2),), 0, "rule"), "kl")
    assert "<a" not in json.dumps(figure)
