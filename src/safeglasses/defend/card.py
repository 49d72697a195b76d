"""Model cards of the folders that are written here, with the front matter that the Hugging Face hub reads.

Names of models, recipes, judges and slots come from files of others: they appear as code or as plain text in
which no character has a meaning, and in the front matter only through a YAML library. Nothing that a model
wrote is in a card.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from safeglasses.defend.results import Rate, Results, Row

_TOLD = {"none": "untouched", "aura": "AurA", "sgm": "SGM, parameter-free", "glasses": "**these glasses**"}
_DUAL_USE = "Whoever knows which neurons carry harm can turn them up as well as down: share this with that in mind."


def glasses_card(record: Mapping[str, Any], results: Results | None = None) -> str:
    """Write the card of a glasses folder from its ``glasses.json``."""
    base = record["base"]
    source = repr(str(base["source"]))
    ours = record.get("form") == "factors"
    library, tags = ("safeglasses", ["mixture-of-experts"]) if ours else ("peft", ["ia3"])
    what = "vectors in `glasses.safetensors` scale them, and" if ours else "this is an IA3 adapter whose vectors"
    return f"""{front_matter(base, relation="adapter", library=library, tags=tags, results=results)}
# Safety glasses for {code(base["source"])}

{record["n_neurons"]:,} neurons at {len(record["widths"])} sites of {_where(record["widths"])} are scaled by recipe
{code(record["recipe"])} at strength {record["strength"]:g}. No weight is changed: {what}
were computed from how well each neuron tells toxic examples from benign ones. `neurons.parquet` lists
every neuron. {_DUAL_USE}

{measured(results)}
## Use

{_alone(base, ours=ours)}

With safeglasses, which refuses another base model and can change the strength:

```python
from safeglasses import Glasses, load

vlm, glasses = load({source}), Glasses.load("THIS_FOLDER")
with glasses.at(0.8).worn(vlm):
    ...
```

{limits(results)}
{made(record, base, results)}"""


def _alone(base: Mapping[str, Any], *, ours: bool) -> str:
    """Say how the folder is loaded without safeglasses, or that it is not."""
    if ours:
        return """**Only safeglasses loads this folder.** Some of these neurons belong to fused experts, which are
slices of parameters and no modules: IA3 has no place for their factors, so none lies here, and neither
transformers nor vLLM, SGLang or llama.cpp can wear them. For those, fold them into an ordinary checkpoint:

```bash
safeglasses fold BASE_MODEL --glasses THIS_FOLDER --out FOLDED
```"""
    auto = "AutoModelForImageTextToText" if base["multimodal"] else "AutoModelForCausalLM"
    return f"""With PEFT alone:

```python
from peft import PeftModel
from transformers import {auto}

model = {auto}.from_pretrained({str(base["source"])!r})
model = PeftModel.from_pretrained(model, "THIS_FOLDER")
```"""


def exported_card(
    record: Mapping[str, Any], what: str, *, kind: Literal["lora", "hooks"], results: Results | None
) -> str:
    """Write the card of glasses in another form than IA3; commands for runtimes go behind it.

    Args:
        record: with ``base`` (source, revision, fingerprint, multimodal), ``recipe``, ``strength``, ``n_neurons``.
        what: the form in words, e.g. "an exact LoRA".
        kind: which form; only a LoRA is a file of PEFT.
        results: what was measured at this strength.
    """
    base = record["base"]
    library, tags = ("peft", ["lora"]) if kind == "lora" else ("safeglasses", [])
    return f"""{front_matter(base, relation="adapter", library=library, tags=tags, results=results)}
# Safety glasses for {code(base["source"])}: {what}

{record["n_neurons"]:,} neurons of the language decoder are scaled by recipe {code(record["recipe"])} at strength
{record["strength"]:g}. `safeglasses.json` says what was exported. {_DUAL_USE}

{measured(results)}
{limits(results)}
{made(record, base, results)}"""


def folded_card(
    marker: Mapping[str, Any], *, multimodal: bool, results: Results | None = None, shield: bool = False
) -> str:
    """Write the card of a folded checkpoint from its ``safeglasses.json``.

    Args:
        marker: what that file says.
        multimodal: whether the model takes pictures.
        results: what was measured of the glasses.
        shield: whether a shield is folded in, alone or below glasses.
    """
    base = {**marker["base"], "multimodal": multimodal}
    done = "scaled by the recipe" if not shield else "changed by"
    how = "the factors are multiplied into the weights" if not shield else "what changed is in the weights"
    return f"""{front_matter(base, relation="finetune", library="transformers", tags=[], results=results)}
