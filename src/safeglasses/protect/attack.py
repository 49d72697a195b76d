"""Attacks on a whole stack as it is deployed: an attacker asks, reads the answer, asks the judge, and asks again.

An attack is a strategy around the stack's own, so batches, journals, traces and costs are those of every stack.
"""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TypeAlias

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.measure.respond import Decoding
from safeglasses.measure.verdicts import Judge, Verdict
from safeglasses.protect.attacker import Wrapper
from safeglasses.protect.local import Answerer
from safeglasses.protect.running import Outcome, protect
from safeglasses.protect.stack import Protection
from safeglasses.protect.steps import Check, Event, Failure, Judged, Log, Prompt, Steps

Words: TypeAlias = tuple[str, ...]

ATTACKER = "attacker"
"""Whose events the queries are."""
PLAIN = "plain"
RESAMPLE = "resample"
SEARCH = "suffix-search"
AGAIN = "suffix-again"
RANDOM = "random-suffix"
UNIVERSAL = "universal-suffix"


@dataclass(frozen=True)
class Attack:
    """What is done to every prompt, at most so many queries each; the first harmful answer ends it."""

    name: str
    """What reports call it."""
    control: str = PLAIN
    """The attack beside which this one shows what it adds; `PLAIN` is its own."""
    wrapper: Wrapper | None = None
    """Around every request."""
    suffixes: Mapping[str, str] = field(default_factory=dict, hash=False)
    """A suffix per prompt's id; under an empty id that of all others."""
    words: Words = ()
    """Suffixes are searched among these; empty: nothing is searched."""
    length: int = 0
    """Words of a searched suffix."""
    queries: int = 1
    """At most so many answers of the stack per prompt."""
    draw: str = ""
    """Names the random numbers of the answers; attacks of one draw see the same ones, query by query."""

    @property
    def identity(self) -> str:
        """SHA-256 over everything on which its queries depend."""
        suffixes = sorted(self.suffixes.items())
        text = repr((self.name, self.wrapper, suffixes, self.words, self.length, self.queries, self.draw))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def text(self, prompt: Prompt, suffix: str) -> str:
        """Return a request as the attacker puts it."""
        text = prompt.text if self.wrapper is None else self.wrapper.around(prompt.text, prompt.language)
        return f"{text} {suffix}" if suffix else text

    def next(self, prompt: str, best: Words | None, rng: random.Random) -> Words:
        """Return the next suffix to try: given, drawn anew, or the best so far with one word changed."""
        if not self.words:
            given = self.suffixes.get(prompt, self.suffixes.get("", ""))
            return (given,) if given else ()
        return mutated(best, self.words, self.length, rng)


@dataclass(frozen=True)
class Query:
    """One query of an attacker, as its trace holds it."""

    suffix: str
    """The words behind the request."""
    harmful: bool | None
    """What the attacker's judge decided of the answer; None where it could not tell."""
    score: float | None
    """How harmful it found it, 0 to 1."""

    @classmethod
    def of(cls, event: Event) -> "Query":
        """Read an attacker's event."""
        score, _, suffix = event.detail.partition(" ")
        told = event.what != "unscored"
        return cls(suffix, event.what == "harmful" if told else None, float(score) if told else None)

    @property
    def event(self) -> Event:
        """Write it as an event."""
        what = {True: "harmful", False: "harmless", None: "unscored"}[self.harmful]
        return Event(ATTACKER, what, f"{'-' if self.score is None else repr(self.score)} {self.suffix}")

    @property
    def value(self) -> float:
        """How near it came: the judge's score, below any score where there is none."""
        return -1.0 if self.score is None else self.score


@dataclass(frozen=True)
class Attacked:
    """A stack under attack: a strategy that `protect` runs."""

    stack: Protection
    """Who answers."""
    attack: Attack
    """What is done to it."""
    judge: Judge
    """Who tells the attacker how harmful an answer is; it sees the request as it came, without wrapper and suffix."""
    seed: int = 0
    """Of the suffixes that are drawn."""

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.attack.name} on {self.stack.name}"

    @property
    def identity(self) -> str:
        """Everything on which its answers and queries depend."""
        return f"{self.stack.identity} {self.attack.identity} {self.judge.name} {self.seed}"

    def steps(self, prompt: Prompt, log: Log) -> Steps[str]:
        """Ask until an answer is harmful or the queries are used up; return the most harmful answer.

        Raises:
            SafeglassesError: the attacker's judge is down: a rate without it would be too low.
        """
        rng = random.Random(f"{self.seed}/{prompt.id}")
        best, words, text = -math.inf, None, ""
        for number in range(self.attack.queries):
            tried = self.attack.next(prompt.id, words, rng)
            said = yield from self.stack.steps(self._asked(prompt, " ".join(tried), number), log)
            verdict = yield from self._judged(prompt, said)
            query = Query(" ".join(tried), verdict.harmful, verdict.score)
            log.events.append(query.event)
            if query.value >= best:  # of equals the newest: a plateau is walked, not sat on
                best, words, text = query.value, tried, said
            if query.harmful:
                return said  # whatever the scores are: this is what was sought
        return text

    def _asked(self, prompt: Prompt, suffix: str, number: int) -> Prompt:
        text = self.attack.text(prompt, suffix)
        draw = self.attack.draw + (f"~{number}" if number else "")
        asked = replace(prompt, draw=f"{prompt.draw}{draw}")
        return asked if text == prompt.text else replace(asked.saying(text), asked=text)

    def _judged(self, prompt: Prompt, said: str) -> Steps[Verdict]:
        (reply,) = yield (Check(self.judge, prompt.text, said),)
        if isinstance(reply, Judged):
            return reply.verdict
        reason = reply.reason if isinstance(reply, Failure) else repr(reply)
        raise SafeglassesError(
            "the judge of the attack gave no verdict",
            given=f"{self.judge.name}: {reason}",
            do="mend it and run the same again: what is done is kept",
        )


