"""The words between a strategy and who runs it: a strategy yields what it wants to know, and is sent the replies.

So its control flow is written once, and is the same in batches on a local model, sample by sample in Inspect against a
server, and in a test against a script.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar

from safeglasses.data.pictures import Picture, Video
from safeglasses.data.records import Example, Text, Turn, media_of
from safeglasses.errors import SafeglassesError
from safeglasses.measure.verdicts import Judge, Verdict

T = TypeVar("T")
OnFailure = Literal["closed", "open"]


@dataclass(frozen=True)
class Contrast:
    """Draw first tokens from where the worn model differs from the bare one."""

    alpha: float = 3.0
    """p = p_bare + alpha (p_worn − p_bare): 0 is the bare model, 1 the worn one."""
    tokens: int = 2
    """So many first tokens; what follows is the bare model's."""
    candidates: int = 5
    """At least so many tokens that both models hold likely stay possible."""


@dataclass(frozen=True)
class Prompt:
    """What the model is asked, and how its answer is drawn."""

    id: str
    """Names the random numbers."""
    turns: tuple[Turn, ...]
    """The chat; the last turn is the user's."""
    asked: str
    """The user's own words, whatever parts have put around them."""
    language: str | None = None
    """Language tag: which wording is used."""
    prefix: str = ""
    """How the answer must begin."""
    contrast: Contrast | None = None
    """Draw by contrast; needs a local model."""
    temperature: float | None = None
    """None: as the caller decodes."""
    draw: str = ""
    """Names one of several answers to the same prompt."""

    @classmethod
    def of(cls, example: Example) -> "Prompt":
        """Return an example's prompt."""
        return cls(example.id, example.messages, _text(example.messages[-1]), example.language)

    @property
    def media(self) -> tuple[Picture | Video, ...]:
        """All pictures and videos of the chat, in order."""
        return media_of(self.turns)

    def saying(self, text: str) -> "Prompt":
        """Return the prompt with another text, behind its pictures and videos, in the last turn."""
        last = self.turns[-1]
        return replace(self, turns=(*self.turns[:-1], Turn(last.role, (*media_of([last]), Text(text)))))

    def without_pictures(self) -> "Prompt":
        """Return the prompt as text alone."""
        turns = (Turn(t.role, tuple(p for p in t.content if isinstance(p, Text))) for t in self.turns)
        return replace(self, turns=tuple(turns))

    def alone(self, text: str, *, pictures: bool) -> "Prompt":
        """Return a question of its own, greedy and without what came before, with pictures and videos or without."""
        content = (*(self.media if pictures else ()), Text(text))
        return Prompt(self.id, (Turn("user", content),), text, self.language, temperature=0.0, draw=self.draw)

    @property
    def text(self) -> str:
        """The text of the last turn."""
        return _text(self.turns[-1])


@dataclass(frozen=True)
class Ask:
    """A call of the model."""

    purpose: str
    """``answer``, ``check``, ``caption`` …"""
    prompt: Prompt
    """What it reads."""
    max_new_tokens: int | None = None
    """None: as the caller decodes."""


@dataclass(frozen=True)
class Check:
    """A call of a judge."""

    judge: Judge
    """Who is asked."""
    question: str
    """What the user said."""
    text: str
    """The answer that is judged."""


@dataclass(frozen=True)
class Said:
    """The model's reply."""

    text: str
    """What it wrote, its prefix included."""
    tokens: int
    """Tokens generated."""
    prompt_tokens: int
    """Tokens read, pictures included."""
    seconds: float
    """The call's share of its batch's time."""
    cut: bool = False
    """The model's context ended it."""


@dataclass(frozen=True)
class Judged:
    """A judge's reply."""

    verdict: Verdict
    """What it said."""
    seconds: float
    """The verdict's share of its batch's time."""


@dataclass(frozen=True)
class Failure:
    """No reply, and why."""

    reason: str
    """In one line."""
    seconds: float = 0.0
    """What it took all the same."""


Request: TypeAlias = Ask | Check
Reply: TypeAlias = Said | Judged | Failure
Steps: TypeAlias = Generator[tuple[Request, ...], Sequence[Reply], T]
Inner: TypeAlias = Callable[[Prompt], Steps[str]]