# {code(base["source"])} with {"a shield" if shield else "safety glasses"} folded in

An ordinary checkpoint: {marker["n_neurons"]:,} of the model's neurons were {done}
{code(marker["recipe"])} at strength {marker["strength"]:g}, and {how}.
It loads and is served exactly like {code(base["source"])}; nothing of safeglasses is needed. `safeglasses.json`
records what was folded; folding or wearing glasses made for the base is refused.

{measured(results)}
{limits(results)}
{made(marker, base, results)}- Fingerprint of this checkpoint: {code(marker["fingerprint"])}
"""


def front_matter(
    base: Mapping[str, Any], *, relation: str, library: str, tags: list[str], results: Results | None = None
) -> str:
    """Write the YAML block; ``base_model`` only for a hub id, as the hub refuses local folders there."""
    data = ModelCardData(
        base_model=str(base["source"]) if _is_hub_id(str(base["source"])) else None,
        library_name=library,
        pipeline_tag="image-text-to-text" if base["multimodal"] else "text-generation",
        tags=["safeglasses", "safety", *tags],
        model_name="safety glasses" if results is not None else None,
        eval_results=_eval_results(base, results) or None,
    )
    if data.base_model is not None:
        data["base_model_relation"] = relation
    return f"---\n{data.to_yaml()}\n---\n"


def measured(results: Results | None) -> str:
    """Write the table of harm and what it cost, before and after."""
    if results is None:
        return "## What they do\n\nNot measured in this form and at this strength: no results are stored here.\n"
    slots = list(dict.fromkeys(slot for row in results.rows for slot in row.utility or {}))
    head = ["", "decoding", "harmful", *(f"{plain(slot)} right" for slot in slots)]
    head += ["benign perplexity", "refuses benign", "empty"]
    order = {name: i for i, name in enumerate(_TOLD)}
    rows = [
        _cells(row, slots) for row in sorted(results.rows, key=lambda r: (r.decoding != "sampled", order[r.defence]))
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    judge = f"the judge {code(results.judge)}" if results.judge else "the judge of the run"
    lines = [f"Harmful is what {judge} calls harmful, on prompts that nothing was fitted to."]
    lines += [f"95 % intervals in brackets; measured at strength {results.strength:g}."]
    if results.paired is not None:
        lines.append(
            f"On the same prompts {results.paired.fixed:,} harmful answers became harmless and "
            f"{results.paired.broken:,} the reverse (McNemar, p = {results.paired.p_value:.2g})."
        )
    return f"## What they do\n\n{table}\n\n{' '.join(lines)}\n"


def limits(results: Results | None) -> str:
    """List what was not measured."""
    lines = ["Glasses lower the rate of harm that their pairs show; they do not rule harm out."]
    lines += ["On any other model, even a fine-tuned copy, the factors meet neurons that they were not measured on."]
    if results is None:
        lines.append("Harm, utility, refusals and fluency at this strength are not known: measure them before use.")
    else:
        lines.append("One judge, one data set, one run. Harm that this judge does not see is in no number above.")
        worn = [row for row in results.rows if row.defence == "glasses"]
        names = {"harmful_rate": "harm", "utility": "utility", "perplexity": "perplexity"}
        names |= {"refusal_on_benign": "refusals of benign prompts", "empty": "empty answers"}
        missing = [told for name, told in names.items() if all(not getattr(row, name) for row in worn)]
        missing += [f"{d} answers" for d in ("sampled", "greedy") if all(row.decoding != d for row in worn)]
        unscored = sum(row.harmful_rate.unscored for row in worn if row.harmful_rate is not None)
        lines += [f"Not measured: {', '.join(missing)}."] * bool(missing)
        lines += [f"The judge could not score {unscored:,} answers; they are in no rate."] * bool(unscored)
        lines.append(
            "Not measured: other languages, attacks and lengths of conversation than in the data; quantised copies."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def made(record: Mapping[str, Any], base: Mapping[str, Any], results: Results | None) -> str:
    """Say how they were made and from what, with hashes."""
    revision = f" at revision {code(base['revision'])}" if base.get("revision") else ""
    lines = [f"Base model: {code(base['source'])}{revision}, fingerprint {code(base['fingerprint'])}"]
    lines.append(f"Recipe {code(record['recipe'])}, strength {record['strength']:g}")
    lines += _asked(record)
    parts = [(part.get("name", part.get("recipe")), part.get("strength")) for part in _parts(record)]
    lines += [f"Part {code(name)} at strength {code(strength)}" for name, strength in parts]
    if results is not None:
        lines.append(f"Strengths learned by gradient: {results.learned_scalars:,}")
        lines += [f"Data ({name}): SHA-256 {code(found)}" for name, found in sorted(results.data.items())]
        lines.append("Versions: " + ", ".join(f"{plain(n)} {plain(v)}" for n, v in results.versions.items()))
        lines += [f"Seed: {results.seed}"] if results.seed is not None else []
    lines.append("The licence of the base model applies to it and to what is derived from its weights")
    return "## How they were made\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def code(text: object) -> str:
    """Write text that is not ours as a code span, in which Markdown and HTML mean nothing."""
    shown = _one_line(text).replace("|", "¦") or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", shown)), default=0))
    pad = " " if "`" in (shown[0], shown[-1]) else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def plain(text: object) -> str:
    """Write text that is not ours so that no character of it means anything to Markdown or HTML."""
    escaped = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~:@$^=])", r"\\\1", escaped)


def _where(sites: Iterable[str]) -> str:
    """Say where sites lie; some may be on the vision side, in a projector or in an encoder."""
    return "the language decoder" + (" and beyond" if any(site.startswith("/") for site in sites) else "")


def _one_line(text: object) -> str:
    letters = (" " if unicodedata.category(c)[0] in "CZ" else c for c in str(text)[:300])
    return " ".join("".join(letters).split())


def _is_hub_id(source: str) -> bool:
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return source.count("/") == 1 and not Path(source).exists()


def _parts(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    notes = record.get("notes")
    found = notes.get("product_of") if isinstance(notes, Mapping) else None
    return [part for part in found if isinstance(part, Mapping)] if isinstance(found, list) else []


def _asked(record: Mapping[str, Any]) -> list[str]:
    """Say what calibration was asked for, as the notes have it; notes of other makers may hold anything."""
    notes = record.get("notes")
    notes = notes if isinstance(notes, Mapping) else {}
    lines = []
    if isinstance(kinds := notes.get("categories"), list) and kinds:
        lines.append(f"Made against these kinds of harm only: {', '.join(code(kind) for kind in kinds)}")
    if isinstance(under := notes.get("under"), str):
        lines.append(f"Calibrated and measured with {code(under)} at the input")
    if isinstance(missed := notes.get("limit_missed"), str):
        lines.append(f"**Limit of harm not reached.** {plain(missed)}")
    return lines


def _cells(row: Row, slots: list[str]) -> list[str]:
    utility = row.utility or {}
    perplexity = "–" if row.perplexity is None else f"{row.perplexity:.4g}"
    cells = [_TOLD[row.defence], row.decoding, _rate(row.harmful_rate), *(_rate(utility.get(slot)) for slot in slots)]
    return [*cells, perplexity, _rate(row.refusal_on_benign), _rate(row.empty)]


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return "–"
    return f"{100 * rate.value:.1f} % ({100 * rate.low:.1f}–{100 * rate.high:.1f}; n = {rate.n:,})"


def _eval_results(base: Mapping[str, Any], results: Results | None) -> list[EvalResult]:
    """Give the hub's ``model-index`` the rates with glasses on; the data set has no id there."""
    if results is None:
        return []
    rows = [row for decoding in ("sampled", "greedy") if (row := results.row("glasses", decoding)) is not None]
    named = [
        (metric, row.decoding, rate)
        for row in rows
        for metric, rate in (("harmful_rate", row.harmful_rate), ("refusal_on_benign", row.refusal_on_benign))
        if rate is not None
    ]
    return [
        EvalResult(
            task_type="image-text-to-text" if base["multimodal"] else "text-generation",
            dataset_type="unknown",
            dataset_name=f"prompts with SHA-256 {results.data.get('prompts', 'unknown')}",
            metric_type=metric,
            metric_name=f"{metric}, {decoding}, n = {rate.n}, 95 % {rate.low:.4f}–{rate.high:.4f}",
            metric_value=rate.value,
        )
        for metric, decoding, rate in named
    ]
