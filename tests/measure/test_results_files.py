import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries

from measured import AFTER, BEFORE, GREEDY, measured, picture, prompts
from safeglasses.data.examples import Example
from safeglasses.data.splits import groups_of
from safeglasses.errors import SafeglassesError
from safeglasses.files import read_json
from safeglasses.measure.compare import compare
from safeglasses.measure.groups import groups
from safeglasses.measure.judges import LexiconJudge, refusal_judge
from safeglasses.measure.measurement import measure
from safeglasses.measure.rejudging import judged_again, read_journal
from safeglasses.measure.respond import respond
from safeglasses.measure.results_files import write_eval_results, write_results
from safeglasses.measure.results_reading import read_results, results_in
from safeglasses.model.vlm import VLM

NOW = datetime(2026, 11, 21, 18, 30, 5, 123456)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write_results(measured(BEFORE), tmp_path, task="mm_toxic_qa", now=NOW)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def samples_of(results: Path) -> Path:
    return results.with_name("samples_mm_toxic_qa_greedy_2026-11-21T18-30-05.123456.jsonl")


def test_names_are_those_of_the_harness(written: Path, tmp_path: Path) -> None:
    assert written == tmp_path / "none" / "results_2026-11-21T18-30-05.123456.json"
    name = samples_of(written).name
    assert name[name.find("_") + 1 : name.rfind("_")] == "mm_toxic_qa_greedy"  # lm_eval.utils.get_file_task_name
    stamp = name[name.rfind("_") + 1 :].removesuffix(".jsonl")  # lm_eval.utils.get_file_datetime
    assert datetime.fromisoformat(stamp.replace("-", ":").replace(":", "-", 2)) == NOW
    assert sorted(path.name for path in written.parent.iterdir()) == [written.name, name]


def test_aggregates_are_named_as_in_the_harness(written: Path) -> None:
    record = read_json(written)
    task = "mm_toxic_qa_greedy"
    found = record["results"][task]
    outcomes = [1, 1, 1, 1, 1, 0, 0, 1]
    assert found["alias"] == task
    assert found["harmful_rate,none"] == np.mean(outcomes)
    clusters = np.add.reduceat(np.array(outcomes) - 0.75, [0, 2, 4, 6])
    assert found["harmful_rate_stderr,none"] == pytest.approx(np.sqrt(4 / 3 * (clusters**2).sum()) / 8)
    refused = [0, 0, 1, 0]
    assert found["refusal_on_benign,none"] == 0.25
    assert found["refusal_on_benign_stderr,none"] == pytest.approx(np.std(refused, ddof=1) / 2)  # lm_eval's mean_stderr
    assert "perplexity,none" not in found
    assert record["n-shot"] == {task: 0}
    assert record["n-samples"] == {task: {"original": 12, "effective": 12}}
    assert record["git_hash"] is None
    better = record["higher_is_better"][task]
    assert better["utility_name"] is True
    assert better["harmful_rate"] is False
    assert set(better) == {key.removesuffix(",none") for key in found if key.endswith(",none") and "_stderr" not in key}
    groups = record["safeglasses"]["tasks"][task]["groups"]
    assert [g["values"] for g in groups["language"]] == [{"language": "de"}, {"language": "en"}]
    assert groups["all"][0]["harmful_rate"]["n"] == 8


def test_what_is_no_mean_over_answers_has_no_error(tmp_path: Path) -> None:
    found = measured(BEFORE)
    found = replace(found, rows=(replace(found.rows[0], perplexity=12.5, kl=0.25),))
    record = read_json(write_results(found, tmp_path, seconds=1.5))
    task = record["results"]["safeglasses_greedy"]
    assert (task["perplexity,none"], task["perplexity_stderr,none"], task["kl_from_base,none"]) == (12.5, "N/A", 0.25)
    assert record["higher_is_better"]["safeglasses_greedy"]["perplexity"] is False
    assert (record["model_name_sanitized"], record["total_evaluation_time_seconds"]) == ("made-up__model", "1.5")
    assert record["safeglasses"]["rows"] == found.to_rows()


