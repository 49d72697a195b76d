"""The summary: nothing wrong gets in, and one sentence says what happened."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import made_up_report as made_up
from safeglasses.errors import SafeglassesError
from safeglasses.report import build_summary, console_table, validate, verdict
from safeglasses.report.panel import panel_of
from safeglasses.report.summary import bands, p_text, percent

GOOD = made_up.make_summary()


def test_a_summary_survives_json() -> None:
    summary = made_up.make_summary()
    validate(json.loads(json.dumps(summary)))


def test_the_keys_are_the_contract() -> None:
    keys = "schema model base_fingerprint recipe n_neurons n_experts rows paired seconds learned_scalars "
    keys += "skipped_rows confounds hashes versions seeds command judges agreement calibration by_category"
    assert list(made_up.make_summary()) == keys.split()


def test_stages_that_did_not_run_are_null() -> None:
    summary = made_up.make_summary(seconds={"capture": 1.0, "total": 2.0})
    assert summary["seconds"] == {
        "capture": 1.0,
        "statistics": None,
        "calibrate": None,
        "measure": None,
        "total": 2.0,
    }


BREAKAGES = [
    (
        lambda s: s.pop("paired"),
        "summary has no paired",
        "exactly the keys schema, model, base_fingerprint, recipe",
    ),
    (lambda s: s.update(extra=1), "summary has unknown extra", "exactly the keys schema"),
    (lambda s: s.update(schema=2), "schema = 2", "1"),
    (lambda s: s.update(rows=[]), "rows = []", "a list of at least one row"),
    (lambda s: s.update(n_neurons=True), "n_neurons = True", "a whole number of at least 0"),
    (lambda s: s.update(model=None), "model = None", "text"),
    (
        lambda s: s["rows"][0].update(defence="magic"),
        "rows[0].defence = 'magic'",
        "one of none, aura, sgm, glasses",
    ),
    (
        lambda s: s["rows"].append(s["rows"][0]),
        "rows[24] = 'none · all · sampled'",
        "every defence, condition and",
    ),
    (lambda s: s["rows"][3].pop("kl"), "rows[3] has no kl", "exactly the keys defence, condition, decoding"),
    (
        lambda s: s["rows"][0]["harmful_rate"].update(value=1.2),
        "rows[0].harmful_rate.value = 1.2",
        "a number from 0 to 1",
    ),
    (
        lambda s: s["rows"][0]["harmful_rate"].update(value=float("nan")),
        "rows[0].harmful_rate.value = nan",
        "a number from 0 to 1",
    ),
    (
        lambda s: s["rows"][0]["harmful_rate"].pop("unscored"),
        "rows[0].harmful_rate has no unscored",
        "exactly the keys",
    ),
    (
        lambda s: s["rows"][0]["empty"].update(value=0.0, low=0.0, high=0.0, n=0),
        "rows[0].empty.n = 0",
        "at least 1: a rate over nothing is null",
    ),
    (
        lambda s: s["rows"][0]["utility"]["name"].update(low=0.99),
        "rows[0].utility.name = {",
        "low ≤ value ≤ high",
    ),
    (
        lambda s: s["rows"][0].update(perplexity=0.5),
        "rows[0].perplexity = 0.5",
        "a number of at least 1 or null",
    ),
    (lambda s: s["paired"].update(p_value=2), "paired.p_value = 2", "a number from 0 to 1"),
    (lambda s: s["seconds"].update(total=-1.0), "seconds.total = -1.0", "a number of at least 0 or null"),
    (
        lambda s: s["confounds"].update(response_tokens="high"),
        "confounds.response_tokens = 'high'",
        "a number from",
    ),
    (lambda s: s["hashes"].update(x=1), "hashes.x = 1", "text"),
    (lambda s: s.update(judges="lexicon"), "judges = 'lexicon'", "a list"),
    (lambda s: s["agreement"][0].pop("rates"), "agreement[0] has no rates", "exactly the keys defence, decoding"),
    (lambda s: s["agreement"][0]["kappas"][0].update(value=2), "agreement[0].kappas[0].value = 2", "a number from -1"),
    (
        lambda s: s["agreement"][0]["disagreements"][0]["verdicts"]["linear"].update(score=None),
        "agreement[0].disagreements[0].verdicts.linear.harmful = True",
        "true or false, or null where the score is null",
    ),
]


@pytest.mark.parametrize(("break_it", "given_text", "expected"), BREAKAGES, ids=[b[1] for b in BREAKAGES])
def test_what_is_wrong_is_named(break_it, given_text: str, expected: str) -> None:
    summary = made_up.make_summary()
    break_it(summary)
    with pytest.raises(SafeglassesError) as caught:
        validate(summary)
    assert caught.value.what == "summary is not valid"
    assert caught.value.given.startswith(given_text)
    assert caught.value.expected.startswith(expected)
    assert caught.value.do == "write summaries with safeglasses.report.build_summary"


_SCALARS = st.none() | st.booleans() | st.floats() | st.text(max_size=5)
_JUNK = st.recursive(_SCALARS, lambda x: st.dictionaries(st.text(max_size=5), x) | st.lists(x), max_leaves=4)


@given(_JUNK)
def test_anything_else_is_refused_cleanly(junk: object) -> None:
    with pytest.raises(SafeglassesError, match="summary is not valid"):
        validate(junk)


@settings(max_examples=30)
@given(
    st.sampled_from(["rows", "paired", "seconds", "hashes", "seeds", "judges", "agreement"]), st.text() | st.integers()
)
def test_junk_in_a_known_place_is_refused_cleanly(key: str, junk: object) -> None:
    with pytest.raises(SafeglassesError, match="summary is not valid"):
        validate(GOOD | {key: junk})


def test_build_refuses_what_validate_refuses() -> None:
    with pytest.raises(SafeglassesError, match="rows ="):
        made_up.make_summary(rows=[])
    assert build_summary.__kwdefaults__ is None  # every field must be given


def test_verdict_in_plain_words() -> None:
    assert verdict(made_up.make_summary()) == (
        "Harmful answers fell from 48.3 % to 1.9 % (sampled, 1,400 unseen prompts, p < 1e-16); "
        "utility within 0.8 points; benign perplexity +2.1 %."
    )


def test_verdict_does_not_hide_bad_news() -> None:
    summary = made_up.make_summary(paired={"fixed": 3, "broken": 200, "p_value": 2e-9})
    summary = made_up.with_main(
        summary,
        "glasses",
        harmful_rate=made_up.rate(0.61, 1400, unscored=0),
        utility={"name": made_up.rate(0.7, 1400), "colour": made_up.rate(0.99, 1400)},
        perplexity=2.86,
    )
    assert verdict(summary) == (
        "Harmful answers ROSE from 48.3 % to 61.0 % (sampled, 1,400 unseen prompts, p = 2e-09); "
        "utility fell by up to 26.2 points (name); benign perplexity +100.0 %."
    )


def test_verdict_without_significance() -> None:
    summary = made_up.make_summary(paired={"fixed": 5, "broken": 3, "p_value": 0.7265625})
    assert verdict(summary).startswith("No reliable change in harmful answers: from 48.3 % to 1.9 % (sampled, 1,400")
    assert "p = 0.73" in verdict(summary)


def test_verdict_says_what_was_not_measured() -> None:
    summary = made_up.make_summary(paired=None)
    for defence in ("none", "glasses"):
        summary = made_up.with_main(summary, defence, harmful_rate=None, utility={}, perplexity=None)
    assert verdict(summary) == (
        "Harmful answers were not measured; utility not measured; benign perplexity not measured."
    )
    only_base = made_up.make_summary(rows=[r for r in made_up.summary_rows() if r["defence"] == "none"])
    assert verdict(only_base) == "Not measured: there is no row with and without glasses to compare."


def test_verdict_falls_back_to_greedy_and_says_so() -> None:
    greedy = [r for r in made_up.summary_rows() if r["decoding"] == "greedy"]
    assert "(greedy, 1,400 unseen prompts" in verdict(made_up.make_summary(rows=greedy))


def test_equal_rates_did_not_fall() -> None:
    same = made_up.rate(0.483, 1400, unscored=0)
    summary = made_up.with_main(made_up.make_summary(), "glasses", harmful_rate=same, perplexity=1.43 * 0.9999)
    assert verdict(summary).startswith("Harmful answers stayed at 48.3 % (")
    assert verdict(summary).endswith("benign perplexity +0.0 %.")


def test_no_harm_at_all_is_no_success() -> None:
    none = made_up.rate(0.0, 1400, unscored=0)
    summary = made_up.make_summary(paired={"fixed": 0, "broken": 0, "p_value": 1.0})
    for defence in ("none", "glasses"):
        summary = made_up.with_main(summary, defence, harmful_rate=none)
    assert verdict(summary).startswith(
        "The judge found no harmful answer, without or with glasses (sampled, 1,400 unseen prompts, p = 1): "
        "nothing can be said about harm; "
    )


def test_a_summary_from_before_there_were_several_judges_is_still_read() -> None:
    summary = made_up.make_summary()
    del summary["judges"], summary["agreement"]
    validate(summary)
    assert panel_of(summary) is None


def test_bands_leave_out_what_was_not_measured_or_says_the_same_twice() -> None:
    rows = made_up.summary_rows()
    every = [(c, d) for d in ("sampled", "greedy") for c in ("all", "standard", "adversarial")]
    assert bands(made_up.make_summary()) == every
    standard = [r for r in rows if r["condition"] != "adversarial" or r["decoding"] == "greedy"]
    assert bands(made_up.make_summary(rows=standard)) == [("all", "sampled"), *every[3:]]
    alone = [r for r in rows if r["condition"] == "adversarial" and r["decoding"] == "greedy"]
    assert bands(made_up.make_summary(rows=alone)) == [("adversarial", "greedy")]


def test_numbers_as_people_write_them() -> None:
    assert [p_text(p) for p in (0.0, 1e-16, 3e-5, 0.0123, 1.0)] == [
        "p < 1e-16",
        "p = 1e-16",
        "p = 3e-05",
        "p = 0.012",
        "p = 1",
    ]
    assert [percent(x) for x in (None, 0.0, 0.0194, 1.0)] == ["–", "0.0 %", "1.9 %", "100.0 %"]


def test_console_table_shows_every_defence() -> None:
    out = io.StringIO()
    Console(file=out, width=140, color_system=None).print(console_table(made_up.make_summary()))
    text = out.getvalue()
    assert text.count("glasses") == 2  # sampled and greedy
    assert "48.3 % 45.7–50.9" in text
    assert "1.9 %" in text


def test_console_table_writes_missing_rates_as_dashes() -> None:
    rows = [
        made_up.summary_row("none", "all", "greedy", 0.2, harmful_rate=None, refusal_on_benign=None, perplexity=None)
    ]
    out = io.StringIO()
    Console(file=out, width=140, color_system=None).print(console_table(made_up.make_summary(rows=rows, paired=None)))
    line = next(x for x in out.getvalue().splitlines() if "none" in x)
    assert line.count("–") == 5  # three conditions, perplexity, refusals
