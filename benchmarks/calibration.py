"""Calibration by gradient against searches of equal budget: which glasses lie on the front of harm and damage?

Every seed draws a benchmark of the miniature of its own (other scenes, wordings and answers), measures the evidence
once, and gives every method the same seconds of processor time on one thread; on a quiet core that is wall time. A
method hands over at most six glasses that it believes to be on the front, by the calibrate split. They are then
measured on the test split, sampled at temperature 1, which no method has seen, and compared by hypervolume: the share
of the rectangle up to the untouched model's harm and 10 points of damage that they dominate.

    python benchmarks/calibration.py --processes 2       # 40 minutes of processor time; goes on where it was killed
    python benchmarks/calibration.py --pilot             # how the searches' settings were chosen; no test split
    python benchmarks/calibration.py --quick             # three minutes, figures without meaning
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from calibration_figures import GAPS, compared, printed
from calibration_plot import drawing
from calibrators import (
    BETAS,
    DAMAGE,
    EFFORT,
    KEPT,
    STRENGTHS,
    Found,
    Ground,
    Meter,
    Offer,
    calibration,
    prompts_of,
    uniform,
)
from hypervolume import hypervolume
from machine import others_share, record
from optuna.samplers import RandomSampler, TPESampler
from searchers import Plan, searching

from safeglasses.data.miniature import CHECKPOINT
from safeglasses.data.miniature.benchmark import write_benchmark
from safeglasses.defend.factors import Factors
from safeglasses.defend.recipes import RECIPES
from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_folder, atomic_write_text, read_json, write_json
from safeglasses.find.evidence import Evidence
from safeglasses.find.finding import measure_evidence
from safeglasses.measure.calibrate import Keep
from safeglasses.measure.judges import judge_from
from safeglasses.model.hooks import scaled
from safeglasses.model.vlm import VLM, load
from safeglasses.run.inputs import read_inputs

SEEDS = (11, 12, 13, 14, 15)
PILOT_SEEDS = (101, 102)
"""Other draws than those that count."""
REFERENCES = {"damage": DAMAGE, "kl": 0.1}
"""Where the rectangle ends: 10 points of damage, or 0.1 nats per token; in harm at the untouched model's."""
GAP_PROMPTS = 700
"""On which the picked glasses are measured again."""
PLAN = Plan()
"""Of both searches: what did best in the pilot."""
PILOT: dict[str, Plan] = {
    "kinds": Plan(),
    "kinds, 200 prompts": Plan(prompts=200),
    "kinds and layers, to 3": Plan("kinds and layers", high=3.0),
    "kinds, AurA's neurons": Plan(rules=("AurA",)),
    "kinds, with finals": Plan(finals=200, share=0.7),
    "kinds, not told of uniform rules": Plan(told=False),
    "kinds and terms, two-sided": Plan("kinds and terms", ("two-sided",)),
    "groups, two-sided": Plan("groups", ("two-sided",), high=1.0),
}
Method = Callable[[Ground, float], Found]


def tpe(seed: int) -> TPESampler:
    """Multi-objective TPE, its numbers modelled together."""
    return TPESampler(seed=seed, multivariate=True, n_startup_trials=15)


def at_random(seed: int) -> RandomSampler:
    """Random search."""
    return RandomSampler(seed=seed)


OURS = "calibration"
METHODS: dict[str, Method] = {
    OURS: calibration,
    "TPE": partial(searching, plan=PLAN, sampler=tpe),
    "random search": partial(searching, plan=PLAN, sampler=at_random),
    "uniform AurA": partial(uniform, recipe=RECIPES["aura"]),
    "uniform AurA, all maps": partial(uniform, recipe=replace(RECIPES["aura"], name="aura-linears", sites="linears")),
}
TRIED: dict[str, Method] = {name: partial(searching, plan=plan, sampler=tpe) for name, plan in PILOT.items()}


@dataclass(frozen=True)
class Job:
    """What is compared, and where it lies."""

    seconds: float
    """Processor time per method and seed."""
    prompts: int
    """Test prompts per glasses."""
    judged: Literal["test", "calibrate"]
    """Split on which glasses are compared; calibrate in a pilot."""
    work: Path
    """Where finished parts are kept."""

    def run(self, seed: int, methods: Sequence[str]) -> dict[str, Any]:
        """Run and measure all methods on one draw, or read what a killed run has left."""
        torch.set_num_threads(1)
        folder = self.work / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        vlm = load(CHECKPOINT)
        ground = ground_of(vlm, seed, folder)
        meter = Meter(ground, prompts_of(ground, self.judged, self.prompts, 4), 4)
        results = {}
        for name in methods:
            path = folder / f"{name}.json"
            if not path.exists():
                write_json(path, self._judged(meter, (METHODS | TRIED)[name](ground, self.seconds)))
            results[name] = read_json(path)
            print(f"seed {seed}, {name}: {results[name]['hypervolume']:.3f}", flush=True)
        return {"seed": seed, "methods": results}

    def _judged(self, meter: Meter, found: Found) -> dict[str, Any]:
        """Measure what a method handed over where it has not looked."""
        keep = Keep(meter.ground.vlm, [e for e in meter.prompts if e.label == "non-toxic"], 32)
        points = [
            {
                "label": offer.label,
                "calibrate": told(offer.figures),
                "judged": meter.figures(offer.factors) | {"kl": divergence(meter.ground.vlm, keep, offer.factors)},
            }
            for offer in found.offers
        ]
        corner = meter.harmful
        areas = {
            kind: hypervolume([(p["judged"]["harmful"], p["judged"][kind]) for p in points], (corner, reference))
            for kind, reference in REFERENCES.items()
        }
        record = {"tried": found.tried, "seconds": found.seconds, "untouched": corner, "points": points}
        record |= {"hypervolume": areas["damage"], "hypervolume_kl": areas["kl"]}
        return record if found.pick is None else record | {"gap": self._gap(meter, found.pick)}

    def _gap(self, meter: Meter, pick: Offer) -> dict[str, Any]:
        """Compare what calibration promises of the glasses that it would pick with what more prompts say."""
        more = Meter(meter.ground, prompts_of(meter.ground, self.judged, GAP_PROMPTS, 5), 5)
        seen = more.figures(pick.factors)
        gap = {kind: seen[kind] - pick.figures[kind] for kind in GAPS}
        return {"label": pick.label, "calibrate": told(pick.figures), "judged": seen, **gap}


