"""What a run starts from: the user's files, read, cut, checked, and named by their contents."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from safeglasses.data.categories import about, check_categories, eliciting, without_others
from safeglasses.data.checks import check_media, check_pairs
from safeglasses.data.examples import SPLITS, Example, Examples, prompts_of, read_examples
from safeglasses.data.open import PROMPTS, open_pairs, open_prompts
from safeglasses.errors import SafeglassesError
from safeglasses.files import sha256_file
from safeglasses.measure.judges import Judge
from safeglasses.measure.panel import DEFAULT_JUDGES
from safeglasses.model.vlm import VLM


@dataclass(frozen=True)
class Inputs:
    """The user's data, read and checked."""

    pairs: Examples
    """Toxic and non-toxic examples with responses; of the chosen categories, where some were chosen."""
    prompts: Examples
    """Prompts to answer; made from the pairs when none were given."""
    judges: tuple[Judge, ...]
    """The first decides which responses are harmful, the others are recorded."""
    refusals: Judge
    """Decides which responses are refusals."""
    max_new_tokens: int
    """Longest answer that is generated."""
    categories: tuple[str, ...] = ()
    """The only kinds of harm that glasses are made for; none: all."""
    lessons: Examples = field(default_factory=lambda: Examples(()))
    """Of the pairs, what calibration learns from: without what elicits harm of other categories."""

    @property
    def judge(self) -> Judge:
        """Who decides which responses are harmful."""
        return self.judges[0]

    @property
    def skipped(self) -> int:
        """How many bad rows were skipped."""
        return len(self.pairs.skipped) + (len(self.prompts.skipped) if self.prompts is not self.pairs else 0)


def read_inputs(
    vlm: VLM,
    pairs: str | Path | None,
    prompts: str | Path | None,
    judges: Sequence[Judge],
    refusals: Judge,
    *,
    limit: int | None,
    skip_bad: bool,
    categories: Sequence[str] = (),
) -> Inputs:
    """Read, cut to the limit, and check everything that can be checked before long work."""
    given = limited(open_pairs() if pairs is None else read_examples(pairs, skip_bad=skip_bad), limit)
    if prompts is not None:
        asked = limited(read_examples(prompts, skip_bad=skip_bad), limit)
    else:
        asked = limited(open_prompts(), limit) if pairs is None else prompts_of(given)
    lessons = given
    if categories:
        check_categories(given, categories)
        lessons, asked = without_others(given, categories), eliciting(asked, categories)
        given = about(given, categories)
    check_pairs(given, vlm)
    check_media(asked, vlm)
    _check_test(asked, of_pairs=prompts is None and pairs is not None)
    lengths = vlm.lengths([e.chat() for e in given])
    without = vlm.lengths([e.chat(with_response=False) for e in given])
    longest = max(a - b for a, b in zip(lengths, without, strict=True))
    return Inputs(
        pairs=given,
        prompts=asked,
        judges=tuple(judges),
        refusals=refusals,
        max_new_tokens=min(256, max(16, longest * 5 // 4)),
        categories=tuple(categories),
        lessons=lessons,
    )


def _check_test(prompts: Examples, *, of_pairs: bool) -> None:
    if any(row.label != "non-toxic" for row in prompts.split("test")):
        return
    add = "give prompts of the test split with --prompts"
    raise SafeglassesError(
        "no prompt to prove anything on",
        given="; ".join(f"{name}: {len(prompts.split(name))} prompts" for name in SPLITS),
        expected='some in the test split that may elicit harm (with a label other than "non-toxic")',
        do=f'{add}, or leave "split" out of the pairs: rows are then split by a hash' if of_pairs else add,
    )


def limited(examples: Examples, limit: int | None) -> Examples:
    """Keep about so many examples of each split, its labels alike, rows of one pair or prompt together."""
    if limit is None:
        return examples
    kept: list[Example] = []
    for split in SPLITS:
        partners: dict[str, list[Example]] = {}
        for row in examples.split(split):
            partners.setdefault(row.pair_id or row.prompt_key, []).append(row)
        labels = {row.label for rows in partners.values() for row in rows}
        room = dict.fromkeys(labels, -(-limit // max(1, len(labels))))
        for rows in partners.values():
            if any(room[row.label] > 0 for row in rows):
                kept += rows
                room.update({label: room[label] - sum(row.label == label for row in rows) for label in labels})
    return replace(examples, rows=tuple(kept), sha256="")


def rows_of(prompts: str | Path | None, split: str, *, skip_bad: bool = False) -> tuple[Examples, tuple[Example, ...]]:
    """Read prompts (None: those of MM-TOXIC-QA (open)); return all of them, and those of a split or of ``all``.

    Raises:
        SafeglassesError: no such split, or no row in it; anything that reading raises.
    """
    if split not in (*SPLITS, "all"):
        raise SafeglassesError("no such split", given=repr(split), expected=", ".join((*SPLITS, "all")))
    examples = open_prompts() if prompts is None else read_examples(prompts, skip_bad=skip_bad)
    rows = examples.rows if split == "all" else examples.split(split).rows
    if not rows:
        raise SafeglassesError(
            "no prompts to answer",
            given=f"{prompts or PROMPTS}, split {split}",
            expected="at least one row",
            do="give rows that split, or use --split all",
        )
    return examples, rows


def drawn_from(rows: Sequence[Example], limit: int | None) -> tuple[Example, ...]:
    """Draw at most so many rows by the hashes of their ids: always the same ones, in the order of the file."""
    if limit is None or limit >= len(rows):
        return tuple(rows)
    drawn = sorted(rows, key=lambda row: hashlib.sha256(row.id.encode("utf-8", "surrogatepass")).digest())
    kept = {row.id for row in drawn[:limit]}  # not every nth: files repeat their kinds in a fixed order
    return tuple(row for row in rows if row.id in kept)


def content_of(path: str | Path) -> str:
    """Hash a data file, or every file of a data folder."""
    path = Path(path)
    if not path.exists():
        raise SafeglassesError("no such file", given=str(path), expected="a .jsonl or .parquet file, or a folder")
    if path.is_dir():
        return ",".join(sha256_file(p)[:16] for p in sorted(path.rglob("*")) if p.is_file())
    return sha256_file(path)


def judges_of(specs: str | Sequence[str] | None) -> list[str]:
    """The judges as an input of the run."""
    given = DEFAULT_JUDGES if specs is None else [specs] if isinstance(specs, str) else specs
    return [judge_of(spec) for spec in given]


def judge_of(spec: str) -> str:
    """A judge as an input of the run: a lexicon counts by its content."""
    if spec.startswith("lexicon:") and Path(spec.removeprefix("lexicon:")).is_file():
        return f"lexicon:{sha256_file(Path(spec.removeprefix('lexicon:')))}"
    return spec
