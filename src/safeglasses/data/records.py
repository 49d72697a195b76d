"""The user's data as records: an `Example` is a prompt with pictures, perhaps a response and a label."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from PIL import Image

from safeglasses.data.pictures import Picture, Video
from safeglasses.errors import SafeglassesError

if TYPE_CHECKING:
    import safeglasses.model.chat

Label = Literal["toxic", "non-toxic"]
Condition = Literal["standard", "adversarial"]
Split = Literal["find", "calibrate", "test"]
LABELS: tuple[Label, ...] = get_args(Label)
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Text:
    """A piece of text in a message."""

    text: str
    """The words, exactly as the model's chat template gets them."""


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    content: tuple[Text | Picture | Video, ...]
    """Texts, pictures and videos in the order in which the model sees them."""


@dataclass(frozen=True)
class Example:
    """One row of the user's data: a prompt, perhaps with a response to it.

    In *pairs* the label is about the response. In *prompts* ``toxic`` or no label means that the prompt tries
    to elicit harm, ``non-toxic`` that it is a benign control, whose response (if any) is a reference answer.
    """

    id: str
    """Unique in its file."""
    messages: tuple[Turn, ...]
    """The prompt; its last turn is the user's."""
    response: str | None = None
    """What the model answered, or should answer."""
    label: Label | None = None
    """See above."""
    pair_id: str | None = None
    """Rows that share it are variants of one item and stay in one split."""
    category: str | None = None
    """Kind of harm, for reports by category."""
    language: str | None = None
    """Language tag of prompt and response."""
    modality: str | None = None
    """Where the harm lies, e.g. ``text`` or ``image``."""
    condition: Condition = "standard"
    """``adversarial``: worded to elicit harm."""
    source: str | None = None
    """Where the row comes from."""
    split: Split = "find"
    """``find`` makes the evidence, ``calibrate`` tunes and checks it, ``test`` is measured."""
    slots: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What a right answer must mention, by kind: ``{"name": "cat", "colour": "red"}``."""

    @property
    def is_toxic(self) -> bool:
        """Whether the label is ``toxic`` (no label is not)."""
        return self.label == "toxic"

    @property
    def media(self) -> tuple[Picture | Video, ...]:
        """The pictures and videos of the prompt in order."""
        return media_of(self.messages)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures of the prompt in order, the frames of its videos among them."""
        shown = (part.frames if isinstance(part, Video) else (part,) for part in self.media)
        return tuple(picture for pictures in shown for picture in pictures)

    @property
    def n_images(self) -> int:
        """Number of pictures in the prompt, frames of videos not counted."""
        return self.layout[0]

    @property
    def n_frames(self) -> int:
        """Number of frames of all videos in the prompt."""
        return sum(self.layout[1:])

    @property
    def layout(self) -> tuple[int, ...]:
        """Number of pictures, then of the frames of each video, as `Chat.layout`: equal within a batch."""
        return layout_of(self.media)

    @cached_property
    def prompt_key(self) -> str:
        """SHA-256 of the messages, the bytes of the pictures included: equal for equal prompts."""
        return _digest(
            [turn.role, [part.text if isinstance(part, Text) else _key(part) for part in turn.content]]
            for turn in self.messages
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything in the row."""
        fields = (
            self.id,
            self.prompt_key,
            self.response,
            self.label,
            self.pair_id,
            self.category,
            self.language,
        )
        return _digest((*fields, self.modality, self.condition, self.source, self.split, sorted(self.slots.items())))

    def chat(self, with_response: bool = True) -> "safeglasses.model.chat.Chat":
        """Return what a model reads, with the pictures decoded now.

        Raises:
            BadRow: a picture has gone or has been damaged since it was read.
        """
        return self.chat_with(Picture.open, with_response=with_response)

    def chat_with(
        self, opened: Callable[[Picture], Image.Image], *, with_response: bool = True
    ) -> "safeglasses.model.chat.Chat":
        """Return the chat with ``opened(picture)`` in place of each picture and each frame."""
        from safeglasses.model.chat import Chat  # torch is only needed where models are

        return Chat(chat_messages(self.messages, opened), self.response if with_response else None)


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Rows in their order, with what was left out of them."""

    rows: tuple[Example, ...]
    """The usable rows."""
    skipped: tuple[str, ...] = ()
    """One message for each bad row that was skipped in reading."""
    sha256: str = ""
    """Hash of the rows' contents (pictures by their bytes) in their order; computed when not given."""

    def __post_init__(self) -> None:
        if not self.sha256:
            object.__setattr__(self, "sha256", _digest(row.digest for row in self.rows))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        return self._with(self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    def filter(self, keep: Callable[[Example], bool]) -> "Examples":
        """Return the rows for which ``keep`` is true."""
        return self._with(row for row in self.rows if keep(row))

    def split(self, name: str) -> "Examples":
        """Return the rows of one split.

        Raises:
            SafeglassesError: there is no split of that name.
        """
        if name not in SPLITS:
            raise SafeglassesError("no such split", given=repr(name), expected=", ".join(SPLITS))
        return self.filter(lambda row: row.split == name)

    @property
    def toxic(self) -> "Examples":
        """The rows labelled toxic."""
        return self.filter(lambda row: row.label == "toxic")

    @property
    def non_toxic(self) -> "Examples":
        """The rows labelled non-toxic."""
        return self.filter(lambda row: row.label == "non-toxic")

    def _with(self, rows: Iterable[Example]) -> "Examples":
        return replace(self, rows=tuple(rows), sha256="")


def media_of(messages: Iterable[Turn]) -> tuple[Picture | Video, ...]:
    """Return the pictures and videos of a chat in order."""
    return tuple(part for turn in messages for part in turn.content if not isinstance(part, Text))


def layout_of(media: Iterable[Picture | Video]) -> tuple[int, ...]:
    """Return the number of pictures, then of the frames of each video."""
    shown = tuple(media)
    films = [part for part in shown if isinstance(part, Video)]
    return (len(shown) - len(films), *(len(film.frames) for film in films))


def chat_messages(
    turns: Iterable[Turn], opened: Callable[[Picture], Image.Image] = Picture.open
) -> list[dict[str, Any]]:
    """Return turns as a model's `Chat` holds them, with ``opened(picture)`` in place of each picture and each frame.

    Raises:
        BadRow: a picture has gone or has been damaged since it was read.
    """

    def part_of(part: Text | Picture | Video) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        if isinstance(part, Picture):
            return {"type": "image", "image": opened(part)}
        rate = {} if part.fps is None else {"fps": part.fps}
        return {"type": "video", "video": [opened(frame) for frame in part.frames], **rate}

    return [{"role": turn.role, "content": [part_of(part) for part in turn.content]} for turn in turns]


def _key(part: Picture | Video) -> list[object]:
    return [part.key] if isinstance(part, Picture) else part.key


def _digest(value: Iterable[object]) -> str:
    return hashlib.sha256(json.dumps(list(value), ensure_ascii=False).encode("utf-8")).hexdigest()
