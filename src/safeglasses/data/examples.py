"""The door to the user's data: records, reading, checking, writing.

>>> pairs = read_examples("pairs.jsonl")
>>> check_pairs(pairs, vlm)
>>> evidence = measure_evidence(vlm, pairs.split("find"), pairs.split("calibrate"), …)
"""

from safeglasses.data.checks import Reader, check_pairs, prompts_of
from safeglasses.data.pictures import Picture, Video
from safeglasses.data.reading import read_examples
from safeglasses.data.records import (
    CONDITIONS,
    LABELS,
    SPLITS,
    Condition,
    Example,
    Examples,
    Label,
    Split,
    Text,
    Turn,
)
from safeglasses.data.splits import assign_splits, split_of
from safeglasses.data.writing import write_examples

__all__ = [
    "CONDITIONS",
    "LABELS",
    "SPLITS",
    "Condition",
    "Example",
    "Examples",
    "Label",
    "Picture",
    "Reader",
    "Split",
    "Text",
    "Turn",
    "Video",
    "assign_splits",
    "check_pairs",
    "prompts_of",
    "read_examples",
    "split_of",
    "write_examples",
]