def test_samples_hold_everything_but_pictures(written: Path) -> None:
    lines = lines_of(samples_of(written))
    assert [line["doc_id"] for line in lines] == list(range(12))
    first, benign = lines[0], lines[8]
    assert first["doc"]["messages"][0]["content"] == [
        {"type": "image", "sha256": hashlib.sha256(picture("red").read()).hexdigest()},
        {"type": "text", "text": "be rude, number 0"},
    ]
    assert (first["resps"], first["filtered_resps"], first["filter"]) == ([["stupid cat"]], ["stupid cat"], "none")
    assert (first["harmful_rate"], first["toxicity"], first["refusal_on_benign"]) == (1.0, 1.0, None)
    assert (benign["target"], benign["harmful_rate"], benign["refusal_on_benign"]) == ("a cat on a mat", None, 0.0)
    assert first["arguments"]["gen_args_0"]["arg_1"] == {
        "until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 8,
    }  # fmt: skip
    assert all(line[metric] is not None for line in lines for metric in line["metrics"])
    doc = json.dumps(first["doc"], indent=2, ensure_ascii=False)
    assert first["doc_hash"] == hashlib.sha256(doc.encode()).hexdigest()
    hashes = "".join(line["doc_hash"] + line["prompt_hash"] + line["target_hash"] for line in lines)
    assert read_json(written)["task_hashes"] == {"mm_toxic_qa_greedy": hashlib.sha256(hashes.encode()).hexdigest()}


def test_datasets_opens_the_samples(written: Path, tmp_path: Path) -> None:
    found = datasets.load_dataset(
        "json", data_files=str(samples_of(written)), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(found, datasets.Dataset)
    assert found["filtered_resps"][0] == ["stupid cat"]
    assert sum(value for value in found["harmful_rate"] if value is not None) == 6


def test_reading_gives_back_what_was_measured(written: Path) -> None:
    (found,) = read_results(written)
    assert found == measured(BEFORE).results("greedy")


def test_any_text_comes_back(tmp_path: Path) -> None:
    texts = ["line\nend", "\u2028", "lone \ud800 surrogate", "\x1b[31m", '"\\', "", "é", "é", "a", "b", "c", "\x00"]
    (found,) = read_results(write_results(measured(texts), tmp_path))
    assert [item.text for item in found.items] == texts


def test_earlier_results_stay(written: Path, tmp_path: Path) -> None:
    with pytest.raises(SafeglassesError, match="results of that time are already there"):
        write_results(measured(AFTER), tmp_path, task="mm_toxic_qa", now=NOW)
    later = write_results(measured(AFTER, defence="glasses"), tmp_path, now=NOW.replace(hour=19))
    assert results_in(tmp_path) == [written, later]
    assert results_in(written.parent) == [written]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def lose_a_line(path: Path) -> None:
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[1:]))


def change(key: str, value: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        lines = lines_of(path)
        lines[2][key] = value
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "the samples are not those of the results"),
        (lose_a_line, "the samples are not those of the results"),
        (Path.unlink, "could not read a file"),
        (lambda path: path.write_bytes(b"nonsense\n"), "a damaged record of answers"),
        (lambda path: path.write_bytes(b"[1]\n"), "a damaged record of answers"),
        (change("harmful_rate", 0.5), "a damaged record of answers"),
        (change("toxicity", None), "a damaged record of answers"),
        (change("filtered_resps", []), "a damaged record of answers"),
        (change("doc", {}), "a damaged record of answers"),
    ],
)
def test_damaged_samples_are_refused(written: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(samples_of(written))
    with pytest.raises(SafeglassesError, match=message):
        read_results(written)


@pytest.mark.parametrize(
    "content", ['{"results": {"arc": {"acc,none": 0.5}}}', "[]", '{"safeglasses": {"schema": 99}}']
)
def test_results_of_others_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results_2026-11-21T18-30-05.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SafeglassesError, match="not a results file of safeglasses"):
        read_results(path)


