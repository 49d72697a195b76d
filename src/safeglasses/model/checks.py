"""What chats must be before a processor sees them: parts that are known, pictures and videos that the model takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_torchvision_available

from safeglasses.errors import SafeglassesError
from safeglasses.model.chat import Chat
from safeglasses.model.processors import VIDEO, Processor, without_video_half

_AS_PICTURES = "give the frames as pictures, several in one message"


def check_chats(chats: Sequence[Chat], processor: Processor, *, needs_picture: bool) -> None:
    """Check that chats can be one batch of a model.

    Raises:
        SafeglassesError: as `check_parts`; no chats, no picture where the model needs one, or unlike numbers of
            pictures or frames.
    """
    check_parts(chats, processor)
    if not chats:
        raise SafeglassesError("no chats to encode", expected="at least one")
    counts = [len(chat.images) for chat in chats]
    if needs_picture and not all(counts):
        raise SafeglassesError(
            "this model does not answer without a picture",
            given=f"no picture in chat {counts.index(0)}",
            expected="a picture in every chat: the model's forward demands pixel_values",
            do="give every example a picture, or leave those without out",
        )
    if len({chat.layout for chat in chats}) > 1:
        films = any(chat.videos for chat in chats)
        raise SafeglassesError(
            "the chats of one batch hold different numbers of pictures" + (" or of frames" if films else ""),
            given=", ".join(_counted(chat) for chat in chats),
            expected="the same number in every chat",
            do="group them with safeglasses.model.vlm.batches, by Chat.layout",
        )


def check_parts(chats: Sequence[Chat], processor: Processor) -> None:
    """Check every chat by itself.

    Raises:
        SafeglassesError: a sound or another kind of part; pictures for a text-only model; a video that is none, or that
            the model does not take.
    """
    for index, chat in enumerate(chats):
        for part in chat.parts:
            if part["type"] == "video":
                _check_frames(part, index)
            elif part["type"] not in ("text", "image"):
                raise SafeglassesError(
                    "a message holds what is neither text nor picture nor video",
                    given=f"a part of type {part['type']!r} in chat {index}",
                    expected='parts of type "text", "image" or "video"',
                    do="leave it out",
                )
    shown = [len(chat.images) + len(chat.videos) for chat in chats]
    if any(shown) and isinstance(processor, PreTrainedTokenizerBase):
        what = "picture" if any(chat.images for chat in chats) else "video"
        raise SafeglassesError(
            f"a {what} was given to a text-only model",
            given=f"{max(shown)} {what}(s) in chat {shown.index(max(shown))}",
            expected="chats with text alone",
            do=f"use a vision-language model, or take the {what}s out of the examples",
        )
    films = [index for index, chat in enumerate(chats) if chat.videos]
    if films:
        _check_half(chats, films, processor)


def _check_half(chats: Sequence[Chat], films: Sequence[int], processor: Processor) -> None:
    """Check that a processor prepares videos, and that it can tell them from pictures."""
    half, name = getattr(processor, VIDEO, None), type(processor).__name__
    if half is None and without_video_half(processor) and not is_torchvision_available():
        raise SafeglassesError(
            "videos need torchvision with this model",
            given=f"a video in chat {films[0]}; {name}, loaded without its video half",
            expected="torchvision, which transformers prepares videos with",
            do=f"pip install torchvision, in the build that matches torch; or {_AS_PICTURES}",
        )
    if half is None:
        raise SafeglassesError(
            "this model's processor takes no videos",
            given=f"a video in chat {films[0]}; {name}",
            expected="a model made for videos",
            do=_AS_PICTURES,
        )
    pictures = getattr(processor, "image_processor", None)
    both = set(half.model_input_names) & set([] if pictures is None else pictures.model_input_names)
    mixed = [index for index in films if chats[index].images]
    if both and mixed:
        raise _not_both(chats, mixed[0], f"{name} calls both {' and '.join(sorted(both))}")
    unlike = [index for index in films if len(set(chats[index].layout[1:])) > 1]
    if unlike and getattr(half, "do_pad", None):
        raise SafeglassesError(
            "this model's processor wants as many frames of every video in a chat",
            given=f"videos of {' and '.join(map(str, chats[unlike[0]].layout[1:]))} frames in chat {unlike[0]}; {name} "
            "fills up the shorter ones, and counts that in the prompt",
            expected="one number of frames",
            do=f"give them one number of frames, or {_AS_PICTURES}",
        )


def check_told_apart(chats: Sequence[Chat], inputs: Mapping[str, Tensor], tokens: Tensor) -> None:
    """Check that a model given pictures and videos finds the tokens of each.

    Args:
        chats: what was encoded.
        inputs: what the model would be given.
        tokens: the ids of the tokens of pictures and frames.

    Raises:
        SafeglassesError: both are given apart, behind one and the same token (GLM-4V: its forward counts all of them as
            pictures).
    """
    mixed = [index for index, chat in enumerate(chats) if chat.images and chat.videos]
    if mixed and {"pixel_values", "pixel_values_videos"} <= inputs.keys() and len(tokens.unique()) == 1:
        raise _not_both(chats, mixed[0], "one token stands for both, and the model counts it as pictures")


def _not_both(chats: Sequence[Chat], index: int, why: str) -> SafeglassesError:
    return SafeglassesError(
        "this model takes pictures or videos, not both in one chat",
        given=f"{len(chats[index].images)} picture(s) and {len(chats[index].videos)} video(s) in chat {index}; {why}",
        expected="chats with pictures alone or with videos alone",
        do="give the frames of the video as pictures too",
    )


def _check_frames(part: Mapping[str, Any], index: int) -> None:
    frames, fps = part.get("video"), part.get("fps")
    if not isinstance(frames, list | tuple) or not frames or not all(isinstance(f, Image.Image) for f in frames):
        raise SafeglassesError(
            "a video that is no list of frames",
            given=f"{'an empty list' if frames in ([], ()) else type(frames).__name__} in chat {index}",
            expected='{"type": "video", "video": [PIL image, …]}',
            do="decode the video first, e.g. ffmpeg -i clip.mp4 -vf fps=2 frames/%04d.png",
        )
    sizes = list(dict.fromkeys(frame.size for frame in frames))
    if len(sizes) > 1:
        raise SafeglassesError(
            "the frames of a video differ in size",
            given=" and ".join(f"{width} × {height}" for width, height in sizes[:2]) + f" in chat {index}",
            expected="one size for all frames",
            do=f"resize them to one size, or {_AS_PICTURES}",
        )
    if fps is not None and not (isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps < float("inf")):
        raise SafeglassesError(
            'the "fps" of a video is no rate',
            given=f"{fps!r} in chat {index}",
            expected="frames a second: a number above 0, or no such field",
        )


def _counted(chat: Chat) -> str:
    pictures, *films = chat.layout
    return str(pictures) + (f" and a video of {' and one of '.join(map(str, films))}" if films else "")


def check_system_turns(chats: Sequence[Chat], prompts: Sequence[str]) -> None:
    """Check that what system turns say stands in the prompts that a template made; spaces do not count.

    Raises:
        SafeglassesError: a template dropped them without a word, as some do.
    """
    for index, (chat, prompt) in enumerate(zip(chats, prompts, strict=True)):
        read = " ".join(prompt.split())
        for message in (message for message in chat.messages if message["role"] == "system"):
            content = message["content"]
            texts = [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
            lost = next((text for text in texts if " ".join(text.split()) not in read), None)
            if lost is not None:
                raise SafeglassesError(
                    "the model's chat template drops what a system turn says",
                    given=f"{lost[:60]!r} of chat {index}: it is not in the prompt that the template makes",
                    expected="a template that writes system turns",
                    do="say it in the user's turn, or leave the system turn out: nobody would read it",
                )
