import io
from collections.abc import Callable

import pytest
from PIL import Image

from safeglasses.data.examples import Example, Picture, Text, Turn


@pytest.fixture(scope="session")
def example() -> Callable[..., Example]:
    """Builds an example: a picture of one colour (none for None) and a question."""
    pictures: dict[str, Picture] = {}

    def picture(colour: str) -> Picture:
        if colour not in pictures:
            file = io.BytesIO()
            Image.new("RGB", (32, 32), colour).save(file, "PNG")
            pictures[colour] = Picture(data=file.getvalue())
        return pictures[colour]

    def build(id: str, text: str = "what is in the picture", colour: str | None = "red", **fields) -> Example:
        content = (*((picture(colour),) if colour else ()), Text(text))
        return Example(id=id, messages=(Turn("user", content),), **fields)

    return build


@pytest.fixture(scope="session")
def prompts(example: Callable[..., Example]) -> tuple[Example, ...]:
    """Eliciting and benign prompts in both conditions, of different lengths, some without a picture."""
    colours = ["red", "blue", "green", None]
    rows = []
    for i in range(14):
        benign = i % 3 == 2
        rows.append(
            example(
                f"p{i:02d}",
                "describe what you see" + " please" * (i % 5),
                colours[i % 4],
                label="non-toxic" if benign else (None if i % 2 else "toxic"),
                condition="adversarial" if i % 4 == 1 else "standard",
                response=("a red dog", "the blue cat on a green chair")[i % 2] if benign and i != 8 else None,
                slots={"name": "dog"} | ({"color": "red"} if i % 2 else {}),
            )
        )
    return tuple(rows)
