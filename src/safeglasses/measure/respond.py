"""Let a model answer prompts: batched, resumable, the same texts after a kill as without one."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from safeglasses.data.checks import check_media
from safeglasses.data.examples import Example, Text
from safeglasses.errors import SafeglassesError
from safeglasses.measure.journal import Journal, Row
from safeglasses.model.thought import parted
from safeglasses.model.vlm import VLM, batches

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn from the model."""

    name: str
    """``sampled`` or ``greedy``: names the rows of the summary."""
    temperature: float
    """1 samples from the model's own distribution; 0 takes the likeliest token."""
    max_new_tokens: int
    """Longest answer."""
    seed: int = 0
    """Of sampling; with temperature 0 it changes nothing."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_new_tokens < 1:
            raise SafeglassesError(
                "bad decoding",
                given=repr(self),
                expected="temperature of at least 0 and max_new_tokens of at least 1",
            )


@dataclass(frozen=True)
class Response:
    """One generated answer."""

    example_id: str
    """The prompt that it answers."""
    text: str
    """The answer, without prompt, thought and special tokens: what is judged."""
    n_tokens: int
    """Its length when tokenised again, the thought included."""
    sample: int
    """Which of several answers to the same prompt, from 0."""
    thought: str = ""
    """What a thinking model wrote before it, in its marks; the journal has both. An answer that never came is empty."""


def respond(
    vlm: VLM,
    examples: Sequence[Example],
    *,
    decoding: Decoding,
    journal: Path | None = None,
    batch_size: int | str = "auto",
    progress: Callable[[int, int], None] | None = None,
    defence: str = "none",
    samples: int = 1,
) -> list[Response]:
    """Answer every prompt; what the model wears is the caller's business.

    Each batch is seeded from the decoding's seed and its own place, and written to the journal when it is
    finished, so a run that was killed gives the same texts as one that was not.

    Args:
        vlm: the model.
        examples: prompts; their responses and labels are not looked at.
        decoding: how to draw.
        journal: JSONL file of finished batches; a file of another run is refused.
        batch_size: prompts answered at once; ``auto`` is 32 on a CPU and 64 on a GPU. Halved when memory
            runs out.
        progress: called with answers done and answers in all after every batch.
        defence: identifies what the model wears, for the journal.
        samples: answers per prompt.

    Returns:
        The answers in the order of the examples, those of one prompt together.

    Raises:
        SafeglassesError: no prompts, or some that show what the model does not take; the journal belongs to another
            run; a single prompt does not fit into memory.
    """
    if not examples or samples < 1:
        raise SafeglassesError("nothing to answer", given=f"{len(examples)} prompts, {samples} answers each")
    if samples > 1 and decoding.temperature == 0:
        raise SafeglassesError(
            "several greedy answers are one answer",
            given=f"samples={samples}, temperature=0",
            expected="samples=1",
        )
    check_media(examples, vlm)
    items = [(example, sample) for example in examples for sample in range(samples)]
    size = resolve_batch_size(vlm, batch_size)
    plan = batches([(e.layout, _text_length(e)) for e, _ in items], size)
    record: Journal[Row] | None = None
    if journal is not None:
        record = Journal(Path(journal), _header(vlm, items, decoding, defence, size), plan, kind=Row)
    with closing(record) if record else nullcontext():
        rows = _answer(vlm, items, plan, decoding, record, progress)
    found = {row.item: row for row in rows}
    parts = [parted(found[i].text) for i in range(len(items))]
    return [
        Response(example.id, answer, found[i].n_tokens, sample, thought)
        for i, ((example, sample), (thought, answer)) in enumerate(zip(items, parts, strict=True))
    ]


def resolve_batch_size(vlm: VLM, batch_size: int | str) -> int:
    """Turn ``auto`` into a number that depends on the kind of device alone, so that reruns agree.

    Raises:
        SafeglassesError: neither ``auto`` nor a positive number.
    """
    if batch_size == "auto":
        return 32 if vlm.device.type == "cpu" else 64
    if isinstance(batch_size, str) or batch_size < 1:
        raise SafeglassesError("bad batch size", given=repr(batch_size), expected="a positive number or auto")
    return batch_size


def in_pieces(rows: Sequence[int], size: int, run: Callable[[Sequence[int]], list[T]]) -> tuple[list[T], int]:
    """Run over rows, at most `size` at once, halving when memory runs out.

    Returns:
        One result per row, and the size that fitted (start the next batch with it).

    Raises:
        SafeglassesError: a single row does not fit.
    """
    done: list[T] = []
    while len(done) < len(rows):
        piece = rows[len(done) : len(done) + size]
        try:
            done += run(piece)
            continue
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
        # outside of `except`: the traceback keeps the failed pass's tensors alive
        if len(piece) == 1:
            raise SafeglassesError(
                "one row alone does not fit into memory",
                given=reason,
                do="use a smaller dtype or a larger device",
            )
        size = (len(piece) + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory: going on with %d rows at once", size)
    return done, size


def _answer(
    vlm: VLM,
    items: Sequence[tuple[Example, int]],
    plan: Sequence[list[int]],
    decoding: Decoding,
    record: Journal[Row] | None,
    progress: Callable[[int, int], None] | None,
) -> list[Row]:
    """Generate the batches that the journal lacks."""
    rows = [row for batch in record.finished for row in batch] if record else []
    size = rows[-1].piece if rows else max(map(len, plan))
    if rows and progress is not None:
        progress(len(rows), len(items))
    for index in range(len(record.finished) if record else 0, len(plan)):

        def run(piece: Sequence[int], index: int = index) -> list[str]:
            return vlm.generate(
                [items[i][0].chat(with_response=False) for i in piece],
                max_new_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                seed=_seed(decoding.seed, index, plan[index].index(piece[0])),
            )

        texts, size = in_pieces(plan[index], size, run)
        lengths = _token_counts(vlm, texts)
        batch = [
            Row(index, item, size, items[item][0].id, text, n)
            for item, text, n in zip(plan[index], texts, lengths, strict=True)
        ]
        if record is not None:
            record.append(batch)
        rows += batch
        if progress is not None:
            progress(len(rows), len(items))
    return rows


def _seed(seed: int, batch: int, start: int) -> int:
    """Seed of the rows of one batch from `start` on: 32 bits, unrelated between batches."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}/{start}".encode()).digest()[:4])


def _text_length(example: Example) -> int:
    return sum(len(part.text) for turn in example.messages for part in turn.content if isinstance(part, Text))


def _token_counts(vlm: VLM, texts: Sequence[str]) -> list[int]:
    return [len(vlm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def _header(
    vlm: VLM, items: Sequence[tuple[Example, int]], decoding: Decoding, defence: str, batch_size: int
) -> dict[str, Any]:
    """Everything on which the texts depend."""
    asked = "\n".join(f"{example.id}\t{example.prompt_key}\t{sample}" for example, sample in items)
    return {
        "model": vlm.fingerprint(),
        "defence": defence,
        "decoding": asdict(decoding),
        "prompts": hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest(),
        "batch_size": batch_size,
    }
