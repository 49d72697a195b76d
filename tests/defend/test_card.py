"""Cards: what stands in them, what must not, and what of others' text could have done there."""

import json
import shutil
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from made_up_report import make_summary
from safeglasses.defend.card import code, exported_card, folded_card, glasses_card, plain
from safeglasses.defend.folder import add_results, results_in
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.home import Home
from safeglasses.defend.results import RESULTS, Results, read_results, results_of
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.model.sites import Site

HASH = "0" * 64
NASTY = (
    "x\n---\nlicense: mit\n# owned\n`<script>alert(1)</script>` | [a](http://b) ![i](http://c) *x* \u2028--- \x1b[31m"
)
MARKDOWN = MarkdownIt("commonmark").enable("table")


@pytest.fixture
def folder(tmp_path):
    factors = {Site("layers.0.mlp.up_proj", "out"): torch.tensor([0.5, 1.0, 0.25])}
    home = Home("owner/model-7b", "main", "model", True, False)
    return Glasses(factors, "sg1-a", "sgm-calibrated", home=home).save(tmp_path / "glasses")


def record_of(folder) -> dict[str, Any]:
    return json.loads((folder / "glasses.json").read_text())


def summary_of(folder, **changes) -> dict[str, Any]:
    hashes = {f"glasses/{name}": text for name, text in record_of(folder)["files"].items()}
    known = {"base_fingerprint": "sg1-a", "recipe": "sgm-calibrated"}
    return make_summary(**known, hashes={"pairs": "1" * 64, "prompts": "2" * 64, **hashes}, **changes)


def results(**changes) -> Results:
    return results_of(make_summary(**changes), glasses=HASH, strength=1, judge="lexicon:words.txt")


def kinds(text: str) -> list[str]:
    return [token.tag for token in MARKDOWN.parse(ModelCard(text).text) if token.type.endswith("_open")]


# what they say


def test_front_matter_of_all_three():
    base = {"source": "owner/model-7b", "fingerprint": "sg1-a", "revision": None, "multimodal": True}
    record = {"base": base, "recipe": "sgm", "strength": 1, "n_neurons": 3, "widths": {}, "fingerprint": "sg1-b"}
    common = {"base_model": "owner/model-7b", "pipeline_tag": "image-text-to-text"}
    assert ModelCard(glasses_card(record)).data.to_dict() == {
        **common,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["safeglasses", "safety", "ia3"],
    }
    assert ModelCard(exported_card(record, "an exact LoRA", kind="lora", results=None)).data.to_dict() == {
        **common,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["safeglasses", "safety", "lora"],
    }
    assert ModelCard(folded_card(record, multimodal=True)).data.to_dict() == {
        **common,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["safeglasses", "safety"],
    }


@pytest.mark.parametrize("source", ["../x", "/a/b", "a/b/c", "model", "a/b--c", "a/b\nlicense: mit", ""])
def test_only_a_hub_id_is_named_as_base(source):
    record = {"source": source, "fingerprint": "sg1-a", "multimodal": False}
    text = glasses_card({"base": record, "recipe": "sgm", "strength": 1, "n_neurons": 3, "widths": {}})
    assert ModelCard(text).data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["safeglasses", "safety", "ia3"],
    }


def test_results_are_in_the_card_and_in_its_model_index(folder):
    bare = (folder / "README.md").read_text()
    assert "Not measured in this form and at this strength" in bare
    found = add_results(folder, summary_of(folder), judge="lexicon:words.txt")
    card = ModelCard((folder / "README.md").read_text())
    before, after = found.row("none", "sampled"), found.row("glasses", "sampled")
    lines = card.text.splitlines()
    heads = "decoding | harmful | name right | colour right | place right | benign perplexity | refuses benign | empty"
    assert f"|  | {heads} |" in lines
    for told, row in (("untouched", before), ("**these glasses**", after)):
        (line,) = [line for line in lines if line.startswith(f"| {told} | sampled |")]
        rate = row.harmful_rate
        wanted = f"{100 * rate.value:.1f} % ({100 * rate.low:.1f}–{100 * rate.high:.1f}; n = {rate.n:,})"
        assert wanted in line
        assert f"{row.perplexity:.4g}" in line
    assert "Harmful is what the judge `lexicon:words.txt` calls harmful" in card.text
    assert "Data (pairs): SHA-256 `" + "1" * 64 in card.text
    paired = found.paired
    assert f"{paired.fixed:,} harmful answers became harmless and {paired.broken:,} the reverse" in card.text
    indexed = {(r.metric_type, r.metric_name.split(", ")[1]): r.metric_value for r in card.data.eval_results}
    assert indexed["harmful_rate", "sampled"] == after.harmful_rate.value
    assert indexed["harmful_rate", "greedy"] == found.row("glasses", "greedy").harmful_rate.value
    assert results_in(folder) == found
    assert Glasses.load(folder).n_neurons == 2, "results change no glasses"


def test_what_was_not_measured_is_said():
    summary = make_summary()
    summary["rows"] = [row for row in summary["rows"] if row["decoding"] == "sampled"]
    for row in summary["rows"]:
        row |= {"perplexity": None, "utility": None}
        if row["harmful_rate"]:
            row["harmful_rate"]["unscored"] = 7
    found = results_of(summary, glasses=HASH, strength=1)
    record = {"base": {"source": "o/m", "fingerprint": "sg1-a", "multimodal": True}, "recipe": "r", "strength": 1}
    text = glasses_card({**record, "n_neurons": 3, "widths": {}}, found)
    assert "- Not measured: utility, perplexity, greedy answers." in text
    assert "- The judge could not score 7 answers; they are in no rate." in text
    assert "they do not rule harm out" in text
    assert "The licence of the base model applies" in text


