from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import is_torchvision_available

import families
from safeglasses.errors import SafeglassesError
from safeglasses.model.vlm import VLM, Batch, Chat, batches

# transformers' glm4v processor lets numpy convert tensors in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
RESPONSES = ("a red dog", "you", "", "sorry I cannot help with that", "Grüße 🐕")


def chats(vlm: VLM, responses: Sequence[str | None] = RESPONSES) -> list[Chat]:
    return [
        Chat(families.messages(index, pictures=int(vlm.is_multimodal)), response)
        for index, response in enumerate(responses)
    ]


def text_of(vlm: VLM, ids: Any, **options: Any) -> str:
    return str(vlm.tokenizer.decode(ids, **options))


def ids_of(batch: Batch, row: int, name: Literal["image", "prompt", "response", "all"]) -> list[int]:
    return batch.ids[row][batch.span(name)[row]].tolist()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_lengths_are_those_of_encoding(family: Callable[[str], VLM], name: str) -> None:
    vlm = family(name)
    many = [*chats(vlm), *chats(vlm, [None] * 5)]
    assert vlm.lengths(many) == [int(vlm.encode([chat]).n_tokens) for chat in many]
    mixed = [Chat(families.messages(2, pictures=number), "a dog") for number in families.PICTURES[name]]
    assert vlm.lengths(mixed) == [int(vlm.encode([chat]).n_tokens) for chat in mixed]
    assert vlm.lengths([]) == []


@pytest.mark.parametrize("name", families.FAMILIES)
def test_encoding_is_what_generation_sees(
    family: Callable[[str], VLM], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = family(name)
    seen: dict[str, Any] = {}
    real: Any = vlm.model.generate

    def spy(**inputs: Any) -> Any:
        seen.update(inputs)
        return real(**inputs)

    monkeypatch.setattr(vlm.model, "generate", spy)
    vlm.generate(chats(vlm), max_new_tokens=1, temperature=0.0, seed=0)
    batch = vlm.encode(chats(vlm))
    for row, response in enumerate(RESPONSES):
        prompt = seen["input_ids"][row][seen["attention_mask"][row].bool()].tolist()
        tokens = vlm.tokenizer(response, add_special_tokens=False)["input_ids"]
        if batch.encoder is None:
            assert ids_of(batch, row, "all") == prompt + tokens
        else:
            assert ids_of(batch.encoder, row, "all") == prompt
            assert ids_of(batch, row, "all") == seen["decoder_input_ids"][row].tolist() + tokens


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "mllama", "llama"])
def test_spans(family: Callable[[str], VLM], name: str, side: Any) -> None:
    vlm = family(name)
    batch = vlm.encode(chats(vlm), padding_side=side)
    for row, response in enumerate(RESPONSES):
        assert text_of(vlm, ids_of(batch, row, "response")) == response
        assert ids_of(batch, row, "prompt") + ids_of(batch, row, "response") == ids_of(batch, row, "all")
        text = text_of(vlm, ids_of(batch, row, "prompt"))
        assert text.startswith("<s><|user|>") and text.endswith("what is " * row + "this<|end|><|assistant|>")
        assert set(ids_of(batch, row, "image")) <= vlm.encoder.picture_ids
        assert bool(ids_of(batch, row, "image")) == vlm.is_multimodal
        assert int(batch.prompt_length[row]) == len(ids_of(batch, row, "prompt"))
        assert int(batch.last_prompt[row]) == int(batch.prompt_mask[row].nonzero().max())
    assert not bool((batch.span("image") & ~batch.span("prompt")).any())
    padding = ~batch.span("all")
    pad: Any = vlm.tokenizer.pad_token_id
    assert batch.inputs["input_ids"][padding].eq(pad).all()
    assert bool(padding[:, 0 if side == "left" else -1].any()) and not bool(
        padding[:, -1 if side == "left" else 0].any()
    )


