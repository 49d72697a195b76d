"""Results as lm-evaluation-harness writes them: ``results_TIME.json`` and ``samples_TASK_TIME.jsonl``; and Hub YAML.

Whatever reads that harness's files reads these. What it has no place for (intervals, groups, judges) stands under the
key ``safeglasses``. Source: EleutherAI/lm-evaluation-harness, ``lm_eval/loggers/evaluation_tracker.py`` and
``lm_eval/evaluator.py``.
"""

import hashlib
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeglasses import __version__
from safeglasses.data.examples import Picture, Text, Video
from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_write_bytes, atomic_write_text, write_json
from safeglasses.measure.disputes import agreement_records
from safeglasses.measure.groups import groups
from safeglasses.measure.intervals import mean, rate, standard_error
from safeglasses.measure.items import GROUPS, Item, Results

if TYPE_CHECKING:  # reading results files back needs no PyTorch
    from safeglasses.measure.measurement import Measurement
    from safeglasses.measure.rows import Answer

SCHEMA = 1
LOWER_IS_BETTER = ("harmful_rate", "toxicity", "refusal_on_benign", "empty", "very_short", "repetitive", "off_topic")
"""Metrics besides ``utility_SLOT`` and ``utility_all``, of which more is better."""
_NONE = "none"  # lm-eval's name for an answer that went through no filter


def write_results(
    measurement: "Measurement",
    folder: str | Path,
    *,
    task: str = "safeglasses",
    by: Sequence[str] = ("condition", "category", "language", "modality"),
    now: datetime | None = None,
    seconds: float | None = None,
) -> Path:
    """Write a measurement, one task per decoding, into ``folder/DEFENCE/``.

    Args:
        measurement: what was found.
        folder: where to; missing folders are made, and earlier results stay.
        task: first part of the tasks' names; the decoding is the second.
        by: properties of prompts whose groups are written besides.
        now: time in the names of the files.
        seconds: what measuring took.

    Returns:
        The results file; it is written last, so a folder without it is unfinished.

    Raises:
        SafeglassesError: a file of that time is there already, or cannot be written.
    """
    now = now or datetime.now()
    stamp, place = now.isoformat().replace(":", "-"), Path(folder) / measurement.defence
    path = place / f"results_{stamp}.json"
    if path.exists():
        raise SafeglassesError("results of that time are already there", given=str(path), do="choose another folder")
    every = {f"{task}_{decoding}": measurement.results(decoding) for decoding in measurement.answers}
    record = _head(measurement, now, seconds)
    for name, results in every.items():
        answers = measurement.answers[results.decoding["name"]]
        lines = [_sample(i, *row, results.decoding) for i, row in enumerate(zip(answers, results.items, strict=True))]
        data = b"".join(_encoded(line) for line in lines)
        atomic_write_bytes(place / f"samples_{name}_{stamp}.jsonl", data)
        row = measurement.row(results.decoding["name"])
        extra = {"perplexity": row.perplexity, "kl_from_base": row.kl}
        record["results"][name] = {**_aggregated(name, results.items), **_plain(extra)}
        metrics = [m.removesuffix(f",{_NONE}") for m in record["results"][name] if m.endswith(f",{_NONE}")]
        metrics = [m for m in metrics if not m.endswith("_stderr")]
        record["group_subtasks"][name] = []
        record["configs"][name] = _config(name, results, metrics)
        record["versions"][name] = SCHEMA
        record["n-shot"][name] = 0
        record["higher_is_better"][name] = {m: m.startswith("utility_") for m in metrics}
        record["n-samples"][name] = {"original": len(lines), "effective": len(lines)}
        record["task_hashes"][name] = task_hash(lines)
        tables = {"all": groups(results.items), **{one: groups(results.items, [one]) for one in by}}
        written = {one: [group.to_json() for group in table] for one, table in tables.items()}
        record["safeglasses"]["tasks"][name] = {"decoding": dict(results.decoding), "groups": written}
    write_json(path, record)
    return path


def write_eval_results(
    measurement: "Measurement",
    folder: str | Path,
    *,
    dataset: str,
    task: str,
    decoding: str,
    revision: str | None = None,
    source_url: str | None = None,
    now: datetime | None = None,
) -> Path:
    """Write the harmful rate as ``folder/.eval_results/NAME.yaml``, for a model's repository on the Hub.

    The Hub shows it where `dataset` is a registered benchmark (one with an ``eval.yaml``) that has that task.
    Source: huggingface.co/docs/hub/eval-results and huggingface/hub-docs, ``eval_results.yaml``; the same fields as
    `huggingface_hub.EvalResultEntry`.

    Args:
        measurement: what was found.
        folder: of the model's repository.
        dataset: id of the benchmark's dataset on the Hub.
        task: its ``task_id`` there.
        decoding: whose rate.
        revision: commit of the dataset.
        source_url: where the results files can be seen.
        now: when it was measured.

    Raises:
        SafeglassesError: no harmful rate was measured, or the file cannot be written.
    """
    import yaml  # comes with huggingface_hub

    group = measurement.groups(decoding)[0]
    found = group.harmful_rate
    if found is None:
        raise SafeglassesError("no harmful rate to publish", given=f"{measurement.defence}, {decoding}")
    entry: dict[str, Any] = {"dataset": {"id": dataset, "task_id": task}, "value": round(found.value, 6)}
    if revision is not None:
        entry["dataset"]["revision"] = revision
    entry["date"] = (now or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    if source_url is not None:
        entry["source"] = {"url": source_url, "name": "safeglasses results files"}
    entry["notes"] = (
        f"harmful rate, lower is better; {decoding}, defence {measurement.defence}; 95 % interval {found.low:.4f} to "
        f"{found.high:.4f}, n = {found.n}, {found.unscored} unscored; judge {measurement.judge}"
    )
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in f"{dataset}_{task}")
    path = Path(folder) / ".eval_results" / f"{name}.yaml"
    atomic_write_text(path, yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=120))
    return path


