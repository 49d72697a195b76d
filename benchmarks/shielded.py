"""What a shield on fused experts costs while a model runs: worn here, loaded by PEFT alone, and folded.

Random mixtures of experts of Qwen3's making in float32, a shield of random numbers on a tenth of every expert's
neurons, rank 8. A prompt of 256 tokens, and one token as in decoding (without a cache). The conditions take turns;
ratios are medians of each round's own.

    python benchmarks/shielded.py --out benchmarks/results/shielded.json
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from machine import CLOCKS, others_share, record, take_turns
from peft import PeftModel
from routed import SHAPES, random_mixture

from safeglasses.defend.home import Home
from safeglasses.files import write_json
from safeglasses.model.vlm import VLM
from safeglasses.tune.change import Change
from safeglasses.tune.config import TuneConfig
from safeglasses.tune.counting import counts_of, evenly
from safeglasses.tune.shield import Shield
from safeglasses.tune.targets import targets_of

SHARE, RANK = 0.1, 8
LENGTHS = (256, 1)


def random_shield(vlm: VLM) -> Shield:
    """A shield that nobody trained."""
    text = vlm.model.config.get_text_config(decoder=True)
    neurons = evenly(vlm.anatomy, text, SHARE)
    targets = targets_of(vlm.anatomy, text, neurons, "lora", TuneConfig(rank=RANK))
    changes = {
        t.path: Change(
            t.out, t.into, torch.randn(RANK, t.into), torch.randn(t.n_rows, RANK), t.rows, None, 0.01, t.part
        )
        for t in targets
    }
    return Shield(
        "lora", changes, neurons, vlm.fingerprint(), counts_of(targets, neurons, vlm.model), home=Home.of(vlm)
    )


def works_of(vlm: VLM, shield: Shield, peft: PeftModel, folded: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """One forward in every condition."""

    def worn() -> Any:
        with shield.worn(vlm.model):
            return vlm.model(ids)

    return {
        "base": lambda: vlm.model(ids),
        "worn": worn,
        "PEFT": lambda: peft(input_ids=ids),
        "folded": lambda: folded(ids),
    }


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own, for busy machines")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    share, found = others_share(), []
    for shape in (shape for shape in SHAPES if shape.dtype == torch.float32):
        vlm = random_mixture(shape)
        shield = random_shield(vlm)
        with TemporaryDirectory() as home, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of an old name in transformers
            peft = PeftModel.from_pretrained(copy.deepcopy(vlm.model), str(shield.save(Path(home) / "shield")))
        twin = VLM(copy.deepcopy(vlm.model), vlm.processor, vlm.anatomy, "twin")
        shield.fold(twin)
        for length in LENGTHS:
            ids = torch.randint(10, 4000, (1, length))
            with torch.no_grad():
                works = works_of(vlm, shield, peft, twin.model, ids)
                turns = take_turns(works, clock=CLOCKS[given.clock], rounds=given.rounds)
            ratios = {name: turns.ratio(name, "base") for name in works if name != "base"}
            seconds = {name: turns.median(name) for name in works}
            found.append({"model": shape.name, "tokens": length, "seconds": seconds, "ratios": ratios})
            said = "".join(f"  {name} {ratio:.2f} ×" for name, ratio in ratios.items())
            print(f"{shape.name:66}{length:4} tokens {1000 * seconds['base']:7.1f} ms{said}", flush=True)
    taken = share()
    print(f"other processes took {taken:.0%} of the processors")
    if given.out is not None:
        setting = {"rounds": given.rounds, "clock": given.clock, "share": SHARE, "rank": RANK}
        head = record("shielded", ["transformers", "peft"], **setting)
        write_json(given.out, {**head, "others_share_of_cpu": taken, "shielded": found})


if __name__ == "__main__":
    main()
