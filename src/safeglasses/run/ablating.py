"""The job behind ``safeglasses ablate``: files in, a resumable folder with a report out."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from safeglasses.data.examples import Example, read_examples
from safeglasses.errors import SafeglassesError
from safeglasses.files import read_json, write_json
from safeglasses.find.contrast import FILE, Contrast
from safeglasses.find.selection import Selection
from safeglasses.measure.items import is_benign
from safeglasses.measure.judges import judge_from, refusal_judge
from safeglasses.model.vlm import VLM, load
from safeglasses.progress import Progress, Quiet
from safeglasses.report.ablation_page import write_ablation_page
from safeglasses.run.ablate import ablate
from safeglasses.run.folder import RunFolder
from safeglasses.run.inputs import content_of, judge_of
from safeglasses.run.worn import worn_in
from safeglasses.tune.shield import Shield


def run_ablation(
    model: str | Path,
    neurons: str | Path,
    prompts: str | Path,
    out: str | Path,
    *,
    tuned: str | Path | None = None,
    kinds: Sequence[Any] = ("zero", "mean", "resample"),
    controls: int = 5,
    judge: str = "complied",
    refusals: str | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int | str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Mapping[str, Any]:
    """Ablate neurons that lie in files, and write ``summary.json`` and ``report.html``; see `ablate`.

    Args:
        model: checkpoint folder or hub id.
        neurons: as `neurons_in` takes it.
        prompts: requests; harmless ones of the find split give ordinary activations, the test split is measured.
        out: folder; one with the same inputs is resumed.
        tuned: a shield or glasses whose activations are patched in.
        kinds: kinds of ablation.
        controls: random sets.
        judge: of harm.
        refusals: of refusals on harmless requests; None for the shipped phrases.
        temperature: 0 is greedy.
        max_new_tokens: longest answer.
        seed: of everything that is drawn.
        limit: at most so many harmful, and so many harmless requests.
        batch_size: prompts at once.
        dtype: as in `load`.
        device_map: as in `load`.
        revision: as in `load`.
        skip_bad: skip unreadable rows.
        overwrite: delete another run in `out`.
        progress: where progress is shown.

    Raises:
        SafeglassesError: bad input, before long work.
        WrongBase: neurons or shield of another model.
    """
    show = progress or Quiet()
    inputs = {
        "job": "ablate",
        "model": str(model),
        "revision": revision,
        "neurons": content_of(neurons),
        "prompts": content_of(prompts),
        "tuned": content_of(tuned) if tuned is not None else None,
        "kinds": list(kinds),
        "controls": controls,
        "judge": judge_of(judge),
        "refusals": None if refusals is None else judge_of(refusals),
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "limit": limit,
        "dtype": dtype,
        "skip_bad": skip_bad,
    }
    resumed = RunFolder.examine(Path(out), inputs, overwrite=overwrite)
    if resumed and (Path(out) / "summary.json").exists():
        return read_json(Path(out) / "summary.json")
    who, refused = judge_from(judge), refusal_judge() if refusals is None else judge_from(refusals)
    with show.stage("load"):
        vlm = load(model, dtype=dtype, device_map=device_map, revision=revision)
    chosen = neurons_in(neurons, vlm)
    worn = None if tuned is None else worn_in(tuned)
    if worn is not None:
        worn.fitted(vlm)
    rows = read_examples(prompts, skip_bad=skip_bad)
    test = [*_first(rows.split("test"), limit, benign=False), *_first(rows.split("test"), limit, benign=True)]
    ordinary = _first(rows.split("find"), limit, benign=True)
    folder = RunFolder.open(Path(out), inputs, overwrite=overwrite)
    summary = ablate(
        vlm,
        chosen,
        test,
        who,
        ordinary=ordinary,
        kinds=kinds,
        controls=controls,
        tuned=worn,
        refusals=refused,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        journals=folder.path / "responses",
        batch_size=batch_size,
        progress=show,
    )
    write_ablation_page(summary, folder.path / "report.html")
    write_json(folder.path / "summary.json", summary)
    return summary


def neurons_in(path: str | Path, vlm: VLM) -> Selection:
    """Read a set of neurons: a run of ``shield``, a shield, a file of safety neurons (their union), or glasses.

    Or a ``.txt`` file with an address a line, as reports and ``neurons.parquet`` print them, halves included:
    ``layers.0.mlp.gate_up_proj:up#3``.

    Raises:
        SafeglassesError: none of these is there, or an address that the model does not have.
        WrongBase: they are of another model.
    """
    path = Path(path)
    if path.suffix == ".txt" and path.is_file():
        return _listed(path, vlm)
    if (path / "shield").is_dir():
        path = path / "shield"
    if path.name == FILE or (path / FILE).exists():
        contrast = Contrast.load(path)
        contrast.check(vlm)
        return contrast.union()
    worn = worn_in(path)
    worn.fitted(vlm)
    if isinstance(worn, Shield):
        return worn.neurons
    acting = worn.effective()
    masks = {
        site: acting[site] != 1 if site in acting else torch.zeros(vlm.anatomy.width(site), dtype=torch.bool)
        for site in dict.fromkeys((*vlm.anatomy.sites("neurons"), *acting))
    }
    return Selection(masks)


def _listed(path: Path, vlm: VLM) -> Selection:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [vlm.anatomy.neuron(line.strip()) for line in lines if line.strip()]
    if not found:
        raise SafeglassesError("no neuron in the file", given=str(path), expected="an address a line")
    masks = {site: torch.zeros(vlm.anatomy.width(site), dtype=torch.bool) for site, _ in found}
    for site, index in found:
        masks[site][index] = True
    return Selection(masks)


def _first(rows: Sequence[Example], limit: int | None, *, benign: bool) -> list[Example]:
    """Take some of the rows of one label, in their order, always the same ones.

    Drawn, not every n-th: data are often written in turns, and a stride would meet one language or modality alone.
    """
    chosen = [e for e in rows if is_benign(e) == benign]
    if limit is None or limit >= len(chosen):
        return chosen
    return [chosen[i] for i in sorted(random.Random(0).sample(range(len(chosen)), limit))]
