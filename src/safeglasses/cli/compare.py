"""``safeglasses compare``: two runs over the same prompts, answer by answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeglasses.cli import options
from safeglasses.cli.outcome import Outcome
from safeglasses.errors import SafeglassesError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from safeglasses.measure.compare import Change, Comparison
    from safeglasses.measure.items import Results
    from safeglasses.measure.paired import Difference

_SHOWN = 20  # ids, or answers, of each kind on a terminal; --json has them all


class By(Enum):
    """Properties of prompts."""

    CONDITION = "condition"
    CATEGORY = "category"
    LANGUAGE = "language"
    MODALITY = "modality"
    SOURCE = "source"


_BY = [By.CONDITION, By.CATEGORY, By.LANGUAGE]


def compare(
    run_a: Annotated[
        Path, typer.Argument(metavar="RUN_A", help="Before: results files, or the folder of a run of `fit`.")
    ],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="After; the same folder compares its defences.")],
    defence_a: Annotated[
        str | None, typer.Option("--a", help="What was worn in RUN_A.", show_default="none, or what there is")
    ] = None,
    defence_b: Annotated[
        str | None, typer.Option("--b", help="What was worn in RUN_B.", show_default="glasses, or what there is")
    ] = None,
    decoding: Annotated[
        str | None, typer.Option(help="Which answers.", show_default="sampled, or what both have")
    ] = None,
    by: Annotated[list[By] | None, typer.Option(help="Break harm down by it; may be given again.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Runs without results files: their prompts.", show_default=False)
    ] = None,
    judge: options.Judge = None,
    refusals: options.Refusals = None,
    show_answers: Annotated[
        bool, typer.Option("--show-answers", help="Print the answers that turned; some of them are harmful.")
    ] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Outcome:
    """Compare two runs over the same prompts.

    Says what was fixed and what broke, with tests and 95 % intervals for pairs, corrected over all groups.
    """
    from safeglasses.cli.progress import calm_libraries
    from safeglasses.measure.compare import compare as compare_results

    calm_libraries()
    answers = _Answers(prompts, judge, refusals)
    sides = [answers.of(run) for run in (run_a, run_b)]
    same = run_a.resolve() == run_b.resolve()
    name = decoding or _common(sides)
    before = _chosen(sides[0], run_a, defence_a or ("none" if same else None), name, "--a", last="none")
    after = _chosen(sides[1], run_b, defence_b or ("glasses" if same else None), name, "--b", last="glasses")
    found = compare_results(before, after, [one.value for one in (_BY if by is None else by)])
    return Outcome(found.to_json(texts=show_answers), lambda console: _show(console, found, show_answers))


@dataclass(frozen=True)
class _Found:
    """Answers that lie somewhere; judging them may take long."""

    defence: str
    decoding: str
    load: "Callable[[], Results]"


class _Answers:
    """Finds answers in a folder, with verdicts or to be judged."""

    def __init__(self, prompts: Path | None, judge: str | None, refusals: str | None) -> None:
        from safeglasses.measure.judges import judge_from

        self.prompts = prompts
        self._judge = None if judge is None else judge_from(judge)
        self._refusals = None if refusals is None else judge_from(refusals)

    def of(self, run: Path) -> list[_Found]:
        from safeglasses.measure.results_reading import read_results, results_in

        newest = {path.parent: path for path in (*results_in(run), *results_in(run / "results"))}
        written = [run] if run.is_file() else list(newest.values())
        if written:
            every = [results for path in written for results in read_results(path)]
            return [_Found(r.defence, r.decoding["name"], lambda r=r: self._again(r)) for r in every]
        journals = sorted((run / "responses").glob("*-*.jsonl"))
        if journals:
            return self._unjudged(run, journals)
        raise SafeglassesError(
            "no answers to compare",
            given=str(run),
            expected="results_*.json as `safeglasses measure --out` writes them, or the folder of a run of `fit`",
        )

    def _again(self, results: "Results") -> "Results":
        """Judge answers anew where a judge was named."""
        if self._judge is None and self._refusals is None:
            return results
        from safeglasses.measure.rejudging import judged_again

        return judged_again(results, self._judge, self._refusals)

    def _unjudged(self, run: Path, journals: Sequence[Path]) -> list[_Found]:
        from safeglasses.data.examples import prompts_of, read_examples
        from safeglasses.files import read_json
        from safeglasses.measure.judges import refusal_judge
        from safeglasses.measure.rejudging import read_journal

        if self.prompts is None or self._judge is None:
            raise SafeglassesError(
                "the run holds answers without verdicts",
                given=str(run),
                expected="its prompts and a judge",
                do="add --prompts FILE (or the pairs, if the run had no prompts) and --judge, as they were given to it",
            )
        examples = read_examples(self.prompts)
        record = run / "environment.json"
        if record.is_file() and read_json(record).get("inputs", {}).get("prompts", "") is None:
            examples = prompts_of(examples)
        judge, refusals = self._judge, self._refusals or refusal_judge()
        found = []
        for path in journals:
            defence, _, decoding = path.stem.rpartition("-")
            read = partial(read_journal, path, examples, judge, refusals, defence=defence)
            found.append(_Found(defence, decoding, read))
        return found


def _common(sides: Sequence[Sequence[_Found]]) -> str:
    """Return the decoding that both have, sampled if it is one of them."""
    names = [[found.decoding for found in side] for side in sides]
    both = [name for name in dict.fromkeys(names[0]) if name in names[1]]
    if not both:
        raise SafeglassesError(
            "the runs were decoded in different ways", given=" and ".join(", ".join(sorted({*n})) for n in names)
        )
    return "sampled" if "sampled" in both else both[0]


def _chosen(
    side: Sequence[_Found], run: Path, defence: str | None, decoding: str, option: str, *, last: str
) -> "Results":
    fitting = [found for found in side if found.decoding == decoding]
    names = [found.defence for found in fitting]
    wanted = defence or (last if last in names else names[0] if len(names) == 1 else None)
    if wanted not in names:
        raise SafeglassesError(
            "which answers?" if wanted is None else "no such answers",
            given=f"{run}, {wanted or 'several defences'}, {decoding}",
            expected=f"{option} " + " or ".join(sorted({*names})) if names else "another --decoding",
        )
    return fitting[names.index(wanted)].load()


def _show(console: "Console", found: "Comparison", answers: bool) -> None:
    """Print what turned, then the tables, then ids or answers."""
    from safeglasses.report.summary import p_text

    for line in (f"before: {found.before}", f"after:  {found.after}", f"judge:  {found.judge}"):
        console.print(_printable(line), markup=False, soft_wrap=True)
    if found.harm and found.paired:
        test = f"{found.paired.fixed} fixed, {found.paired.broken} broken ({p_text(found.paired.p_value)}, McNemar"
        if found.harm.clusters < found.harm.n and found.harm.p_value is not None:
            test += f"; {p_text(found.harm.p_value)} by {found.harm.clusters:,} groups of prompts that hang together"
        unscored = f"; {found.harm.unscored} unscored" if found.harm.unscored else ""
        console.print(f"{test}); {found.harm.n:,} prompts{unscored}", markup=False, soft_wrap=True)
    else:
        console.print("harm was not measured: no prompt with a verdict in both runs", markup=False, soft_wrap=True)
    console.print(_totals(found))
    if found.groups:
        console.print(_groups(found))
    for title, changes in (("fixed", found.fixed), ("broken", found.broken)):
        _list(console, title, changes, answers)


def _totals(found: "Comparison") -> "Table":
    table = _table(f"{found.n:,} answers (difference: 95 % interval, paired)", "")
    every = {**({"harmful": found.harm} if found.harm else {}), **found.changes}
    for name, change in every.items():
        table.add_row(*_cells(name, change))
    return table


def _groups(found: "Comparison") -> "Table":
    left = f"; {found.left_out} groups without a scored pair are not shown" if found.left_out else ""
    table = _table(f"harmful answers by group (p corrected over {len(found.groups)} groups: Holm){left}", "group")
    table.add_column("fixed", justify="right")
    table.add_column("broken", justify="right")
    table.add_column("p (Holm)", justify="right")
    for group in found.groups:
        name = ", ".join(f"{key} {_printable(value or '–')}" for key, value in group.values.items())
        table.add_row(
            *_cells(name, group.harm), str(group.paired.fixed), str(group.paired.broken), f"{group.p_holm:.2g}"
        )
    return table


def _table(title: str, first: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in ("n", "before", "after", "difference (points)"):
        table.add_column(name, justify="right")
    return table


def _cells(name: str, change: "Difference") -> list[str]:
    from rich.markup import escape

    share = [f"{100 * value:.1f} %" for value in (change.before, change.after)]
    interval = f"{100 * change.value:+.1f} [dim]{100 * change.low:+.1f} … {100 * change.high:+.1f}[/dim]"
    return [escape(name), f"{change.n:,}", *share, interval]


def _list(console: "Console", title: str, changes: "Sequence[Change]", answers: bool) -> None:
    """Print which prompts turned; their answers only if asked, and never raw."""
    if not changes:
        return
    more = f" (the first {_SHOWN}; --json has all)" if len(changes) > _SHOWN else ""
    console.print(f"{title}: {len(changes)}{more}", markup=False)
    for change in changes[:_SHOWN]:
        item = change.before
        kind = ", ".join(value for value in (item.condition, item.category, item.language) if value)
        sample = f" (sample {item.sample})" if item.sample else ""
        console.print(f"  {_printable(item.id)}{sample}  {_printable(kind)}", markup=False, soft_wrap=True)
        for name, side in (("before", change.before), ("after", change.after)) if answers else ():
            console.print(f"    {name}: {_printable(side.text)}", markup=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Escape what a terminal would obey or hide: control and format characters, line ends."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