def test_picture_spans_have_the_models_length(family: Callable[[str], VLM]) -> None:
    llava = family("llava")
    assert llava.encode(chats(llava)).image_mask.sum(dim=1).tolist() == [9] * 5
    qwen = family("qwen2_vl")
    batch = qwen.encode(chats(qwen))
    assert batch.image_mask.sum(dim=1).tolist() == (batch.inputs["image_grid_thw"].prod(dim=1) // 4).tolist()


def test_response_tokens_are_text_to_the_model(family: Callable[[str], VLM]) -> None:
    for name, key in (("qwen2_vl", "mm_token_type_ids"), ("gemma3", "token_type_ids")):
        vlm = family(name)
        batch = vlm.encode(chats(vlm))
        kinds = batch.inputs.get(key, batch.inputs.get("mm_token_type_ids"))
        assert kinds is not None
        assert not bool(kinds[batch.response_mask].any())
        assert bool((kinds.bool() == batch.image_mask).all())


def test_an_answer_behind_a_prompt_that_is_read_both_ways_is_not_part_of_it(family: Callable[[str], VLM]) -> None:
    """PaliGemma's prompt sees itself whole; an answer must change nothing of what the prompt is to the model."""
    vlm = family("paligemma")
    batch = vlm.encode(chats(vlm))
    assert batch.inputs["token_type_ids"].tolist() == batch.response_mask.long().tolist()
    with torch.no_grad():
        logits, bare = vlm.forward(batch), vlm.forward(vlm.encode(chats(vlm, [None] * len(RESPONSES))))
    for row in range(len(RESPONSES)):
        prompt = batch.prompt_mask[row].nonzero()[:, 0]
        torch.testing.assert_close(logits[row, prompt], bare[row, prompt], atol=1e-5, rtol=0)


def test_a_model_that_needs_a_picture(family: Callable[[str], VLM]) -> None:
    with pytest.raises(SafeglassesError) as caught:
        family("blip_2").encode([Chat(families.messages(0, pictures=0))])
    assert str(caught.value) == (
        "this model does not answer without a picture\n"
        "  given:    no picture in chat 0\n"
        "  expected: a picture in every chat: the model's forward demands pixel_values\n"
        "  do:       give every example a picture, or leave those without out"
    )


def test_logits_from(tiny_vlm: VLM, family: Callable[[str], VLM]) -> None:
    for vlm in (tiny_vlm, family("llama")):
        batch = vlm.encode(chats(vlm))
        with torch.no_grad():
            whole = vlm.forward(batch)
            torch.testing.assert_close(vlm.forward(batch, logits_from=5), whole[:, 5:], atol=1e-5, rtol=0)
        with pytest.raises(SafeglassesError, match="no such column"):
            vlm.forward(batch, logits_from=whole.shape[1])


def test_gradient_mode_is_the_callers(tiny_vlm: VLM) -> None:
    batch = tiny_vlm.encode(chats(tiny_vlm))
    assert tiny_vlm.forward(batch).requires_grad
    with torch.no_grad():
        assert not tiny_vlm.forward(batch).requires_grad


def test_plain_strings_and_system_messages(tiny_vlm: VLM, family: Callable[[str], VLM]) -> None:
    talk = [{"role": "system", "content": "sorry"}, {"role": "user", "content": "what"}]
    for vlm in (tiny_vlm, family("llama")):
        ids = vlm.encode([Chat(talk)]).inputs["input_ids"][0]
        assert text_of(vlm, ids) == "<s><|system|>sorry<|end|><|user|>what<|end|><|assistant|>"


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_a_template_that_drops_a_system_turn_is_an_error(
    family: Callable[[str], VLM], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    vlm = family(name)
    user = {"role": "user", "content": [{"type": "text", "text": "what"}]}
    plain = [Chat([user]), Chat([{"role": "system", "content": "  never\n curse "}, user], "a dog")]
    parts = Chat([{"role": "system", "content": [{"type": "text", "text": "be kind"}]}, user])
    theirs: Any = vlm.processor.chat_template
    trimmed = theirs.replace("{{ m.content }}", "{{ m.content | trim }}").replace("{{ c.text }}", "{{ c.text | trim }}")
    monkeypatch.setattr(vlm.processor, "chat_template", trimmed)
    assert len(vlm.lengths([*plain, parts])) == len(vlm.encode([*plain, parts]).ids) == 3
    dropping = theirs.replace("for m in messages", "for m in messages if m.role != 'system'")
    monkeypatch.setattr(vlm.processor, "chat_template", dropping)
    assert vlm.lengths(plain[:1]) == [len(vlm.encode(plain[:1]).ids[0])]
    for refused in (vlm.lengths, vlm.encode):
        with pytest.raises(SafeglassesError) as caught:
            refused(plain)
        assert caught.value.what == "the model's chat template drops what a system turn says"
        assert caught.value.given.startswith("'  never\\n curse ' of chat ")
        assert caught.value.do == "say it in the user's turn, or leave the system turn out: nobody would read it"
        with pytest.raises(SafeglassesError, match="drops what a system turn says"):
            refused([parts])


def test_greedy_equals_repeated_forward(tiny_vlm: VLM) -> None:
    text = ""
    with torch.no_grad():
        ids = tiny_vlm.encode(chats(tiny_vlm, [None])).inputs
        for _ in range(5):
            logits = tiny_vlm.model(**ids).logits[0, -1]
            ids["input_ids"] = torch.cat([ids["input_ids"], logits.argmax()[None, None]], dim=1)
            ids["attention_mask"] = torch.ones_like(ids["input_ids"])
            text = text_of(tiny_vlm, ids["input_ids"][0, -1 - _ :], skip_special_tokens=True).strip()
    assert tiny_vlm.generate(chats(tiny_vlm, [None]), max_new_tokens=5, temperature=0.0, seed=0) == [text]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "mllama", "llama", "gpt2"])
