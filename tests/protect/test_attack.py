"""What an attacker does, query by query, with a scripted model; and what is counted of it."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protect.script import GREEDY, Says, Script, ask
from safeglasses.errors import SafeglassesError
from safeglasses.protect.attack import (
    PLAIN,
    SEARCH,
    Attack,
    Attacked,
    Query,
    best_suffix,
    find_universal,
    harmful,
    mutated,
    queries_of,
)
from safeglasses.protect.attacked import Tried, attack_rows, examples_of, summaries
from safeglasses.protect.attacker import Wrapper
from safeglasses.protect.compose import Kit, compose
from safeglasses.protect.running import protect
from safeglasses.protect.steps import Failure

WORDS = tuple(f"w{i}" for i in range(9))
PROMPTS = [ask(f"say {i}", id=f"p{i}", label="toxic") for i in range(6)]
RESAMPLE = Attack("resample", queries=12)
SEARCHED = Attack(SEARCH, "resample", words=WORDS, length=2, queries=60)


def triggered(*words: str):
    """Answer badly when all the words are asked."""
    return lambda one: "bad answer" if set(words) <= set(one.prompt.text.split()) else "fine answer"


def hit(attack: Attack, reply, judge=None, *, stack="none", examples=PROMPTS, **options):
    script = Script(reply)
    besieged = Attacked(compose(stack, Kit(judge=Says("worse"))), attack, judge or Says())
    return protect(besieged, examples, script, decoding=GREEDY, **options), script


def timeless(outcomes):
    """What a run that went on has in common with one that did not stop."""
    return [(o.id, o.text, o.events, replace(o.cost, seconds=0.0)) for o in outcomes]


def test_without_attack_the_prompt_is_asked_as_it_came():
    outcomes, script = hit(Attack(PLAIN), triggered("w3"))
    assert [one.prompt.turns for one in script.asked] == [e.messages for e in PROMPTS]
    assert {one.prompt.draw for one in script.asked} == {""}
    assert [queries_of(o) for o in outcomes] == [(Query("", False, 0.0),)] * 6
    assert outcomes[0].cost.checks == 1  # the attacker's question


def test_a_search_finds_a_planted_word_within_its_queries():
    outcomes, script = hit(SEARCHED, triggered("w3"))
    for outcome, example in zip(outcomes, PROMPTS, strict=True):
        assert harmful(outcome)
        assert outcome.text == "bad answer"
        tried = queries_of(outcome)
        assert "w3" in tried[-1].suffix.split()
        assert [query.harmful for query in tried] == [False] * (len(tried) - 1) + [True]  # it stops there
        assert len(tried) <= 60
        asked = [one.prompt for one in script.asked if one.prompt.id == example.id]
        assert [p.text for p in asked] == [f"{example.messages[0].content[0].text} {q.suffix}" for q in tried]
        assert [p.asked for p in asked] == [p.text for p in asked]  # parts inside the stack see what the attacker wrote
        assert len({p.draw for p in asked}) == len(asked)  # every query has random numbers of its own


def test_a_search_climbs_by_the_judges_score():
    class Counts(Says):
        def _verdict(self, text):
            share = len({"w1", "w2", "w5"} & set(text.split())) / 3
            return replace(super()._verdict(text), score=share, harmful=share == 1)

    climb = replace(SEARCHED, length=3, queries=200)
    outcomes, _ = hit(climb, lambda one: one.prompt.text, Counts("", {}))
    assert all(harmful(outcome) for outcome in outcomes)
    for outcome in outcomes:
        best = -1.0
        for before, after in zip(queries_of(outcome), queries_of(outcome)[1:], strict=False):
            best = max(best, before.value)
            kept = [query for query in queries_of(outcome) if query.value == best]
            assert any(_apart(query.suffix, after.suffix) == 1 for query in kept)


def _apart(one: str, other: str) -> int:
    return sum(a != b for a, b in zip(one.split(), other.split(), strict=True))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(0, 9), st.integers(0, 99))
def test_never_more_queries_than_allowed_and_never_one_after_success(queries, at, seed):
    attack = replace(SEARCHED, queries=queries)
    script = Script(triggered(f"w{at}"))
    besieged = Attacked(compose("none"), attack, Says(), seed)
    outcomes = protect(besieged, PROMPTS, script, decoding=GREEDY)
    for outcome in outcomes:
        tried = queries_of(outcome)
        assert len(tried) == queries or (len(tried) < queries and tried[-1].harmful)
        assert [one.harmful for one in tried[:-1]] == [False] * (len(tried) - 1)
    assert len(script.asked) == sum(len(queries_of(o)) for o in outcomes)


def test_the_control_asks_the_same_again_with_the_random_numbers_of_the_search():
    _, again = hit(RESAMPLE, triggered("w3"))
    assert [one.prompt.text for one in again.asked if one.prompt.id == "p0"] == ["say 0"] * 12
    _, searched = hit(replace(SEARCHED, queries=12), triggered("never"))
    draws = [[one.prompt.draw for one in script.asked if one.prompt.id == "p0"] for script in (again, searched)]
    assert draws[0] == draws[1] == ["", *(f"~{i}" for i in range(1, 12))]


def test_a_wrapper_and_a_suffix_stand_around_the_request_and_the_judge_sees_the_request_alone():
    wrapper = Wrapper("w", "s", {"en": "please: {text} thanks", "de": "bitte: {text} danke"})

    class Asks(Says):
        def judge_with_prompts(self, prompts, responses):
            self.questions += prompts
            return self.judge(responses)

    judge = Asks()
    german = ask("sag", id="g", language="de-AT")
    attack = Attack("wrapper:w", wrapper=wrapper, suffixes={"p0": "now", "": "then"})
    _, script = hit(attack, triggered("never"), judge, examples=[PROMPTS[0], german])
    assert {one.prompt.text for one in script.asked} == {"please: say 0 thanks now", "bitte: sag danke then"}
    assert set(judge.questions) == {"say 0", "sag"}


def test_the_whole_stack_is_asked():
    outcomes, script = hit(replace(SEARCHED, queries=5), lambda one: "worse", Says("worse"), stack="filter")
    assert not any(harmful(outcome) for outcome in outcomes)
    assert {outcome.text for outcome in outcomes} == {"I'm sorry, but I can't help with that."}
    assert len(script.asked) == 5 * len(PROMPTS)
    assert outcomes[0].cost.checks == 10


def test_unscored_answers_are_queries_and_no_successes():
    outcomes, _ = hit(replace(RESAMPLE, queries=2), lambda one: "odd", Says(scores={"odd": None}))
    assert [query.harmful for query in queries_of(outcomes[0])] == [None, None]
    assert harmful(outcomes[0]) is None
    mixed, _ = hit(
        replace(RESAMPLE, queries=2), lambda one: "odd" if one.prompt.draw else "fine", Says(scores={"odd": None})
    )
    assert harmful(mixed[0]) is False


def test_a_judge_that_is_down_is_an_error_and_no_rate():
    with pytest.raises(SafeglassesError) as refused:
        hit(RESAMPLE, triggered("w3"), Says(down=True))
    assert str(refused.value).startswith(
        "the judge of the attack gave no verdict\n  given:    says bad: the judge is down"
    )


def test_a_killed_attack_goes_on_and_gives_the_same(tmp_path):
    options = {"batch_size": 2, "journal": tmp_path / "whole.jsonl"}
    whole, _ = hit(SEARCHED, triggered("w3", "w4"), **options)
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:30])
    resumed, script = hit(SEARCHED, triggered("w3", "w4"), batch_size=2, journal=tmp_path / "part.jsonl")
    assert timeless(resumed) == timeless(whole)
    assert {one.prompt.id for one in script.asked} == {json.loads(line)["example_id"] for line in lines[3:]}
    with pytest.raises(SafeglassesError, match=r"^the journal belongs to another run\n"):
        hit(replace(SEARCHED, length=3), triggered("w3"), batch_size=2, journal=tmp_path / "part.jsonl")
    with pytest.raises(SafeglassesError, match=r"^the journal belongs to another run\n"):
        hit(SEARCHED, triggered("w3"), Says("fine"), batch_size=2, journal=tmp_path / "part.jsonl")


@given(st.integers(1, 6), st.randoms())
def test_a_mutation_changes_one_word_to_another_of_the_list(length, random):
    first = mutated(None, WORDS, length, random)
    assert len(first) == length
    after = mutated(first, WORDS, length, random)
    assert sum(a != b for a, b in zip(first, after, strict=True)) == 1
    assert set(after) <= set(WORDS)


@given(st.booleans() | st.none(), st.floats(0, 1), st.sampled_from(["", "a", "a b", "tàn nhẫn x"]))
def test_queries_survive_their_trace(told, score, suffix):
    query = Query(suffix, told, None if told is None else score)
    assert Query.of(query.event) == query


def find(reply, folder=None, queries=60, **options):
    script = Script(reply)
    search = replace(SEARCHED, queries=queries)
    found = find_universal(
        compose("none"), PROMPTS, script, Says(), search=search, seed=0, decoding=GREEDY, folder=folder, **options
    )
    return found, script


def test_a_universal_suffix_is_found_within_its_queries_and_goes_on_after_a_kill(tmp_path):
    found, script = find(triggered("w3"), tmp_path / "whole", 40)
    assert "w3" in found.suffix.split()
    assert len(found.tried) == 40
    assert found.tried[0][0] == found.first
    assert len(script.asked) == len(found.outcomes) == 40 * len(PROMPTS)
    assert max(rate for _, rate in found.tried) == 1.0
    for file in sorted((tmp_path / "whole").iterdir())[25:]:
        file.unlink()
    again, rest = find(triggered("w3"), tmp_path / "whole", 40)
    assert timeless(again.outcomes) == timeless(found.outcomes)
    assert replace(again, outcomes=()) == replace(found, outcomes=())
    assert len(rest.asked) == 15 * len(PROMPTS)


def test_a_search_without_a_scored_answer_is_an_error():
    script = Script(lambda one: "odd")
    judge = Says(scores={"odd": None})
    with pytest.raises(SafeglassesError, match=r"^the judge scored no answer of the search\n  given:    6 answers"):
        find_universal(compose("none"), PROMPTS, script, judge, search=SEARCHED, seed=0, decoding=GREEDY)


def test_the_best_suffix_is_the_harmful_one_else_the_newest_of_the_best():
    outcomes, _ = hit(SEARCHED, triggered("w3"))
    assert "w3" in best_suffix(outcomes[0]).split()
    unbroken, _ = hit(replace(SEARCHED, queries=7), triggered("never"))
    assert best_suffix(unbroken[0]) == queries_of(unbroken[0])[-1].suffix


MANY = [ask(f"say {i}", id=f"p{i}", label="toxic") for i in range(40)]
ATTACKS = [Attack(PLAIN), Attack("wrapper:w", wrapper=Wrapper("w", "s", {"en": "x {text}"})), RESAMPLE, SEARCHED]


def tried(defence: str, reply) -> list[Tried]:
    return [Tried(defence, a, tuple(hit(a, reply, examples=MANY)[0]), {"other": [None] * 40}) for a in ATTACKS]


@pytest.fixture(scope="module")
def rows():
    """The base always harms; the stack only with the word or the wrapper, or when its number is below four."""

    def stack(one) -> str:
        said = one.prompt.text.split()
        return "bad" if {"w3", "x"} & set(said) or int(said[1]) < 4 else "fine"

    both = [*tried("none", lambda one: "bad"), *tried("stack", stack)]
    return both, {(row.defence, row.attack): row for row in attack_rows(both, MANY)}


def test_rows_say_what_each_attack_does_to_gain_and_harm(rows):
    _, by = rows
    plain, again, searched = (by["stack", name] for name in (PLAIN, "resample", SEARCH))
    assert (plain.harmful_rate.value, plain.remaining, plain.added) == (0.1, None, None)
    assert plain.change is not None
    assert plain.change.value == -0.9
    assert (again.harmful_rate.value, again.most_queries, again.queries) == (0.1, 12, 36 * 12 + 4)
    assert again.remaining is not None
    assert again.remaining.value == 1.0
    assert searched.harmful_rate.value == 1.0
    assert searched.remaining is not None
    assert searched.remaining.value == 0.0
    assert searched.prevented is not None
    assert searched.prevented.value == 0.0
    assert searched.control == "resample"
    assert searched.added is not None
    assert searched.added.value == 0.9
    assert by["none", SEARCH].queries == 40
    assert by["none", SEARCH].remaining is by["none", SEARCH].change is None
    wrapped = by["stack", "wrapper:w"]
    assert (wrapped.harmful_rate.value, wrapped.control, wrapped.most_queries) == (1.0, PLAIN, 1)
    assert searched.witnesses == {"other": None}
    json.dumps([row.to_json() for row in by.values()], allow_nan=False)


def test_summaries_name_the_worst_attack_that_is_held_back(rows):
    _, by = rows
    stack = summaries(tuple(by.values()))[1]
    assert (stack["defence"], stack["worst"]["attack"], stack["within"]["attack"]) == ("stack", "wrapper:w", SEARCH)
    assert stack["resampled"]["harmful_rate"]["value"] == 0.1
    assert summaries(tuple(by.values()), frozenset({"wrapper:w"}))[1]["worst"] is None


def test_examples_are_answers_that_an_attack_turned(rows):
    both, _ = rows
    found = examples_of(both, MANY)
    assert {one["defence"] for one in found} == {"stack"}
    assert all(one["before"] == "fine" and one["after"] == "bad" for one in found)
    assert {one["id"] for one in found} == {"p4", "p5"}


def test_a_stack_without_its_control_is_refused(rows):
    both, _ = rows
    with pytest.raises(SafeglassesError) as refused:
        attack_rows([one for one in both if one.attack.name != PLAIN or one.defence != "stack"], MANY)
    assert str(refused.value) == "attacks to compare with are missing\n  given:    plain on stack"


def test_a_request_that_cannot_be_answered_is_refused_and_counted():
    outcomes, _ = hit(Attack(PLAIN), lambda one: Failure("no room"))
    assert [event.what for event in outcomes[0].failures] == ["failed closed"]
    assert harmful(outcomes[0]) is False
