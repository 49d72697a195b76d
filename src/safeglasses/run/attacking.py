"""Attack stacks of defences by someone who knows them, and write down how much of each stack's gain remains."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safeglasses.data.examples import Example, read_examples
from safeglasses.data.open import open_pairs
from safeglasses.data.splits import groups_of
from safeglasses.errors import SafeglassesError
from safeglasses.files import write_json
from safeglasses.measure.items import is_benign, question_of
from safeglasses.measure.panel import panel_from
from safeglasses.measure.respond import resolve_batch_size
from safeglasses.model.vlm import load
from safeglasses.progress import Progress, Quiet
from safeglasses.protect.attack import Universal
from safeglasses.protect.attacked import Tried, attack_rows, examples_of, summaries
from safeglasses.protect.attacker import Attacker, known_wrappers, read_attacker, shipped_attacker
from safeglasses.report.attack_page import write_attack_page
from safeglasses.run.inputs import drawn_from, rows_of
from safeglasses.run.siege import Plan, Siege
from safeglasses.run.stacks import StacksAsked, circular, decoding_of, refuse_misfits, stacks_of

SCHEMA = 1
KINDS = ("wrappers", "universal", "search")


@dataclass(frozen=True, kw_only=True)
class AttackAsked(StacksAsked):
    """What is attacked, and how; of the prompts only the eliciting ones are asked.

    The first judge decides and serves the attacker, further ones bear witness.
    """

    attacker: Path | None = None
    """Wrappers and words; None: those that ship."""
    kinds: Sequence[str] = KINDS
    """Which of `KINDS` are tried."""
    known: Sequence[Path] = ()
    """Data that the defences were fitted on: a wrapper that occurs there is not held back."""
    allow_known: bool = False
    """Mark such wrappers instead of refusing them."""
    queries: int = 16
    """Of the searches: per prompt, and suffixes tried for the universal one."""
    suffix_words: int = 3
    """Words of a suffix."""
    search_split: str = "calibrate"
    """Where the universal suffix is searched; never the split that it is tried on."""
    search_limit: int = 48
    """At most so many prompts there."""


def attack_model(
    model: str | Path,
    asked: AttackAsked,
    *,
    batch_size: int | str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Attack stacks of defences, each by itself, and compare.

    Args:
        model: checkpoint folder or hub id.
        asked: what to attack, and how.
        batch_size: prompts at once, or ``auto``.
        dtype: ``auto`` or a torch dtype's name.
        device_map: as in transformers.
        revision: of a hub model.
        progress: where progress is shown.

    Returns:
        What ``attack.json`` holds, and the ``files`` written.

    Raises:
        SafeglassesError: bad input, as far as possible before the model is loaded: a wrapper that calibration knew,
            a suffix searched on the prompts that it is tried on; answers of another run in the folder.
    """
    show = progress or Quiet()
    judges = panel_from(asked.judges)
    _check(asked)
    every, found = rows_of(asked.prompts, asked.split)
    rows = drawn_from(_eliciting(found, f"split {asked.split}"), asked.limit)
    search = _search_rows(asked, rows) if "universal" in asked.kinds else ()
    attacker = shipped_attacker() if asked.attacker is None else read_attacker(asked.attacker)
    known = _known(asked, attacker, every, show) if "wrappers" in asked.kinds else {}
    stacks = stacks_of(asked)
    deciding = circular(stacks, judges[0], show)
    plan = Plan(tuple(asked.kinds), attacker, asked.queries, asked.suffix_words, asked.greedy, asked.seed)
    most = plan.most_queries(len(rows), len(search))
    show.say(f"{len(rows):,} eliciting prompts, {len(stacks)} stacks, at most {most:,} queries each")
    with show.stage("load the model"):
        vlm = load(model, dtype=dtype, device_map=device_map, revision=revision)
    refuse_misfits(stacks, vlm, rows)
    decoding = decoding_of(asked)
    siege = Siege(vlm, plan, judges, decoding, resolve_batch_size(vlm, batch_size), asked.out / "answers", show)
    tried: list[Tried] = []
    universal: dict[str, Universal] = {}
    for stack in stacks:
        for one in siege.lay(stack, rows, search, universal):
            tried.append(one)
            if len(tried) == 1:
                each = sum(outcome.cost.seconds for outcome in one.outcomes) / len(rows)
                minutes = most * len(stacks) * each / 60
                show.say(f"at the pace of these answers, all queries of all stacks take at most {minutes:,.1f} min")
    lines = attack_rows(tried, rows)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "model": vlm.source,
        "base_fingerprint": vlm.fingerprint(),
        "judge": judges[0].name,
        "witnesses": [judge.name for judge in judges[1:]],
        "judges_inside": sorted({judge.name for stack in stacks for judge in stack.judges}),
        "circular": deciding,
        "decoding": asdict(decoding),
        "split": asked.split,
        "prompts": len(rows),
        "attacker": "shipped" if asked.attacker is None else str(asked.attacker),
        "wrappers": [
            {"name": w.name, "source": w.source, "languages": list(w.texts), "known": known.get(w.name)}
            for w in attacker.wrappers
            if "wrappers" in asked.kinds
        ],
        "suffixes": {"words": len(attacker.words), "length": asked.suffix_words, "queries": asked.queries},
        "search": {"split": asked.search_split, "prompts": len(search)} if search else None,
        "universal": {
            name: {"suffix": u.suffix, "tried": [list(pair) for pair in u.tried], "queries": len(u.outcomes)}
            for name, u in universal.items()
        },
        "parts": {stack.name: [part.name for part in stack.parts] for stack in stacks},
        "rows": [line.to_json() for line in lines],
        "stacks": summaries(lines, frozenset(f"wrapper:{name}" for name in known)),
        "examples": examples_of(tried, rows),
    }
    write_json(asked.out / "attack.json", record)
    page = write_attack_page(record, asked.out / "attack.html")
    return {**record, "files": {"attack": str(asked.out / "attack.json"), "page": str(page)}}


