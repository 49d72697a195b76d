"""Schema 1 of `summary.json`, checked key by key."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safeglasses.errors import SafeglassesError

SCHEMA = 1
DEFENCES = ("none", "aura", "sgm", "glasses")
CONDITIONS = ("all", "standard", "adversarial")
DECODINGS = ("sampled", "greedy")
STAGES = ("capture", "statistics", "calibrate", "measure", "total")
RATES = ("refusal_on_benign", "empty", "very_short")
Number = float | int
"""A JSON number: 0.0 may come back as 0."""


def _bad(path: str, value: object, expected: str) -> SafeglassesError:
    return SafeglassesError(
        "summary is not valid",
        given=f"{path} = {value!r}",
        expected=expected,
        do="write summaries with safeglasses.report.build_summary",
    )


def _keys(path: str, value: object, required: Sequence[str], optional: Sequence[str] = ()) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _bad(path, value, "an object")
    missing = [k for k in required if k not in value]
    unknown = [k for k in value if k not in required and k not in optional]
    if missing or unknown:
        said = [f"no {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(map(str, unknown))}"] * bool(
            unknown
        )
        raise SafeglassesError(
            "summary is not valid",
            given=f"{path} has {'; '.join(said)}",
            expected=f"exactly the keys {', '.join(required)}",
            do="write summaries with safeglasses.report.build_summary",
        )
    return value


def _number(path: str, value: object, low: float, high: float, *, null: bool = False) -> None:
    if value is None and null:
        return
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= float(value) <= high:  # type: ignore[arg-type]
        span = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise _bad(path, value, f"a number {span}{' or null' if null else ''}")


def _count(path: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _bad(path, value, "a whole number of at least 0")


def _one_of(path: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise _bad(path, value, f"one of {', '.join(map(str, choices))}")


def _text(path: str, value: object) -> None:
    if not isinstance(value, str):
        raise _bad(path, value, "text")


def _rate(path: str, value: object, *, unscored: bool) -> None:
    if value is None:
        return
    base = ("value", "low", "high", "n")
    rate = _keys(path, value, (*base, "unscored") if unscored else base, () if unscored else ("unscored",))
    for name in base[:3]:
        _number(f"{path}.{name}", rate[name], 0.0, 1.0)
    _count(f"{path}.n", rate["n"])
    if rate["n"] == 0:
        raise _bad(f"{path}.n", 0, "at least 1: a rate over nothing is null")
    if not rate["low"] <= rate["value"] <= rate["high"]:
        raise _bad(path, dict(rate), "low ≤ value ≤ high")
    if "unscored" in rate:
        _count(f"{path}.unscored", rate["unscored"])


def _row(path: str, value: object) -> None:
    keys = ("defence", "condition", "decoding", "harmful_rate", "utility", "perplexity", "kl", *RATES)
    row = _keys(path, value, keys)
    for name, choices in (("defence", DEFENCES), ("condition", CONDITIONS), ("decoding", DECODINGS)):
        _one_of(f"{path}.{name}", row[name], choices)
    _rate(f"{path}.harmful_rate", row["harmful_rate"], unscored=True)
    if row["utility"] is not None:
        for slot, rate in _keys(f"{path}.utility", row["utility"], (), tuple(row["utility"])).items():
            _rate(f"{path}.utility.{slot}", rate, unscored=False)
    _number(f"{path}.perplexity", row["perplexity"], 1.0, math.inf, null=True)
    _number(f"{path}.kl", row["kl"], -1e-6, math.inf, null=True)
    for name in RATES:
        _rate(f"{path}.{name}", row[name], unscored=False)


def _list(path: str, value: object) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _bad(path, value, "a list")
    return value


def _agreement(path: str, value: object) -> None:
    """Check what several judges said about the answers of one defence and decoding."""
    keys = ("defence", "decoding", "rates", "kappas", "disagreements", "n_disagreements")
    record = _keys(path, value, keys)
    _one_of(f"{path}.defence", record["defence"], DEFENCES)
    _one_of(f"{path}.decoding", record["decoding"], DECODINGS)
    _entries(f"{path}.rates", record["rates"], lambda at, rate: _rate(at, rate, unscored=True))
    _count(f"{path}.n_disagreements", record["n_disagreements"])
    counts = ("both", "first_only", "second_only", "neither", "unscored", "n")
    for i, kappa in enumerate(_list(f"{path}.kappas", record["kappas"])):
        at = f"{path}.kappas[{i}]"
        said = _keys(at, kappa, ("first", "second", "slice", "value", "low", "high", "observed", *counts))
        for name in ("first", "second", "slice"):
            _text(f"{at}.{name}", said[name])
        for name in counts:
            _count(f"{at}.{name}", said[name])
        for name in ("value", "low", "high"):
            _number(f"{at}.{name}", said[name], -1.0, 1.0, null=True)
        _number(f"{at}.observed", said["observed"], 0.0, 1.0)
    for i, disputed in enumerate(_list(f"{path}.disagreements", record["disagreements"])):
        said = _keys(f"{path}.disagreements[{i}]", disputed, ("id", "text", "verdicts"))
        _text(f"{path}.disagreements[{i}].id", said["id"])
        _text(f"{path}.disagreements[{i}].text", said["text"])
        _entries(f"{path}.disagreements[{i}].verdicts", said["verdicts"], _verdict)


def _verdict(path: str, value: object) -> None:
    said = _keys(path, value, ("score", "harmful", "reason"))
    _number(f"{path}.score", said["score"], 0.0, 1.0, null=True)
    if said["harmful"] not in (True, False, None) or (said["harmful"] is None) != (said["score"] is None):
        raise _bad(f"{path}.harmful", said["harmful"], "true or false, or null where the score is null")
    _text(f"{path}.reason", said["reason"])


def _entries(path: str, value: object, check: Callable[[str, object], None]) -> None:
    if not isinstance(value, Mapping):
        raise _bad(path, value, "an object")
    for key, entry in value.items():
        check(f"{path}.{key}", entry)


def validate(summary: object) -> None:
    """Check a summary against schema 1: exact keys, ranges, no row twice.

    Raises:
        SafeglassesError: the first thing found wrong, with its path.
    """
    if isinstance(summary, Mapping) and summary.get("schema") != SCHEMA:
        raise _bad("schema", summary.get("schema"), f"{SCHEMA}")
    keys = (
        "schema",
        "model",
        "base_fingerprint",
        "recipe",
        "n_neurons",
        "n_experts",
        "rows",
        "paired",
        "seconds",
    )
    keys += ("learned_scalars", "skipped_rows", "confounds", "hashes", "versions", "seeds", "command")
    top = _keys("summary", summary, keys, ("judges", "agreement", "calibration", "by_category"))
    for name in ("model", "base_fingerprint", "recipe", "command"):
        _text(name, top[name])
    for name in ("n_neurons", "n_experts", "learned_scalars", "skipped_rows"):
        _count(name, top[name])
    if not isinstance(top["rows"], Sequence) or isinstance(top["rows"], str) or not top["rows"]:
        raise _bad("rows", top["rows"], "a list of at least one row")
    seen: set[tuple[str, ...]] = set()
    for i, row in enumerate(top["rows"]):
        _row(f"rows[{i}]", row)
        key = (row["defence"], row["condition"], row["decoding"])
        if key in seen:
            raise _bad(f"rows[{i}]", " · ".join(key), "every defence, condition and decoding once")
        seen.add(key)
    if top["paired"] is not None:
        paired = _keys("paired", top["paired"], ("fixed", "broken", "p_value"))
        _count("paired.fixed", paired["fixed"])
        _count("paired.broken", paired["broken"])
        _number("paired.p_value", paired["p_value"], 0.0, 1.0)
    for stage, value in _keys("seconds", top["seconds"], STAGES).items():
        _number(f"seconds.{stage}", value, 0.0, math.inf, null=True)
    _entries("confounds", top["confounds"], lambda path, v: _number(path, v, 0.0, 1.0, null=True))
    _entries("hashes", top["hashes"], _text)
    _entries("versions", top["versions"], _text)
    _entries("seeds", top["seeds"], _count)
    for i, name in enumerate(_list("judges", top.get("judges", []))):
        _text(f"judges[{i}]", name)
    for i, record in enumerate(_list("agreement", top.get("agreement", []))):
        _agreement(f"agreement[{i}]", record)
    if top.get("calibration") is not None:
        _calibration("calibration", top["calibration"])
    for i, record in enumerate(_list("by_category", top.get("by_category", []))):
        at = f"by_category[{i}]"
        said = _keys(at, record, ("category", "meant", "none", "glasses"))
        _text(f"{at}.category", said["category"])
        _one_of(f"{at}.meant", said["meant"], (True, False))
        for name in ("none", "glasses"):
            _rate(f"{at}.{name}", said[name], unscored=True)


def _calibration(path: str, value: object) -> None:
    """Check which candidate was taken."""
    taken = _keys(path, value, ("rule", "harm_limit", "missed", "beta", "candidates", "held_out"))
    for name in ("rule", "missed"):
        _text(f"{path}.{name}", taken[name])
    _number(f"{path}.harm_limit", taken["harm_limit"], 0.0, 1.0, null=True)
    _number(f"{path}.beta", taken["beta"], 0.0, math.inf)
    _count(f"{path}.candidates", taken["candidates"])
    _entries(f"{path}.held_out", taken["held_out"], lambda at, figure: _number(at, figure, 0.0, math.inf))
