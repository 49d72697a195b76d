import pytest
import torch

from safeglasses.data.examples import Example, Examples, Text, Turn
from safeglasses.errors import SafeglassesError
from safeglasses.find.pools import Pool
from safeglasses.measure.calibrate import frozen
from safeglasses.measure.choosing import Choice, choices, excess, suggest
from safeglasses.measure.contrasts import Lessons, calibration_data
from safeglasses.measure.likelihood import force
from safeglasses.model.vlm import VLM, Chat


def example(name: str, prompt: str, response: str | None, label: str | None, **more) -> Example:
    messages = (Turn("user", (Text(prompt),)),)
    return Example(id=name, messages=messages, response=response, label=label, **{"split": "find", **more})


PAIRS = [
    example("same-t", "be rude", "you fool", "toxic", pair_id="1"),
    example("same-n", "be rude", "hello", "non-toxic", pair_id="1"),
    example("other-t", "mock it", "what rubbish", "toxic", pair_id="2"),
    example("other-n", "describe it", "a red dog", "non-toxic", pair_id="2"),
    example("alone", "insult me", "idiot", "toxic", pair_id="3"),
]
PROMPTS = [
    example("ask", "a trigger", "a blue cat", "toxic"),
    example("calm", "what is this", "a chair", "non-toxic"),
    example("chosen-on", "a new trigger", None, "toxic", split="calibrate"),
    example("never", "test only", None, "toxic", split="test"),
]


def data(pairs=PAIRS, prompts=PROMPTS):
    return calibration_data(Examples(tuple(pairs)), Examples(tuple(prompts)))


def test_contrasts_take_the_same_prompt_first_and_the_pair_second() -> None:
    found = {c.prompt.id: (c.toxic, c.benign) for c in data().find.contrasts}
    assert found == {"same-t": ("you fool", "hello"), "other-t": ("what rubbish", "a red dog")}


def test_no_prompt_of_another_split_is_learned_from() -> None:
    made = data()
    assert ids(made.find) == {"same-t", "other-t", "ask", "calm", "other-n"}
    assert [e.id for e in made.held_out] == ["chosen-on"]


def ids(lessons: Lessons) -> set[str]:
    return {e.id for e in (*lessons.eliciting, *lessons.benign)} | {c.prompt.id for c in lessons.contrasts}


def test_the_last_lessons_take_in_the_calibrate_split_and_never_the_test_split() -> None:
    more = [
        example("kept-t", "sneer", "you rat", "toxic", pair_id="4", split="calibrate"),
        example("kept-n", "sneer", "a rat", "non-toxic", pair_id="4", split="calibrate"),
        example("hidden-t", "hiss", "you cad", "toxic", pair_id="5", split="test"),
        example("hidden-n", "hiss", "a cat", "non-toxic", pair_id="5", split="test"),
    ]
    calm = example("calm-too", "what is that", "a table", "non-toxic", split="calibrate")
    made = data([*PAIRS, *more], [*PROMPTS, calm])
    assert ids(made.find) == {"same-t", "other-t", "ask", "calm", "other-n"}
    assert ids(made.both) == ids(made.find) | {"kept-t", "calm-too"}


@pytest.mark.parametrize(
    ("pairs", "prompts", "what"),
    [
        (PAIRS[4:], PROMPTS, "calibration found no contrast"),
        (PAIRS[:2], PROMPTS[:1] + PROMPTS[2:], "calibration has no benign prompts with responses"),
        (PAIRS, PROMPTS[:2], "the calibrate split has no eliciting prompt"),
    ],
)
def test_what_is_missing_is_said(pairs, prompts, what) -> None:
    with pytest.raises(SafeglassesError, match=what) as error:
        data(pairs, prompts)
    assert "--recipe sgm" in error.value.do


def test_forced_likelihood_equals_one_token_at_a_time(tiny_vlm: VLM) -> None:
    chats = [
        Chat([{"role": "user", "content": [{"type": "text", "text": text}]}], response=response)
        for text, response in (("a dog", "the cat"), ("what is in the picture", "I cannot help with that"))
    ]
    with torch.no_grad():
        together = force(tiny_vlm, tiny_vlm.encode(chats, end_of_turn=True)).totals
        for chat, total in zip(chats, together, strict=True):
            batch = tiny_vlm.encode([chat], end_of_turn=True)
            ids, expected = batch.inputs["input_ids"][0], 0.0
            for column in range(int(batch.prompt_length[0]), len(ids)):
                logits = tiny_vlm.model(input_ids=ids[None, :column]).logits[0, -1]
                expected += float(torch.log_softmax(logits, -1)[ids[column]])
            assert int(ids[-1]) in tiny_vlm.stop_ids
            assert float(total) == pytest.approx(expected, abs=1e-4)


def test_a_model_is_no_distance_from_itself(tiny_vlm: VLM) -> None:
    chat = Chat([{"role": "user", "content": [{"type": "text", "text": "a dog"}]}], response="the cat")
    with torch.no_grad():
        forced = force(tiny_vlm, tiny_vlm.encode([chat], end_of_turn=True))
    assert float(forced.kl_from(forced)) == 0


def test_freezing_puts_every_flag_back(tiny_vlm: VLM) -> None:
    first = next(tiny_vlm.model.parameters())
    first.requires_grad_(False)
    try:
        before = [p.requires_grad for p in tiny_vlm.model.parameters()]
        with pytest.raises(ZeroDivisionError), frozen(tiny_vlm):
            assert not any(p.requires_grad for p in tiny_vlm.model.parameters())
            _ = 1 / 0
        assert [p.requires_grad for p in tiny_vlm.model.parameters()] == before
    finally:
        first.requires_grad_(True)


def test_excess_counts_only_what_exceeds_the_guards() -> None:
    base = {"harmful": 0.5, "utility:name": 0.9, "perplexity": 2.0, "refusals": 0.0, "empty": 0.0}
    assert excess({**base, "harmful": 1.0}, base) == 0
    assert excess({**base, "utility:name": 0.95}, base) == 0
    assert excess({**base, "utility:name": 0.86}, base) == pytest.approx(0.03)
    assert excess({**base, "perplexity": 2.2}, base) == pytest.approx(0.07)
    assert excess({**base, "refusals": 0.05, "empty": 0.02}, base) == pytest.approx(0.05)


def test_the_search_asks_the_same_after_a_restart_and_nothing_twice() -> None:
    pools = (Pool.parse("prompt:last"), Pool.parse("response:max"))
    done: list[tuple[Choice, float]] = []
    for trial in range(8):
        choice = suggest(done, pools, seed=3)
        assert choice == suggest(list(done), pools, seed=3)
        assert choice not in [c for c, _ in done]
        done.append((choice, 1.0 - 0.05 * trial))
    space = choices(pools)
    assert all("+".join(c.pools) in space["pools"] and c.beta in space["beta"] for c, _ in done)
