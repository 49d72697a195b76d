"""What every command about stacks of defences does first: build them, see that they fit, name their files."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safeglasses.data.examples import Example
from safeglasses.measure.measurement import GREEDY, SAMPLED
from safeglasses.measure.respond import Decoding
from safeglasses.measure.verdicts import Judge
from safeglasses.model.vlm import VLM
from safeglasses.progress import Progress
from safeglasses.protect.compose import NONE, Kit, compose, read_kit
from safeglasses.protect.parts import Reminder
from safeglasses.protect.stack import Protection
from safeglasses.run.under import Under


@dataclass(frozen=True, kw_only=True)
class StacksAsked:
    """What is said of stacks of defences, and of the answers that they give."""

    defences: Sequence[str]
    """Stacks as texts, or names of the recipe; `NONE` is added in front, to compare with."""
    out: Path
    """Where answers, the record and the page go; what is there is gone on with."""
    prompts: str | Path | None = None
    """Prompts; None: those of MM-TOXIC-QA (open)."""
    judges: Sequence[str] | None = None
    """As `judge_from` reads them, the first decides; None: those that ship."""
    recipe: Path | None = None
    """Names of stacks, prompts, what happens on failure."""
    defence_judge: str | None = None
    """Who judges inside stacks; None: as the recipe says."""
    on_failure: str | None = None
    """``closed`` or ``open``; None: as the recipe says."""
    split: str = "test"
    """``find``, ``calibrate``, ``test`` or ``all``."""
    greedy: bool = False
    """Take the likeliest tokens instead of sampling at temperature 1."""
    max_new_tokens: int = 64
    """Longest answer."""
    seed: int = 0
    """Of everything that is drawn."""
    limit: int | None = None
    """At most so many prompts: always the same draw, whatever the seed."""


def stacks_of(asked: StacksAsked) -> list[Protection]:
    """Build stacks, each once, with `NONE` in front.

    Raises:
        SafeglassesError: as `read_kit` and `compose`.
    """
    kit = Kit() if asked.recipe is None else read_kit(asked.recipe)
    changes: dict[str, Any] = {} if asked.defence_judge is None else {"judge": asked.defence_judge}
    changes |= {} if asked.on_failure is None else {"on_failure": asked.on_failure}
    kit = replace(kit, **changes)
    return [compose(name, kit) for name in dict.fromkeys((NONE, *asked.defences))]


def circular(stacks: Sequence[Protection], judge: Judge, show: Progress) -> list[str]:
    """Name the stacks in which the judge that decides takes part, and say so."""
    found = [stack.name for stack in stacks if any(one.name == judge.name for one in stack.judges)]
    if found:
        show.say(f"the judge that decides also takes part in answering: {', '.join(found)}")
    return found


def refuse_misfits(stacks: Sequence[Protection], vlm: VLM, examples: Sequence[Example]) -> None:
    """Put on and take off all that stacks wear, and let the model read what they say, before anything is answered.

    Raises:
        SafeglassesError: glasses or a shield of another model, or words that reach it with none of the prompts: a
            system turn that its template refuses or drops. Where only some prompts are so, the part fails as told.
    """
    for stack in stacks:
        words = tuple(part for part in stack.parts if isinstance(part, Reminder))
        refused = Under(stack.name, words, "").refused(vlm, examples) if words else ()
        if refused and all(refused):
            raise next(filter(None, refused))
        for defence in stack.worn:
            with defence.worn(vlm):
                pass


def decoding_of(asked: StacksAsked) -> Decoding:
    """Return how answers are drawn: sampled at temperature 1, or greedily."""
    drawn = GREEDY if asked.greedy else SAMPLED
    return Decoding(drawn.name, drawn.temperature, asked.max_new_tokens, asked.seed)


def slug(name: str) -> str:
    """Name a file after a stack: readable, and no other stack's."""
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
