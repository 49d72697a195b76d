"""The whole circle of one tiny family: capture, wear, take off, save, fold, load with transformers alone, same text.

`row` goes round it and returns a line of docs/families.md; ``yes`` in a cell is written nowhere but behind the step
that was made.
"""

import io
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import families
from safeglasses.data.examples import Example, Picture, Text, Turn
from safeglasses.defend.glasses import Glasses
from safeglasses.find.capture import capture
from safeglasses.find.pools import Pool
from safeglasses.model.overview import overview
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM, Batch, Chat, load
from safeglasses.ship.fold import fold_checkpoint

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
RESPONSES = ("a red dog", "you", "sorry I cannot help with that", "Grüße 🐕", "the blue cat on a green chair")
FILMED = (
    "family",
    "tokens of four frames",
    "times as text",
    "several videos a chat",
    "pictures beside them",
    "capture",
    "wear, take off",
    "same text",
)
STEPS = ("capture", "wear, take off", "save, load", "fold", "reload alone", "same text")
WITHIN = 1e-4
"""Largest difference of a logit or of an activation that rounding in another order makes."""


def row(name: str, folder: Path) -> str:
    """Go round the circle with a family under a folder; return its line of the page.

    Raises:
        AssertionError: a step did not do what it should.
    """
    base = families.build(name, folder / "base")
    vlm = load(base)
    spans = embedding_changes(vlm)
    made = dict.fromkeys(STEPS, "no")
    made["capture"] = captured(vlm)
    glasses, batch, chats = glasses_of(vlm), batch_of(vlm), chats_of(vlm)
    before, weights = logits(vlm, batch), {n: p.detach().clone() for n, p in vlm.model.named_parameters()}
    with glasses.worn(vlm):
        worn = logits(vlm, batch)
        tokens = continued(vlm.model, vlm, chats)
        text = vlm.generate(chats, max_new_tokens=8, temperature=0.0, seed=0)
    assert float((worn - before).abs().max()) > 100 * WITHIN, "glasses that change little would prove little"
    assert torch.equal(logits(vlm, batch), before)
    assert all(torch.equal(value, weights[n]) for n, value in vlm.model.named_parameters())
    made["wear, take off"] = "yes"
    glasses.save(folder / "glasses", vlm)
    again = Glasses.load(folder / "glasses")
    assert again.factors.keys() == glasses.factors.keys()
    assert all(torch.equal(again.factors[site], values) for site, values in glasses.factors.items())
    made["save, load"] = "yes"
    folded = fold_checkpoint(base, again, folder / "folded").folder
    again.fold(vlm)
    close(logits(vlm, batch), worn)
    made["fold"] = "yes"
    auto: Any = AutoModelForImageTextToText if vlm.is_multimodal else AutoModelForCausalLM
    alone = auto.from_pretrained(folded).eval()
    mine = dict(vlm.model.named_parameters())
    assert all(torch.equal(value, mine[n]) for n, value in alone.named_parameters())
    with torch.no_grad():
        close(alone(**batch.inputs, use_cache=False).logits, worn)
    made["reload alone"] = "yes"
    found = continued(alone, vlm, chats)
    assert torch.equal(found, tokens)
    assert [words.strip() for words in vlm.tokenizer.batch_decode(found, skip_special_tokens=True)] == text
    made["same text"] = "yes"
    shutil.rmtree(folder, ignore_errors=True)
    takes = ", ".join(map(str, families.PICTURES[name])) or "none"
    return "| " + " | ".join([f"`{name}`", shape(vlm), takes, spans, *made.values()]) + " |"


def page(rows: Iterable[str], films: Iterable[str]) -> str:
    """Return the page from the lines of its two tables."""
    lines, videos = list(rows), list(films)
    pictured = sum("| none |" not in line for line in lines)
    whole = sum(line.count("| yes") == len(STEPS) for line in lines)
    head = _HEAD.format(n=len(lines), pictured=pictured, whole=whole, second=len(families.NEED_TORCHVISION))
    titles = ("family", "its decoder", "pictures a chat", "picture tokens", *STEPS)
    return head + _table(titles, lines) + _VIDEOS.format(films=len(videos)) + _table(FILMED, videos) + _ADDING


