"""Model cards of the folders that are written here, with the front matter that the Hugging Face hub reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def glasses_card(record: Mapping[str, Any]) -> str:
    """Write the card of a glasses folder from its ``glasses.json``."""
    base = record["base"]
    auto = "AutoModelForImageTextToText" if base["multimodal"] else "AutoModelForCausalLM"
    front = _front(base, relation="adapter", library="peft")
    return f"""{front}
# Safety glasses for {base["source"]}

{record["n_neurons"]} neurons at {len(record["widths"])} sites of the language decoder are scaled by recipe
`{record["recipe"]}` at strength {record["strength"]:g}. No weight is changed: this is an IA3 adapter whose
vectors were computed from how well each neuron tells toxic examples from benign ones. `neurons.parquet` lists
every neuron.

With PEFT alone:

```python
from peft import PeftModel
from transformers import {auto}

model = {auto}.from_pretrained({base["source"]!r})
model = PeftModel.from_pretrained(model, "THIS_FOLDER")
```

With safeglasses, which refuses another base model and can change the strength:

```python
from safeglasses import Glasses, load

vlm, glasses = load({base["source"]!r}), Glasses.load("THIS_FOLDER")
with glasses.at(0.8).worn(vlm):
    ...
```

Made for the model with fingerprint `{base["fingerprint"]}`. On any other model, even a
fine-tuned copy, the factors meet neurons that they were not measured on. Glasses lower harm, they do not
rule it out: read the report of the run.
"""


def folded_card(marker: Mapping[str, Any], *, multimodal: bool) -> str:
    """Write the card of a folded checkpoint from its ``safeglasses.json``."""
    base = marker["base"]
    front = _front({**base, "multimodal": multimodal}, relation="finetune", library="transformers")
    return f"""{front}
# {base["source"]} with safety glasses folded in

An ordinary checkpoint: {marker["n_neurons"]} neurons of the language decoder were scaled by the recipe
`{marker["recipe"]}` at strength {marker["strength"]:g}, and the factors are multiplied into the weights.
It loads and is served exactly like {base["source"]}; nothing of safeglasses is needed. `safeglasses.json`
records what was folded; folding or wearing glasses made for the base is refused.

Base fingerprint `{base["fingerprint"]}`, fingerprint of this checkpoint `{marker["fingerprint"]}`.
"""


def _front(base: Mapping[str, Any], *, relation: str, library: str) -> str:
    source = str(base["source"])
    lines = ["---"]  # the hub refuses cards that name a local folder as base
    if _HUB_ID.fullmatch(source) and not Path(source).exists():
        lines += [f"base_model: {source}", f"base_model_relation: {relation}"]
    lines += [
        f"library_name: {library}",
        f"pipeline_tag: {'image-text-to-text' if base['multimodal'] else 'text-generation'}",
        "tags:",
        "- safeglasses",
        "- safety",
        *(["- ia3"] if library == "peft" else []),
        "---",
        "",
    ]
    return "\n".join(lines)
