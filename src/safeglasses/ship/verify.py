"""Prove what a model wears: in this process, or behind an OpenAI-compatible server."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safeglasses.defend.home import FOLDED
from safeglasses.defend.record import RECORD
from safeglasses.errors import SafeglassesError
from safeglasses.files import read_json
from safeglasses.model.vlm import VLM, load
from safeglasses.ship.client import Answer, Place, Server
from safeglasses.ship.known import FLOOR, Cell, Known, KnownAnswers, Whose, plain
from safeglasses.ship.probe import logprobs, pieces
from safeglasses.ship.weighing import QUANTISED, ROUNDED, SAME, Observed, Verdict, weigh

ADAPTER = "adapter_config.json"
__all__ = ["Verdict", "load_any", "verify_model", "verify_served"]


def verify_model(vlm: VLM, known: KnownAnswers, *, quantised: bool | None = None) -> Verdict:
    """Ask a model in this process, whatever it wears and however it wears it.

    Args:
        vlm: the model.
        known: known answers of the glasses in question.
        quantised: whether its weights are of fewer than 16 bits; None: as its config says.

    Raises:
        SafeglassesError: its chat template or processor refuses the prompts, or its answers are no numbers.
    """
    if quantised is None:
        quantised = getattr(vlm.model.config, "quantization_config", None) is not None
    exact = vlm.dtype == torch.float32 and known.dtype == "float32"
    noise = QUANTISED if quantised else SAME if exact else ROUNDED
    notes = {
        "weights": "those of the base model"
        if vlm.fingerprint() == known.base_fingerprint
        else "others than the base's",
        "folded": [str(record.get("recipe")) for record in getattr(vlm.model.config, FOLDED, None) or ()],
        "dtype": str(vlm.dtype).removeprefix("torch."),
    }
    if _cannot_take(vlm, known):
        nothing = dict.fromkeys(known.references, 0)
        because = "it does not take the known prompts: no pictures, or too small a vocabulary"
        return Verdict("another model", because, "log-probabilities", "none", nothing, 0, notes=notes)
    values = _asked(vlm, known)
    if np.isnan(values).any():
        raise SafeglassesError(
            "the model's answers are no numbers",
            given=f"{int(np.isnan(values).sum())} of {len(values)} log-probabilities of {vlm.source} are NaN",
            expected="finite numbers",
            do="look for NaN among its weights, or load it in another dtype",
        )
    return replace(weigh(known, Observed(values, np.full_like(values, FLOOR), noise=noise)), notes=notes)


def verify_served(server: Server, known: KnownAnswers, *, quantised: bool = False) -> Verdict:
    """Ask a server over HTTP: log-probabilities where it gives them, texts where it does not.

    Raises:
        SafeglassesError: the server cannot be reached, does not know the model, or answers nonsense.
    """
    answers = [server.ask(one.prompt.messages(), known.max_new_tokens) for one in known.prompts]
    matched = [_matched(one, answer) for one, answer in zip(known.prompts, answers, strict=True)]
    values, floors = (np.concatenate(parts) for parts in zip(*matched, strict=True))
    noise = QUANTISED if quantised else ROUNDED
    return weigh(known, Observed(values, floors, [answer.text for answer in answers], noise))


def load_any(source: str | Path, **options: Any) -> VLM:
    """Load a checkpoint, or a PEFT adapter folder together with the base model that it names.

    Raises:
        SafeglassesError: as `load`; or the adapter names no base model, or PEFT cannot load it.
    """
    folder = Path(source).expanduser()
    if (folder / RECORD).is_file() and not (folder / ADAPTER).is_file():
        raise SafeglassesError(
            "these glasses are no adapter: they scale fused experts, which IA3 has no place for",
            given=str(folder),
            expected="a model, or an adapter that PEFT loads",
            do="fold them (safeglasses fold) and verify the folded checkpoint",
        )
    if not (folder / ADAPTER).is_file() or (folder / "config.json").is_file():
        return load(source, **options)
    config = read_json(folder / ADAPTER)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise SafeglassesError(
            "the adapter does not name its base model",
            given=str(folder / ADAPTER),
            expected="base_model_name_or_path",
            do="add the entry, or merge the adapter into its base model first",
        )
    vlm = load(base, **options)
    try:
        vlm.model.load_adapter(str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise SafeglassesError(
            "PEFT cannot load the adapter",
            given=f"{folder}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
            expected=f"an adapter for {base}",
            do="check it with PeftModel.from_pretrained",
        ) from error
    return replace(vlm, source=f"{base} with {folder}")


def _cannot_take(vlm: VLM, known: KnownAnswers) -> bool:
    pictures = any(one.picture is not None for one in known.prompts)
    highest = max(int(token) for one in known.prompts for token in one.spelled)
    width = int(vlm.model.config.get_text_config(decoder=True).vocab_size)
    return (pictures and not vlm.is_multimodal) or highest >= width


def _asked(vlm: VLM, known: KnownAnswers) -> Float[np.ndarray, " value"]:
    """Follow both known answers to every prompt with the model, and read off its log-probabilities."""
    both: tuple[Whose, ...] = ("base", "worn")
    rows: list[tuple[int, Whose]] = [
        (i, path)
        for i, one in enumerate(known.prompts)
        for path in both
        if any(cell.path == path for cell in one.cells)
    ]
    prompts = [known.prompts[i].prompt for i, _ in rows]
    paths = [known.prompts[i].paths[path] for i, path in rows]
    seen: dict[tuple[int, Whose], Tensor] = {}
    for piece in pieces(vlm, prompts, paths):
        seen |= {rows[row]: values.cpu() for row, values in zip(piece.rows, logprobs(vlm, piece), strict=True)}
    values = [seen[i, c.path][c.at][list(c.tokens)] for i, one in enumerate(known.prompts) for c in one.cells]
    return torch.cat(values).double().clamp(FLOOR, 0).numpy()


def _matched(one: Known, answer: Answer) -> tuple[Float[np.ndarray, " value"], Float[np.ndarray, " value"]]:
    """Bring what a server showed into the order of the known values.

    A place in the server's answer is comparable as long as the tokens in front of it are those of a known answer.
    A known token that the server does not list is at most as likely as the least likely one it lists.

    Returns:
        Log-probabilities, NaN where nothing can be compared; and how low they can be seen to be.
    """
    values, floors = np.full(one.n_values, np.nan), np.full(one.n_values, FLOOR)
    start = 0
    for cell in one.cells:
        place = _place(one, cell, answer.places)
        here = range(start, start + len(cell.tokens))
        start = here.stop
        if place is None or not place.top:
            continue
        spelled = [plain(one.spelled[str(token)]) for token in cell.tokens]
        listed = [plain(text) for text in place.top]
        least = max(FLOOR, min(place.top.values()))
        for k, name in zip(here, spelled, strict=True):
            if not name or spelled.count(name) > 1 or listed.count(name) > 1:
                continue  # two tokens read the same without white space: which is which cannot be known
            if name in listed:
                values[k] = min(0.0, max(FLOOR, list(place.top.values())[listed.index(name)]))
            else:
                values[k] = floors[k] = least
    return values, floors


def _place(one: Known, cell: Cell, places: Sequence[Place]) -> Place | None:
    """Return the place of the server's answer that has the same tokens in front of it."""
    if cell.at >= len(places):
        return None
    before = [plain(one.spelled[str(token)]) for token in one.paths[cell.path][: cell.at]]
    return places[cell.at] if before == [plain(place.token) for place in places[: cell.at]] else None