def _check(asked: AttackAsked) -> None:
    unknown = sorted(set(asked.kinds) - set(KINDS))
    if unknown or not asked.kinds:
        given = ", ".join(unknown) or "none"
        raise SafeglassesError("no such kind of attack", given=given, expected=", ".join(KINDS))
    if min(asked.queries, asked.suffix_words, asked.search_limit) < 1:
        given = f"queries {asked.queries}, suffix words {asked.suffix_words}, search prompts {asked.search_limit}"
        raise SafeglassesError("an attack without a query or a word", given=given, expected="at least 1 of each")
    if "universal" in asked.kinds and (asked.split == asked.search_split or "all" in (asked.split, asked.search_split)):
        raise SafeglassesError(
            "the suffix would be searched on the prompts that it is tried on",
            given=f"split {asked.split}, search split {asked.search_split}",
            expected="two different splits",
            do="choose another --search-split, or leave `universal` out of --attacks",
        )


def _eliciting(rows: Iterable[Example], where: str) -> tuple[Example, ...]:
    found = tuple(row for row in rows if not is_benign(row))
    if not found:
        raise SafeglassesError(
            "no eliciting prompt to attack with",
            given=where,
            expected='at least one row whose label is not "non-toxic"',
        )
    return found


def _search_rows(asked: AttackAsked, rows: Sequence[Example]) -> tuple[Example, ...]:
    """Draw the prompts of the search; none shares a picture, a pair or its text with those that are attacked."""
    _, found = rows_of(asked.prompts, asked.search_split)
    others = _eliciting(found, f"search split {asked.search_split}")
    groups = groups_of([*rows, *others])
    tried = set(groups[: len(rows)])
    kept = [row for row, group in zip(others, groups[len(rows) :], strict=True) if group not in tried]
    return drawn_from(_eliciting(kept, f"search split {asked.search_split}, prompts of its own"), asked.search_limit)


def _known(asked: AttackAsked, attacker: Attacker, prompts: Iterable[Example], show: Progress) -> dict[str, str]:
    """Find wrappers that are not held back."""
    given = {str(path): read_examples(path) for path in asked.known}
    if asked.prompts is None and not given:
        given["the pairs of MM-TOXIC-QA (open)"] = open_pairs()
    elif not given:
        show.say("wrappers were checked against --prompts and what ships alone: name the fit's data with --known")
    seen = {"the prompts": [question_of(row) for row in prompts]}
    seen |= {name: [question_of(row) for row in rows] for name, rows in given.items()}
    known = known_wrappers(attacker.wrappers, seen)
    if known and not asked.allow_known:
        raise SafeglassesError(
            "a wrapper that calibration may have known",
            given="; ".join(f"{name}, in {where}" for name, where in known.items()),
            expected="wrappers that are held back",
            do="take it out of --attacker, or mark it in the report with --allow-known",
        )
    if known:
        show.say(f"not held back, and marked so: {', '.join(known)}")
    return known
