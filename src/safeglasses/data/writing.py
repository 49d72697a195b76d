"""Writing examples as JSONL, the inverse of reading."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from safeglasses.data.pictures import FORMATS, Picture, Video
from safeglasses.data.records import Example, Text
from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_write_bytes, atomic_write_text


def write_examples(path: str | Path, examples: Iterable[Example]) -> None:
    """Write a ``.jsonl`` file that `read_examples` reads back to equal examples.

    Pictures below the file's folder are named by their relative path; all others are copied to ``images/``
    beside the file under a name from their hash.

    Raises:
        SafeglassesError: the file's name does not end in ``.jsonl``, or it cannot be written.
        BadRow: a picture has gone.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise SafeglassesError("examples are written as JSONL", given=str(path), expected="a name that ends in .jsonl")
    lines = [json.dumps(_row(example, path.parent), ensure_ascii=False) + "\n" for example in examples]
    atomic_write_text(path, "".join(lines))


def _row(example: Example, folder: Path) -> dict[str, object]:
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, Text)
                else {"type": "image", "path": _place(part, folder)}
                if isinstance(part, Picture)
                else _video(part, folder)
                for part in turn.content
            ],
        }
        for turn in example.messages
    ]
    row = {
        "id": example.id,
        "messages": messages,
        "response": example.response,
        "label": example.label,
        "pair_id": example.pair_id,
        "category": example.category,
        "language": example.language,
        "modality": example.modality,
        "condition": example.condition,
        "source": example.source,
        "split": example.split,
        "slots": dict(example.slots) or None,
    }
    return {name: value for name, value in row.items() if value is not None}


def _video(video: Video, folder: Path) -> dict[str, object]:
    frames: dict[str, object] = {"type": "video", "video": [_place(frame, folder) for frame in video.frames]}
    return frames if video.fps is None else {**frames, "fps": video.fps}


def _place(picture: Picture, folder: Path) -> str:
    if picture.data is None and picture.path is not None:
        path, root = picture.path.resolve(), folder.resolve()
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    data = picture.read()
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind = (image.format or "").lower()
    name = f"images/{picture.key[:32]}.{kind}"
    if not (folder / name).exists():
        atomic_write_bytes(folder / name, data)
    return name
