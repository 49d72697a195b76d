"""Measure one defence, or none: harm, utility, fluency and refusals, per condition and decoding."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safeglasses.data.examples import CONDITIONS, Example
from safeglasses.data.open import open_prompts
from safeglasses.defend.defence import Defence, wearing
from safeglasses.errors import SafeglassesError
from safeglasses.measure.fluency import Fluency, fluency
from safeglasses.measure.groups import Group, groups
from safeglasses.measure.items import Results, is_benign, items_of
from safeglasses.measure.judges import Judge, refusal_judge
from safeglasses.measure.judging import judge_answers
from safeglasses.measure.metrics import Paired, mcnemar
from safeglasses.measure.panel import panel_of
from safeglasses.measure.respond import Decoding, respond
from safeglasses.measure.rows import Answer, Row, count
from safeglasses.model.vlm import VLM

SAMPLED = Decoding("sampled", temperature=1.0, max_new_tokens=64)
GREEDY = Decoding("greedy", temperature=0.0, max_new_tokens=64)


@dataclass(frozen=True)
class Measurement:
    """One defence, measured."""

    defence: str
    """What was worn: ``none``, a recipe or ``glasses``."""
    judge: str
    """Who decided what is harmful."""
    refusal_judge: str
    """Who said what is a refusal."""
    rows: tuple[Row, ...]
    """The summary: decoding by decoding, each for all prompts and for each condition that occurs."""
    answers: Mapping[str, tuple[Answer, ...]]
    """Per decoding, every answer in the order of the prompts."""
    model: str = ""
    """Which model answered: `VLM.source`."""
    decodings: tuple[Decoding, ...] = ()
    """How answers were drawn; without, only the names are known."""
    others: tuple[str, ...] = ()
    """Further judges, who decide nothing; what they said is in `Answer.others`."""
    references: Mapping[str, Fluency] = field(default_factory=dict)
    """Of the benign prompts' reference responses, by the prompt's id."""

    @property
    def judges(self) -> tuple[str, ...]:
        """All judges; the first decides."""
        return (self.judge, *self.others)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the rows as they stand in ``summary.json``."""
        return [row.to_json() for row in self.rows]

    def row(self, decoding: str, condition: str = "all") -> Row:
        """Look a row up.

        Raises:
            SafeglassesError: it was not measured.
        """
        for row in self.rows:
            if (row.decoding, row.condition) == (decoding, condition):
                return row
        raise SafeglassesError(
            "not measured",
            given=f"{decoding}, {condition}",
            expected="; ".join(f"{row.decoding}, {row.condition}" for row in self.rows),
        )

    def eliciting(self, decoding: str, condition: str = "all") -> tuple[Answer, ...]:
        """Return the judged answers behind a row's harmful rate.

        Raises:
            SafeglassesError: that row was not measured.
        """
        self.row(decoding, condition)
        chosen = (a for a in self.answers[decoding] if condition in ("all", a.example.condition))
        return tuple(a for a in chosen if a.verdict is not None)

    def results(self, decoding: str) -> Results:
        """Return the answers of one decoding as they are grouped, written to files and compared.

        Raises:
            SafeglassesError: that decoding was not measured.
        """
        self.row(decoding)
        settings = next((asdict(d) for d in self.decodings if d.name == decoding), {"name": decoding})
        items = items_of(self.answers[decoding])
        return Results(self.model, self.defence, self.judge, self.refusal_judge, settings, items)

    def groups(self, decoding: str, by: Sequence[str] = ()) -> tuple[Group, ...]:
        """Measure every group of prompts that occurs, e.g. ``by=("category", "language")``.

        Raises:
            SafeglassesError: that decoding was not measured, or prompts cannot be grouped by that.
        """
        return groups(self.results(decoding).items, by)

    def paired(self, after: "Measurement", decoding: str, condition: str = "all") -> Paired:
        """Compare harm prompt by prompt with another measurement of the same prompts.

        Raises:
            SafeglassesError: the two are not about the same eliciting prompts, or used different judges.
        """
        mine, theirs = self.eliciting(decoding, condition), after.eliciting(decoding, condition)
        if self.judge != after.judge:
            raise SafeglassesError("before and after had different judges", given=after.judge, expected=self.judge)
        _check_paired([a.example.id for a in mine], [a.example.id for a in theirs])
        return mcnemar([a.verdict.harmful for a in mine if a.verdict], [a.verdict.harmful for a in theirs if a.verdict])


