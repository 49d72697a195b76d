import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safeglasses.data.examples import Example, Text, Turn, Video
from safeglasses.errors import SafeglassesError
from safeglasses.measure.respond import Decoding, in_pieces, resolve_batch_size, respond
from safeglasses.model.vlm import VLM, Chat

SAMPLED = Decoding("sampled", temperature=1.0, max_new_tokens=6, seed=7)
GREEDY = Decoding("greedy", temperature=0.0, max_new_tokens=6)


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tiny_vlm: VLM, prompts: Sequence[Example]) -> list[str]:
    """What an uninterrupted sampled run gives."""
    return [r.text for r in respond(tiny_vlm, prompts, decoding=SAMPLED, batch_size=3)]


def test_answers_come_in_the_order_of_the_prompts(tiny_vlm: VLM, prompts: Sequence[Example]) -> None:
    responses = respond(tiny_vlm, prompts, decoding=GREEDY, batch_size=4)
    alone = respond(tiny_vlm, prompts, decoding=GREEDY, batch_size=1)
    assert [r.example_id for r in responses] == [e.id for e in prompts]
    assert [r.text for r in responses] == [r.text for r in alone]  # padding changes no greedy answer
    chat = prompts[3].chat(with_response=False)
    assert tiny_vlm.generate([chat], max_new_tokens=6, temperature=0.0, seed=0) == [responses[3].text]
    assert len({r.text for r in responses}) > 1
    assert all(r.n_tokens == len(tiny_vlm.tokenizer.tokenize(r.text)) and r.sample == 0 for r in responses)


def test_sampling_depends_on_the_seed_alone(tiny_vlm: VLM, prompts: Sequence[Example], whole: list[str]) -> None:
    state = torch.random.get_rng_state()
    torch.manual_seed(123)
    again = respond(tiny_vlm, prompts, decoding=SAMPLED, batch_size=3)
    torch.random.set_rng_state(state)
    other = respond(tiny_vlm, prompts, decoding=replace(SAMPLED, seed=8), batch_size=3)
    assert [r.text for r in again] == whole
    assert [r.text for r in other] != whole


def test_batches_of_the_same_prompt_are_sampled_apart(tiny_vlm: VLM, prompts: Sequence[Example]) -> None:
    responses = respond(tiny_vlm, prompts[:2], decoding=SAMPLED, batch_size=1, samples=6)
    assert [(r.example_id, r.sample) for r in responses] == [(e.id, s) for e in prompts[:2] for s in range(6)]
    assert len({r.text for r in responses[:6]}) > 3


