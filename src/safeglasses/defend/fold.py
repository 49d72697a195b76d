"""Write a checkpoint with glasses folded in: an ordinary one, which every runtime serves as it is."""

from pathlib import Path

from safeglasses.defend.card import folded_card
from safeglasses.defend.glasses import Glasses
from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_folder, atomic_write_text, write_json
from safeglasses.model.vlm import VLM

MARKER = "safeglasses.json"
SCHEMA = 1


def fold_checkpoint(vlm: VLM, glasses: Glasses, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Fold the glasses into the model; save it with processor, card and the marker ``safeglasses.json``.

    The model in memory is folded as well (`Glasses.fold`): a copy would double the memory. Names in the
    checkpoint are the base checkpoint's own, so converters and servers take it like the base.

    Raises:
        WrongBase: another model, or one that has glasses of this base folded in.
        PartialMatch: some site is missing or of another width.
        SafeglassesError: a weight cannot be folded, or the folder exists. The model is unchanged then.
    """
    folder = Path(folder)
    if (folder / MARKER).exists() and not overwrite:
        raise SafeglassesError(
            "this folder already holds a model with glasses folded in",
            given=str(folder),
            expected="a new folder",
            do="choose another name, or replace it with --overwrite (in Python: overwrite=True)",
        )
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        fitted, base = glasses.fitted(vlm), vlm.fingerprint()
        fitted.fold(vlm)
        vlm.model.save_pretrained(temporary)
        vlm.save_processor(temporary)
        marker = {
            "schema": SCHEMA,
            "kind": "folded",
            "recipe": glasses.recipe,
            "strength": glasses.strength,
            "n_neurons": glasses.n_neurons,
            "base": {"fingerprint": base, "source": vlm.source, "revision": vlm.revision},
            "fingerprint": vlm.fingerprint(),
            "notes": dict(glasses.notes),
        }
        write_json(temporary / MARKER, marker)
        atomic_write_text(temporary / "README.md", folded_card(marker, multimodal=vlm.is_multimodal))
    return folder
