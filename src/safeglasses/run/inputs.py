"""What a run starts from: the user's files, read, cut, checked, and named by their contents."""

from dataclasses import dataclass, replace
from pathlib import Path

from safeglasses.data.checks import check_pairs
from safeglasses.data.examples import Example, Examples, prompts_of, read_examples
from safeglasses.errors import SafeglassesError
from safeglasses.files import sha256_file
from safeglasses.measure.judges import Judge, judge_from, refusal_judge
from safeglasses.model.vlm import VLM


@dataclass(frozen=True)
class Inputs:
    """The user's data, read and checked."""

    pairs: Examples
    """Toxic and non-toxic examples with responses."""
    prompts: Examples
    """Prompts to answer; made from the pairs when none were given."""
    judge: Judge
    """Decides which responses are harmful."""
    refusals: Judge
    """Decides which responses are refusals."""
    max_new_tokens: int
    """Longest answer that is generated."""

    @property
    def skipped(self) -> int:
        """How many bad rows were skipped."""
        return len(self.pairs.skipped) + (len(self.prompts.skipped) if self.prompts is not self.pairs else 0)


def read_inputs(
    vlm: VLM,
    pairs: str | Path,
    prompts: str | Path | None,
    judge: str | None,
    refusals: str | None,
    *,
    limit: int | None,
    skip_bad: bool,
) -> Inputs:
    """Read, cut to the limit, and check everything that can be checked before long work."""
    if judge is None:
        raise SafeglassesError(
            "no judge",
            expected="--judge lexicon:FILE (a word a line) or --judge classifier:ID (a Hugging Face text classifier)",
            do="name one; the answers must be judged by something that you trust",
        )
    given = limited(read_examples(pairs, skip_bad=skip_bad), limit)
    asked = limited(read_examples(prompts, skip_bad=skip_bad), limit) if prompts is not None else prompts_of(given)
    check_pairs(given, vlm)
    lengths = vlm.lengths([e.chat() for e in given])
    without = vlm.lengths([e.chat(with_response=False) for e in given])
    longest = max(a - b for a, b in zip(lengths, without, strict=True))
    return Inputs(
        pairs=given,
        prompts=asked,
        judge=judge_from(judge),
        refusals=judge_from(refusals) if refusals is not None else refusal_judge(),
        max_new_tokens=min(256, max(16, longest * 5 // 4)),
    )


def limited(examples: Examples, limit: int | None) -> Examples:
    """Keep at most so many examples of each split, its labels alike."""
    if limit is None:
        return examples
    kept: list[Example] = []
    for split in ("find", "calibrate", "test"):
        rows = examples.split(split).rows
        labels = sorted({e.label or "" for e in rows})
        for label in labels:
            kept += [e for e in rows if (e.label or "") == label][: -(-limit // len(labels))]
    return replace(examples, rows=tuple(kept))


def content_of(path: str | Path) -> str:
    """Hash a data file, or every file of a data folder."""
    path = Path(path)
    if not path.exists():
        raise SafeglassesError("no such file", given=str(path), expected="a .jsonl or .parquet file, or a folder")
    if path.is_dir():
        return ",".join(sha256_file(p)[:16] for p in sorted(path.rglob("*")) if p.is_file())
    return sha256_file(path)


def judge_of(spec: str | None) -> str | None:
    """The judge as an input of the run: a lexicon counts by its content."""
    if spec is not None and spec.startswith("lexicon:") and Path(spec.removeprefix("lexicon:")).is_file():
        return f"lexicon:{sha256_file(Path(spec.removeprefix('lexicon:')))}"
    return spec
