"""What every command about stacks of defences does first: build them, see that they fit, name their files."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safeglasses.measure.measurement import GREEDY, SAMPLED
from safeglasses.measure.respond import Decoding
from safeglasses.measure.verdicts import Judge
from safeglasses.model.vlm import VLM
from safeglasses.progress import Progress
from safeglasses.protect.compose import NONE, Kit, compose, read_kit
from safeglasses.protect.stack import Protection


def stacks_of(
    defences: Sequence[str], recipe: Path | None, judge: str | None, on_failure: str | None
) -> list[Protection]:
    """Build stacks, each once, with `NONE` in front: what they are compared with.

    Args:
        defences: stacks as texts, or names of the recipe.
        recipe: names of stacks, prompts, what happens on failure.
        judge: who judges inside stacks; None: as the recipe says.
        on_failure: ``closed`` or ``open``; None: as the recipe says.

    Raises:
        SafeglassesError: as `read_kit` and `compose`.
    """
    kit = Kit() if recipe is None else read_kit(recipe)
    changes: dict[str, Any] = {} if judge is None else {"judge": judge}
    changes |= {} if on_failure is None else {"on_failure": on_failure}
    kit = replace(kit, **changes)
    return [compose(name, kit) for name in dict.fromkeys((NONE, *defences))]


def circular(stacks: Sequence[Protection], judge: Judge, show: Progress) -> list[str]:
    """Name the stacks in which the judge that decides takes part, and say so."""
    found = [stack.name for stack in stacks if any(one.name == judge.name for one in stack.judges)]
    if found:
        show.say(f"the judge that decides also takes part in answering: {', '.join(found)}")
    return found


def refuse_misfits(stacks: Sequence[Protection], vlm: VLM) -> None:
    """Put on and take off everything that stacks wear, before anything is answered.

    Raises:
        SafeglassesError: glasses or a shield of another model.
    """
    for stack in stacks:
        for defence in stack.worn:
            with defence.worn(vlm):
                pass


def decoding_of(greedy: bool, max_new_tokens: int, seed: int) -> Decoding:
    """Return how a command's answers are drawn: sampled at temperature 1, or greedily."""
    drawn = GREEDY if greedy else SAMPLED
    return Decoding(drawn.name, drawn.temperature, max_new_tokens, seed)


def slug(name: str) -> str:
    """Name a file after a stack: readable, and no other stack's."""
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