def test_greedy_does_not_depend_on_the_batch(family: Callable[[str], VLM], name: str) -> None:
    vlm = family(name)
    options: Any = {"max_new_tokens": 4, "temperature": 0.0, "seed": 0}
    alone = [vlm.generate([chat], **options)[0] for chat in chats(vlm)]
    assert vlm.generate(chats(vlm), **options) == alone


def test_sampling_is_reproducible_and_leaves_no_trace(tiny_vlm: VLM) -> None:
    state, theirs = torch.get_rng_state(), tiny_vlm.model.generation_config
    options: Any = {"max_new_tokens": 8, "temperature": 1.0}
    first = tiny_vlm.generate(chats(tiny_vlm), **options, seed=1)
    assert tiny_vlm.generate(chats(tiny_vlm), **options, seed=1) == first
    assert tiny_vlm.generate(chats(tiny_vlm), **options, seed=2) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_vlm.model.generation_config is theirs


def test_checkpoint_settings_do_not_leak_into_generation(tiny_vlm: VLM) -> None:
    options: Any = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}
    before = tiny_vlm.generate(chats(tiny_vlm), **options)
    theirs = tiny_vlm.model.generation_config
    theirs.repetition_penalty, theirs.top_k, theirs.min_new_tokens = 5.0, 1, 6
    try:
        assert tiny_vlm.generate(chats(tiny_vlm), **options) == before
    finally:
        theirs.repetition_penalty = theirs.top_k = theirs.min_new_tokens = None


def test_picture_for_a_text_only_model(family: Callable[[str], VLM]) -> None:
    vlm = family("llama")
    with pytest.raises(SafeglassesError) as caught:
        vlm.encode([Chat(families.messages(0, pictures=0)), Chat(families.messages(0))])
    assert str(caught.value) == (
        "a picture was given to a text-only model\n"
        "  given:    1 picture(s) in chat 1\n"
        "  expected: chats with text alone\n"
        "  do:       use a vision-language model, or take the pictures out of the examples"
    )
    with pytest.raises(SafeglassesError, match="text-only"):
        vlm.lengths([Chat(families.messages(0))])


def test_unequal_numbers_of_pictures(tiny_vlm: VLM) -> None:
    with pytest.raises(SafeglassesError) as caught:
        tiny_vlm.encode([Chat(families.messages(0)), Chat(families.messages(0, pictures=2))])
    assert str(caught.value) == (
        "the chats of one batch hold different numbers of pictures\n"
        "  given:    1, 2\n"
        "  expected: the same number in every chat\n"
        "  do:       group them with safeglasses.model.vlm.batches, by Chat.layout"
    )


def test_end_of_turn_follows_each_response(tiny_vlm: VLM) -> None:
    plain, ended = tiny_vlm.encode(chats(tiny_vlm)), tiny_vlm.encode(chats(tiny_vlm), end_of_turn=True)
    for row, response in enumerate(RESPONSES):
        ending = [tiny_vlm.tokenizer.eos_token_id] if response else []
        assert ids_of(ended, row, "response") == ids_of(plain, row, "response") + ending
    assert tiny_vlm.stop_ids == (tiny_vlm.tokenizer.eos_token_id,)


def test_placeholders_in_an_answer_stay_text(tiny_vlm: VLM) -> None:
    answers = ["see <image> here", "a dog"]
    batch = tiny_vlm.encode(chats(tiny_vlm, answers))
    assert text_of(tiny_vlm, ids_of(batch, 0, "response")) == answers[0]
    assert not tiny_vlm.encoder.picture_ids.intersection(ids_of(batch, 0, "response"))
    with torch.no_grad():
        tiny_vlm.forward(batch)
    assert tiny_vlm.lengths(chats(tiny_vlm, answers)) == batch.attention_mask.sum(dim=1).tolist()


def test_chats_that_the_model_cannot_take(tiny_vlm: VLM, family: Callable[[str], VLM]) -> None:
    talk = families.messages(0)
    talk[0]["content"].append({"type": "text", "text": "and <image>?"})
    with pytest.raises(SafeglassesError) as caught:
        tiny_vlm.encode([Chat(talk)])
    assert caught.value.what == "the model's chat template or processor refuses a chat"
    picky = family("llama").processor
    theirs = picky.chat_template
    picky.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(SafeglassesError) as caught:
            family("llama").encode([Chat(families.messages(0, pictures=0))])
    finally:
        picky.chat_template = theirs
    assert str(caught.value) == (
        "the model's chat template or processor refuses a chat\n"
        "  given:    roles must alternate\n"
        "  expected: roles in an order that the template knows, and no picture placeholder in the texts\n"
        "  do:       mend the messages: drop system turns, join turns of one role, remove <image> etc."
    )


