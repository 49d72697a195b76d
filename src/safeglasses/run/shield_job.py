"""The stages of a run of `shield`, each resumable from its file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from safeglasses.data.examples import Example
from safeglasses.data.probes import Cell
from safeglasses.defend.defence import Defence
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import SafeglassesError
from safeglasses.files import read_json
from safeglasses.find.contrast import FILE, Contrast
from safeglasses.find.contrasting import measure_contrast
from safeglasses.find.overlap import atlas_of
from safeglasses.find.rules import Rule
from safeglasses.find.selection import Selection
from safeglasses.measure.measurement import Measurement, measure
from safeglasses.measure.respond import Decoding
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.progress import Progress
from safeglasses.run.folder import RunFolder
from safeglasses.run.hardening import defended, treatments
from safeglasses.run.shield_data import ShieldData
from safeglasses.run.shield_plan import ShieldPlan, left_out
from safeglasses.run.shield_summary import choice_of, gates_of, rows_of, transfer_of, verdict
from safeglasses.tune.amplify import amplify
from safeglasses.tune.counting import Counts, count
from safeglasses.tune.shield import Shield
from safeglasses.tune.training import tune

SCHEMA = 1


@dataclass(frozen=True)
class Job:
    """The stages of one run, each resumable from its file."""

    vlm: VLM
    data: ShieldData
    plan: ShieldPlan
    rule: Rule
    sites: tuple[Site, ...] | None
    """Where neurons are looked for; None: wherever they can be."""
    folder: RunFolder
    seed: int
    batch_size: int | str
    show: Progress

    def check_base(self) -> None:
        """Refuse to go on with a model that changed since the run began."""
        known = self.folder.once("fingerprint.json", self.vlm.fingerprint)
        if known != self.vlm.fingerprint():
            raise SafeglassesError(
                "the model changed since this run began",
                given=self.vlm.fingerprint(),
                expected=known,
                do="start a new run with another --out, or use --overwrite",
            )

    def contrast(self) -> Contrast:
        """Find safety neurons in every cell, and say how sure that is."""
        path = self.folder.path / FILE
        if path.exists():
            return Contrast.load(path)
        with self.folder.timed("find"), self.show.stage("find safety neurons") as advance:
            found = measure_contrast(
                self.vlm,
                self.data.found,
                rules=(self.rule,),
                tokens=self.plan.tokens,
                sites=self.sites,
                seed=self.seed,
                progress=advance,
            )
        found.save(path)
        return found

    def completed(self) -> "Job":
        """Let the untouched model answer harmless rows of the find split that bring no answer."""
        if not self.data.unanswered:
            return self
        own = self.measured("own harmless answers", None, self.data.unanswered)
        texts = {a.example.id: a.text for a in own.answers[next(iter(own.answers))]}
        return replace(self, data=self.data.answered(texts))

    def arms(self, neurons: Selection) -> tuple[dict[str, Shield | Glasses], dict[str, Measurement], dict[str, int]]:
        """Tune the neurons, random ones and plain LoRA, and let each answer the test split."""
        rows = self.data.training()
        made: dict[str, Shield | Glasses] = {"shield": self.tuned("shield", neurons, rows, self.plan.mode)}
        seeds = {f"random-{i}": self.seed + i for i in range(self.plan.controls)}
        for name, seed in seeds.items():
            made[name] = self.tuned(name, neurons.matched(seed), rows, self.plan.mode, seed=seed)
        if self.plan.mode != "amplify":
            made["lora"] = self.tuned("lora", neurons, rows, "plain")
        measured = {"none": self.measured("none", None)}
        measured |= {name: self.measured(name, defence) for name, defence in made.items()}
        return made, measured, seeds

    def tuned(
        self,
        name: str,
        neurons: Selection,
        rows: Sequence[Example],
        mode: Any,
        *,
        seed: int | None = None,
        steps: int | None = None,
    ) -> Shield | Glasses:
        """Tune once, or read what an earlier run tuned."""
        home = self.folder.path / name if name == "shield" else self.folder.path / "controls" / name
        home.parent.mkdir(exist_ok=True)
        with self.folder.timed("tune"):
            if mode == "amplify":
                return self._amplified(name, neurons, home)
            config = replace(self.plan.tune, seed=self.seed if seed is None else seed)
            if steps is not None or any(site.fused for site in neurons.masks):  # few prompts, or few for each expert
                config = replace(config, max_steps=steps or config.max_steps, empty_layers="skip")
            if mode == "freeze":
                rows = self._preferences(rows)
            self.show.say(f"tune: {name}")
            return tune(self.vlm, neurons, rows, mode=mode, config=config, out=home, progress=self.show)

    def _amplified(self, name: str, neurons: Selection, home: Path) -> Glasses:
        if home.exists():
            return Glasses.load(home)
        rows = self.data.calibrate
        if not rows:
            raise SafeglassesError(
                "amplify chooses its gain on the calibrate split, which the probe lacks",
                expected='rows with "split": "calibrate"',
            )

        def score(glasses: Glasses) -> float:
            found = self.measured(f"{name}-calibrate", glasses, rows, journal=False).rows[0]
            refused = found.refusal_on_benign.value if found.refusal_on_benign else 0.0
            return -(found.harmful_rate.value if found.harmful_rate else 0.0) - refused

        with self.show.stage(f"choose the gain: {name}"):
            glasses = amplify(self.vlm, neurons, score)
            glasses.save(home, self.vlm)
        return glasses

    def _preferences(self, rows: Sequence[Example]) -> list[Example]:
        """Pair every target with the model's own answer where that is what should not be said."""
        own = self.measured("own answers", None, [r for r in rows if r.is_toxic])
        answers = own.answers[next(iter(own.answers))]
        bad = {a.example.id: a.text for a in answers if a.verdict is not None and a.verdict.harmful}
        pairs = []
        for row in rows:
            if row.id in bad:
                pairs.append(replace(row, id=f"{row.id}-chosen", label="non-toxic", pair_id=row.id))
                pairs.append(replace(row, id=f"{row.id}-rejected", label="toxic", pair_id=row.id, response=bad[row.id]))
        if not pairs:
            raise SafeglassesError(
                "the model complied with none of the probe's harmful requests: there is no answer to prefer another to",
                given=f"{len(answers)} requests",
                do="use another mode, or requests that it complies with",
            )
        return pairs

    def measured(
        self,
        name: str,
        defence: Defence | None,
        rows: Sequence[Example] | None = None,
        *,
        vlm: VLM | None = None,
        journal: bool = True,
    ) -> Measurement:
        """Answer prompts greedily; the test split where no rows are given."""
        asked = self.data.measured if rows is None else rows
        decoding = Decoding("greedy", temperature=0.0, max_new_tokens=self.data.max_new_tokens, seed=self.seed)
        with self.folder.timed("measure"), self.show.stage(f"answer: {name}", len(asked)) as advance:
            return measure(
                vlm or self.vlm,
                asked,
                self.data.judge,
                glasses=defence,
                name=name,
                decodings=(decoding,),
                refusals=self.data.refusals,
                journal_dir=self.folder.path / "responses" if journal else None,
                batch_size=self.batch_size,
                progress=advance,
            )

    def hardened(self, made: Mapping[str, Shield | Glasses], neurons: Selection) -> list[dict[str, Any]]:
        """Treat copies of the defended model, and count attack success again."""
        found = []
        ordinary = self.data.ordinary or tuple(e for e in self.data.training() if not e.is_toxic)
        for treatment, treat in treatments(neurons, ordinary, self.plan.tune).items():
            for name in ("none", "shield", "lora"):
                worn = made.get(name)
                if name == "none" or isinstance(worn, Shield):
                    found.append(self._treated(name, treatment, treat, worn if isinstance(worn, Shield) else None))
        return found

    def _treated(self, name: str, treatment: str, treat: Callable[[VLM], None], worn: Shield | None) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            with self.show.stage(f"{treatment}: {name}"):
                twin = defended(self.vlm, worn)
                treat(twin)
            after = self.measured(f"{name}-{treatment.replace(' ', '-')}", None, self.data.harmful, vlm=twin)
            return {"defence": name, "treatment": treatment, "asr": rows_of(name, after)[0]["asr"]}

        home = self.folder.path / "treated"
        home.mkdir(exist_ok=True)
        return self.folder.once(f"treated/{name}-{treatment.replace(' ', '-')}.json", run)

    def transfer(self, contrast: Contrast, before: Measurement) -> list[dict[str, Any]]:
        """Tune on one cell's data, test on all."""
        if self.plan.transfer == "none" or self.plan.mode == "amplify":
            return []
        found = []
        steps = self.plan.tune.max_steps or self._steps(len(self.data.training()))
        for where, what in self._sources(contrast):
            neurons = reduce(or_, [contrast.neurons(cell) for cell in self._cells(contrast, where)])
            if not len(neurons):
                self.show.say(f"no transfer from {where}: no neuron was found there")
                continue
            cells = self._cells(contrast, what)
            name = f"{where}+{what}".replace("/", "-")
            made = self.tuned(name, neurons, self.data.training(cells), self.plan.mode, steps=steps)
            after = self.measured(name, made, self.data.harmful)
            seen = {str(cell) for cell in (*cells, *self._cells(contrast, where))}
            found += transfer_of(before, after, found_on=where, tuned_on=what, seen=seen)
        return found

    def _sources(self, contrast: Contrast) -> list[tuple[str, str]]:
        """Return where neurons are found and whose data they are tuned with: cells, or languages with all of theirs."""
        languages = contrast.languages
        anchor = "en" if "en" in languages else languages[0]
        text = next((str(c) for c in contrast.cells if c == Cell(anchor, "text-dominant")), anchor)
        if self.plan.transfer == "zero-shot":
            return [(text, text), (anchor, anchor)]
        ends = dict.fromkeys((anchor, languages[-1]))
        places = [text, *(str(c) for c in contrast.cells if c.language in ends and str(c) != text)]
        return [(a, b) for a in places for b in places] + [(language, language) for language in ends]

    @staticmethod
    def _cells(contrast: Contrast, name: str) -> list[Cell]:
        return [cell for cell in contrast.cells if name in (str(cell), cell.language)]

    def _steps(self, rows: int) -> int:
        """How many optimiser steps the shield itself takes: no source gets fewer for having fewer rows."""
        return max(1, round(self.plan.tune.epochs * rows / self.plan.tune.batch))

    def summary(
        self,
        contrast: Contrast,
        neurons: Selection,
        made: Mapping[str, Shield | Glasses],
        measured: Mapping[str, Measurement],
        seeds: Mapping[str, int],
    ) -> dict[str, Any]:
        """Put ``summary.json`` together; measures what is left to measure."""
        rows = rows_of("none", measured["none"]) + rows_of("shield", measured["shield"])
        for name, seed in seeds.items():
            rows += rows_of("random-neurons", measured[name], seed)
        if "lora" in measured:
            rows += rows_of("lora", measured["lora"])
        counts = {name: _counts(self.vlm, made[name], neurons).record() for name in ("shield", "lora") if name in made}
        atlas = atlas_of(contrast) if len(contrast.cells) > 1 else None
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "shield",
            "model": self.vlm.source,
            "base_fingerprint": self.vlm.fingerprint(),
            "mode": self.plan.mode,
            "rule": self.rule.record(),
            "tokens": self.plan.tokens,
            "judge": self.data.judge.name,
            "languages": list(self.data.found.languages),
            "parameters": counts["shield"],
            "parameters_of_controls": {name: value for name, value in counts.items() if name != "shield"},
            "certainty": {name: dict(value) for name, value in contrast.certainty[self.rule.name].items()},
            "left_out": left_out(self.vlm, self.sites),
            "overlap": None if atlas is None else {"summary": atlas.summary(), **atlas.record()},
            "rows": rows,
            "choice": choice_of(measured, list(seeds), rows),
            "gates": gates_of(rows),
            "robustness": self.hardened(made, neurons) if self.plan.robustness else [],
            "transfer": self.transfer(contrast, measured["none"]),
            "rows_used": {"find": len(self.data.found.examples), "tune": len(self.data.training())},
            "seconds": self.folder.seconds(),
            "seeds": {"shield": self.seed, "random-neurons": list(seeds.values())},
            "versions": read_json(self.folder.path / "environment.json")["versions"],
            "command": read_json(self.folder.path / "environment.json")["command"],
        }
        return {**found, "verdict": verdict(found)}


def _counts(vlm: VLM, made: Shield | Glasses, neurons: Selection) -> Counts:
    if isinstance(made, Shield):
        return made.counts
    counted = count(vlm.model, neurons, mode="rows")
    return replace(counted, optimiser_parameters=0)  # nothing was trained