class Failed(SafeglassesError):
    """Something that a part needed could not be had."""


class Refused(Exception):
    """A part has decided that the polite refusal is the answer."""


@dataclass(frozen=True)
class Event:
    """Something that a part did, or that befell it."""

    part: str
    """Which part; ``model`` for the call of the model itself."""
    what: str
    """``unsafe``, ``caption``, ``failed open`` …"""
    detail: str = ""
    """A text of the model or a reason; untrusted."""

    @property
    def is_failure(self) -> bool:
        """Whether something that was needed could not be had."""
        return self.what.startswith("failed")

    def to_json(self) -> dict[str, str]:
        """Return the fields as JSON-ready values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Cost:
    """What one answer cost."""

    calls: int = 0
    """Calls of the model; an answer by contrast is two, of the bare and of the worn model."""
    checks: int = 0
    """Calls of judges."""
    tokens: int = 0
    """Tokens generated in all calls."""
    prompt_tokens: int = 0
    """Tokens read in all calls, pictures included."""
    seconds: float = 0.0
    """Model and judges; of calls in a batch, the share of one row."""
    widest: int = 0
    """Most tokens, read and generated, that the model had to remember at one time."""

    def after(self, requests: Sequence[Request], replies: Sequence[Reply]) -> "Cost":
        """Add what one round of requests has cost."""
        said = [reply for reply in replies if isinstance(reply, Said)]
        return Cost(
            calls=self.calls + sum(1 + (r.prompt.contrast is not None) for r in requests if isinstance(r, Ask)),
            checks=self.checks + sum(isinstance(r, Check) for r in requests),
            tokens=self.tokens + sum(s.tokens for s in said),
            prompt_tokens=self.prompt_tokens + sum(s.prompt_tokens for s in said),
            seconds=self.seconds + sum(reply.seconds for reply in replies),
            widest=max(self.widest, sum(s.tokens + s.prompt_tokens for s in said)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return dict(vars(self))


@dataclass
class Log:
    """What happened on the way to one answer; the one record here that changes."""

    events: list[Event] = field(default_factory=list)
    """In order."""
    cost: Cost = field(default_factory=Cost)
    """So far."""

    def note(self, part: str, what: str, detail: str = "") -> None:
        """Add an event."""
        self.events.append(Event(part, what, detail))


def ask(*requests: Request) -> Steps[list[Any]]:
    """Ask all at once and return the replies.

    Raises:
        Failed: one of them could not be had, or a judge could not tell.
    """
    replies = yield requests
    for reply in replies:
        if isinstance(reply, Failure):
            raise Failed(reply.reason)
        if isinstance(reply, Judged) and reply.verdict.harmful is None:
            raise Failed(f"unscored: {reply.verdict.reason}")
    return list(replies)


def priced(steps: Steps[T], log: Log) -> Steps[T]:
    """Let a strategy run, and add what each of its rounds costs to the log."""
    replies: Sequence[Reply] | None = None
    while True:
        try:
            requests = next(steps) if replies is None else steps.send(replies)
        except StopIteration as done:
            return done.value
        replies = yield requests
        log.cost = log.cost.after(requests, replies)


def together(steps: Sequence[Steps[T]]) -> Steps[list[T]]:
    """Run several side by side: what all of them want to know is asked in one round."""
    results: dict[int, T] = {}
    wanted: dict[int, tuple[Request, ...]] = {}

    def advance(index: int, replies: Sequence[Reply] | None) -> None:
        wanted.pop(index, None)
        try:
            wanted[index] = next(steps[index]) if replies is None else steps[index].send(replies)
        except StopIteration as done:
            results[index] = done.value

    for index in range(len(steps)):
        advance(index, None)
    while wanted:
        round_ = dict(wanted)
        replies = yield tuple(request for requests in round_.values() for request in requests)
        start = 0
        for index, requests in round_.items():
            advance(index, replies[start : start + len(requests)])
            start += len(requests)
    return [results[index] for index in range(len(steps))]


def _text(turn: Turn) -> str:
    return "\n".join(part.text for part in turn.content if isinstance(part, Text))
