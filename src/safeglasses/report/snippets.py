"""What a page offers for copying: how to wear, load and fold what a run wrote."""

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Snippet:
    """Something to copy and paste."""

    title: str
    """What it is for."""
    language: str
    """``python`` or ``sh``."""
    code: str
    """The lines."""
    note: str = ""
    """One sentence about it."""


def usage(
    base: str, adapter: str, folded: str | None = None, *, multimodal: bool = True, peft: bool = True
) -> tuple[Snippet, ...]:
    """Write the copy-and-paste lines for one run folder.

    Args:
        base: source of the untouched model.
        adapter: the glasses folder, relative to the report.
        folded: the folded checkpoint, relative to the report; None says how to make one.
        multimodal: False for a text-only base.
        peft: False for glasses that IA3 cannot carry.
    """
    auto, reader = ("ImageTextToText", "AutoProcessor") if multimodal else ("CausalLM", "AutoTokenizer")
    worn = (
        "import safeglasses\n\n"
        f"vlm = safeglasses.load({base!r})\n"
        f"glasses = safeglasses.Glasses.load({adapter!r})   # .at(0.5) is half as strong\n"
        "with glasses.worn(vlm):\n"
        "    ...   # vlm.model and vlm.generate wear them in here; after the block they are off"
    )
    ready = (
        "from peft import PeftModel\n"
        f"from transformers import AutoModelFor{auto}\n\n"
        f"model = AutoModelFor{auto}.from_pretrained({base!r})\n"
        f"model = PeftModel.from_pretrained(model, {adapter!r})"
    )
    fold = f"safeglasses fold {shlex.quote(base)} --glasses {shlex.quote(adapter)} --out folded"
    plain = (
        f"from transformers import AutoModelFor{auto}, {reader}\n\n"
        f"model = AutoModelFor{auto}.from_pretrained({folded!r})\n"
        f"processor = {reader}.from_pretrained({folded!r})"
    )
    ordinary = "An ordinary checkpoint with the factors in its weights, for any runtime that loads the base model."
    adapted = Snippet("peft", "python", ready, "The folder is an ordinary IA3 adapter; this needs no safeglasses.")
    return (
        Snippet("safeglasses", "python", worn, "Refuses a wrong base model."),
        *((adapted,) if peft else ()),
        Snippet("folded checkpoint", "sh", fold, ordinary)
        if folded is None
        else Snippet("folded checkpoint", "python", plain, ordinary),
    )
