"""The last stage: put everything a run measured into ``summary.json``, ``report.json`` and ``report.html``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from safeglasses.data.examples import Examples
from safeglasses.defend.adapters import TENSORS
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.table import NEURONS
from safeglasses.defend.vectors import VECTORS
from safeglasses.files import sha256_file
from safeglasses.find.evidence import Evidence
from safeglasses.find.selection import Selection
from safeglasses.measure.disputes import agreement_of, verdicts_in
from safeglasses.measure.measurement import Measurement
from safeglasses.measure.rows import Answer
from safeglasses.measure.search import Candidate, Search
from safeglasses.measure.verdicts import Verdict
from safeglasses.model.vlm import VLM
from safeglasses.report import record as r
from safeglasses.report.counts import heat_map, histogram, telling
from safeglasses.report.interpret import prompt_text, thumbnails, top_neurons
from safeglasses.report.snippets import usage

SHOWN_RESPONSES = 80
SHOWN_DISPUTES = 40
NOT_VERIFIED = (
    "Another run with another seed was not made here; --seed changes sampling, search and calibration.",
    "Whether the glasses hold in a quantised copy of the model was not measured.",
)


def experts(evidence: Evidence, glasses: Glasses, search: Search | None) -> Selection:
    """Return the neurons that the evidence selected: the calibrated rule's, else all that the recipe changed."""
    if search is None:
        changed = {site: row != 1 for site, row in glasses.factors.items()}
        none = {site: torch.zeros(rows.shape[1], dtype=torch.bool) for site, rows in evidence.auroc.items()}
        return Selection(none | changed)
    rule = search.rule
    selected = (rule.gain > 0).any(dim=1)
    return Selection({s: row[:w] for s, row, w in zip(rule.sites, selected, rule.widths, strict=True)})


def trade_off(search: Search | None) -> r.TradeOff | None:
    """Draw up the candidates of a calibration."""
    if search is None:
        return None
    base = search.base

    def lost(figures: Mapping[str, float]) -> float | None:
        falls = [base[k] - v for k, v in figures.items() if k.startswith("utility:")]
        return max(falls) if falls else None

    trials = [
        r.Trial(
            name=_named(c, on_front=search.front is not None),
            harm=c.figures["harmful"],
            utility_lost=lost(c.figures),
            kl=c.figures["training_kl"],
            score=c.score,
            damage=c.figures.get("damage"),
            errors=(c.figures["harmful_error"], c.figures["damage_error"]) if "damage" in c.figures else None,
        )
        for c in search.candidates
    ]
    taken = search.taken
    return r.TradeOff(
        tuple(trials), taken.index, taken.rule, base_harm=base["harmful"], limit=taken.limit, missed=taken.missed
    )


def _named(candidate: Candidate, *, on_front: bool) -> str:
    choice = candidate.choice
    if on_front:
        return f"point {candidate.round + 1} of the front, β {choice.beta:g}"
    return (
        f"trial {candidate.trial + 1}, round {candidate.round + 1}: {' + '.join(choice.pools)}, "
        f"AUROC > {choice.threshold:g}, β {choice.beta:g}, {candidate.share:.0%} worn"
    )


def chosen(search: Search) -> dict[str, Any]:
    """Say for ``summary.json`` which candidate was taken, by what rule, and what the calibrate split says of it."""
    names = ("harmful", "harmful_error", "damage", "damage_error")
    figures = {name: search.best.figures[name] for name in names}
    taken = search.taken
    return {
        "rule": taken.rule,
        "harm_limit": taken.limit,
        "missed": taken.missed,
        "beta": search.best.choice.beta,
        "candidates": len(search.candidates),
        "held_out": figures,
    }


