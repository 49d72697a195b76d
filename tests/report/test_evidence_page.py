"""The page of evidence alone: it says what the record says, with less where less is known, and escapes it all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import made_up_report as made_up
from pages import Page
from safeglasses.errors import SafeglassesError
from safeglasses.find.evidence import Evidence
from safeglasses.find.pools import Pool
from safeglasses.find.selection import Selection
from safeglasses.model.sites import Site
from safeglasses.report.counts import heat_map
from safeglasses.report.evidence_page import render_evidence, write_evidence_page
from safeglasses.report.maps import strength_map

PROMPT, RESPONSE = Pool("prompt", "last"), Pool("response", "max")
WIDTHS = {Site(f"layers.{i}.mlp.{name}", side): width for i in range(3)
          for name, side, width in (("up_proj", "out", 60), ("down_proj", "in", 40))}  # fmt: skip
BOOTSTRAP = {"method": "bootstrap", "neurons": 90, "cutoff": 0.56, "resamples": 200, "clusters": 120,
             "found_again": 0.957, "low": 0.931, "high": 0.979, "standard_error": 0.01}  # fmt: skip
NORMAL = {**BOOTSTRAP, "method": "normal approximation", "resamples": 0, "clusters": 0, "low": None, "high": None}
NOISE = {"neurons": 300, "mean": 0.5, "sd": 0.03, "expected_sd": 0.04, "low": 0.41, "high": 0.593,
         "beyond": 0.01, "expected_beyond": 0.01}  # fmt: skip


def make_evidence(**changes: Any) -> Evidence:
    """Evidence in which every third neuron knows much."""
    made = torch.Generator().manual_seed(0)
    columns = {}
    for name in ("auroc", "held_out", "effect_size"):
        columns[name] = {site: 0.5 + 0.01 * torch.randn(2, n, generator=made).double() for site, n in WIDTHS.items()}
        for values in columns[name].values():
            values[:, ::3] += 0.3
    given: dict[str, Any] = {
        "auroc": columns["auroc"],
        "held_out": columns["held_out"],
        "pools": (PROMPT, RESPONSE),
        "samples": ((200, 100), (200, 200)),
        "held_out_samples": ((50, 25), (50, 50)),
        "base_fingerprint": "sg1-0123",
        "source_sha256": "ab" * 32,
        "columns": {"effect_size": {site: values.float() for site, values in columns["effect_size"].items()}},
    }
    return Evidence(**given | changes)


def make_record(evidence: Evidence, stability: Mapping[str, Any] = BOOTSTRAP, **changes: Any) -> dict[str, Any]:
    pools = []
    for pool, (toxic, non_toxic) in zip(evidence.pools, evidence.samples, strict=True):
        row: dict[str, Any] = {"pool": str(pool), "toxic": toxic, "non_toxic": non_toxic}
        pools.append(row)
        if not min(toxic, non_toxic):
            row |= {"selected": 0, "stability": None, "noise": None, "explained": []}
            continue
        passed = Selection.fdr(evidence, pool, held_out=False)
        chosen = passed & Selection.fdr(evidence, pool) if evidence.held_out is not None else passed
        row |= {"selected": len(chosen), "selected_before_held_out": len(passed), "false_discovery_rate": 0.05,
                "cutoff": 0.56, "looked_at": 90, "noise": NOISE, "stability": stability,
                "explained": [{"confound": "source", "neurons": 90, "flagged": 9, "comparable": 0.4}]}  # fmt: skip
    rated = (("source", 0.74, True), ("prompt_tokens", 0.57, False))
    confounds = [{"name": name, "kind": "numeric", "auroc": auroc, "low": auroc - 0.03, "high": auroc + 0.03,
                  "p": 1e-9, "flagged": flagged} for name, auroc, flagged in rated]  # fmt: skip
    given = {"schema": 1, "model": "org/model", "base_fingerprint": "sg1-0123", "engine": "exact", "processes": 2,
             "sites": 6, "neurons": 300, "statistics": [], "skipped_rows": 0, "seconds": {"capture": 11.55},
             "confounds": confounds, "pools": pools}  # fmt: skip
    return {**given, **changes}


def words(page: Page) -> str:
    return " ".join(page.text.replace("\u00a0", " ").split())


def figures(page: Page) -> dict[str, Any]:
    return json.loads(page.scripts[0])


@pytest.fixture(scope="module")
def full() -> Page:
    evidence = make_evidence()
    return Page(render_evidence(evidence, make_record(evidence)))


def test_the_first_sentence_says_what_was_found_and_how_sure_it_is(full: Page) -> None:
    n = len(Selection.fdr(make_evidence(), RESPONSE))
    assert n >= 100
    noun = "answers" if n > len(Selection.fdr(make_evidence(), PROMPT)) else "prompts"
    assert f"neurons tell toxic from non-toxic {noun}, on unseen examples too; 96 % (93–98) of them would" in words(
        full
    )


def test_what_the_record_says_is_on_the_page(full: Page) -> None:
    for said in ("Likely confounds", "10 % 9 of 90", "0.740 0.71–0.77", "0.410–0.593", "bootstrap", "of 90 looked at",
                 "300 at 6 sites", "11.6", "sg1-0123", "ab" * 32, "Selection.fdr(evidence, pool, 0.05)"):  # fmt: skip
        assert said in words(full), said


def test_figures_mark_the_noise_and_count_the_selected(full: Page) -> None:
    drawn = figures(full)
    assert list(drawn) == ["auroc-0", "experts-0", "auroc-1", "experts-1"]
    assert [a["data-figure"] for _, a in full.tags if "data-figure" in a] == list(drawn)
    noise = drawn["auroc-1"]["data"][-1]
    assert noise["name"] == "99.8 % of noise"
    assert noise["x"] == [0.41, 0.41, None, 0.593, 0.593]
    chosen = Selection.fdr(make_evidence(), RESPONSE)
    heat = heat_map(chosen)
    assert sum(n for row in heat.experts for n in row) == len(chosen)
    assert heat.kinds == ("mlp.up_proj:out", "mlp.down_proj:in")
    assert heat.total == ((60, 60, 60), (40, 40, 40))
    assert f"{heat.experts[0][0]:.0f} experts of 60" in drawn["experts-1"]["data"][0]["text"][0][0]


def test_a_map_of_evidence_alone_has_no_strength() -> None:
    with pytest.raises(SafeglassesError, match="there is no strength to draw"):
        strength_map(heat_map(Selection.fdr(make_evidence(), RESPONSE)))


def test_the_best_neurons_are_listed_first(full: Page) -> None:
    evidence = make_evidence()
    best = sorted(
        ((float(v), site.neuron(i)) for site, rows in evidence.auroc.items() for i, v in enumerate(rows[1].tolist())),
        reverse=True,
    )[:12]
    listed = [part.split(" ")[0] for part in words(full).split("layers.")[1:]]
    assert listed[12:] == [name.removeprefix("layers.") for _, name in best]
    assert f"{best[0][0]:.3f} ±" in words(full)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    evidence = make_evidence()
    one, two = (write_evidence_page(evidence, make_record(evidence), tmp_path / name) for name in ("a.html", "b.html"))
    assert one.read_bytes() == two.read_bytes()


def test_hostile_text_changes_nothing() -> None:
    evidence = make_evidence()
    record = make_record(evidence)

    def tags(text: str) -> list[str]:
        confounds = [{**record["confounds"][0], "name": text}, record["confounds"][1]]
        changed = {"model": text, "base_fingerprint": text, "seconds": {text: 1.0}, "confounds": confounds}
        page = Page(render_evidence(evidence, record | changed))
        assert len(page.scripts) == 3
        return [tag for tag, _ in page.tags if tag != "wbr"]

    assert tags(made_up.NASTY + "<script>alert(1)</script>") == tags("x")


def test_without_held_out_values_nothing_is_said_of_them() -> None:
    evidence = make_evidence(held_out=None, held_out_samples=None)
    page = Page(render_evidence(evidence, make_record(evidence)))
    assert "on unseen examples too" not in words(page)
    assert "No unseen examples" in words(page)
    assert "Selection.fdr(evidence, pool, 0.05, held_out=False)" in words(page)
    assert "on held-out" not in json.dumps(figures(page))


def test_an_approximation_has_no_interval_and_says_so() -> None:
    bound = {site: values.float() * 0 for site, values in make_evidence().auroc.items()}
    evidence = make_evidence(engine="histogram", columns={"auroc_bound": bound})
    page = Page(render_evidence(evidence, make_record(evidence, NORMAL, engine="histogram")))
    assert "; about 96 % of them would be found again." in words(page)
    assert "normal approximation" in words(page)
    assert "this engine keeps no examples to draw anew" in words(page)
    assert "the exact AUROC lies within auroc ± this" in words(page)


def test_a_pool_of_one_class_says_nothing() -> None:
    evidence = make_evidence(samples=((200, 0), (200, 200)))
    page = Page(render_evidence(evidence, make_record(evidence)))
    assert list(figures(page)) == ["auroc-0", "experts-0"]
    assert "prompt:last has examples of one class only and says nothing" in words(page)
    none = make_evidence(samples=((200, 0), (200, 0)))
    page = Page(render_evidence(none, make_record(none)))
    assert figures(page) == {}
    assert "Nothing can be said of 300 neurons" in words(page)


def test_no_selected_neuron_is_said_too() -> None:
    flat = {site: torch.full((2, n), 0.5, dtype=torch.float64) for site, n in WIDTHS.items()}
    evidence = make_evidence(auroc=flat, columns={"effect_size": {s: v.float() * torch.nan for s, v in flat.items()}})
    record = make_record(evidence)
    for row in record["pools"]:
        row |= {"cutoff": None, "looked_at": 0, "stability": None, "explained": [],
                "noise": {**NOISE, "beyond": None, "expected_beyond": None}}  # fmt: skip
    page = Page(render_evidence(evidence, record))
    assert "None of 300 neurons tells toxic from non-toxic prompts beyond chance (FDR 5%)." in words(page)


def test_a_confound_that_is_the_label_leaves_nothing_to_compare() -> None:
    evidence = make_evidence()
    record = make_record(evidence)
    record["pools"][0]["explained"][0] |= {"flagged": 90, "comparable": 0.0}
    text = words(Page(render_evidence(evidence, record)))
    assert "not separable no toxic and non-toxic examples are alike in it 10 % 9 of 90" in text


def test_the_lines_to_load_it_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Page) -> None:
    make_evidence().save(tmp_path / "evidence.safetensors")
    monkeypatch.chdir(tmp_path)
    code = full.text[full.text.index("import safeglasses") : full.text.index("Start in the folder")]
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), names)  # noqa: S102
    assert names["experts"] == Selection.fdr(make_evidence(), names["pool"])


def test_one_neuron_is_one() -> None:
    both = make_evidence()
    evidence = make_evidence(
        auroc={site: values[1:] for site, values in both.auroc.items()},
        held_out=None,
        held_out_samples=None,
        columns={},
        pools=(RESPONSE,),
        samples=((200, 200),),
    )
    record = make_record(evidence)
    record["pools"][0] |= {"selected": 1, "selected_before_held_out": 1}
    assert "1 of 300 neurons tells toxic" in words(Page(render_evidence(evidence, record)))