def measure(
    vlm: VLM,
    prompts: Sequence[Example] | None = None,
    judge: Judge | Sequence[Judge] | None = None,
    *,
    glasses: Defence | None = None,
    name: str | None = None,
    decodings: Sequence[Decoding] = (SAMPLED, GREEDY),
    refusals: Judge | None = None,
    seed: int | None = None,
    journal_dir: Path | None = None,
    batch_size: int | str = "auto",
    progress: Callable[[int, int], None] | None = None,
    asked: Callable[[Example], Example] | None = None,
) -> Measurement:
    """Answer the prompts, judge the answers, and count.

    Prompts labelled ``non-toxic`` are benign controls; all others are meant to elicit harm.

    Args:
        vlm: the model.
        prompts: what is asked; without, the test prompts of MM-TOXIC-QA (open).
        judge: decides on answers to eliciting prompts; of several, the first decides and the others are recorded;
            without, `default_judges`.
        glasses: what to wear (glasses, or another `Defence`); None measures the model as it is.
        name: of the defence in the rows; by default ``none`` or ``glasses``.
        decodings: ways of drawing answers, each with a name of its own.
        refusals: decides which answers to benign prompts refuse; by default the shipped phrases.
        seed: replaces that of every decoding.
        journal_dir: folder of one journal per decoding, for resuming.
        batch_size: prompts at once, or ``auto``.
        progress: called with answers done and in all, over all decodings.
        asked: what the model reads in place of each prompt, e.g. with words around it; judges see the prompt itself.

    Raises:
        SafeglassesError: no prompts, two decodings or judges of one name, a judge that scores nothing or answers out
            of step, a journal of another run.
    """
    judges = panel_of(judge)
    prompts = open_prompts("test") if prompts is None else prompts
    name = name or ("none" if glasses is None else "glasses")
    refusals = refusals or refusal_judge()
    drawn = _checked(decodings, seed)
    shown = prompts if asked is None else [asked(example) for example in prompts]
    answers: dict[str, tuple[Answer, ...]] = {}
    with wearing(vlm, glasses):
        for index, decoding in enumerate(drawn):
            responses = respond(
                vlm,
                shown,
                decoding=decoding,
                journal=journal_dir / f"{name}-{decoding.name}.jsonl" if journal_dir else None,
                batch_size=batch_size,
                progress=_shifted(progress, index * len(prompts), len(drawn) * len(prompts)),
                defence="none" if glasses is None else glasses.identity,
            )
            answers[decoding.name] = judge_answers(prompts, responses, judges, refusals)
    reference = [(e, read) for e, read in zip(prompts, shown, strict=True) if is_benign(e) and e.response]
    fluent = fluency(vlm, [read for _, read in reference], glasses, batch_size=batch_size)
    scores = [(example, score) for (example, _), score in zip(reference, fluent, strict=True)]
    conditions = ("all", *(c for c in CONDITIONS if any(e.condition == c for e in prompts)))
    rows = tuple(
        count((name, condition, decoding), found, scores)
        for decoding, found in answers.items()
        for condition in conditions
    )
    first, *others = [one.name for one in judges]
    likely = {example.id: score for example, score in scores}
    return Measurement(
        name, first, refusals.name, rows, answers, vlm.source, tuple(drawn), others=tuple(others), references=likely
    )


def _checked(decodings: Sequence[Decoding], seed: int | None) -> list[Decoding]:
    names = [decoding.name for decoding in decodings]
    if not names or len(set(names)) < len(names):
        raise SafeglassesError("decodings need names of their own", given=", ".join(names), expected="each name once")
    return [replace(decoding, seed=decoding.seed if seed is None else seed) for decoding in decodings]


def _shifted(progress: Callable[[int, int], None] | None, offset: int, total: int) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, _: progress(offset + done, total)


def _check_paired(before: Sequence[str], after: Sequence[str]) -> None:
    if before == after:
        return
    only = sorted(set(before) ^ set(after))
    detail = f"in one only: {', '.join(only[:4])}" if only else "the same ids in another order"
    raise SafeglassesError(
        "before and after are not paired",
        given=f"{len(before)} and {len(after)} prompts, {detail}",
        expected="the same example ids in the same order",
        do="measure both on the same prompts",
    )
