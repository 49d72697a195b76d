"""Every way in which one stack is attacked, each with its journal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safeglasses.data.examples import Example
from safeglasses.measure.items import question_of
from safeglasses.measure.respond import Decoding
from safeglasses.measure.verdicts import Judge, verdicts_of
from safeglasses.model.vlm import VLM
from safeglasses.progress import Progress
from safeglasses.protect.attack import (
    AGAIN,
    PLAIN,
    RANDOM,
    RESAMPLE,
    SEARCH,
    UNIVERSAL,
    Attack,
    Attacked,
    Universal,
    best_suffix,
    find_universal,
)
from safeglasses.protect.attacked import Tried
from safeglasses.protect.attacker import Attacker
from safeglasses.protect.grid import held_bytes
from safeglasses.protect.local import LocalAnswerer, memory_per_token
from safeglasses.protect.running import protect
from safeglasses.protect.stack import Protection
from safeglasses.run.stacks import slug


@dataclass(frozen=True)
class Plan:
    """What is done to every stack alike."""

    kinds: tuple[str, ...]
    """Of ``wrappers``, ``universal`` and ``search``."""
    attacker: Attacker
    """Wrappers and words."""
    queries: int
    """Of the searches."""
    length: int
    """Words of a suffix."""
    greedy: bool
    """The same question has the same answer: asking again is no attack and no control."""
    seed: int
    """Of the suffixes."""

    def attacks(self) -> list[Attack]:
        """Return the attacks that need nothing found before."""
        attacks = [Attack(PLAIN)]
        if "wrappers" in self.kinds:
            attacks += [Attack(f"wrapper:{wrapper.name}", wrapper=wrapper) for wrapper in self.attacker.wrappers]
        if "search" in self.kinds:
            again = [] if self.greedy else [Attack(RESAMPLE, queries=self.queries)]
            attacks += [*again, self.search(PLAIN if self.greedy else RESAMPLE)]
        return attacks

    def search(self, control: str) -> Attack:
        """Return the search of a suffix."""
        return Attack(SEARCH, control, words=self.attacker.words, length=self.length, queries=self.queries)

    def most_queries(self, prompts: int, searched: int) -> int:
        """Bound the queries of one stack, for as many prompts and as many others to search a suffix for all on."""
        again = "search" in self.kinds and not self.greedy
        each = sum(attack.queries for attack in self.attacks()) + again + (2 if searched else 0)
        return prompts * each + searched * self.queries


@dataclass(frozen=True)
class Siege:
    """One model, and everything that is the same for all stacks."""

    vlm: VLM
    """Who answers."""
    plan: Plan
    """What is done to each stack."""
    judges: Sequence[Judge]
    """The first decides and serves the attacker, the others bear witness."""
    decoding: Decoding
    """How answers are drawn."""
    batch_size: int
    """Prompts at once."""
    folder: Path
    """Where journals go."""
    show: Progress
    """Where progress is shown."""

    def lay(
        self,
        stack: Protection,
        rows: Sequence[Example],
        search: Sequence[Example],
        universal: dict[str, Universal],
    ) -> Iterator[Tried]:
        """Attack one stack in every way, without attack first; what is found for all goes into ``universal``."""
        for attack in self.plan.attacks():
            yield (done := self._one(stack, attack, rows))
            if attack.name == SEARCH and not self.plan.greedy:  # greedy, the same question has the same answer
                found = {outcome.id: best_suffix(outcome) for outcome in done.outcomes}
                yield self._one(stack, Attack(AGAIN, suffixes=found, draw="~again"), rows)
        if search:
            best = universal[stack.name] = self._universal(stack, search)
            yield self._one(stack, Attack(RANDOM, suffixes={"": best.first}), rows)
            yield self._one(stack, Attack(UNIVERSAL, RANDOM, suffixes={"": best.suffix}), rows)

    def _one(self, stack: Protection, attack: Attack, rows: Sequence[Example]) -> Tried:
        with self.show.stage(f"{attack.name}: {stack.name}") as advance:
            outcomes = protect(
                Attacked(stack, attack, self.judges[0], self.plan.seed),
                rows,
                LocalAnswerer(self.vlm, stack.worn),
                decoding=self.decoding,
                journal=self._folder(stack) / f"{slug(attack.name)}.jsonl",
                batch_size=self.batch_size,
                progress=advance,
            )
        texts, questions = [outcome.text for outcome in outcomes], [question_of(row) for row in rows]
        witnesses = {j.name: [v.harmful for v in verdicts_of(j, texts, questions)] for j in self.judges[1:]}
        held, cache = held_bytes(stack.worn), memory_per_token(self.vlm)
        return Tried(stack.name, attack, tuple(outcomes), witnesses, held, cache)

    def _universal(self, stack: Protection, search: Sequence[Example]) -> Universal:
        with self.show.stage(f"search a universal suffix: {stack.name}") as advance:
            return find_universal(
                stack,
                search,
                LocalAnswerer(self.vlm, stack.worn),
                self.judges[0],
                search=self.plan.search(PLAIN),
                seed=self.plan.seed,
                decoding=self.decoding,
                folder=self._folder(stack) / "universal",
                batch_size=self.batch_size,
                progress=advance,
            )

    def _folder(self, stack: Protection) -> Path:
        return self.folder / slug(stack.name)
