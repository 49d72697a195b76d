"""What an attacker brings, as data: wrappers around requests, words for suffixes; and whether calibration knew them."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from safeglasses.data.build.conditions import shipped_wrappers
from safeglasses.errors import SafeglassesError
from safeglasses.measure.words import split_words

HOLE = "{text}"
FALLBACK = "en"
RUN = 5
"""Words in a row that two wordings share only if one was made from the other."""
SHARE = 0.5
"""Of a wrapper's runs of words: from this share on it is called known."""


@dataclass(frozen=True)
class Wrapper:
    """A way to word any request so that defences give way."""

    name: str
    """What reports call it."""
    source: str
    """The paper in whose manner it is worded."""
    texts: Mapping[str, str]
    """Per language tag, a text with one ``{text}``; what a language lacks is said in English."""

    def around(self, text: str, language: str | None) -> str:
        """Return a request in this wrapper; what the request holds is not searched for a hole."""
        before, after = self._template(language).split(HOLE)
        return f"{before}{text}{after}"

    def _template(self, language: str | None) -> str:
        tag = language or FALLBACK
        return next(self.texts[one] for one in (tag, tag.split("-")[0], FALLBACK) if one in self.texts)


@dataclass(frozen=True)
class Attacker:
    """Everything that is worded beforehand."""

    wrappers: tuple[Wrapper, ...]
    """Each is an attack of its own."""
    words: tuple[str, ...]
    """What suffixes are made of."""


@cache
def shipped_attacker() -> Attacker:
    """Return the attacker that comes with the package: worded by us, in no recipe that ships."""
    text = files("safeglasses.protect").joinpath("attacks/held_back.toml").read_text(encoding="utf-8")
    return _attacker(tomllib.loads(text), "held_back.toml", None)


def read_attacker(path: Path) -> Attacker:
    """Read an attacker (TOML): ``words``, ``[wrappers.NAME]`` with ``source`` and a text per language.

    What the file has not is taken from what ships.

    Raises:
        SafeglassesError: no such file, no TOML, an unknown entry, or one that cannot be used.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SafeglassesError("could not read the attacker's file", given=f"{path}: {error}") from error
    return _attacker(table, str(path), shipped_attacker())


def _attacker(table: Mapping[str, Any], where: str, fallback: Attacker | None) -> Attacker:
    unknown = sorted(set(table) - {"words", "wrappers"})
    if unknown or not table:
        raise _mistake(where, unknown[0] if unknown else "nothing", "words = [...] and [wrappers.NAME]")
    words = table.get("words", None if fallback is None else list(fallback.words))
    if not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words) or len(words) < 2:
        raise _mistake(where, f"words = {words!r:.60}", "a list of at least two texts that are not blank")
    wrappers = table.get("wrappers")
    if wrappers is None and fallback is not None:
        return Attacker(fallback.wrappers, tuple(dict.fromkeys(words)))
    if not isinstance(wrappers, Mapping):
        raise _mistake(where, f"wrappers = {wrappers!r:.60}", "a table for each wrapper: [wrappers.NAME]")
    return Attacker(tuple(_wrapper(name, one, where) for name, one in wrappers.items()), tuple(dict.fromkeys(words)))


def _wrapper(name: str, table: Any, where: str) -> Wrapper:
    place = f"wrappers.{name}"
    if not isinstance(table, Mapping) or not all(isinstance(text, str) for text in table.values()):
        raise _mistake(where, f"{place} = {table!r:.60}", "a table of texts: source, and one for each language")
    texts = {language: text for language, text in table.items() if language != "source"}
    if FALLBACK not in texts or "source" not in table:
        raise _mistake(where, f"{place} with {', '.join(table) or 'nothing'}", "source, en, and further languages")
    for language, text in texts.items():
        if text.count(HOLE) != 1 or not split_words(text.replace(HOLE, " ")):
            raise _mistake(where, f"{place}.{language} = {text!r:.60}", "words around one {text}")
    return Wrapper(name, table["source"], texts)


def _mistake(where: str, given: str, expected: str) -> SafeglassesError:
    return SafeglassesError("a mistake in the attacker's file", given=f"{where}: {given}", expected=expected)


def known_wrappers(wrappers: Sequence[Wrapper], seen: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Say which wrappers are not held back, and who knew them: the shipped benchmark's recipe, or given texts.

    A wrapper is known when all its words around the hole stand in one seen text in their order, or when half of its
    runs of five words occur in the seen texts; punctuation, case and width do not count. A wrapper whose meaning was
    seen in other words is not found.

    Args:
        wrappers: which are asked about.
        seen: prompts that a defence was fitted, calibrated or built with, by what is to be said of them.

    Returns:
        By wrapper, where it was met and in which language; those that are held back are missing.
    """
    recipe = [t for one in shipped_wrappers() for t in one.templates if HOLE in t]
    sources = {"the wrappers of the shipped benchmark": recipe, **seen}
    found: dict[str, str] = {}
    for where, texts in sources.items():
        lines = [_spelled(text.replace(HOLE, " ")) for text in texts]
        runs = {run for line in lines for run in _runs(line.split())}
        for wrapper in wrappers:
            for language, text in wrapper.texts.items():
                if wrapper.name not in found and _known(text, lines, runs):
                    found[wrapper.name] = f"{where} ({language})"
    return found


def _known(template: str, lines: Sequence[str], runs: set[tuple[str, ...]]) -> bool:
    pieces = [piece for piece in map(_spelled, template.split(HOLE)) if piece.strip()]
    if any(_in_order(pieces, line) for line in lines):
        return True
    own = [run for piece in pieces for run in _runs(piece.split())]
    return bool(own) and sum(run in runs for run in own) >= SHARE * len(own)


def _in_order(pieces: Sequence[str], line: str) -> bool:
    start = 0
    for piece in pieces:
        place = line.find(piece, start)
        if place < 0:
            return False
        start = place + len(piece) - 1  # the blank between two words belongs to both
    return True


def _spelled(text: str) -> str:
    return f" {' '.join(split_words(text))} "


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