def rows_of(text: str, *, films: bool = False) -> dict[str, str]:
    """Return the lines of a page's first table by family, or those of the table of videos."""
    lines = text.partition("## Videos")[2 if films else 0].splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}  # not those of a diff


def _table(titles: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join(["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles), *lines]) + "\n\n"


def captured(vlm: VLM) -> str:
    """Pool activations of all sites one example at a time and in batches, padded on both sides."""
    examples = [_example(vlm, index, response) for index, response in enumerate(RESPONSES)]
    pools = [Pool.parse(text) for text in ("prompt:last", "response:max", "all:mean")]
    sites = sites_of(vlm)
    one, many = (capture(vlm, examples, sites=sites, pools=pools, batch_size=size) for size in (1, 5))
    for site in sites:
        close(one.values[site], many.values[site])
    assert any(float(values.nan_to_num().abs().max()) > 0 for values in one.values.values())
    chats = chats_of(vlm)
    with torch.no_grad():
        single = [vlm.forward(vlm.encode([chat]))[0] for chat in chats]
        for side in ("right", "left"):
            batch = vlm.encode(chats, padding_side=side)
            together = vlm.forward(batch)
            for index, expected in enumerate(single):
                close(together[index][batch.span("all")[index]], expected)
    return "yes"


def embedding_changes(vlm: VLM) -> str:
    """Say how many tokens a picture takes, and of how many the embedding changes with the picture."""
    if not vlm.is_multimodal:
        return "none"
    batch, moved = changed(vlm, one_message, 1, 0)
    span, found = int(batch.asked.image_mask.sum()), int(moved.sum())
    return f"{span}, all change" if found == span else f"{span}, {found or 'none'} change"


def one_message(pictures: Sequence[Any]) -> list[dict[str, Any]]:
    """Return one message with all pictures."""
    images = [{"type": "image", "image": image} for image in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "what is this"}]}]


def changed(vlm: VLM, build: Any, count: int, which: int) -> tuple[Batch, Tensor]:
    """Return a prompt with pictures, and the tokens whose embeddings change with one of them."""
    pictures = [families.picture(24, 24 + 12 * index, seed=index) for index in range(count)]
    others = [*pictures]
    others[which] = families.picture(*pictures[which].size, seed=100)
    first, second = (vlm.encode([Chat(build(chosen), "a dog")]) for chosen in (pictures, others))
    assert torch.equal(first.asked.inputs["input_ids"], second.asked.inputs["input_ids"])
    return first, (embedded(vlm, first) != embedded(vlm, second)).any(dim=-1)


def embedded(vlm: VLM, batch: Batch) -> Tensor:
    """Return what the first layer of what reads the prompt reads: ``[sample, token, hidden]``."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    with torch.no_grad(), _watched(_first_layer(vlm), keep):
        vlm.model(**batch.inputs, use_cache=False)
    (value,) = seen
    return value


def sites_of(vlm: VLM) -> list[Site]:
    """Return all sites: outputs of linear maps, neurons, and all sides of fused experts."""
    found = [*vlm.anatomy.sites("linears"), *vlm.anatomy.neurons]
    found += [site for experts in vlm.anatomy.experts.values() for site in experts.sites("gate", "up", "out")]
    return list(dict.fromkeys(found))


def glasses_of(vlm: VLM) -> Glasses:
    """Return random factors from 0.4 to 1 for a third of the neurons of every map and expert.

    Of a map that reads neurons one side, by turns, since an adapter holds one vector per map.
    """
    generator = torch.Generator().manual_seed(0)
    factors = {}
    sides = {path: ("in", "out")[index % 2] for index, path in enumerate(vlm.anatomy.ffn)}
    for site in sites_of(vlm):
        if sides.get(site.path, site.side) != site.side:
            continue
        values = 0.4 + 0.6 * torch.rand(vlm.anatomy.width(site), generator=generator)
        factors[site] = torch.where(torch.rand(len(values), generator=generator) < 1 / 3, values, 1.0)
    kept: Mapping[Site, Tensor] = {site: values for site, values in factors.items() if bool((values != 1).any())}
    return Glasses(kept, vlm.fingerprint(), "test")


def chats_of(vlm: VLM) -> list[Chat]:
    """Return chats of different lengths, each with a picture of another size where the model takes one."""
    pictures = int(vlm.is_multimodal)
    return [Chat(families.messages(i, pictures=pictures), response) for i, response in enumerate(RESPONSES)]


def batch_of(vlm: VLM) -> Batch:
    """Return these chats as one batch."""
    return vlm.encode(chats_of(vlm))


def logits(vlm: VLM, batch: Batch) -> Tensor:
    """Return all logits."""
    with torch.no_grad():
        return vlm.forward(batch)


def close(found: Tensor, expected: Tensor) -> None:
    """Assert that two results differ by rounding alone."""
    torch.testing.assert_close(found, expected, atol=WITHIN, rtol=WITHIN, equal_nan=True)


def continued(model: Any, vlm: VLM, chats: Sequence[Chat]) -> Tensor:
    """Return the tokens of greedy answers by transformers' own ``generate``."""
    batch = vlm.encode([Chat(chat.messages) for chat in chats], padding_side="left")
    with torch.no_grad():
        tokens = model.generate(**vlm.encoder.to_generate(batch), max_new_tokens=8, do_sample=False)
    return tokens[:, batch.ids.shape[1] :]


