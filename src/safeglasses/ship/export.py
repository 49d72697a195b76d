"""Export glasses for a runtime: an IA3 adapter, an exact LoRA, or hooks for SGLang; each with card and known answers.

| file | ia3 | lora | sglang |
|---|---|---|---|
| ``adapter_config.json``, ``adapter_model.safetensors`` | IA3 | LoRA | |
| ``glasses.json``, ``neurons.parquet`` | as `Glasses.save` writes them | | |
| ``sglang_hooks.json``, ``factors.safetensors`` | | | hooks and factors |
| ``safeglasses.json`` | what was exported, with hashes | same | same |
| ``known_answers.json`` | log-probabilities with and without, for `safeglasses verify` | same | same |
| ``README.md`` | card with commands to copy | same | same |
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from safeglasses import __version__
from safeglasses.defend.card import exported_card, glasses_card
from safeglasses.defend.factors import changed, refuse_fused, refuse_outside
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.home import Home
from safeglasses.defend.record import RECORD
from safeglasses.defend.results import Results
from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_folder, atomic_write_text, read_json, sha256_file, write_json
from safeglasses.model.vlm import VLM
from safeglasses.ship import runtimes
from safeglasses.ship.answers import make_answers
from safeglasses.ship.hooks import write_hooks
from safeglasses.ship.lora import vllm_rank, write_lora

MARKER = "safeglasses.json"
CARD = "README.md"
SCHEMA = 1


@dataclass(frozen=True)
class _Draft:
    """A folder that is being written."""

    folder: Path
    """Temporary, beside where it will be."""
    glasses: Glasses
    """Fitted to the model."""
    home: Home
    """The base model as files name it."""
    record: dict[str, Any]
    """What ``safeglasses.json`` will hold; filled by the writer of each format."""

    def finish(self, vlm: VLM) -> None:
        """Write known answers, and the record with the hashes of all files."""
        make_answers(vlm, self.glasses).save(self.folder)
        files = sorted(path for path in self.folder.iterdir() if path.name != CARD)
        self.record["files"] = {path.name: sha256_file(path) for path in files}
        write_json(self.folder / MARKER, self.record)


def export_ia3(
    vlm: VLM, glasses: Glasses, out: str | Path, *, results: Results | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the folder that `Glasses.save` writes, at the strength of these glasses, with known answers.

    Args:
        vlm: the base model.
        glasses: what to export, at their strength.
        out: folder to make.
        results: what was measured of just these glasses, for the card.
        overwrite: replace a folder that is there.

    Returns:
        What ``safeglasses.json`` says.

    Raises:
        WrongBase: they were made for another model.
        PartialMatch: some site is missing or of another width.
        SafeglassesError: no neuron is changed, a module keeps factors on both sides, or the folder exists.
    """
    refuse_fused(changed(glasses.factors), "an IA3 adapter")
    with _drafted("ia3", vlm, glasses, out, overwrite=overwrite) as draft:
        draft.glasses.save(draft.folder, vlm, overwrite=True)
        draft.finish(vlm)
        card = glasses_card(read_json(draft.folder / RECORD), results)
        atomic_write_text(draft.folder / CARD, card + runtimes.section(draft.record))
    return draft.record