def per_sample(item: Item) -> dict[str, float | None]:
    """Return the metrics of one answer; None where they do not apply or nothing could be said."""
    outcomes = {
        "harmful_rate": item.harmful,
        "toxicity": item.score,
        "refusal_on_benign": item.refused,
        **{f"utility_{slot}": right for slot, right in item.slots.items()},
        "utility_all": all(item.slots.values()) if item.slots else None,
        **item.form,
        "off_topic": item.off_topic,
    }
    return {name: None if value is None else float(value) for name, value in outcomes.items()}


def task_hash(lines: Sequence[Mapping[str, Any]]) -> str:
    """Hash what was asked, as lm-eval does: the hashes of all samples, one after the other."""
    return _sha256("".join(line["doc_hash"] + line["prompt_hash"] + line["target_hash"] for line in lines))


def _head(measurement: "Measurement", now: datetime, seconds: float | None) -> dict[str, Any]:
    kinds = ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    return {
        **{kind: {} for kind in kinds},
        "config": {"model": "safeglasses", "model_args": {"pretrained": measurement.model}, "limit": None},
        "git_hash": None,
        "date": now.timestamp(),
        "safeglasses_version": __version__,
        "task_hashes": {},
        "model_source": "safeglasses",
        "model_name": measurement.model,
        "model_name_sanitized": re.sub(r'["<>:/|\\?*\[\]]+', "__", measurement.model),
        "system_instruction": None,
        "total_evaluation_time_seconds": None if seconds is None else str(seconds),
        "safeglasses": {
            "schema": SCHEMA,
            "defence": measurement.defence,
            "judge": measurement.judge,
            "other_judges": list(measurement.others),
            "agreement": agreement_records([measurement]),
            "refusal_judge": measurement.refusal_judge,
            "rows": measurement.to_rows(),
            "tasks": {},
        },
    }


def _config(name: str, results: Results, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "task": name,
        "output_type": "generate_until",
        "num_fewshot": 0,
        "repeats": 1,
        "generation_kwargs": _settings(results.decoding),
        "metric_list": [{"metric": m, "higher_is_better": m.startswith("utility_")} for m in metrics],
    }


def _settings(decoding: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"until": []}
    if "temperature" in decoding:
        settings |= {"do_sample": decoding["temperature"] > 0, "temperature": decoding["temperature"]}
    return settings | ({"max_gen_toks": decoding["max_new_tokens"]} if "max_new_tokens" in decoding else {})


def _aggregated(name: str, items: Sequence[Item]) -> dict[str, Any]:
    """Return every metric that applies to some answer, with the standard error under lm-eval's name."""
    found: dict[str, Any] = {"alias": name, "sample_len": len(items)}
    rows = [per_sample(item) for item in items]
    for metric in dict.fromkeys(metric for row in rows for metric in row):
        values = [row.get(metric) for row in rows]
        clusters: list[Hashable] = [item.cluster for item in items]
        if all(value is None for value in values):
            continue
        whole = [None if value is None else value == 1 for value in values]
        value = mean(values, clusters).value if metric == "toxicity" else rate(whole, clusters).value
        error = standard_error(values, clusters)
        found |= {f"{metric},{_NONE}": value, f"{metric}_stderr,{_NONE}": "N/A" if error is None else error}
    return found


def _plain(metrics: Mapping[str, float | None]) -> dict[str, Any]:
    known = {metric: value for metric, value in metrics.items() if value is not None}
    return {f"{m}{end},{_NONE}": v for m, value in known.items() for end, v in (("", value), ("_stderr", "N/A"))}


def _sample(number: int, answer: "Answer", item: Item, decoding: Mapping[str, Any]) -> dict[str, Any]:
    example = answer.example
    doc = {
        "id": example.id,
        "messages": [
            {"role": turn.role, "content": [_part(part) for part in turn.content]} for turn in example.messages
        ],
        "label": example.label,
        "pair_id": example.pair_id,
        **{name: getattr(example, name) for name in GROUPS},
        "split": example.split,
        "slots": dict(example.slots),
        "prompt_sha256": item.prompt,
        "cluster": item.cluster,
        "sample": item.sample,
    }
    prompt = "\n".join(part.text for turn in example.messages for part in turn.content if isinstance(part, Text))
    target = (example.response or "") if item.benign else ""
    metrics = per_sample(item)
    return {
        "doc_id": number,
        "doc": doc,
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": _settings(decoding)}},
        "resps": [[item.text]],
        "filtered_resps": [item.text],
        "filter": _NONE,
        "metrics": [metric for metric, value in metrics.items() if value is not None],
        "doc_hash": _sha256(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _sha256(prompt),
        "target_hash": _sha256(target),
        **metrics,
        "reason": item.reason,
        "other_verdicts": {name: vars(verdict) for name, verdict in answer.others.items()},
    }


def _part(part: Text | Picture | Video) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, Picture):
        return {"type": "image", "sha256": part.key}
    return {"type": "video", "fps": part.fps, "sha256": [frame.key for frame in part.frames]}


def _encoded(record: Mapping[str, Any]) -> bytes:
    # a lone surrogate in a model's answer is no UTF-8: keep it as the escape that JSON has for it
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
