"""The stages of one run, in order, each resumable from its file."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safeglasses.data.categories import by_category
from safeglasses.data.examples import Example, Examples
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.recipes import RECIPES, Recipe, apply
from safeglasses.errors import SafeglassesError, TooWeak
from safeglasses.files import read_json
from safeglasses.find.evidence import Evidence
from safeglasses.find.finding import measure_evidence, setup_for
from safeglasses.find.pools import Pool
from safeglasses.measure.calibrate import Effort
from safeglasses.measure.contrasts import calibration_data
from safeglasses.measure.disputes import agreement_records
from safeglasses.measure.measurement import Measurement, measure
from safeglasses.measure.respond import Decoding
from safeglasses.measure.search import Calibration, Search
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.progress import Advance, Progress
from safeglasses.report.summary import build_summary
from safeglasses.run.budget import Plan, parse_budget, plan_for
from safeglasses.run.calibrating import Wanted, save_points
from safeglasses.run.folder import RunFolder
from safeglasses.run.inputs import Inputs
from safeglasses.run.proof import about_categories, chosen, experts, hashes
from safeglasses.ship.answers import make_answers
from safeglasses.ship.known import KNOWN


@dataclass(frozen=True)
class Job:
    """One run: what goes in, and the stages that make files of it."""

    vlm: VLM
    """The untouched model."""
    data: Inputs
    """The user's data and judges."""
    recipe: Recipe
    """How glasses are made."""
    folder: RunFolder
    """Where results lie, and from where they are taken when they are there."""
    seed: int
    """Of sampling, search and calibration."""
    batch_size: int | str
    """Rows per forward pass, or ``auto``."""
    show: Progress
    """Where progress is shown."""
    wanted: Wanted = field(default_factory=Wanted)
    """What calibration is asked for."""

    def evidence(self) -> Evidence:
        """Capture once for every recipe that will be measured."""
        recipes = self._recipes().values()
        pools = tuple(dict.fromkeys(p for r in recipes for p in r.pools))
        return self._captured("evidence.safetensors", self.data.pairs, pools, "find expert neurons")

    def by_category(self) -> dict[str, Evidence] | None:
        """Capture once more for every category of harm, if the recipe asks for it."""
        if not self.recipe.by_category:
            return None
        found = {}
        for number, (name, pairs) in enumerate(by_category(self.data.pairs).items()):
            file = f"evidence-by-category/{number:02d}.safetensors"  # a name is data, and no path
            found[name] = self._captured(file, pairs, self.recipe.pools, f"find expert neurons of “{name}”")
        self.folder.once("evidence-by-category/categories.json", lambda: list(found))
        return found

    def _captured(self, file: str, pairs: Examples, pools: Sequence[Pool], what: str) -> Evidence:
        path = self.folder.path / file
        if path.exists():
            return Evidence.load(path)
        find, held_out = pairs.split("find"), pairs.split("calibrate")
        total = len(find) + len(held_out)
        where = {"sites": self._sites(), "pools": tuple(pools)}
        shards = self.folder.path / "shards"
        setup = setup_for(
            self.vlm,
            max(len(find), len(held_out)),
            **where,
            folder=shards,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        with self.show.stage(what, total) as advance:
            evidence = measure_evidence(
                self.vlm,
                find,
                held_out if _both_classes(held_out) else None,
                **where,
                setup=setup,
                progress=advance,
                timed=self.folder.timed,
            )
            evidence.save(path)
        shutil.rmtree(shards, ignore_errors=True)
        return evidence

    def glasses(self, evidence: Evidence, budget: str | None) -> tuple[Glasses, Search | None]:
        """Apply the recipe; calibrate when it says so."""
        path = self.folder.path / "glasses"
        if self.recipe.rule != "calibrated":
            glasses = apply(self.recipe, evidence, anatomy=self.vlm.anatomy)
            self._save(glasses, path)
            return glasses, None
        plan = self._plan(budget)
        categories = self.by_category()
        with self.folder.timed("calibrate"), self.show.stage("calibrate", self.wanted.steps(plan)) as advance:
            glasses, search = self._calibrated(evidence, categories, plan, advance)
        if search.taken.missed:
            self.show.say(f"LIMIT NOT REACHED: {search.taken.missed}")
        self._save(glasses, path)
        return glasses, search

    def _calibrated(
        self, evidence: Evidence, categories: Mapping[str, Evidence] | None, plan: Plan, advance: Advance
    ) -> tuple[Glasses, Search]:
        total = self.wanted.steps(plan)
        done = iter(range(1, total + 1))
        calibration = Calibration(
            self.vlm,
            evidence,
            calibration_data(self.data.lessons, self.data.prompts),
            self.data.judge,
            recipe=self.recipe,
            effort=plan.effort,
            folder=self.folder.path / "calibration",
            refusals=self.data.refusals,
            seed=self.seed,
            max_new_tokens=self.data.max_new_tokens,
            on_step=lambda: advance(next(done), total),
            asked=self.wanted.under,
            categories=categories,
        )
        if self.wanted.front is None:
            search = calibration.search(plan.trials, harm=self.wanted.harm)
        else:
            front = calibration.front(self.wanted.front)
            save_points(front, self.folder.path / "front", self.vlm, self.show, self.wanted)
            search = calibration.on_front(front, harm=self.wanted.harm)
        glasses = calibration.glasses(search)
        return replace(glasses, notes={**glasses.notes, **self.wanted.notes()}), search

    def _save(self, glasses: Glasses, path: Path) -> None:
        """Write the glasses, and what will prove that they are worn."""
        if not path.exists():
            glasses.save(path, self.vlm)
        if (path / KNOWN).exists():
            return
        with self.show.stage("known answers"):
            try:
                make_answers(self.vlm, glasses).save(path)
            except TooWeak as error:  # whoever measures them should still see by how much
                self.show.say(f"{error.what}: `safeglasses verify` will have nothing to go by")

    def measure(self, evidence: Evidence, glasses: Glasses) -> tuple[dict[str, Measurement], dict[str, str]]:
        """Answer the test prompts with and without; the only stage that reads the test split."""
        test = self.data.prompts.split("test")
        worn: dict[str, Glasses | None] = {"none": None}
        missing: dict[str, str] = {}
        for name, recipe in self._recipes().items():
            if name != "glasses":
                try:
                    worn[name] = apply(recipe, evidence, anatomy=self.vlm.anatomy)
                except SafeglassesError as error:  # a rule that selects nothing here is a finding, not a failure
                    missing[name] = error.what
        worn["glasses"] = glasses
        decodings = (
            Decoding("sampled", temperature=1.0, max_new_tokens=self.data.max_new_tokens, seed=self.seed),
            Decoding("greedy", temperature=0.0, max_new_tokens=self.data.max_new_tokens, seed=self.seed),
        )
        total = len(worn) * len(decodings) * len(test)
        results = {}
        with self.folder.timed("measure"), self.show.stage("measure on unseen prompts", total) as advance:
            for index, (name, pair) in enumerate(worn.items()):
                offset = index * len(decodings) * len(test)
                results[name] = measure(
                    self.vlm,
                    test,
                    self.data.judges,
                    glasses=pair,
                    name=name,
                    decodings=decodings,
                    refusals=self.data.refusals,
                    journal_dir=self.folder.path / "responses",
                    batch_size=self.batch_size,
                    asked=self.wanted.under,
                    progress=lambda done, _, offset=offset: advance(offset + done, total),
                )
        return results, missing

    def summary(
        self,
        evidence: Evidence,
        glasses: Glasses,
        search: Search | None,
        measurements: Mapping[str, Measurement],
    ) -> dict[str, Any]:
        """Put ``summary.json`` together."""
        before, after = measurements["none"], measurements["glasses"]
        paired = before.paired(after, "sampled").to_json()
        seconds = self.folder.seconds()
        record = read_json(self.folder.path / "environment.json")
        return build_summary(
            model=self.vlm.source,
            base_fingerprint=self.vlm.fingerprint(),
            recipe=self.recipe.name,
            n_neurons=glasses.n_neurons,
            n_experts=len(experts(evidence, glasses, search)),
            rows=[row for measurement in measurements.values() for row in measurement.to_rows()],
            paired={name: paired[name] for name in ("fixed", "broken", "p_value")},
            seconds={**seconds, "total": round(sum(seconds.values()), 2)},
            learned_scalars=search.learned_scalars if search is not None else 0,
            skipped_rows=self.data.skipped,
            confounds=evidence.confounds,
            hashes={**hashes(self.folder.path), "pairs": self.data.pairs.sha256, "prompts": self.data.prompts.sha256},
            versions=record["versions"],
            seeds={"fit": self.seed},
            command=record["command"],
            judges=before.judges,
            agreement=agreement_records((before, after)),
            calibration=None if search is None else chosen(search),
            by_category=about_categories(before, after, self.data.categories),
        )

    def _sites(self) -> tuple[Site, ...]:
        """Return what any recipe acts on; fused experts, of which there are very many, only where the user's does."""
        parts = self.vlm.anatomy
        mine = parts.sites(self.recipe.sites)
        beside = parts.sites("mlp") if any(site.fused for site in mine) else ()
        return tuple(dict.fromkeys([*parts.sites("linears"), *mine, *beside]))

    def _recipes(self) -> dict[str, Recipe]:
        """The user's recipe and the parameter-free ones that stand beside it."""
        beside = {name: RECIPES[name] for name in ("aura", "sgm") if name != self.recipe.name}
        return {**beside, "glasses": self.recipe}

    def _plan(self, budget: str | None) -> Plan:
        def make() -> dict[str, Any]:
            if budget is None:
                return asdict(Plan())
            examples = self.data.pairs.split("find").rows
            given = {"seconds": parse_budget(budget), "max_new_tokens": self.data.max_new_tokens}
            given["points"] = len(self.wanted.front or ())
            return asdict(plan_for(self.vlm, examples, **given))

        record = self.folder.once("plan.json", make)
        return Plan(record["trials"], Effort(**record["effort"]))


def _both_classes(examples: Sequence[Example]) -> bool:
    return len({e.label for e in examples}) == 2
