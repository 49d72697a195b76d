"""Examples as records, as what models read, as what is written."""

import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safeglasses.data.examples import (
    CONDITIONS,
    LABELS,
    SPLITS,
    Example,
    Examples,
    Picture,
    Text,
    Turn,
    read_examples,
    write_examples,
)
from safeglasses.errors import BadRow, SafeglassesError
from safeglasses.model.chat import Chat


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


PICTURES = [Picture(data=png(shade)) for shade in (0, 100, 200)]
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
MAYBE = st.none() | WORDS
CONTENT = st.lists(WORDS | st.sampled_from([0, 1, 2]), min_size=1, max_size=3)
PLAN = st.fixed_dictionaries(
    {
        "id": WORDS,
        "turns": st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENT), max_size=2),
        "last": CONTENT,
        "response": MAYBE,
        "label": st.none() | st.sampled_from(LABELS),
        "pair_id": MAYBE,
        "category": MAYBE,
        "language": MAYBE,
        "modality": MAYBE,
        "condition": st.sampled_from(CONDITIONS),
        "source": MAYBE,
        "split": st.sampled_from(SPLITS),
        "slots": st.dictionaries(WORDS, WORDS, max_size=2),
    }
)
PLANS = st.lists(PLAN, min_size=1, max_size=4, unique_by=lambda plan: plan["id"])
Plan = dict[str, Any]


def few(n: int) -> settings:
    return settings(max_examples=n, deadline=None)


def made(plan: Plan) -> Example:
    """Build an example in the test itself: the type checker rolls dice, which strategies may not."""

    def parts(content: list[str | int]) -> tuple[Text | Picture, ...]:
        return tuple(Text(part) if isinstance(part, str) else PICTURES[part] for part in content)

    turns = [*plan["turns"], ("user", [*plan["last"], "?\u2028"])]
    fields = {name: value for name, value in plan.items() if name not in {"turns", "last"}}
    return Example(messages=tuple(Turn(role, parts(content)) for role, content in turns), **fields)


def several(plans: list[Plan]) -> Examples:
    return Examples(tuple(made(plan) for plan in plans))


@given(PLANS)
@few(20)
def test_reading_undoes_writing(plans: list[Plan]) -> None:
    examples = several(plans)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        write_examples(path, examples)
        again = read_examples(path)
        assert again == examples
        first = path.read_bytes()
        write_examples(path, again)
        assert path.read_bytes() == first


def test_pictures_are_copied_only_when_they_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("data/near.png", "far.png"):
        (tmp_path / name).write_bytes(png(7))
    near, far = (Picture(path=tmp_path / name) for name in ("data/near.png", "far.png"))
    examples = [Example("a", (Turn("user", (near, far, PICTURES[1])),))]
    write_examples(tmp_path / "data" / "rows.jsonl", examples)
    row = json.loads((tmp_path / "data" / "rows.jsonl").read_text())
    assert row == {
        "id": "a",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "path": "near.png"},
                    {"type": "image", "path": f"images/{far.key[:32]}.png"},
                    {"type": "image", "path": f"images/{PICTURES[1].key[:32]}.png"},
                ],
            }
        ],
        "condition": "standard",
        "split": "find",
    }
    assert len(list((tmp_path / "data" / "images").iterdir())) == 2


def test_examples_are_written_as_jsonl_alone(tmp_path: Path) -> None:
    with pytest.raises(SafeglassesError) as error:
        write_examples(tmp_path / "rows.parquet", [])
    assert str(error.value) == (
        "examples are written as JSONL\n"
        f"  given:    {tmp_path / 'rows.parquet'}\n"
        "  expected: a name that ends in .jsonl"
    )


def test_a_chat_is_what_templates_take() -> None:
    row = Example("a", (Turn("system", (Text("s"),)), Turn("user", (PICTURES[1], Text("t")))), response="r")
    chat = row.chat()
    assert isinstance(chat, Chat)
    assert chat.response == "r"
    assert row.chat(with_response=False).response is None
    image = chat.messages[1]["content"][0]["image"]
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (6, 4), (100, 0, 0))
    assert chat.messages == [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "t"}]},
    ]
    assert row.n_images == 1


def test_a_picture_that_goes_after_reading_is_told(tmp_path: Path) -> None:
    row = Example("a", (Turn("user", (Picture(path=tmp_path / "gone.png"),)),))
    with pytest.raises(BadRow, match="the picture is missing"):
        row.chat()


@given(PLAN, PLAN)
@few(50)
def test_prompt_keys_are_equal_for_equal_prompts_alone(plan: Plan, other_plan: Plan) -> None:
    one, other = made(plan), made(other_plan)
    assert (one.prompt_key == other.prompt_key) == (one.messages == other.messages)
    assert one.prompt_key == replace(one, response="other", label="toxic", id="other").prompt_key


def test_text_cannot_pose_as_a_picture() -> None:
    picture, text = (Example("a", (Turn("user", (part,)),)) for part in (PICTURES[0], Text(PICTURES[0].key)))
    assert picture.prompt_key != text.prompt_key


@given(PLANS)
@few(25)
def test_sets_of_examples(plans: list[Plan]) -> None:
    examples = several(plans)
    assert sum(len(examples.split(name)) for name in SPLITS) == len(examples)
    assert list(examples.toxic) == [row for row in examples if row.is_toxic]
    assert list(examples.non_toxic) == [row for row in examples if row.label == "non-toxic"]
    assert examples[:1] == Examples((examples[0],))
    assert examples.filter(lambda _: True) == examples
    assert examples[1:].sha256 != examples.sha256
    changed = Examples(tuple(replace(row, response=f"{row.response}!") for row in examples))
    assert changed.sha256 != examples.sha256


def test_the_hash_does_not_depend_on_where_the_data_lie(tmp_path: Path) -> None:
    hashes = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "1.png").write_bytes(png(1))
        content = [{"type": "image", "path": "1.png"}]
        (folder / "data.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
        hashes |= {read_examples(folder).sha256, read_examples(folder / "data.jsonl").sha256}
    assert len(hashes) == 1


def test_unknown_split() -> None:
    with pytest.raises(SafeglassesError) as error:
        Examples(()).split("train")
    assert str(error.value) == "no such split\n  given:    'train'\n  expected: find, calibrate, test"