def shape(vlm: VLM) -> str:
    """Say in a few words what feed-forward blocks and fused experts a decoder has."""
    table = overview(vlm.anatomy)
    parts = []
    for block in table["blocks"]:
        inside, _, _ = block["maps"][-1].rpartition(".")
        leaves = [path.removeprefix(inside + ".") for path in block["maps"]]
        parts.append(f"`{inside}`: `{'`, `'.join(leaves)}`" if inside else f"`{'`, `'.join(leaves)}`")
        if isinstance(block["width"], list):
            parts[-1] += " of " + " and ".join(map(str, block["width"])) + " neurons"
    parts += [f"fused `{found['kind']}`: {found['layout']}" for found in table["experts"]]
    if beside := _beside(vlm):
        parts.append(f"beside them `{'`, `'.join(beside)}`")
    if table["cross_attention_layers"]:
        parts.append("layers of cross-attention alone")
    if vlm.anatomy.outside.paths("crossing"):
        parts.append("gated layers of cross-attention before them")
    if vlm.anatomy.encoder_path is not None:
        parts.append("behind an encoder")
    return "; ".join(parts)


def _beside(vlm: VLM) -> list[str]:
    """Return what else with linear maps layers hold, beside attention and feed-forward."""
    found = {Site(path, "out").kind.removesuffix(":out").partition(".")[0] for path in vlm.anatomy.linears}
    plain = re.compile(r"((self|cross|encoder)_)?attn|fc\d|mlp|feed_forward")
    return sorted(name for name in found if not plain.fullmatch(name))


def _example(vlm: VLM, index: int, response: str) -> Example:
    pictures: tuple[Picture, ...] = ()
    if vlm.is_multimodal:
        file = io.BytesIO()
        families.picture(*families.SIZES[index], seed=index).save(file, "PNG")
        pictures = (Picture(data=file.getvalue()),)
    words = Text("what is " * index + "this")
    label: Any = "toxic" if index % 2 else "non-toxic"
    return Example(id=f"row-{index}", messages=(Turn("user", (*pictures, words)),), response=response, label=label)


def _first_layer(vlm: VLM) -> nn.Module:
    encoder = vlm.anatomy.encoder_path
    crossing = [path for path in vlm.anatomy.outside.paths("crossing") if path.endswith(".0.cross_attn.q_proj")]
    if crossing:  # layers of cross-attention come before the decoder's own
        return vlm.model.get_submodule(crossing[0][1:].removesuffix(".cross_attn.q_proj"))
    if encoder is None:
        return vlm.model.get_submodule(vlm.anatomy.absolute_path(vlm.anatomy.layers_path) + ".0")
    inside = vlm.model.get_submodule(encoder)
    path = min((p for p, _ in inside.named_modules() if p.endswith("layers.0") and "vision" not in p), key=len)
    return inside.get_submodule(path)


@contextmanager
def _watched(layer: nn.Module, keep: Any) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


