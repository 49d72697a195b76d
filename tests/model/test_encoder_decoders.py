"""Models whose decoder answers what an encoder has read: spans, likelihoods, generation, refusals."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import families
from find.conftest import example_of
from safeglasses.errors import SafeglassesError
from safeglasses.measure.likelihood import force
from safeglasses.measure.respond import Decoding
from safeglasses.model.architectures import config_of
from safeglasses.model.loading import auto_class
from safeglasses.model.sampling import Settings, draw
from safeglasses.model.vlm import VLM, Chat, load
from safeglasses.protect.local import LocalAnswerer
from safeglasses.protect.steps import Ask, Contrast, Prompt, Said
from safeglasses.tune.encoding import IGNORED, encoded

BOTH = ("florence2", "t5gemma2")
GREEDY = Decoding("greedy", 0.0, 3, 0)
RESPONSES = ("a red dog", "you", "sorry I cannot help with that")


@pytest.fixture(params=BOTH)
def vlm(request: pytest.FixtureRequest, family: Callable[[str], VLM]) -> VLM:
    return family(request.param)


def chats(responses: tuple[str | None, ...] = RESPONSES) -> list[Chat]:
    return [Chat(families.messages(index), response) for index, response in enumerate(responses)]


def test_spans_of_both_sides(vlm: VLM) -> None:
    batch = vlm.encode(chats(), end_of_turn=True)
    assert batch.encoder is not None
    (token,), (start,), (stop,) = vlm.encoder.picture_ids, vlm.start_ids, vlm.stop_ids
    for row, response in enumerate(RESPONSES):
        assert batch.ids[row][batch.span("prompt")[row]].tolist() == [start]
        spoken = vlm.tokenizer(response, add_special_tokens=False)["input_ids"]
        assert batch.ids[row][batch.span("response")[row]].tolist() == [*spoken, stop]
        prompt = batch.encoder.ids[row][batch.encoder.span("prompt")[row]].tolist()
        assert vlm.tokenizer.decode(prompt).count("what is ") == row
        assert batch.encoder.span("image")[row].tolist() == [i == token for i in batch.encoder.ids[row].tolist()]
        assert int(batch.encoder.span("image")[row].sum()) in (9, 10)
    assert not batch.encoder.span("response").any()
    assert torch.equal(batch.n_tokens, batch.span("all").sum(dim=1) + batch.encoder.span("all").sum(dim=1))


@pytest.mark.parametrize("name", ["image", "text"])
def test_the_decoder_reads_nothing_of_the_prompt(vlm: VLM, name: str) -> None:
    with pytest.raises(SafeglassesError) as caught:
        vlm.encode(chats()).span(name)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "the decoder of an encoder–decoder reads nothing of the prompt itself\n"
        f"  given:    span {name} at sites of the decoder\n"
        "  expected: prompt (the start token, which has seen the whole prompt), response or all\n"
        "  do:       pool over prompt:last, or look at the encoder's sites"
    )


def test_generation_is_the_likeliest_token_again_and_again(vlm: VLM) -> None:
    """What `generate` says with its caches, `forward` says without, a chat at a time."""
    answers = vlm.generate(chats(), max_new_tokens=5, temperature=0.0, seed=0)
    drawn = draw(vlm, chats(), [Settings(5)] * 3)
    for chat, answer, row in zip(chats(), answers, drawn, strict=True):
        batch = vlm.encode([Chat(chat.messages)])
        inputs = dict(batch.inputs)
        del inputs["decoder_attention_mask"]
        for _ in range(5):
            with torch.no_grad():
                token = vlm.model(**inputs, use_cache=False).logits[:, -1:].argmax(dim=-1)
            inputs["decoder_input_ids"] = torch.cat([inputs["decoder_input_ids"], token], dim=1)
            if int(token) in vlm.stop_ids:
                break
        ids = inputs["decoder_input_ids"][0, 1:].tolist()
        expected = str(vlm.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        assert answer == row.text == expected
        assert row.n_prompt == int(batch.n_tokens)


def test_answers_that_have_begun_do_not_depend_on_each_other(vlm: VLM) -> None:
    rows = [Settings(4, prefix=prefix) for prefix in ("a red dog", "", "you")]
    together = draw(vlm, chats(), rows)
    for chat, row, answer in zip(chats(), rows, together, strict=True):
        assert draw(vlm, [chat], [row]) == [answer]
        assert answer.text.startswith(row.prefix)


def test_likelihoods_are_those_of_the_models_own_loss(vlm: VLM) -> None:
    with torch.no_grad():
        forced = force(vlm, vlm.encode(chats(), end_of_turn=True))
    for chat, total in zip(chats(), forced.totals.tolist(), strict=True):
        prompt = vlm.encode([Chat(chat.messages)])
        labels = torch.tensor([[*vlm.tokenizer(chat.response, add_special_tokens=False)["input_ids"], *vlm.stop_ids]])
        inputs = {n: v for n, v in prompt.inputs.items() if not n.startswith("decoder_")}
        start = torch.tensor([vlm.start_ids])
        with torch.no_grad():
            read = torch.cat([start, labels[:, :-1]], dim=1)
            loss = vlm.model(**inputs, decoder_input_ids=read, labels=labels).loss
        assert total == pytest.approx(-float(loss) * labels.shape[1], abs=1e-4)


def test_targets_of_tuning_are_the_response_alone(vlm: VLM) -> None:
    examples = [example_of(i, response=text) for i, text in enumerate(RESPONSES)]
    made = encoded(vlm, examples)
    labels = made.pop("labels")
    batch = vlm.encode([e.chat() for e in examples], end_of_turn=True)
    assert labels.shape == batch.ids.shape
    with torch.no_grad():
        logits = vlm.model(**made, use_cache=False).logits
        losses = cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        assert float(losses) == pytest.approx(-float(force(vlm, batch).totals.sum()), abs=1e-3)


def test_a_forced_first_token_is_no_part_of_the_answer(tmp_path: Path, family: Callable[[str], VLM]) -> None:
    folder = Path(shutil.copytree(family("florence2").source, tmp_path / "forced"))
    path = folder / "generation_config.json"
    path.write_text(path.read_text().replace("{", '{"forced_bos_token_id": 1,', 1))
    vlm = load(folder)
    assert vlm.start_ids == (2, 1)
    batch = vlm.encode(chats())
    assert batch.ids[:, :2].tolist() == [[2, 1]] * 3
    assert batch.prompt_length.tolist() == [2] * 3
    assert vlm.generate(chats(), max_new_tokens=3, temperature=0.0, seed=0) == [
        row.text for row in draw(vlm, chats(), [Settings(3)] * 3)
    ]


def test_no_contrast_with_an_encoder(vlm: VLM) -> None:
    prompt = Prompt.of(example_of(1))
    with pytest.raises(SafeglassesError) as caught:
        LocalAnswerer(vlm).answer([Ask("answer", replace(prompt, contrast=Contrast()))], GREEDY)
    assert caught.value.what == "decoding by contrast needs a model without an encoder"
    (said,) = LocalAnswerer(vlm).answer([Ask("answer", prompt)], GREEDY)
    assert isinstance(said, Said)
    chat = example_of(1).chat(with_response=False)
    assert [said.text] == vlm.generate([chat], max_new_tokens=3, temperature=0.0, seed=0)


@pytest.mark.parametrize("model_type", ["vision-encoder-decoder", "pix2struct", "pp_formulanet", "udop"])
def test_encoders_that_take_no_chat(model_type: str) -> None:
    reads = "where words lie on a page" if model_type == "udop" else "no text"
    with pytest.raises(SafeglassesError) as caught:
        auto_class("here", config_of(model_type)[0])
    assert caught.value.what == f"an encoder–decoder whose encoder reads {reads}"
    assert caught.value.given == f"here of type {model_type!r}"