def video(frames: object, **more: object) -> list[Chat]:
    return [Chat([{"role": "user", "content": [{"type": "video", "video": frames, **more}]}])]


def test_videos_are_refused_where_a_model_takes_none_and_their_frames_taken(family: Callable[[str], VLM]) -> None:
    frames = families.film(3)
    with pytest.raises(SafeglassesError) as caught:
        family("llava").encode(video(frames))
    assert str(caught.value) == (
        "this model's processor takes no videos\n"
        "  given:    a video in chat 0; LlavaProcessor\n"
        "  expected: a model made for videos\n"
        "  do:       give the frames as pictures, several in one message"
    )
    pictures = [{"type": "image", "image": frame} for frame in frames]
    assert int(family("llava").encode([Chat([{"role": "user", "content": pictures}])]).image_mask.sum()) == 27
    with pytest.raises(SafeglassesError, match="a video was given to a text-only model"):
        family("llama").encode(video(frames))


@pytest.mark.skipif(is_torchvision_available(), reason="there is torchvision")
def test_videos_without_torchvision(family: Callable[[str], VLM]) -> None:
    for use in (family("qwen3_vl").encode, family("qwen3_vl").lengths):
        with pytest.raises(SafeglassesError) as caught:
            use(video(families.film(3)))
        assert str(caught.value) == (
            "videos need torchvision with this model\n"
            "  given:    a video in chat 0; Qwen3VLProcessor, loaded without its video half\n"
            "  expected: torchvision, which transformers prepares videos with\n"
            "  do:       pip install torchvision, in the build that matches torch; or give the frames as pictures, "
            "several in one message"
        )


@pytest.mark.parametrize(
    ("frames", "more", "text"),
    [
        (
            "clip.mp4",
            {},
            "a video that is no list of frames\n"
            "  given:    str in chat 0\n"
            '  expected: {"type": "video", "video": [PIL image, …]}\n'
            "  do:       decode the video first, e.g. ffmpeg -i clip.mp4 -vf fps=2 frames/%04d.png",
        ),
        ([], {}, "a video that is no list of frames\n  given:    an empty list in chat 0"),
        (
            [families.picture(24, 24), families.picture(30, 24)],
            {},
            "the frames of a video differ in size\n"
            "  given:    24 × 24 and 30 × 24 in chat 0\n"
            "  expected: one size for all frames\n"
            "  do:       resize them to one size, or give the frames as pictures, several in one message",
        ),
        (
            families.film(2),
            {"fps": 0},
            'the "fps" of a video is no rate\n'
            "  given:    0 in chat 0\n"
            "  expected: frames a second: a number above 0, or no such field",
        ),
        (families.film(2), {"fps": float("nan")}, 'the "fps" of a video is no rate'),
        (families.film(2), {"fps": "2"}, 'the "fps" of a video is no rate'),
    ],
)
def test_what_is_no_video(tiny_vlm: VLM, frames: object, more: dict[str, object], text: str) -> None:
    for use in (tiny_vlm.encode, tiny_vlm.lengths):
        with pytest.raises(SafeglassesError) as caught:
            use(video(frames, **more))
        assert str(caught.value).startswith(text)


def test_other_parts_are_refused(tiny_vlm: VLM) -> None:
    with pytest.raises(SafeglassesError) as caught:
        tiny_vlm.encode([Chat([{"role": "user", "content": [{"type": "audio", "audio": "bark.wav"}]}])])
    assert str(caught.value) == (
        "a message holds what is neither text nor picture nor video\n"
        "  given:    a part of type 'audio' in chat 0\n"
        '  expected: parts of type "text", "image" or "video"\n'
        "  do:       leave it out"
    )


def test_no_chats(tiny_vlm: VLM) -> None:
    with pytest.raises(SafeglassesError, match="no chats to encode"):
        tiny_vlm.encode([])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50))), st.integers(1, 8))
def test_batches_hold_every_index_once_and_never_mix(keys: list[tuple[int, int]], size: int) -> None:
    found = batches(keys, size)
    assert sorted(index for batch in found for index in batch) == list(range(len(keys)))
    for batch in found:
        assert len(batch) <= size
        assert len({keys[index][0] for index in batch}) == 1
    assert found == batches(keys, size)
    assert [keys[index] for batch in found for index in batch] == sorted(keys)