def export_lora(
    vlm: VLM,
    glasses: Glasses,
    out: str | Path,
    *,
    max_rank: int = 512,
    dtype: torch.dtype | None = None,
    results: Results | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a PEFT LoRA that changes exactly what the glasses change; see `safeglasses.ship.lora`.

    Args:
        vlm: the base model.
        glasses: what to export, at their strength.
        out: folder to make.
        max_rank: most neurons that a matrix may change.
        dtype: of the file's tensors; by default the model's.
        results: what was measured of just these glasses, for the card.
        overwrite: replace a folder that is there.

    Returns:
        What ``safeglasses.json`` says; ``biases`` is true where vLLM, SGLang and llama.cpp cannot load the file.

    Raises:
        WrongBase: they were made for another model.
        PartialMatch: some site is missing or of another width.
        SafeglassesError: no neuron is changed, a matrix changes more than `max_rank`, a weight is quantised, or the
            folder exists.
    """
    with _drafted("lora", vlm, glasses, out, overwrite=overwrite) as draft:
        written = write_lora(draft.folder, vlm, draft.glasses.effective(), draft.home, max_rank=max_rank, dtype=dtype)
        draft.record["lora"] = {
            "rank": written.rank,
            "vllm_max_lora_rank": None if written.biases else vllm_rank(written.rank),
            "biases": written.biases,
            "dtype": str(written.dtype).removeprefix("torch."),
            "ranks": dict(written.ranks),
        }
        draft.finish(vlm)
        _write_card(draft, "an exact LoRA", "lora", results)
    return draft.record


def export_sglang(
    vlm: VLM, glasses: Glasses, out: str | Path, *, results: Results | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write hooks for SGLang's ``--forward-hooks``; see `safeglasses.serving.sglang`.

    Args:
        vlm: the base model.
        glasses: what to export, at their strength.
        out: folder to make.
        results: what was measured of just these glasses, for the card.
        overwrite: replace a folder that is there.

    Returns:
        What ``safeglasses.json`` says.

    Raises:
        WrongBase: they were made for another model.
        PartialMatch: some site is missing or of another width.
        SafeglassesError: no neuron is changed, maps that SGLang merges differ on their input, or the folder exists.
    """
    refuse_fused(changed(glasses.factors), "hooks of SGLang")
    refuse_outside(changed(glasses.factors), "SGLang's --forward-hooks")
    with _drafted("sglang", vlm, glasses, out, overwrite=overwrite) as draft:
        written = write_hooks(draft.folder, vlm, draft.glasses.effective(), draft.home)
        draft.record["sglang"] = {
            "modules": list(written.modules),
            "moved": {str(old): str(new) for old, new in written.moved.items()},
            "inputs": written.inputs,
        }
        draft.finish(vlm)
        _write_card(draft, "forward hooks for SGLang", "hooks", results)
    return draft.record


def check_out(out: str | Path, *, overwrite: bool) -> None:
    """Refuse an output that is there already, before anything takes time; `atomic_folder` looks again.

    Raises:
        SafeglassesError: it exists, and may not be replaced.
    """
    if Path(out).exists() and not overwrite:
        raise SafeglassesError(
            "the output is already there",
            given=str(out),
            expected="a new folder, so that no earlier result is lost",
            do="choose another name, or replace it with --overwrite (in Python: overwrite=True)",
        )


@contextmanager
def _drafted(kind: str, vlm: VLM, glasses: Glasses, out: str | Path, *, overwrite: bool) -> Iterator[_Draft]:
    """Check glasses and place, and give an empty folder that takes its place when the block ends well."""
    fitted = glasses.fitted(vlm)
    home = Home.of(vlm)
    if fitted.n_neurons == 0:
        raise SafeglassesError(
            "these glasses change no neuron: exporting them would silently do nothing",
            given=f"recipe {glasses.recipe}, strength {glasses.strength:g}, {len(glasses.factors)} sites",
            expected="at least one neuron with a factor other than 1, and a strength above 0",
            do="lower the recipe's threshold, or raise the strength",
        )
    record = {
        "schema": SCHEMA,
        "kind": kind,
        "recipe": glasses.recipe,
        "strength": glasses.strength,
        "n_neurons": fitted.n_neurons,
        "base": {"fingerprint": glasses.base_fingerprint, **asdict(home)},
        "notes": dict(glasses.notes),
        "version": __version__,
    }
    with atomic_folder(out, overwrite=overwrite) as temporary:
        yield _Draft(temporary, fitted, home, record)


def _write_card(draft: _Draft, what: str, kind: Literal["lora", "hooks"], results: Results | None) -> None:
    card = exported_card(draft.record, what, kind=kind, results=results)
    atomic_write_text(draft.folder / CARD, card + runtimes.section(draft.record))
