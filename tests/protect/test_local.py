"""Strategies on a real tiny model with pictures: what is worn, prefixes, contrast, journals."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from protect.script import Says, ask
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import SafeglassesError
from safeglasses.measure.respond import Decoding
from safeglasses.model.vlm import load
from safeglasses.protect import output, parts
from safeglasses.protect.compose import Kit, compose
from safeglasses.protect.local import LocalAnswerer, contrasted, memory_per_token
from safeglasses.protect.running import protect
from safeglasses.protect.stack import Protection, Worn
from safeglasses.protect.steps import Contrast, Prompt
from safeglasses.protect.wording import shipped as wording_of
from shipped import both_sides

SAMPLED = Decoding("sampled", temperature=1.0, max_new_tokens=5)
GREEDY = Decoding("greedy", temperature=0.0, max_new_tokens=5)
PROMPTS = [
    ask("what is this", *(["red", "blue"][: i % 3]), id=f"p{i}", language=["en", "de", None][i % 3]) for i in range(4)
]
KIT = Kit(judge=Says("zzz"), on_failure="open")
EVERY = "typographic+self-reminder+best-of-n:2+ecso+self-defense+filter"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A random model never ends a reply by itself."""
    for module in (parts, output):
        monkeypatch.setattr(module, "SHORT", 5)


@pytest.fixture(scope="module")
def glasses(tiny_vlm) -> Glasses:
    """Glasses that change the tiny model's answers."""
    return both_sides(tiny_vlm)


def run(text, vlm, prompts=PROMPTS, decoding=SAMPLED, worn=(), **options):
    stack = compose(text, KIT)
    if worn:
        stack = Protection(stack.name, (*stack.parts, *(Worn("glasses", g) for g in worn)), stack.refusal, "open")
    return protect(stack, prompts, LocalAnswerer(vlm, stack.worn), decoding=decoding, **options)


@pytest.mark.parametrize("name", ["self-reminder", "adashield-s", "xsafety", "typographic", "refusal-prefix"])
def test_each_runs_at_the_input(tiny_vlm, name):
    outcomes = run(name, tiny_vlm)
    assert [o.id for o in outcomes] == [e.id for e in PROMPTS]
    assert all(o.cost.calls >= 1 and o.cost.tokens >= 1 and o.cost.widest > 0 for o in outcomes)


@pytest.mark.parametrize("name", ["best-of-n:2", "eta:2", "ecso", "self-defense", "filter", EVERY])
def test_each_runs_around_the_answer(tiny_vlm, name):
    outcomes = run(name, tiny_vlm)
    assert all(o.cost.calls + o.cost.checks >= 2 or not e.n_images for o, e in zip(outcomes, PROMPTS, strict=True))


def test_answers_do_not_depend_on_batches_and_are_those_of_generate(tiny_vlm):
    together, alone = run(EVERY, tiny_vlm), run(EVERY, tiny_vlm, batch_size=1)
    assert [(o.text, o.events) for o in together] == [(o.text, o.events) for o in alone]
    (first, *_), chat = run("none", tiny_vlm, decoding=GREEDY), PROMPTS[0].chat()
    assert [first.text] == tiny_vlm.generate([chat], max_new_tokens=5, temperature=0.0, seed=0)


def test_what_is_worn_is_worn_in_every_call_and_taken_off(tiny_vlm, glasses):
    before = run("none", tiny_vlm, decoding=GREEDY)
    worn = run("none", tiny_vlm, decoding=GREEDY, worn=[glasses])
    with glasses.worn(tiny_vlm):
        expected = run("none", tiny_vlm, decoding=GREEDY)
    assert [o.text for o in worn] == [o.text for o in expected] != [o.text for o in before]
    assert [o.text for o in run("none", tiny_vlm, decoding=GREEDY)] == [o.text for o in before]


def test_an_answer_begins_with_its_prefix(tiny_vlm):
    outcomes = run("refusal-prefix", tiny_vlm, decoding=GREEDY)
    words = [wording_of("refusal-prefix").text(e.language, "prefix") for e in PROMPTS]
    decoded = [tiny_vlm.tokenizer.decode(tiny_vlm.tokenizer(w, add_special_tokens=False)["input_ids"]) for w in words]
    assert all(o.text.startswith(w.strip()) for o, w in zip(outcomes, decoded, strict=True))