def told(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures that all methods have."""
    return {name: figures[name] for name in ("harmful", "harmful_error", "damage", "damage_error")}


@torch.no_grad()
def divergence(vlm: VLM, keep: Keep, factors: Factors) -> float:
    """KL(base ‖ worn) along the reference responses of benign prompts, nats per token."""
    tokens = [len(base.token_log_probs) for base in keep.base]
    with scaled(vlm.model, vlm.anatomy, factors):
        return sum(keep.kl(vlm, i).item() * n for i, n in enumerate(tokens)) / sum(tokens)


def ground_of(vlm: VLM, seed: int, folder: Path) -> Ground:
    """Draw a benchmark and measure its evidence, once."""
    if not (folder / "benchmark").exists():
        with atomic_folder(folder / "benchmark") as new:
            write_benchmark(new, seed=seed)
    files = folder / "benchmark"
    judge, refusals = (judge_from(f"lexicon:{files / name}") for name in ("lexicon.txt", "refusals.txt"))
    pairs, prompts = files / "pairs.jsonl", files / "prompts.jsonl"
    data = read_inputs(vlm, pairs, prompts, (judge,), refusals, limit=None, skip_bad=False)
    path = folder / "evidence.safetensors"
    if not path.exists():
        pools = tuple(dict.fromkeys(p for name in ("aura", "sgm-calibrated") for p in RECIPES[name].pools))
        find, again = data.pairs.split("find"), data.pairs.split("calibrate")
        measure_evidence(vlm, find, again, sites=vlm.anatomy.sites("linears"), pools=pools).save(path)
    evidence = Evidence.load(path)
    return Ground(vlm, evidence, data.pairs, data.prompts, judge, refusals, data.max_new_tokens, seed, folder)


def begin(work: Path, setting: Mapping[str, Any]) -> None:
    """Keep finished parts of runs with other settings apart.

    Raises:
        SafeglassesError: the folder holds parts of another run.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / "setting.json"
    if not path.exists():
        write_json(path, setting)
    if read_json(path) != setting:
        raise SafeglassesError(
            "the folder holds parts of a run with other settings",
            given=f"{work}: {read_json(path)}",
            expected=str(setting),
            do="give another --work, or delete that folder",
        )


def main() -> None:
    """Run what is not there yet, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="processor time per method and seed")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"draws; by default {' '.join(map(str, SEEDS))}")
    parser.add_argument("--prompts", type=int, default=300, help="test prompts that glasses are compared on")
    parser.add_argument("--processes", type=int, default=1, help="seeds at once, a thread each")
    parser.add_argument("--pilot", action="store_true", help="compare settings of the searches, on the calibrate split")
    parser.add_argument("--methods", nargs="+", choices=(OURS, *TRIED), help="only these of a pilot")
    parser.add_argument("--quick", action="store_true", help="one seed and a few seconds")
    parser.add_argument("--work", type=Path, default=Path("runs/calibration"), help="where finished parts are kept")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--plot", type=Path, help="where to draw")
    args = parser.parse_args()
    if args.methods and not args.pilot:
        parser.error("--methods chooses among a pilot's; without --pilot all are compared")
    seeds, seconds, prompts = args.seeds or (PILOT_SEEDS if args.pilot else SEEDS), args.seconds, args.prompts
    if args.quick:
        seeds, seconds, prompts = seeds[:1], 10.0, 60
    methods = args.methods or [OURS, *TRIED] if args.pilot else list(METHODS)
    job = Job(seconds, prompts, "calibrate" if args.pilot or args.quick else "test", args.work)
    setting = {"seconds": seconds, "prompts": prompts, "judged": job.judged, "kept": KEPT, "references": REFERENCES}
    setting |= {"effort": asdict(EFFORT), "betas": BETAS, "strengths": STRENGTHS, "plan": asdict(PLAN)}
    begin(args.work, json.loads(json.dumps(setting)))
    share = others_share()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        found = pool.starmap(job.run, [(seed, methods) for seed in seeds], chunksize=1)
    summary = compared(found, methods, OURS)
    print(printed(summary))
    if args.out is not None:
        head = record("calibration", ("optuna", "transformers"), **setting, seeds=list(seeds), threads=1)
        write_json(args.out, {**head, "others_share": share(), "summary": summary, "runs": found})
    if args.plot is not None:
        atomic_write_text(args.plot, drawing(found, methods, DAMAGE))


if __name__ == "__main__":
    main()