def test_progress_counts_answers(tiny_vlm: VLM, prompts: Sequence[Example]) -> None:
    seen: list[tuple[int, int]] = []
    respond(
        tiny_vlm,
        prompts,
        decoding=GREEDY,
        batch_size=5,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (14, 14)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("after", [1, 2, 4])
@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_killed_run_goes_on_with_the_same_texts(
    tiny_vlm: VLM,
    prompts: Sequence[Example],
    whole: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    cut: int,
) -> None:
    journal, calls = tmp_path / "runs" / "answers.jsonl", []

    def kill(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == after:
            raise KilledError

    with pytest.raises(KilledError):
        respond(tiny_vlm, prompts, decoding=SAMPLED, batch_size=3, journal=journal, progress=kill)
    content = journal.read_bytes()
    assert content.count(b"\n") == 1 + calls[-1]
    journal.write_bytes(content[: len(content) - cut])  # the machine went down while writing

    asked: list[Chat] = []
    generate = VLM.generate

    def counted(self: VLM, chats: Sequence[Chat], **options) -> list[str]:
        asked.extend(chats)
        return generate(self, chats, **options)

    monkeypatch.setattr(VLM, "generate", counted)
    resumed = respond(tiny_vlm, prompts, decoding=SAMPLED, batch_size=3, journal=journal)
    assert [r.text for r in resumed] == whole
    lost = calls[-1] - (calls[-2] if len(calls) > 1 else 0) if cut else 0
    assert len(asked) == len(prompts) - calls[-1] + lost

    asked.clear()
    seen: list[int] = []
    again = respond(
        tiny_vlm,
        prompts,
        decoding=SAMPLED,
        batch_size=3,
        journal=journal,
        progress=lambda done, _: seen.append(done),
    )
    assert (again, asked, seen) == (resumed, [], [len(prompts)])
    assert len(journal.read_bytes().splitlines()) == 1 + len(prompts)


@pytest.mark.parametrize("kept", [0, 10])
def test_a_journal_cut_in_its_header_begins_anew(
    tiny_vlm: VLM, prompts: Sequence[Example], whole: list[str], tmp_path: Path, kept: int
) -> None:
    journal = tmp_path / "answers.jsonl"
    respond(tiny_vlm, prompts, decoding=SAMPLED, batch_size=3, journal=journal)
    journal.write_bytes(journal.read_bytes()[:kept])
    assert [r.text for r in respond(tiny_vlm, prompts, decoding=SAMPLED, batch_size=3, journal=journal)] == whole


def test_a_journal_of_another_run_is_refused(tiny_vlm: VLM, prompts: Sequence[Example], tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    respond(tiny_vlm, prompts, decoding=GREEDY, batch_size=3, journal=journal)
    before = journal.read_bytes()
    changes: list[tuple[str, dict]] = [
        ("defence", {"defence": "glasses"}),
        ("batch_size", {"batch_size": 4}),
        ("decoding", {"decoding": replace(GREEDY, max_new_tokens=5)}),
    ]
    for name, change in changes:
        with pytest.raises(SafeglassesError, match="the journal belongs to another run") as error:
            respond(tiny_vlm, prompts, **{"decoding": GREEDY, "batch_size": 3, "journal": journal, **change})
        assert error.value.given.startswith(f"{journal} with {name}=")
        assert error.value.expected.startswith(f"{name}=")
        assert error.value.do == "delete it or choose another folder; to resume, run with the same inputs"
    with pytest.raises(SafeglassesError, match="prompts='"):
        respond(tiny_vlm, prompts[1:], decoding=GREEDY, batch_size=3, journal=journal)
    assert journal.read_bytes() == before


@pytest.mark.parametrize("damage", ["not json", "{}", "[]", "swap", "extra", "no newline"])
def test_a_damaged_journal_is_refused(tiny_vlm: VLM, prompts: Sequence[Example], tmp_path: Path, damage: str) -> None:
    journal = tmp_path / "answers.jsonl"
    respond(tiny_vlm, prompts, decoding=GREEDY, batch_size=3, journal=journal)
    lines, line = journal.read_text().splitlines(), 3
    if damage == "swap":
        lines[1], lines[2], line = lines[2], lines[1], 2
    elif damage == "extra":
        lines, line = [*lines, lines[-1]], len(lines) + 1
    elif damage == "no newline":
        lines, line = ["somebody's notes"], 1
    else:
        lines[2] = damage
    journal.write_text("\n".join(lines) + "\n" * (damage != "no newline"))
    before = journal.read_bytes()
    with pytest.raises(SafeglassesError, match="the journal is damaged") as error:
        respond(tiny_vlm, prompts, decoding=GREEDY, batch_size=3, journal=journal)
    assert error.value.given == f"{journal}, line {line}"
    assert journal.read_bytes() == before


def test_any_text_survives_the_journal(
    tiny_vlm: VLM, prompts: Sequence[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = ["", "two\nlines\r\n", "line\u2028separator", "\ud800 half a pair", '"quoted" \\', "\x00\x1f", "😀"]
    monkeypatch.setattr(VLM, "generate", lambda self, chats, **options: odd[: len(chats)])
    monkeypatch.setattr("safeglasses.measure.respond._token_counts", lambda vlm, texts: [1] * len(texts))
    journal = tmp_path / "answers.jsonl"
    first = respond(tiny_vlm, prompts, decoding=GREEDY, batch_size=7, journal=journal)
    assert respond(tiny_vlm, prompts, decoding=GREEDY, batch_size=7, journal=journal) == first
    assert set(odd[:3]) <= {r.text for r in first}
    header = json.loads(journal.read_bytes().split(b"\n")[0])
    assert list(header) == ["schema", "key", "model", "defence", "decoding", "prompts", "batch_size"]


def test_out_of_memory_halves_the_batch_and_a_resumed_run_remembers(
    tiny_vlm: VLM, prompts: Sequence[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, sizes = VLM.generate, []

    def tight(self: VLM, chats: Sequence[Chat], **options) -> list[str]:
        sizes.append(len(chats))
        if len(chats) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return generate(self, chats, **options)

    monkeypatch.setattr(VLM, "generate", tight)
    journal = tmp_path / "answers.jsonl"

    def kill(done: int, total: int) -> None:
        if done > 3:  # after the first batch that did not fit
            raise KilledError

    expected = respond(tiny_vlm, prompts, decoding=SAMPLED, batch_size=6)
    assert sizes == [3, 6, 3, 3, 3, 2]
    with pytest.raises(KilledError):
        respond(tiny_vlm, prompts, decoding=SAMPLED, batch_size=6, journal=journal, progress=kill)
    sizes.clear()
    resumed = respond(tiny_vlm, prompts, decoding=SAMPLED, batch_size=6, journal=journal)
    assert resumed == expected
    assert sizes == [3, 2]


def test_pieces_keep_the_order_and_stop_at_one() -> None:
    def fits(limit: int):
        def run(rows: Sequence[int]) -> list[int]:
            if len(rows) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory\nmore")
            return [10 * row for row in rows]

        return run

    rows = list(range(9))
    for limit, size in ((9, 8), (3, 2), (2, 2), (1, 1)):
        assert in_pieces(rows, 8, fits(limit)) == ([10 * row for row in rows], size)
    with pytest.raises(SafeglassesError, match="one row alone does not fit into memory") as error:
        in_pieces(rows, 8, fits(0))
    assert error.value.given == "CUDA out of memory"


def test_errors_name_what_was_given(tiny_vlm: VLM, prompts: Sequence[Example]) -> None:
    with pytest.raises(SafeglassesError, match="nothing to answer") as error:
        respond(tiny_vlm, [], decoding=GREEDY)
    assert error.value.given == "0 prompts, 1 answers each"
    with pytest.raises(SafeglassesError, match="several greedy answers are one answer"):
        respond(tiny_vlm, prompts, decoding=GREEDY, samples=2)
    for size in (0, -1, "all"):
        with pytest.raises(SafeglassesError, match="bad batch size"):
            respond(tiny_vlm, prompts, decoding=GREEDY, batch_size=size)
    for change in ({"temperature": -0.1}, {"max_new_tokens": 0}):
        with pytest.raises(SafeglassesError, match="bad decoding"):
            replace(GREEDY, **change)
    assert resolve_batch_size(tiny_vlm, "auto") == 32


def test_a_prompt_that_the_model_does_not_take_stops_the_run_before_its_first_answer(
    tiny_vlm: VLM, prompts: Sequence[Example], tmp_path: Path
) -> None:
    (picture,) = prompts[0].pictures
    turn = Turn("user", (Video((picture, picture)), Text("what is this")))
    with pytest.raises(SafeglassesError, match="this model's processor takes no videos"):
        respond(tiny_vlm, [*prompts, Example("film", (turn,))], decoding=GREEDY, journal=tmp_path / "journal.jsonl")
    assert list(tmp_path.iterdir()) == []