_HEAD = """# Families that the tests go round with

Tiny random models of {n} families, {pictured} of them with pictures; **{whole} went round the whole circle**. `yes` is
written by the run that did it: `pytest tests/test_families.py` compares this page with what it finds, family by family,
and `python scripts/make_families.py` writes it anew. [architectures.md](architectures.md) has all types, from configs
alone.

- *picture tokens*: tokens of one picture's span, and of how many of them the embedding before the first layer changes
  when the picture does. None outside the span ever changes. What does not change inside is the learned end of a row of
  patches, or the placeholder where pictures enter by cross-attention.
- *capture*: pooled activations of every site (outputs of linear maps, neurons, all sides of experts) are those of one
  example at a time, for pictures of five sizes in one batch, padded on the right; logits also padded on the left.
- *wear, take off*: glasses on a third of the neurons of every map and expert change the logits; without them, logits
  and weights are what they were to the last bit.
- *save, load*: the folder holds the same factors. *fold*: logits are those of wearing.
- *reload alone*: the folded checkpoint, streamed on disk and loaded by `transformers`, has the weights of folding in
  memory to the last bit, and *same text*: its own `generate` writes, token by token, what the worn model wrote.

The last {second} ran with torchvision's Python half alone, in the tests' second run: their processors need it, or they
are about videos ([CONTRIBUTING.md](../CONTRIBUTING.md)). All others ran without it. Not here: GOT-OCR2, whose processor
takes no chats, and Perception LM, whose tower needs timm.

"""
_VIDEOS = """## Videos

{films} of these families take videos; every line was written by a run with torchvision's Python half.

- *tokens of four frames*: those of the span, and of how many of them the embedding changes with the frames, one by one.
  Every frame moves some, and none moves a token outside the span.
- *times as text*: what the processor writes between frames says when they were taken; such words are no picture tokens.
- *several videos a chat*: `of unlike lengths`, or of as many frames each. *pictures beside them*: in the same chat.
  `refused` is an error before the model runs.
- *capture*: pooled activations of every site are those of one video at a time, for videos of three sizes in one batch;
  logits with padding on either side. *wear, take off*: as above. *same text*: greedy answers one by one and in a batch.

Kimi K2.5 has a video processor, but its forward in transformers 5.23 fails on chunks of several frames.

"""
_ADDING = """## Adding a family

Give `tests/families` what tells the family from others: a config of two layers, a processor of small pictures, its
special tokens and what a chat template writes for a picture. `python scripts/make_families.py` then writes its row, and
every test over families runs it: the circle, picture tokens by brute force, files on disk, adapters in PEFT, tuning.
Nothing in `src/` knows a family by name but the table in `model/decoders.py`, which has one line, for a model whose own
`get_decoder()` leads elsewhere; if a family breaks, what it breaks is mended by structure.

This is the whole commit that added GLM-4.6V (its videos came later), its lines of context left out:

```diff
--- a/tests/families/qwens.py
+++ b/tests/families/qwens.py
+def _glm46v(ids: dict[str, int]) -> Any:
+    like = _glm4v(ids).to_dict()
+    return get("glm46v.Glm46VConfig")(**{name: value for name, value in like.items() if name != "model_type"})
+
+
+def _glm46v_processor(tokenizer: Any) -> ProcessorMixin:
+    images = pil("glm46v", "Glm46VImageProcessorPil")(
+        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2048}
+    )
+    return without_video("glm46v.Glm46VProcessor")(image_processor=images, tokenizer=tokenizer)
+
+
 SPECS: dict[str, Family] = {
+    "glm46v": Family(
+        _glm46v,
+        "Glm46VForConditionalGeneration",
+        _glm46v_processor,
+        tokens=_GLM_TOKENS,
+        named={"image_token": "<|image|>", "video_token": "<|video|>"},
+        image="<|begin_of_image|><|image|><|end_of_image|>",
+    ),
 }
--- a/docs/families.md
+++ b/docs/families.md
-Tiny random models of 32 families, 26 of them with pictures; **32 went round the whole circle**. `yes` is
+Tiny random models of 33 families, 27 of them with pictures; **33 went round the whole circle**. `yes` is
+| `glm46v` | `mlp`: `gate_up_proj`, `down_proj` | 0, 1, 2 | 9, all change | yes | yes | yes | yes | yes | yes |
```
"""
