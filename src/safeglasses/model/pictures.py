"""Which tokens of a prompt stand for a picture or a video's frame."""

from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from safeglasses.model.processors import Processor, tokenizer_of

_IMAGE = ("image_token_id", "image_token_index")
_VIDEO = ("video_token_id", "video_token_index")


def picture_ids(config: PreTrainedConfig, processor: Processor) -> frozenset[int]:
    """Return the ids of the tokens whose embeddings a model puts pictures in place of; empty if none are named.

    What the config says comes first, since it is where the model itself looks. A processor's own id is asked next, and
    not its list of ids, which may hold marks around a picture as well (Aya Vision).
    """
    if isinstance(processor, PreTrainedTokenizerBase):
        return frozenset()
    known = tokenizer_of(processor).added_tokens_decoder  # a default for videos may be any word of this tokenizer
    videos = {number for number in _named(config, _VIDEO) if number in known}
    return frozenset((_named(config, _IMAGE) or _named(processor, _IMAGE[:1])) | videos)


def picture_mask(
    prompts: Mapping[str, Any], ids: Collection[int], bare: Callable[[], Sequence[Sequence[int]]]
) -> Bool[Tensor, "sample token"]:
    """Return which tokens of padded prompts stand for pictures.

    Where no id is known, they are those that ``mm_token_type_ids`` say are no text; without these, those that the same
    prompts lack without their pictures, marks around a picture included.

    Args:
        prompts: what a processor made, padded on the right.
        ids: what `picture_ids` says.
        bare: the tokens of the same prompts without pictures; asked for only where nothing else tells.
    """
    tokens, mask = prompts["input_ids"], prompts["attention_mask"].bool()
    if ids:
        return torch.isin(tokens, torch.tensor(sorted(ids))) & mask
    if "mm_token_type_ids" in prompts:
        return prompts["mm_token_type_ids"].bool() & mask
    found = torch.zeros_like(mask)
    for row, keep, without, place in zip(tokens, mask, bare(), found, strict=True):
        place[keep.nonzero()[:, 0]] = _added(row[keep].tolist(), list(without))
    return found


def _named(place: Any, names: Sequence[str]) -> set[int]:
    values = (getattr(place, name, None) for name in names)
    return {value for value in values if isinstance(value, int)}


def _added(tokens: list[int], without: list[int]) -> Bool[Tensor, " token"]:
    """Return which tokens a shorter text lacks."""
    found = torch.ones(len(tokens), dtype=torch.bool)
    for start, _, length in SequenceMatcher(None, tokens, without, autojunk=False).get_matching_blocks():
        found[start : start + length] = False
    return found
