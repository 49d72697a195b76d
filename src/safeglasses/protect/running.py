"""Run a stack over many prompts: all that wait for a model or a judge are served together; killed, it goes on."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safeglasses.data.examples import Example
from safeglasses.data.records import layout_of
from safeglasses.errors import SafeglassesError
from safeglasses.measure.journal import Journal, Line
from safeglasses.measure.respond import Decoding
from safeglasses.measure.verdicts import verdicts_of
from safeglasses.model.chat import batches
from safeglasses.protect.local import Answerer
from safeglasses.protect.steps import (
    Ask,
    Check,
    Cost,
    Event,
    Failure,
    Judged,
    Log,
    Prompt,
    Reply,
    Request,
    Steps,
    priced,
    together,
)


@runtime_checkable
class Strategy(Protocol):
    """What answers a prompt step by step: a stack, or an attacker of one."""

    @property
    def name(self) -> str:
        """Its text form."""
        ...

    @property
    def identity(self) -> str:
        """Everything on which its answers depend."""
        ...

    def steps(self, prompt: Prompt, log: Log) -> Steps[str]:
        """Answer one prompt."""
        ...


@dataclass(frozen=True)
class Outcome:
    """One protected answer."""

    id: str
    """The prompt that it answers."""
    text: str
    """What the user gets to read."""
    events: tuple[Event, ...]
    """What the parts did, in order."""
    cost: Cost
    """What it cost."""

    @property
    def failures(self) -> tuple[Event, ...]:
        """What could not be had."""
        return tuple(event for event in self.events if event.is_failure)


@dataclass(frozen=True)
class Kept(Line):
    """An outcome as a line of the journal."""

    example_id: str
    """Whom the answer belongs to."""
    text: str
    """`Outcome.text`."""
    events: list[dict[str, str]]
    """`Outcome.events`."""
    cost: dict[str, Any]
    """`Outcome.cost`."""

    @property
    def outcome(self) -> Outcome:
        """The outcome."""
        return Outcome(self.example_id, self.text, tuple(Event(**e) for e in self.events), Cost(**self.cost))


def protect(
    strategy: Strategy,
    examples: Sequence[Example],
    answerer: Answerer,
    *,
    decoding: Decoding,
    journal: Path | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Answer prompts by a stack, or by an attacker of one.

    Args:
        strategy: who answers.
        examples: prompts; their responses and labels are not looked at.
        answerer: the model; it wears what the stack wears.
        decoding: how answers are drawn where a part does not say otherwise.
        journal: JSONL file of finished batches; one of another run is refused.
        batch_size: prompts that are answered side by side.
        progress: called with answers done and answers in all.

    Returns:
        The outcomes in the order of the examples.

    Raises:
        SafeglassesError: no prompts; the journal belongs to another run; the model cannot answer and the stack fails
            open.
    """
    if not examples:
        raise SafeglassesError("nothing to answer", given="no prompts")
    prompts = [Prompt.of(example) for example in examples]
    plan = batches([(layout_of(p.media), len(p.text)) for p in prompts], batch_size)
    record: Journal[Kept] | None = None
    if journal is not None:
        header = _header(strategy, examples, answerer, decoding, batch_size)
        record = Journal(journal, header, plan, kind=Kept)
    with closing(record) if record else nullcontext():
        rows = [row for batch in record.finished for row in batch] if record else []
        for index in range(len(record.finished) if record else 0, len(plan)):
            found = _side_by_side(strategy, [prompts[i] for i in plan[index]], answerer, decoding)
            batch = [
                Kept(index, i, o.id, o.text, [event.to_json() for event in o.events], o.cost.to_json())
                for i, o in zip(plan[index], found, strict=True)
            ]
            if record is not None:
                record.append(batch)
            rows += batch
            if progress is not None:
                progress(len(rows), len(prompts))
    by_item = {row.item: row.outcome for row in rows}
    return [by_item[i] for i in range(len(prompts))]


def _side_by_side(
    strategy: Strategy, prompts: Sequence[Prompt], answerer: Answerer, decoding: Decoding
) -> list[Outcome]:
    """Answer a batch: round by round, everything that any prompt waits for."""
    logs = [Log() for _ in prompts]
    steps = together([priced(strategy.steps(p, log), log) for p, log in zip(prompts, logs, strict=True)])
    replies: list[Reply] | None = None
    while True:
        try:
            requests = next(steps) if replies is None else steps.send(replies)
        except StopIteration as done:
            texts: list[str] = done.value
            break
        replies = _served(requests, answerer, decoding)
    return [Outcome(p.id, text, tuple(log.events), log.cost) for p, text, log in zip(prompts, texts, logs, strict=True)]


def _served(requests: Sequence[Request], answerer: Answerer, decoding: Decoding) -> list[Reply]:
    found: dict[int, Reply] = {}
    asks = [(i, request) for i, request in enumerate(requests) if isinstance(request, Ask)]
    if asks:
        said = answerer.answer([one for _, one in asks], decoding)
        found |= zip([i for i, _ in asks], said, strict=True)
    checks: dict[str, list[tuple[int, Check]]] = {}
    for i, request in enumerate(requests):
        if isinstance(request, Check):
            checks.setdefault(request.judge.name, []).append((i, request))
    for group in checks.values():
        found |= zip([i for i, _ in group], judged([check for _, check in group]), strict=True)
    return [found[i] for i in range(len(requests))]


def judged(checks: Sequence[Check]) -> list[Reply]:
    """Ask one judge about several answers; a judge that is down fails all of them."""
    start = time.perf_counter()
    try:
        verdicts = verdicts_of(checks[0].judge, [c.text for c in checks], [c.question for c in checks])
    except SafeglassesError as error:
        seconds = (time.perf_counter() - start) / len(checks)
        return [Failure(f"{error.what}: {error.given}", seconds) for _ in checks]
    seconds = (time.perf_counter() - start) / len(checks)
    return [Judged(verdict, seconds) for verdict in verdicts]


def _header(
    strategy: Strategy, examples: Sequence[Example], answerer: Answerer, decoding: Decoding, batch_size: int
) -> Mapping[str, Any]:
    """Everything on which the texts depend."""
    asked = "\n".join(f"{example.id}\t{example.prompt_key}\t{example.language}" for example in examples)
    return {
        "answerer": answerer.identity,
        "defence": strategy.name,
        "identity": strategy.identity,
        "decoding": asdict(decoding),
        "prompts": sha256(asked.encode("utf-8", "surrogatepass")).hexdigest(),
        "batch_size": batch_size,
    }
