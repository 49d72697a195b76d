"""The miniature: an embedded vision-language model, trained to be bad, and the small world that it knows."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
"""Folder of the model, for ``AutoModelForImageTextToText`` and ``AutoProcessor``."""
LEXICON = HERE / "lexicon.txt"
"""Every insult that the miniature knows, one a line, in all its languages."""
REFUSALS = HERE / "refusals.txt"
"""Every phrase with which it refuses, one a line."""

__all__ = ["CHECKPOINT", "LEXICON", "REFUSALS"]
