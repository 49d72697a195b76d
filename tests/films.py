"""What came of videos with one tiny family: a line of the second table of docs/families.md."""

import io
from typing import Any

import torch
from PIL import Image

import families
from circle import WITHIN, close, embedded, glasses_of, sites_of
from safeglasses.data.examples import Example, Picture, Text, Turn, Video
from safeglasses.errors import SafeglassesError
from safeglasses.find.capture import capture
from safeglasses.find.pools import Pool
from safeglasses.model.vlm import VLM, Chat

Frames = list[Image.Image]
_SIZES = ((24, 24), (36, 24), (20, 48))


def chat(
    *shown: Frames | Image.Image, words: str = "what is this", response: str | None = "a dog", **more: Any
) -> Chat:
    """Return a chat of one message with videos and pictures."""
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": part} if isinstance(part, Image.Image) else {"type": "video", "video": part, **more}
        for part in shown
    ]
    return Chat([{"role": "user", "content": [*parts, {"type": "text", "text": words}]}], response)


def row(name: str, vlm: VLM) -> str:
    """Try videos with a family; return its line.

    Raises:
        AssertionError: something is not as it should be.
    """
    unlike, beside = chat(families.film(2), families.film(4)), chat(families.film(2), families.picture(24, 24))
    cells = [
        f"`{name}`",
        _tokens(vlm),
        "yes" if _text(vlm) != _text(vlm, fps=0.01) else "no",
        "of unlike lengths" if taken(vlm, unlike) else "of one length",
        "yes" if taken(vlm, beside) else "refused",
        _captured(vlm),
        _worn(vlm),
        _written(vlm),
    ]
    assert taken(vlm, chat(families.film(2), families.film(2)))
    return "| " + " | ".join(cells) + " |"


def taken(vlm: VLM, one: Chat) -> bool:
    """Say whether a model takes a chat; what it takes, it runs."""
    try:
        batch = vlm.encode([one])
    except SafeglassesError:
        return False
    with torch.no_grad():
        assert bool(vlm.forward(batch).isfinite().all())
    return True


def _tokens(vlm: VLM) -> str:
    frames = families.film(4)
    batch = vlm.encode([chat(frames)])
    moved = torch.zeros_like(batch.image_mask)
    for place in range(len(frames)):
        others = [*frames[:place], families.picture(24, 24, seed=99), *frames[place + 1 :]]
        one = (embedded(vlm, batch) != embedded(vlm, vlm.encode([chat(others)]))).any(dim=-1)
        assert bool(one.any()) and not bool((one & ~batch.image_mask).any())
        moved |= one
    span, found = int(batch.image_mask.sum()), int(moved.sum())
    return f"{span}, all change" if found == span else f"{span}, {found} change"


def _text(vlm: VLM, **more: Any) -> str:
    batch = vlm.encode([chat(families.film(4), **more)])
    return str(vlm.tokenizer.decode(batch.ids[0][batch.span("text")[0]]))


def _captured(vlm: VLM) -> str:
    examples = [_example(index, size) for index, size in enumerate(_SIZES)]
    pools = [Pool.parse(text) for text in ("image:mean", "prompt:last", "response:max", "all:mean")]
    one, many = (capture(vlm, examples, sites=sites_of(vlm), pools=pools, batch_size=size) for size in (1, 3))
    for site, values in one.values.items():
        close(values, many.values[site])
    chats = [example.chat() for example in examples]
    with torch.no_grad():
        single = [vlm.forward(vlm.encode([chat]))[0] for chat in chats]
        for side in ("right", "left"):
            batch = vlm.encode(chats, padding_side=side)
            for found, real, expected in zip(vlm.forward(batch), batch.span("all"), single, strict=True):
                close(found[real], expected)
    return "yes"


def _worn(vlm: VLM) -> str:
    batch = vlm.encode([chat(families.film(4))])
    with torch.no_grad():
        before = vlm.forward(batch)
        with glasses_of(vlm).worn(vlm):
            assert float((vlm.forward(batch) - before).abs().max()) > 100 * WITHIN
        assert torch.equal(vlm.forward(batch), before)
    return "yes"


def _written(vlm: VLM) -> str:
    chats = [chat(families.film(4, *size, seed=index), words="what is " * index) for index, size in enumerate(_SIZES)]
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}
    assert vlm.generate(chats, **options) == [vlm.generate([one], **options)[0] for one in chats]
    return "yes"


def _example(index: int, size: tuple[int, int]) -> Example:
    frames = []
    for frame in families.film(4, *size, seed=index):
        file = io.BytesIO()
        frame.save(file, "PNG")
        frames.append(Picture(data=file.getvalue()))
    turn = Turn("user", (Video(tuple(frames), fps=1.0), Text("what is " * index + "this")))
    label: Any = "toxic" if index % 2 else "non-toxic"
    return Example(
        id=f"row-{index}", messages=(turn,), response=("a red dog", "you", "sorry I cannot")[index], label=label
    )