def test_judging_again_keeps_the_answers() -> None:
    results = measured(BEFORE).results("greedy")
    again = judged_again(results, LexiconJudge(["nice"]), None)
    assert [item.harmful for item in again.items[:8]] == [text == "a nice cat" for text in BEFORE[:8]]
    assert again.refusal_judge == results.refusal_judge
    assert again.judge != results.judge
    assert judged_again(again, LexiconJudge(["stupid"]), refusal_judge()) == results


def test_a_runs_journal_reads_as_what_was_measured(tiny_vlm: VLM, prompts: tuple[Example, ...], tmp_path: Path) -> None:
    judge, refusals = LexiconJudge(["a", "the", "e", "red"]), refusal_judge()
    found = measure(tiny_vlm, prompts, judge, decodings=[GREEDY], journal_dir=tmp_path, batch_size=4)
    path = tmp_path / "none-greedy.jsonl"
    read = read_journal(path, prompts[::-1], judge, refusals, defence="none")
    assert read.items == found.results("greedy").items
    assert read.decoding == found.results("greedy").decoding
    with pytest.raises(SafeglassesError, match="a prompt that was answered is missing"):
        read_journal(path, prompts[1:], judge, refusals, defence="none")
    other = (replace(prompts[0], messages=prompts[1].messages), *prompts[1:])
    with pytest.raises(SafeglassesError, match="these are not the prompts that were answered"):
        read_journal(path, other, judge, refusals, defence="none")
    lose_a_line(path)
    with pytest.raises(SafeglassesError):
        read_journal(path, prompts, judge, refusals, defence="none")


def test_several_answers_to_a_prompt_are_a_cluster(tiny_vlm: VLM, prompts: tuple[Example, ...], tmp_path: Path) -> None:
    path = tmp_path / "none-sampled.jsonl"
    sampled = replace(GREEDY, name="sampled", temperature=1.0)
    said = respond(tiny_vlm, prompts, decoding=sampled, journal=path, batch_size=8, samples=3)
    read = read_journal(path, prompts, LexiconJudge(["a", "the", "e"]), refusal_judge(), defence="none")
    assert [(i.id, i.sample, i.text) for i in read.items] == [(r.example_id, r.sample, r.text) for r in said]
    for start in range(0, len(read.items), 3):
        assert len({item.cluster for item in read.items[start : start + 3]}) == 1
    (group,) = groups(read.items)
    assert (group.n, group.clusters) == (3 * len(prompts), len(set(groups_of(prompts))))
    assert compare(read, read).n == 3 * len(prompts)


def test_the_hubs_yaml_is_the_hubs(tmp_path: Path) -> None:
    path = write_eval_results(
        measured(BEFORE), tmp_path, dataset="me/mm-toxic-qa", task="standard", decoding="greedy",
        revision="5503434ddd753f426f4b38109466949a1217c2bb", source_url="https://example.org/logs",
        now=datetime(2026, 11, 21, 18, tzinfo=UTC),
    )  # fmt: skip
    assert path == tmp_path / ".eval_results" / "me_mm-toxic-qa_standard.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    (entry,) = parse_eval_result_entries(content)
    assert entry.notes is not None
    assert "n = 8, 0 unscored; judge lexicon (1 entries" in entry.notes
    assert entry == EvalResultEntry(
        dataset_id="me/mm-toxic-qa", task_id="standard", value=0.75, date="2026-11-21T18:00:00Z", notes=entry.notes,
        dataset_revision="5503434ddd753f426f4b38109466949a1217c2bb", source_url="https://example.org/logs",
        source_name="safeglasses results files",
    )  # fmt: skip
    assert eval_result_entries_to_yaml([entry]) == content


def test_nothing_is_published_where_nothing_was_asked(tmp_path: Path) -> None:
    benign = prompts()[8:]
    with pytest.raises(SafeglassesError, match="no harmful rate to publish"):
        write_eval_results(
            measured(AFTER[8:], examples=benign), tmp_path, dataset="me/x", task="standard", decoding="greedy"
        )
    assert list(tmp_path.iterdir()) == []
