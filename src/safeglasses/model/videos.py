"""Videos in chats: how a family's own processor is given all of their frames, and what stands for them in counting."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from safeglasses.model.chat import Chat, Message
from safeglasses.model.processors import VIDEO, Processor

FPS = 1.0
"""Frames a second where neither the chat nor the processor says how many."""


def video_options(chats: Sequence[Chat], processor: Processor) -> dict[str, Any]:
    """Return what makes a processor take every frame, at the times at which they are said to be.

    Frames without a rate are as many a second as the processor takes itself (2 with Qwen-VL and GLM-V): what the model
    was made with.
    """
    if not any(chat.videos for chat in chats):
        return {}
    theirs = getattr(getattr(processor, VIDEO, None), "fps", None)
    rate = float(theirs) if isinstance(theirs, int | float) and theirs > 0 else FPS
    told = [[_metadata(part, rate) for part in chat.videos] for chat in chats]
    return {"do_sample_frames": False, "video_metadata": told}


def size_of(video: Mapping[str, Any]) -> tuple[int | float, ...]:
    """Return what the number of a video's tokens depends on: frames, width, height and frames a second."""
    frames = video["video"]
    return (len(frames), *frames[0].size, video.get("fps") or 0.0)


def with_stand_ins(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with videos of the same sizes, black and white by turns.

    Some processors leave out what repeats from frame to frame: these have the most tokens that any can have.
    """

    def stand_in(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part["type"] != "video":
            return part
        frames = [Image.new("RGB", frame.size, ("black", "white")[n % 2]) for n, frame in enumerate(part["video"])]
        return {**part, "video": frames}

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [stand_in(part) for part in message["content"]]}
        for message in messages
    ]


def _metadata(video: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """Return the fields of transformers' ``VideoMetadata``."""
    count, fps = len(video["video"]), float(video.get("fps") or rate)
    width, height = video["video"][0].size
    frames = {"total_num_frames": count, "frames_indices": list(range(count))}
    return {**frames, "fps": fps, "duration": count / fps, "width": width, "height": height}