# what others' text cannot do there


def test_what_calibration_was_asked_for_is_in_the_card(folder):
    notes = {"categories": ["hate", "threats"], "under": "self-reminder", "limit_missed": "None keeps 2 percent"}
    text = glasses_card({**record_of(folder), "notes": notes}, None)
    assert "- Made against these kinds of harm only: `hate`, `threats`\n" in text
    assert "- Calibrated and measured with `self-reminder` at the input\n" in text
    assert "- **Limit of harm not reached.** None keeps 2 percent\n" in text
    plain = glasses_card({**record_of(folder), "notes": {"categories": "hate", "under": 1, "limit_missed": None}}, None)
    assert "kinds of harm" not in plain
    assert "at the input" not in plain


def test_nothing_of_others_becomes_markup(folder):
    summary = make_summary()
    for row in summary["rows"]:
        if row["utility"]:
            row["utility"] = {NASTY: next(iter(row["utility"].values()))}
    summary["versions"]["torch"] = NASTY
    found = results_of(summary, glasses=HASH, strength=1, judge=NASTY)
    harmless = results_of(
        {**deepcopy(summary), "rows": [{**row, "utility": {"x": None}} for row in summary["rows"]]},
        glasses=HASH,
        strength=1,
        judge="x",
    )
    for make in (
        lambda r, s: glasses_card(r, s),
        lambda r, s: exported_card(r, "an exact LoRA", kind="lora", results=s),
        lambda r, s: folded_card({**r, "fingerprint": r["recipe"]}, multimodal=True, results=s),
    ):
        plain_record, nasty_record = (
            {
                "base": {"source": text, "fingerprint": text, "revision": text, "multimodal": True},
                "recipe": text,
                "strength": 1,
                "n_neurons": 3,
                "widths": {},
                "notes": {
                    "product_of": [{"name": text, "recipe": text, "strength": text}, text, 1],
                    "categories": [text, 1],
                    "under": text,
                    "limit_missed": text,
                },
            }
            for text in ("x", NASTY)
        )
        bad, good = make(nasty_record, found), make(plain_record, harmless)
        assert ModelCard(bad).data.to_dict().keys() == ModelCard(good).data.to_dict().keys()
        assert kinds(bad) == kinds(good)
        rendered = MARKDOWN.render(ModelCard(bad).text)
        assert "<script" not in rendered
        assert "<img" not in rendered
        assert 'href="http://b"' not in rendered
        assert "\x1b" not in bad


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_code_and_plain_text_are_one_inline_element(text):
    (inline,) = [token for token in MARKDOWN.parse(f"a {code(text)} b") if token.type == "inline"]
    assert [child.type for child in inline.children] == ["text", "code_inline", "text"]
    assert "\n" not in code(text)
    tokens = MARKDOWN.parse(f"| a |\n| --- |\n| z{plain(text)} |\n")
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 2
    assert {child.type for child in cells[1].children} <= {"text", "text_special"}


# results as a file


def test_results_of_other_glasses_are_refused(folder, tmp_path):
    summary = summary_of(folder)
    for change in ({"base_fingerprint": "sg1-b"}, {"recipe": "sgm"}):
        with pytest.raises(PartialMatch, match="these results are of other glasses"):
            add_results(folder, {**summary, **change})
    moved = {**summary["hashes"], "glasses/neurons.parquet": HASH}
    with pytest.raises(PartialMatch, match=r"given: +glasses/neurons.parquet"):
        add_results(folder, {**summary, "hashes": moved})
    assert not (folder / RESULTS).exists()
    add_results(folder, summary)
    Glasses.load(folder).at(0.5).save(tmp_path / "half")
    assert not (tmp_path / "half" / RESULTS).exists()
    shutil.copy(folder / RESULTS, tmp_path / "half" / RESULTS)
    with pytest.raises(PartialMatch, match="these results are of other glasses"):
        results_in(tmp_path / "half")


def test_results_hold_at_one_strength(folder):
    assert results_in(folder) is None
    found = add_results(folder, summary_of(folder))
    assert results_in(folder, 1) == found
    assert results_in(folder, 0.5) is None


def test_results_hold_no_text_of_a_model_and_no_path(folder):
    add_results(folder, summary_of(folder, command="safeglasses fit /home/me/model"), judge="j")
    assert "/home/me" not in (folder / RESULTS).read_text() + (folder / "README.md").read_text()
    assert read_results(folder / RESULTS) == results_in(folder)


def places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inner for found in [(*path, key), *places(item, (*path, key))]]


JUNK = st.sampled_from([None, True, -1, 2, 2**70, 0.5, 1e308, "", "a" * 999, [], {}, [None], {"": 0}]).map(deepcopy)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_results_are_refused_or_whole(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    record = json.loads(json.dumps(asdict(results())))
    where = data.draw(st.sampled_from(places(record)))
    owner = record
    for key in where[:-1]:
        owner = owner[key]
    if data.draw(st.booleans()):
        owner[where[-1]] = data.draw(JUNK)
    else:
        del owner[where[-1]]
    path.write_text(json.dumps(record))
    try:
        found = read_results(path)
    except SafeglassesError as error:
        assert str(error).startswith("not the results of a run\n  given:")
    else:
        base = {"source": "o/m", "fingerprint": "sg1-a", "multimodal": True}
        glasses_card({"base": base, "recipe": "r", "strength": 1, "n_neurons": 3, "widths": {}}, found)


@pytest.mark.parametrize("summary", [{}, {"rows": 1}, {"rows": [{}]}, {**make_summary(), "paired": {"fixed": -1}}])
def test_no_summary(summary):
    with pytest.raises(SafeglassesError, match=r"no summary of a run|not the results of a run"):
        results_of(summary, glasses=HASH, strength=1)
