"""Examples as micro-batches: encoded by the model's own chat template, once, with only the answers as targets."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from safeglasses.data.examples import Example
from safeglasses.errors import BadRow, SafeglassesError
from safeglasses.model.vlm import VLM, batches

IGNORED = -100
_KEPT = 2 << 30
"""Bytes of encoded micro-batches that are kept for the next epoch; beyond it they are encoded anew."""
_STEP = 32  # tokens: examples of one length class share a micro-batch
_AT_ONCE = 256


class Microbatches(Dataset[dict[str, Tensor]]):
    """Groups of at most `size` items, put together once, each encoded when it is first asked for.

    A group never mixes numbers of pictures, and holds items of like length; which ones is decided by a seed.
    """

    def __init__(
        self,
        keys: Sequence[tuple[tuple[int, ...], int]],
        size: int,
        seed: int,
        encode: Callable[[list[int]], dict[str, Tensor]],
    ) -> None:
        """Put the groups together.

        Args:
            keys: per item its `layout` and its length in tokens.
            size: most items in a group.
            seed: of the order.
            encode: makes a micro-batch of items.
        """
        order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
        place = {index: rank for rank, index in enumerate(order)}
        self.groups = batches([(n, -(-length // _STEP), place[i]) for i, (n, length) in enumerate(keys)], size)
        self._encode = encode
        self._cache: dict[int, dict[str, Tensor]] = {}
        self._room = _KEPT

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index in self._cache:
            return self._cache[index]
        made = self._encode(self.groups[index])
        size = sum(tensor.numel() * tensor.element_size() for tensor in made.values())
        if size <= self._room:
            self._room -= size
            self._cache[index] = made
        return made


def answers(vlm: VLM, examples: Sequence[Example], size: int, seed: int) -> Microbatches:
    """Return examples as micro-batches with ``labels``.

    Raises:
        SafeglassesError: as in `check_targets`.
    """
    lengths = check_targets(vlm, examples)
    keys = [(example.layout, length) for example, length in zip(examples, lengths, strict=True)]
    return Microbatches(keys, size, seed, lambda group: encoded(vlm, [examples[i] for i in group]))


def preferences(vlm: VLM, pairs: Sequence[tuple[Example, Example]], size: int, seed: int) -> Microbatches:
    """Return pairs as micro-batches as TRL takes them: the chosen in the first half, ``completion_mask``.

    Raises:
        SafeglassesError: as in `check_targets`.
    """
    sides = [check_targets(vlm, [pair[side] for pair in pairs]) for side in (0, 1)]
    keys = [(pair[0].layout, max(lengths)) for pair, *lengths in zip(pairs, *sides, strict=True)]

    def encode(group: list[int]) -> dict[str, Tensor]:
        made = encoded(vlm, [pairs[i][side] for side in (0, 1) for i in group])
        made["completion_mask"] = (made.pop("labels") != IGNORED).long()
        return made

    return Microbatches(keys, size, seed, encode)


def encoded(vlm: VLM, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Encode examples with as many pictures each as one micro-batch: the model's inputs and ``labels``.

    Labels are the tokens of the answer and of the end of the turn; `IGNORED` everywhere else.
    """
    batch = vlm.encode([example.chat() for example in examples], end_of_turn=True)
    labels = batch.ids.masked_fill(~batch.response_mask, IGNORED)
    return {**batch.inputs, "labels": labels}


def first_column(labels: Tensor) -> int:
    """Return the column whose logits predict the first target."""
    return int((labels != IGNORED).any(dim=0).nonzero()[0]) - 1


def check_targets(vlm: VLM, examples: Sequence[Example]) -> list[int]:
    """Check that every example has a target and fits into the model; return their lengths in tokens.

    Raises:
        SafeglassesError: no examples.
        BadRow: an example without a response, or longer than the model's context.
    """
    if not examples:
        raise SafeglassesError("nothing to tune on", given="no examples", expected="rows with a response as target")
    for example in examples:
        if not (example.response or "").strip():
            raise BadRow(
                "an example has no target",
                given=f"row {example.id} without a response",
                expected="a refusal or a helpful answer as response",
                do="give it one, or leave the row out",
            )
    lengths: list[int] = []
    for start in range(0, len(examples), _AT_ONCE):  # pictures of so many are open at once
        lengths += vlm.lengths([example.chat() for example in examples[start : start + _AT_ONCE]])
    limit = vlm.context_length
    longest = max(range(len(lengths)), key=lambda i: lengths[i])
    if limit is not None and lengths[longest] + 1 > limit:
        raise BadRow(
            "an example is longer than the model's context",
            given=f"row {examples[longest].id} with {lengths[longest] + 1:,} tokens",
            expected=f"at most {limit:,} tokens with the end of the turn",
            do="shorten it, or leave the row out",
        )
    return lengths