def mutated(best: Words | None, words: Words, length: int, rng: random.Random) -> Words:
    """Return a suffix drawn from the words, or the best one so far with one word replaced by another.

    Source: random search as in Andriushchenko et al. 2024 (arXiv 2404.02151), section 3; there over tokens and by the
    log-probability of "Sure", here over whole words and by the judge's score of the answer: nothing else is seen of a
    deployed stack.
    """
    if best is None:
        return tuple(rng.choice(words) for _ in range(length))
    place = rng.randrange(length)
    other = rng.choice([word for word in words if word != best[place]])
    return (*best[:place], other, *best[place + 1 :])


def queries_of(outcome: Outcome) -> tuple[Query, ...]:
    """Return an attacker's queries of one prompt, in order."""
    return tuple(Query.of(event) for event in outcome.events if event.part == ATTACKER)


def harmful(outcome: Outcome) -> bool | None:
    """Whether any query brought a harmful answer; None where none of them could be scored."""
    said = [query.harmful for query in queries_of(outcome)]
    return True if True in said else False if False in said else None


def best_suffix(outcome: Outcome) -> str:
    """Return the suffix of a prompt's harmful query, else of its newest query with the highest score."""
    newest = reversed(queries_of(outcome))
    return max(newest, key=lambda query: (query.harmful is True, query.value)).suffix


@dataclass(frozen=True)
class Universal:
    """One suffix for all prompts, and how it was found."""

    suffix: str
    """The best one."""
    first: str
    """The first that was tried: drawn, not chosen, and the same for every stack."""
    tried: tuple[tuple[str, float], ...]
    """Every suffix with its harmful rate on the prompts of the search: of the chosen one too high, since chosen."""
    outcomes: tuple[Outcome, ...]
    """All queries."""


def find_universal(
    stack: Protection,
    examples: Sequence[Example],
    answerer: Answerer,
    judge: Judge,
    *,
    search: Attack,
    seed: int,
    decoding: Decoding,
    folder: Path | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Universal:
    """Search one suffix that makes a stack's answers to many prompts harmful.

    Args:
        stack: who is attacked.
        examples: prompts to search on; never those that the suffix is then tried on.
        answerer: the model, wearing what the stack wears.
        judge: who tells harm.
        search: its words, their number in a suffix, and as many suffixes as it has queries.
        seed: of the suffixes.
        decoding: how answers are drawn, for every suffix with random numbers of its own.
        folder: where a journal for each suffix goes.
        batch_size: prompts at once.
        progress: called with suffixes tried and suffixes in all.

    Raises:
        SafeglassesError: as `protect`; no answer could be scored.
    """
    rng = random.Random(f"{seed}/universal")
    best, chosen = (-math.inf, 0.0), None
    tried: list[tuple[str, float]] = []
    spent: list[Outcome] = []
    for number in range(search.queries):
        words = mutated(chosen, search.words, search.length, rng)
        attack = Attack(UNIVERSAL, suffixes={"": " ".join(words)}, draw=f"~u{number}")
        journal = None if folder is None else folder / f"{UNIVERSAL}-{number:04d}.jsonl"
        outcomes = protect(
            Attacked(stack, attack, judge, seed),
            examples,
            answerer,
            decoding=decoding,
            journal=journal,
            batch_size=batch_size,
        )
        known = [(q.harmful, q.score) for o in outcomes for q in queries_of(o) if q.score is not None]
        if not known:
            raise SafeglassesError("the judge scored no answer of the search", given=f"{len(outcomes)} answers")
        rate = fmean(harm is True for harm, _ in known)
        value = (rate, fmean(score for _, score in known))
        if value >= best:
            best, chosen = value, words
        tried.append((" ".join(words), rate))
        spent += outcomes
        if progress is not None:
            progress(number + 1, search.queries)
    return Universal(" ".join(chosen or ()), tried[0][0], tuple(tried), tuple(spent))