def contrast(vlm, glasses, alpha, tokens, decoding=GREEDY):
    stack = compose("none")
    from safeglasses.protect.decoding import ContrastiveDecoding

    parts = (
        ContrastiveDecoding(Contrast(float(alpha), tokens, candidates=10**6), "contrast"),
        Worn("glasses", glasses),
    )
    stack = Protection("contrast", parts, stack.refusal, "open")
    outcomes = protect(stack, PROMPTS, LocalAnswerer(vlm, stack.worn), decoding=decoding)
    assert {o.cost.calls for o in outcomes} == {2}
    return [o.text for o in outcomes]


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=lambda d: d.name)
def test_contrast_lies_on_a_line_through_the_bare_and_the_worn_model(tiny_vlm, glasses, decoding):
    bare = [o.text for o in run("none", tiny_vlm, decoding=decoding)]
    worn = [o.text for o in run("none", tiny_vlm, decoding=decoding, worn=[glasses])]
    assert contrast(tiny_vlm, glasses, 0, 10**6, decoding) == bare != worn
    assert contrast(tiny_vlm, glasses, 1, 10**6, decoding) == worn


CACHED = ("qwen2_vl", "qwen3_vl", "gemma3", "mllama", "idefics3")


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of Pillow, by a processor
@pytest.mark.parametrize("name", CACHED)
def test_the_worn_model_goes_on_from_its_own_cache_in_every_family(name, tmp_path):
    vlm = load(families.build(name, tmp_path / name))
    glasses = both_sides(vlm)
    bare = [o.text for o in run("none", vlm)]
    worn = [o.text for o in run("none", vlm, worn=[glasses])]
    assert bare != worn
    assert contrast(vlm, glasses, 0, 10**6, SAMPLED) == bare
    assert contrast(vlm, glasses, 1, 10**6, SAMPLED) == worn


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-40, 40), st.integers(-40, 40)), min_size=3, max_size=9), st.integers(1, 9))
def test_candidates_are_the_smallest_common_top_sets(logits, wanted):
    bare, worn = torch.tensor(logits, dtype=torch.float64).T[:, None, :] / 10
    p, q = bare[0].softmax(-1), worn[0].softmax(-1)
    orders = [values.argsort(descending=True, stable=True).tolist() for values in (p, q)]
    wanted = min(wanted, len(logits))
    depth = next(k for k in range(1, len(logits) + 1) if len(set(orders[0][:k]) & set(orders[1][:k])) >= wanted)
    common = set(orders[0][:depth]) & set(orders[1][:depth])
    mixed = (p + 3 * (q - p)).clamp(min=0)
    found = contrasted(bare, worn, Contrast(3.0, 1, wanted))[0].exp()
    expected = torch.tensor([float(v) if i in common else 0.0 for i, v in enumerate(mixed)])
    if float(expected.sum()) > 1e-6 and len({round(float(v), 6) for v in (*p, *q)}) == 2 * len(logits):
        assert found == pytest.approx(expected, abs=1e-5)
    assert not found.isnan().any()
    assert float(found.sum()) > 0


def test_a_killed_run_goes_on_and_gives_the_same(tiny_vlm, tmp_path):
    text = "best-of-n:2+ecso"
    whole = run(text, tiny_vlm, journal=tmp_path / "whole.jsonl", batch_size=2)
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for cut in (2, len(lines) - 1):
        (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:cut]) + lines[cut][:20])
        resumed = run(text, tiny_vlm, journal=tmp_path / "part.jsonl", batch_size=2)
        assert [(o.text, o.events) for o in resumed] == [(o.text, o.events) for o in whole]
    kept = [json.loads(line) for line in lines[1:]]
    assert {row["example_id"]: row["text"] for row in kept} == {o.id: o.text for o in whole}
    with pytest.raises(SafeglassesError, match="the journal belongs to another run"):
        run("ecso", tiny_vlm, journal=tmp_path / "whole.jsonl", batch_size=2)


def test_a_request_that_fills_the_context_is_refused_visibly(tiny_vlm):
    long = ask("what " * (tiny_vlm.context_length or 0), id="long")
    stack = compose("none")
    outcomes = protect(stack, [long, *PROMPTS[:1]], LocalAnswerer(tiny_vlm), decoding=GREEDY)
    assert outcomes[0].text == "I'm sorry, but I can't help with that."
    assert outcomes[0].failures[0].detail.startswith("the prompt fills the model's context: there is no room")
    assert outcomes[1].events == ()


def test_memory_of_a_token_is_what_the_cache_holds(tiny_vlm):
    batch = tiny_vlm.encode([PROMPTS[0].chat()])
    with torch.no_grad():
        cache = tiny_vlm.model(**batch.inputs, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == memory_per_token(tiny_vlm) * batch.inputs["input_ids"].shape[1]


def test_a_prompt_keeps_its_pictures_in_front():
    prompt = Prompt.of(ask("what", "red", "blue"))
    assert [type(part).__name__ for part in prompt.saying("who").turns[-1].content] == ["Picture", "Picture", "Text"]
    assert prompt.saying("who").asked == "what"
    assert prompt.without_pictures().media == ()