def about_categories(before: Measurement, after: Measurement, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Compare harm by category where glasses were made for some only; the others show how specific they are."""
    if not wanted:
        return []
    found = []
    for old, new in zip(*(m.groups("sampled", ("category",)) for m in (before, after)), strict=True):
        if old.harmful_rate is not None and new.harmful_rate is not None:
            name = old.values["category"]
            rates = {"none": old.harmful_rate.to_json(), "glasses": new.harmful_rate.to_json()}
            found.append({"category": name or "", "meant": name in wanted, **rates})
    return sorted(found, key=lambda record: not record["meant"])


def side_by_side(before: Measurement, after: Measurement, decoding: str) -> tuple[r.SideBySide, ...]:
    """Pair the answers to eliciting prompts; all that broke first, then a spread of the rest."""
    pairs = [_pair(a, b, decoding) for a, b in zip(before.eliciting(decoding), after.eliciting(decoding), strict=True)]
    broken = [p for p in pairs if p.status == "broken"]
    harmful = [p for p in pairs if p.status == "unchanged" and p.after.harmful]
    rest = [p for p in pairs if p.status == "fixed"]
    quiet = [p for p in pairs if p.status == "unchanged" and not p.after.harmful]
    chosen = [*broken[:20], *harmful[:20]]
    room = SHOWN_RESPONSES - len(chosen)
    return tuple(chosen + _spread(rest, room * 3 // 4) + _spread(quiet, room // 4))


def _spread(items: Sequence[r.SideBySide], k: int) -> list[r.SideBySide]:
    if len(items) <= k:
        return list(items)
    return [items[i * len(items) // k] for i in range(k)]


def _pair(before: Answer, after: Answer, decoding: str) -> r.SideBySide:
    example = before.example
    tags = (example.condition, example.language, example.category, decoding)
    return r.SideBySide(
        id=example.id,
        prompt=prompt_text(example),
        before=_answer(before),
        after=_answer(after),
        pictures=thumbnails(example),
        tags=tuple(t for t in tags if t),
    )


def disputes(measurements: Sequence[Measurement], decoding: str) -> tuple[r.Dispute, ...]:
    """Gather the answers that judges differ about, as many of each measurement, the widest gap first."""
    found = []
    for measurement in measurements:
        agreed = agreement_of(measurement, decoding)
        answers = measurement.eliciting(decoding)
        for item in agreed.disagreements[: SHOWN_DISPUTES // len(measurements)] if agreed else ():
            answer = answers[item.index]
            verdicts = verdicts_in(measurement, answer)
            scores = [v.score for v in verdicts.values() if v.score is not None]
            found.append((min(scores) - max(scores), _dispute(answer, verdicts, measurement.defence, decoding)))
    return tuple(dispute for _, dispute in sorted(found, key=lambda pair: pair[0]))


def _dispute(answer: Answer, verdicts: Mapping[str, Verdict], defence: str, decoding: str) -> r.Dispute:
    example = answer.example
    worn = "with glasses" if defence == "glasses" else "without glasses"
    tags = (worn, example.condition, example.language, example.category, decoding)
    return r.Dispute(
        id=example.id,
        prompt=prompt_text(example),
        text=answer.text,
        said=tuple(r.Said(name, v.harmful, v.score, v.reason) for name, v in verdicts.items()),
        pictures=thumbnails(example),
        tags=tuple(t for t in tags if t),
    )


def _answer(answer: Answer) -> r.Answer:
    verdict = answer.verdict
    return r.Answer(answer.text, verdict.harmful if verdict else None, verdict.reason if verdict else "")


def report_data(
    vlm: VLM,
    examples: Examples,
    evidence: Evidence,
    glasses: Glasses,
    search: Search | None,
    measurements: Mapping[str, Measurement],
    summary: Mapping[str, Any],
    *,
    missing: Mapping[str, str],
    under: str = "",
) -> r.ReportData:
    """Gather everything on the page.

    Args:
        vlm: the untouched model.
        examples: the find split, for what fires the top neurons.
        evidence: AUROC per neuron.
        glasses: what was fitted.
        search: the calibration, if there was one.
        measurements: per defence, with ``none`` and ``glasses`` among them.
        summary: the run's summary.
        missing: defences that could not be measured, and why.
        under: what stood at the input in every row.
    """
    before, after = measurements["none"], measurements["glasses"]
    decoding = "sampled"
    notes = {"every row": f"answered with {under} at the input; so “without glasses” is that alone"} if under else {}
    notes |= {f"row “{name}”": f"not measured: {why}" for name, why in missing.items()}
    return r.ReportData(
        summary=summary,
        heat=heat_map(experts(evidence, glasses, search), glasses.effective()),
        histograms=tuple(histogram(evidence, row) for row in telling(evidence)),
        trade_off=trade_off(search),
        neurons=tuple(top_neurons(vlm, glasses, evidence, examples)),
        responses=side_by_side(before, after, decoding),
        responses_of=len(before.eliciting(decoding)),
        judge=before.judge,
        disputes=disputes((before, after), decoding),
        snippets=usage(vlm.source, "glasses", multimodal=vlm.is_multimodal, peft=glasses.loads_in_peft),
        not_verified=NOT_VERIFIED,
        notes=notes,
    )


def hashes(folder: Path) -> dict[str, str]:
    """Hash what a run leaves for others to use."""
    glasses = (f"glasses/{name}" for name in (TENSORS, VECTORS, NEURONS) if (folder / "glasses" / name).exists())
    return {name: sha256_file(folder / name) for name in ("evidence.safetensors", *glasses)}
