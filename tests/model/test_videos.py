"""Videos by every family's own processor: which tokens are theirs, by brute force, and that batches change nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import families
from circle import close, embedded
from films import chat
from safeglasses.errors import SafeglassesError
from safeglasses.model.vlm import VLM, Batch, Chat

pytestmark = [
    pytest.mark.torchvision,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # NumPy's, on GLM's processors
]
TIMED = (
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm46v",
    "glm4v_moe",
    "video_llama_3",
    "gemma4",
    "smolvlm",
)
"""Those that write when each frame was taken, as text between the frames."""
STACKED = ("llava_onevision", "internvl", "llava_next_video", "video_llava", "smolvlm")
"""Those that want as many frames of every video in a chat."""
APART = ("glm4v", "glm46v", "glm4v_moe", "smolvlm")
"""Those that take pictures or videos, not both in one chat."""
Frames = list[Image.Image]


def changed(
    vlm: VLM, build: Callable[[Sequence[Frames]], Chat], films: Sequence[Frames], film: int, frame: int
) -> Tensor:
    """Return the tokens whose embeddings change with one frame."""
    others = [[*frames] for frames in films]
    others[film][frame] = families.picture(*films[film][frame].size, seed=99)
    first, second = (vlm.encode([build(chosen)]) for chosen in (films, others))
    assert torch.equal(first.ids, second.ids)
    return (embedded(vlm, first) != embedded(vlm, second)).any(dim=-1)


@pytest.mark.parametrize("name", families.VIDEOS)
def test_the_span_is_what_changes_with_the_frames(family: Callable[[str], VLM], name: str) -> None:
    """Two videos around a picture where a chat may hold both; of an odd number of frames the last may count twice."""
    vlm = family(name)
    films, stills = (
        [families.film(3), families.film(3, 32, 20, seed=1)],
        [families.picture(24, 24, seed=7)] * (name not in APART),
    )

    def build(chosen: Sequence[Frames]) -> Chat:
        return chat(chosen[0], *stills, chosen[1])

    batch = vlm.encode([build(films)])
    of = [[changed(vlm, build, films, film, frame) for frame in range(3)] for film in range(2)]
    assert all(bool(moved.any()) for frames in of for moved in frames), "a frame that nothing depends on"
    whole = [torch.stack(frames).any(dim=0) for frames in of]
    assert not (whole[0] & whole[1]).any(), "a token belongs to one video"
    alone = vlm.encode([chat(*stills)]).image_mask.sum()
    span = batch.image_mask
    assert not ((whole[0] | whole[1]) & ~span).any()
    rest = span & ~whole[0] & ~whole[1]
    fixed = int(rest.sum() - alone)  # what ends a video, learned once
    assert 0 <= fixed <= 2
    assert not fixed or name == "llava_onevision"
    assert bool(batch.span("text").any())


@pytest.mark.parametrize("name", families.VIDEOS)
def test_batches_and_padding_change_nothing(family: Callable[[str], VLM], name: str) -> None:
    vlm = family(name)
    words = ("this", "what is what is this")
    chats = [
        chat(families.film(4), words=words[0], response="you", fps=1),
        chat(families.film(4, 36, 24, seed=1), words=words[1], response="a red dog", fps=0.5),
    ]
    single = [vlm.encode([one]) for one in chats]
    with torch.no_grad():
        alone = [vlm.forward(batch)[0] for batch in single]
        for side in ("right", "left"):
            both: Batch = vlm.encode(chats, padding_side=side)
            logits = vlm.forward(both)
            for row, expected in enumerate(alone):
                real = both.span("all")[row]
                close(logits[row][real], expected)
                for span in ("image", "text", "prompt", "response"):
                    assert torch.equal(both.span(span)[row][real], single[row].span(span)[0]), span
    answers = vlm.generate(chats, max_new_tokens=4, temperature=0.0, seed=0)
    assert answers == [vlm.generate([one], max_new_tokens=4, temperature=0.0, seed=0)[0] for one in chats]


@pytest.mark.parametrize("name", families.VIDEOS)
def test_lengths_are_those_of_encoding(family: Callable[[str], VLM], name: str) -> None:
    vlm = family(name)
    chats = [chat(families.film(4)), chat(families.film(6, 36, 24), fps=0.1), chat(families.picture(24, 24))]
    assert vlm.lengths(chats) == [int(vlm.encode([one]).n_tokens) for one in chats]
    still = chat([families.picture(24, 24)] * 4)
    assert vlm.lengths([still])[0] >= int(vlm.encode([still]).n_tokens), "what repeats may be left out"


@pytest.mark.parametrize("name", families.VIDEOS)
def test_videos_with_unlike_numbers_of_frames(family: Callable[[str], VLM], name: str) -> None:
    vlm = family(name)
    mixed = chat(families.film(2), families.film(4, seed=1))
    if name in STACKED:
        with pytest.raises(SafeglassesError, match="as many frames of every video in a chat"):
            vlm.encode([mixed])
    else:
        assert int(vlm.encode([mixed]).image_mask.sum()) > int(vlm.encode([chat(families.film(4))]).image_mask.sum())
    with pytest.raises(SafeglassesError) as caught:
        vlm.encode([chat(families.film(2)), chat(families.film(4)), chat(families.film(2), families.film(2))])
    assert str(caught.value) == (
        "the chats of one batch hold different numbers of pictures or of frames\n"
        "  given:    0 and a video of 2, 0 and a video of 4, 0 and a video of 2 and one of 2\n"
        "  expected: the same number in every chat\n"
        "  do:       group them with safeglasses.model.vlm.batches, by Chat.layout"
    )


@pytest.mark.parametrize("name", families.VIDEOS)
def test_times_of_frames_are_text(family: Callable[[str], VLM], name: str) -> None:
    """They are no picture tokens, and follow the rate: the chat's own, else the processor's."""
    vlm = family(name)
    rate = vlm.processor.video_processor.fps or 1
    frames = families.film(4)

    def words(**more: Any) -> str:
        batch = vlm.encode([chat(frames, **more)])
        return str(vlm.tokenizer.decode(batch.ids[0][batch.span("text")[0]]))

    assert words() == words(fps=rate)
    assert (words() != words(fps=0.01)) == (name in TIMED)
    if name == "qwen3_vl":
        assert "<0.5 seconds><|vision_start|><|vision_end|><2.5 seconds>" in words(fps=1)
    if name == "qwen2_5_vl":
        assert vlm.encode([chat(frames, fps=3)]).inputs["second_per_grid_ts"].tolist() == pytest.approx([2 / 3])


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "gemma4"])
def test_the_same_as_transformers_own_processor(family: Callable[[str], VLM], name: str) -> None:
    """With all frames and their times said, in transformers' own words."""
    vlm = family(name)
    one = chat(families.film(4), response=None, fps=2)
    processor: Any = vlm.processor
    metadata = {"total_num_frames": 4, "fps": 2.0, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
    expected = processor(
        text=processor.apply_chat_template(list(one.messages), add_generation_prompt=True),
        videos=[one.messages[0]["content"][0]["video"]],
        video_metadata=[metadata],
        do_sample_frames=False,
        add_special_tokens=False,
        return_tensors="pt",
    )
    found = vlm.encode([one]).inputs
    for key in ("input_ids", "pixel_values_videos", "pixel_values", "video_grid_thw", "mm_token_type_ids"):
        assert (key in found) == (key in expected)
        assert key not in found or torch.equal(found[key], expected[key])


@pytest.mark.parametrize("name", APART)
def test_pictures_beside_a_video_that_a_model_could_not_tell_apart(family: Callable[[str], VLM], name: str) -> None:
    with pytest.raises(SafeglassesError) as caught:
        family(name).encode([chat(families.film(2), families.picture(24, 24))])
    why = "one token stands for both, and the model counts it as pictures"
    if name == "smolvlm":
        why = "SmolVLMProcessor calls both pixel_attention_mask and pixel_values"
    assert str(caught.value) == (
        "this model takes pictures or videos, not both in one chat\n"
        f"  given:    1 picture(s) and 1 video(s) in chat 0; {why}\n"
        "  expected: chats with pictures alone or with videos alone\n"
        "  do:       give the frames of the video as pictures too"
    )


def test_seconds_between_frames_keep_their_precision(family: Callable[[str], VLM]) -> None:
    vlm = family("qwen2_5_vl")
    encoder = replace(vlm.encoder, dtype=torch.bfloat16)
    inputs = encoder.encode([chat(families.film(4), fps=3)], "right").inputs
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 / 3])


def test_a_video_of_one_frame_where_two_make_a_patch(family: Callable[[str], VLM]) -> None:
    with pytest.raises(SafeglassesError) as caught:
        family("qwen3_vl").encode([chat(families.film(1))])
    assert "t:1 must be larger than temporal_factor:2" in caught.value.given
