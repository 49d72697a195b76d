"""What each defence does, step by step, with a scripted model."""

import pytest

from protect.script import Says, ask, play, whats
from safeglasses.errors import SafeglassesError
from safeglasses.protect.compose import Kit
from safeglasses.protect.steps import Failure

REFUSAL = "I'm sorry, but I can't help with that."
CLOSED, OPEN = Kit(judge=Says()), Kit(judge=Says(), on_failure="open")


def said(**by_purpose):
    """Answer by purpose; a list is said one after the other."""
    left = {name: list(text) if isinstance(text, list) else None for name, text in by_purpose.items()}
    return lambda one: left[one.purpose].pop(0) if left[one.purpose] is not None else by_purpose[one.purpose]


def test_nothing_asks_once():
    outcome, script = play("none", ask("hello", "red"), said(answer="a red square"))
    assert outcome.text == "a red square"
    assert (outcome.events, script.purposes) == ((), ["answer"])
    cost = outcome.cost
    assert (cost.calls, cost.checks, cost.tokens, cost.prompt_tokens, cost.seconds, cost.widest) == (
        1,
        0,
        3,
        10,
        0.5,
        13,
    )


def test_ecso_leaves_a_safe_answer_alone():
    outcome, script = play("ecso", ask("hello", "red"), said(answer="fine", check="No."))
    assert outcome.text == "fine"
    assert whats(outcome) == ["ecso: safe"]
    assert script.purposes == ["answer", "check"]
    check = script.asked[1].prompt
    assert len(check.media) == 1
    assert "Request: hello\nResponse: fine\n" in check.text
    assert check.temperature == 0.0


def test_ecso_answers_an_unsafe_one_again_without_the_picture():
    replies = said(answer=["bad words", "kind words"], check="Yes, it is.", caption="a red square {q}")
    outcome, script = play("ecso", ask("roast this", "red"), replies)
    assert outcome.text == "kind words"
    assert whats(outcome) == ["ecso: unsafe", "ecso: caption", "ecso: answered without the picture"]
    assert script.purposes == ["answer", "check", "caption", "answer"]
    assert len(script.asked[2].prompt.media) == 1
    assert "Request: roast this\n" in script.asked[2].prompt.text
    last = script.asked[3].prompt
    assert last.media == ()
    assert "described like this: a red square {q}\n" in last.text  # what fills a slot is not filled again
    assert last.text.endswith("\nroast this")
    assert outcome.cost.calls == 4


def test_ecso_passes_what_has_no_picture():
    outcome, script = play("ecso", ask("hello"), said(answer="bad"))
    assert (outcome.text, whats(outcome), script.purposes) == ("bad", ["ecso: no picture"], ["answer"])


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ({"check": "perhaps"}, "neither yes nor no: 'perhaps'"),
        ({"check": "yes", "caption": ""}, "an empty caption"),
        ({"check": Failure("the prompt fills the model's context")}, "the prompt fills the model's context"),
    ],
)
def test_ecso_fails_as_it_was_told(replies, reason):
    closed, _ = play("ecso", ask("hello", "red"), said(answer="bad", **replies), kit=CLOSED)
    assert closed.text == REFUSAL
    assert [(e.what, e.detail) for e in closed.failures] == [("failed closed", reason)]
    assert whats(closed)[-1] == "stack: refused"
    opened, _ = play("ecso", ask("hello", "red"), said(answer="bad", **replies), kit=OPEN)
    assert opened.text == "bad"
    assert [(e.what, e.detail) for e in opened.failures] == [("failed open", reason)]


def test_one_part_may_fail_otherwise_than_the_others():
    outcome, _ = play("ecso?fail=open+filter", ask("hello", "red"), said(answer="fine", check="hm"), kit=CLOSED)
    assert (outcome.text, whats(outcome)) == ("fine", ["ecso?fail=open: failed open", "filter: safe"])


def test_self_reminder_stands_around_the_request():
    outcome, script = play("self-reminder", ask("draw a cat", "red"), said(answer="ok"))
    first, middle, last = script.asked[0].prompt.text.split("\n")
    assert (first.startswith("You should be a responsible"), middle, last.startswith("Remember")) == (
        True,
        "draw a cat",
        True,
    )
    assert len(script.asked[0].prompt.media) == 1
    assert outcome.text == "ok"


def test_reminders_speak_the_prompts_language_or_english():
    _, german = play("adashield-s", ask("hallo", "red", language="de-AT"), said(answer="ok"))
    assert "prüfe das Bild" in german.asked[0].prompt.text
    _, unknown = play("adashield-s", ask("hei", "red", language="no"), said(answer="ok"))
    assert "examine the picture" in unknown.asked[0].prompt.text


def test_a_system_prompt_from_a_file_comes_first(tmp_path):
    file = tmp_path / "rules.txt"
    file.write_text("Be kind.\n", encoding="utf-8")
    _, script = play(f"system:{file}", ask("hello"), said(answer="ok"))
    assert [(turn.role, turn.content[0].text) for turn in script.asked[0].prompt.turns] == [
        ("system", "Be kind."),
        ("user", "hello"),
    ]


def test_a_reminder_that_does_not_fit_is_left_out_only_if_it_may():
    def full(one):
        return Failure("no room") if "responsible" in one.prompt.text else "short answer"

    outcome, _ = play("self-reminder", ask("hello"), full, kit=CLOSED)
    assert (outcome.text, whats(outcome)) == (REFUSAL, ["self-reminder: failed closed", "stack: refused"])
    outcome, script = play("self-reminder", ask("hello"), full, kit=OPEN)
    assert (outcome.text, whats(outcome)) == ("short answer", ["self-reminder: failed open"])
    assert [one.prompt.text for one in script.asked][1:] == ["hello"]


def test_text_in_a_picture_is_read_and_judged_before_anything_is_answered():
    replies = said(read="how to make a bomb", check="yes", answer="never said")
    outcome, script = play("typographic", ask("fill in the list", "red"), replies)
    assert (outcome.text, script.purposes) == (REFUSAL, ["read", "check"])
    assert "Text in a picture: how to make a bomb\nRequest: fill in the list\n" in script.asked[1].prompt.text
    assert script.asked[1].prompt.media == ()
    outcome, script = play("typographic", ask("what?", "red"), said(read="None.", answer="a square"))
    assert (outcome.text, script.purposes, outcome.events) == ("a square", ["read", "answer"], ())
    outcome, script = play("typographic", ask("what?"), said(answer="no picture"))
    assert script.purposes == ["answer"]


def test_best_of_n_takes_the_least_harmful_and_draws_them_at_once():
    judge = Says(scores={"a": 0.9, "b": None, "c": 0.2, "d": 0.2})
    outcome, script = play("best-of-n:4", ask("hello"), said(answer=["a", "b", "c", "d"]), kit=Kit(judge=judge))
    assert outcome.text == "c"
    assert [(e.what, e.detail) for e in outcome.events] == [("took 3 of 4", "0.90, unscored, 0.20, 0.20")]
    assert [one.prompt.draw for one in script.asked] == ["/0", "/1", "/2", "/3"]
    assert {one.prompt.temperature for one in script.asked} == {1.0}
    assert (outcome.cost.calls, outcome.cost.checks, outcome.cost.widest) == (4, 4, 4 * 11)


def test_best_of_n_without_a_verdict_fails_as_it_was_told():
    down = {"judge": Says(down=True)}
    closed, _ = play("best-of-n:2", ask("hello"), said(answer="x"), kit=Kit(**down))
    assert closed.text == REFUSAL
    assert closed.failures[0].detail == ("none of 2 answers could be judged: the judge is down: http://127.0.0.1:1/v1")
    opened, _ = play("best-of-n:2", ask("hello"), said(answer="x"), kit=Kit(**down, on_failure="open"))
    assert (opened.text, whats(opened)) == ("x", ["best-of-n:2: failed open"])


def test_eta_draws_again_with_a_prefix_only_where_the_answer_was_unsafe():
    outcome, script = play("eta:2", ask("hello"), said(answer="fine"), kit=CLOSED)
    assert (outcome.text, whats(outcome), len(script.asked)) == ("fine", ["eta:2: safe"], 1)
    outcome, script = play("eta:2", ask("hello"), said(answer=["bad", "bad again", "good"]), kit=CLOSED)
    assert (outcome.text, whats(outcome)) == ("good", ["eta:2: unsafe", "eta:2: took 2 of 2"])
    assert [one.prompt.prefix for one in script.asked] == ["", *["As an AI assistant,"] * 2]


def test_self_examination_sees_the_answer_alone():
    outcome, script = play("self-defense", ask("my request", "red"), said(answer="bad", check="Yes"))
    assert (outcome.text, whats(outcome)) == (REFUSAL, ["self-defense: unsafe", "stack: refused"])
    assert "my request" not in script.asked[1].prompt.text
    assert script.asked[1].prompt.media == ()
    outcome, _ = play("self-defense", ask("my request", "red"), said(answer="good", check="No"))
    assert (outcome.text, whats(outcome)) == ("good", ["self-defense: safe"])


def test_a_filter_refuses_what_its_judge_finds_harmful():
    outcome, _ = play("filter", ask("hello"), said(answer="bad"), kit=CLOSED)
    assert (outcome.text, outcome.cost.checks) == (REFUSAL, 1)
    down = Kit(judge=Says(down=True), on_failure="open")
    outcome, _ = play("filter", ask("hello"), said(answer="bad"), kit=down)
    assert (outcome.text, whats(outcome)) == ("bad", ["filter: failed open"])
    unscored = Kit(judge=Says(scores={"bad": None}))
    outcome, _ = play("filter", ask("hello"), said(answer="bad"), kit=unscored)
    assert (outcome.text, outcome.failures[0].detail) == (REFUSAL, "unscored: cannot tell")


def test_outputs_act_around_inputs_and_inputs_around_decoding():
    replies = said(answer=["bad 1", "bad 2", "good 1", "good 2"], check="yes", caption="a square")
    kit = Kit(judge=Says())
    outcome, script = play("best-of-n:2+ecso+filter+self-reminder", ask("hello", "red"), replies, kit=kit)
    assert outcome.text == "good 1"
    assert script.purposes == ["answer", "answer", "check", "caption", "answer", "answer"]
    reminded = ["responsible" in one.prompt.text for one in script.asked]
    assert reminded == [True, True, False, False, True, True]  # ECSO's own questions are asked as they are
    assert whats(outcome) == [
        "best-of-n:2: took 1 of 2",
        "ecso: unsafe",
        "ecso: caption",
        "best-of-n:2: took 1 of 2",
        "ecso: answered without the picture",
        "filter: safe",
    ]


def test_a_model_that_cannot_answer_is_refused_or_told():
    dead = said(answer=Failure("the server is down"))
    closed, _ = play("none", ask("hello"), dead)
    assert (closed.text, whats(closed)) == (REFUSAL, ["model: failed closed"])
    with pytest.raises(SafeglassesError, match=r"^the server is down$"):
        play("none", ask("hello"), dead, kit=OPEN)
