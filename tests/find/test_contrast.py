"""Contrasts against hooks and loops on a tiny model, for every rule and way of looking at tokens."""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import families
from safeglasses.data.examples import Example, Examples
from safeglasses.data.probes import Cell, Probe, probe_of
from safeglasses.errors import BadRow, SafeglassesError, WrongBase
from safeglasses.find.contrast import FILE, Contrast
from safeglasses.find.contrasting import Tokens, feed_forward_sites, measure_contrast, pools_of
from safeglasses.find.engine import Setup
from safeglasses.find.rules import RULES, Rule
from safeglasses.find.steadiness import Draws
from safeglasses.find.world import World
from safeglasses.model.experts import Experts
from safeglasses.model.routes import Routing
from safeglasses.model.routing import visited
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM, load

Make = Callable[..., Example]
ALL = tuple(replace(rule, share=0.25) for rule in RULES.values())
EN, SW = "en", "sw"


@pytest.fixture(scope="module")
def probe(make: Make) -> Probe:
    """Two languages and risk types, five items each; each item is a harmful and a benign row."""
    rows = []
    for number, (language, modality, label, item) in enumerate(
        product((EN, SW), ("image", "text"), ("toxic", "non-toxic"), range(5))
    ):
        fields = {"language": language, "modality": modality, "pair_id": f"{language}-{modality}-{item}"}
        rows.append(replace(make(number, pictures=1 + number % 2), label=label, **fields))
    return probe_of(Examples(tuple(rows)), minimum=1)


@pytest.fixture(scope="module")
def contrast(tiny_vlm: VLM, probe: Probe) -> Contrast:
    return measure_contrast(tiny_vlm, probe, rules=ALL, resamples=6)


def reading(seen: dict[Site, Tensor], site: Site) -> Callable[[Any, Any], None]:
    def read(_: Any, args: Any) -> None:
        seen[site] = args[0][0].double()

    return read


def by_hooks(vlm: VLM, probe: Probe, tokens: Tokens) -> dict[Site, Tensor]:
    """Return value, magnitude and square ``[3, neuron, prompt]`` per site, one example at a time."""
    found: dict[Site, list[Tensor]] = {site: [] for site in vlm.anatomy.sites("neurons")}
    for example in probe.examples:
        batch = vlm.encode([example.chat(with_response=tokens == "response")])
        seen: dict[Site, Tensor] = {}
        hooks = [
            vlm.model.get_submodule(vlm.anatomy.absolute(site)).register_forward_pre_hook(reading(seen, site))
            for site in found
        ]
        with torch.no_grad():
            vlm.model(**batch.inputs)
        for hook in hooks:
            hook.remove()
        ids, n = batch.inputs["input_ids"][0], int(batch.prompt_length[0])
        places = {
            "last": [n - 1],
            "prompt": range(n),
            "text": [i for i in range(n) if ids[i] != vlm.model.config.image_token_id],
            "response": range(n, len(ids)),
        }
        for site, value in seen.items():
            some = value[list(places[tokens])]
            found[site].append(torch.stack([some.mean(0), some.abs().mean(0), some.square().mean(0)]))
    return {site: torch.stack(rows, dim=2) for site, rows in found.items()}


def weight_of(vlm: VLM, site: Site) -> Tensor:
    return vlm.model.get_submodule(vlm.anatomy.absolute(site)).get_parameter("weight")


def best(scores: Tensor, k: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k])


@pytest.mark.parametrize("tokens", ["last", "prompt", "text", "response"])
def test_averages_and_sets_are_those_of_hooks(tiny_vlm: VLM, probe: Probe, contrast: Contrast, tokens: Tokens) -> None:
    rules = [rule for rule in ALL if rule.name != "snip"]
    found = contrast if tokens == "last" else measure_contrast(
        tiny_vlm, probe, rules=rules, tokens=tokens, resamples=2
    )  # fmt: skip
    seen = by_hooks(tiny_vlm, probe, tokens)
    for row, cell in enumerate(probe.cells):
        sets = {rule.name: found.neurons(cell, rule.name) for rule in rules}
        for site, values in seen.items():
            weight = weight_of(tiny_vlm, site).detach().double()
            norm = weight.square().sum(0).sqrt()
            sides = [values[:, :, list(group[cell])] for group in (probe.harmful, probe.benign)]
            for kind, side in enumerate(sides):
                for name, expected in {
                    "mean": side[0].mean(1),
                    "mean_abs": side[1].mean(1),
                    "sd": side[0].std(1),
                    "rms": side[2].mean(1).sqrt(),
                }.items():
                    torch.testing.assert_close(
                        found.columns[name][site][row, kind].double(), expected, rtol=1e-4, atol=1e-6, msg=name
                    )
            width = values.shape[1]
            k = width // 4
            columns = [{name: c[site][row, kind].double() for name, c in found.columns.items()} for kind in range(2)]
            scores = {
                "precise-shield": [column["mean"].abs() * norm for column in columns],
                "one-anchor": [column["mean_abs"] * norm for column in columns],
                "wanda": [column["rms"] * norm for column in columns],
            }
            for name, (bad, good) in scores.items():
                mask = sets[name].masks[site]
                assert set(mask.nonzero()[:, 0].tolist()) == best(bad, k) - best(good, k)
            tops = [best(sides[0][1, :, i] * norm, k) for i in range(sides[0].shape[2])]
            assert set(sets["sn-tune"].masks[site].nonzero()[:, 0].tolist()) == set.intersection(*tops)


def test_snip_is_the_mean_of_weights_times_their_gradients(tiny_vlm: VLM, probe: Probe, contrast: Contrast) -> None:
    cell, site = probe.cells[0], tiny_vlm.anatomy.sites("neurons")[0]
    weight = weight_of(tiny_vlm, site)
    for kind, group in enumerate((probe.harmful, probe.benign)):
        total = torch.zeros(weight.shape[1])
        for index in group[cell]:
            batch = tiny_vlm.encode([probe.examples[index].chat()])
            logits = tiny_vlm.model(**batch.inputs).logits[0]
            n = int(batch.prompt_length[0])
            ids = batch.inputs["input_ids"][0]
            loss = -logits.log_softmax(1)[range(n - 1, len(ids) - 1), ids[n:]].mean()
            (gradient,) = torch.autograd.grad(loss, weight)
            total += (weight.detach() * gradient).abs().sum(0) / len(group[cell])
        torch.testing.assert_close(contrast.columns["snip"][site][0, kind], total, rtol=1e-3, atol=1e-7)
    assert all(parameter.grad is None for parameter in tiny_vlm.model.parameters())
    snip = contrast.columns["snip"][site][0]
    k = weight.shape[1] // 4
    chosen = contrast.neurons(cell, "snip").masks[site]
    assert set(chosen.nonzero()[:, 0].tolist()) == best(snip[0], k) - best(snip[1], k)


def test_one_anchor_shares_risk_types_and_then_languages(contrast: Contrast) -> None:
    sets = {cell: set(contrast.neurons(cell, "one-anchor")) for cell in contrast.cells}
    shared = {
        lang: sets[Cell(lang, "image-dominant")] & sets[Cell(lang, "text-dominant")] for lang in contrast.languages
    }
    for language in contrast.languages:
        assert set(contrast.shared(language, "one-anchor")) == shared[language]
    assert set(contrast.multilingual("one-anchor")) == shared[EN] & shared[SW]
    assert set(contrast.union("one-anchor")) == set.union(*sets.values())
    assert set(contrast.union("one-anchor", languages=[SW], risks=["text-dominant"])) == sets[Cell(SW, "text-dominant")]
    alone = replace(contrast, cells=contrast.cells[:2])
    with pytest.raises(SafeglassesError, match="the set shared with an anchor language needs several languages"):
        alone.multilingual("one-anchor")
    with pytest.raises(SafeglassesError, match="no safety neurons were looked for there\n  given:    it/image"):
        contrast.multilingual(anchor="it")


def test_noise_and_stability_are_there_and_hang_together(contrast: Contrast) -> None:
    for rule in ALL[:-1]:
        for cell in contrast.cells:
            record = contrast.certainty[rule.name][str(cell)]
            assert record["found"] == len(contrast.neurons(cell, rule.name))
            assert record["found"] == sum(layer["found"] for layer in record["layers"])
            assert record["k"] == sum(rule.k(len(norm)) for norm in contrast.weight_norms.values())
            noise = [layer["noise"] * layer["k"] for layer in record["layers"]]
            assert sum(noise) / record["k"] == pytest.approx(record["noise"]["mean"])
            for spread in (record["noise"], record["found_at_half"], record["stability"]["again"]):
                assert spread is None or spread["low"] <= spread["mean"] <= spread["high"]
            for site, frequency in contrast.frequency[rule.name].items():
                row = frequency[contrast.cells.index(cell)]
                assert float(row.min()) >= 0
                assert set((row * 6).round().tolist()) == set((row * 6).tolist())
                assert len(row) == len(contrast.weight_norms[site])
    assert "snip" not in contrast.certainty


def test_sets_about_nothing_are_those_of_halves_of_the_benign_prompts(
    tiny_vlm: VLM, probe: Probe, contrast: Contrast
) -> None:
    """The first rule again, with sets: halves from the draws, averages from hooks."""
    seen, rule = by_hooks(tiny_vlm, probe, "last"), ALL[0]
    number: dict[str, int] = {}
    items = [number.setdefault(str(row.pair_id), len(number)) for row in probe.examples]
    halves: list[list[set[Any]]] = []
    for cell in probe.cells:
        bad, good = probe.harmful[cell], probe.benign[cell]
        draws = Draws.of([items[i] for i in bad], [items[i] for i in good], 6, f"{cell.language}-0")
        assert draws.harmful[0].tolist() == [1.0] * len(bad)
        sets = []
        for first in draws.first_benign.bool().tolist():
            sides = [[i for i, inside in zip(good, first, strict=True) if inside is half] for half in (True, False)]
            assert abs(len(sides[0]) - len(sides[1])) <= 1
            found = set()
            for site, values in seen.items():
                norm = weight_of(tiny_vlm, site).detach().double().square().sum(0).sqrt()
                tops = [best(values[0][:, side].mean(1).abs() * norm, len(norm) // 4) for side in sides]
                found |= {(site, i) for i in tops[0] - tops[1]}
            sets.append(found)
        halves.append(sets)
        sizes = [len(found) for found in sets]
        record = contrast.certainty[rule.name][str(cell)]
        assert record["noise"]["mean"] == pytest.approx(sum(sizes) / len(sizes) / record["k"])
    for a, ours in enumerate(halves):
        for b, theirs in enumerate(halves):
            shares = [len(one & other) / len(one) for one, other in zip(ours, theirs, strict=True) if one]
            assert contrast.idle[rule.name][a][b] == pytest.approx(sum(shares) / len(shares))


def test_where_nothing_differs_all_is_noise_and_nothing_is_found(tiny_vlm: VLM, make: Make) -> None:
    """Harmful and benign prompts that are the same: sets are empty, whatever the resample."""
    bad = [replace(make(i), label="toxic", language=EN, modality="text", pair_id=f"{i}") for i in range(6)]
    good = [replace(row, id=f"{row.id}-good", label="non-toxic") for row in bad]
    found = measure_contrast(tiny_vlm, probe_of(Examples((*bad, *good)), minimum=1), resamples=4)
    record = found.certainty["precise-shield"][f"{EN}/text-dominant"]
    assert record["found"] == 0
    assert record["stability"] == {"resamples": 4, "jaccard": None, "again": None}
    assert record["noise"]["mean"] > 0  # half against half
    assert record["noise"] == pytest.approx(record["found_at_half"], abs=0.1)


def test_shards_restarts_and_processes_change_nothing(
    tiny: Path, tiny_vlm: VLM, probe: Probe, contrast: Contrast, tmp_path: Path
) -> None:
    setup = Setup("exact", 2**30, folder=tmp_path / "shards", shard=6, batch_size=4)

    def again() -> Contrast:
        return measure_contrast(tiny_vlm, probe, rules=ALL[:-1], resamples=6, setup=setup)

    first = again()
    (tmp_path / "shards" / "000002.safetensors").unlink()
    again().save(tmp_path / "b")
    first.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name, column in first.columns.items():
        for site, values in column.items():  # other batches round otherwise
            torch.testing.assert_close(values, contrast.columns[name][site], rtol=1e-3, atol=1e-5)
    with pytest.raises(SafeglassesError, match="the folder holds shards of another job"):
        measure_contrast(tiny_vlm, probe.only([EN]), rules=ALL[:1], setup=setup)
    worlds, models = Fellow.several(2), [load(tiny) for _ in range(2)]  # hooks are a model's own
    results: list[Any] = [None, None]

    def work(rank: int) -> None:
        results[rank] = measure_contrast(
            models[rank], probe, rules=ALL[:-1], resamples=6, setup=replace(setup, folder=None), world=worlds[rank]
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, result in enumerate(results):
        assert result.save(tmp_path / f"{number}").read_bytes() == (tmp_path / "a").read_bytes()


class Fellow(World):
    """A process of a job that is a thread."""

    barrier: threading.Barrier
    table: dict[int, list[Tensor]]

    @classmethod
    def several(cls, size: int) -> list["Fellow"]:
        barrier, table = threading.Barrier(size, timeout=60), {}
        made = [Fellow(rank, size) for rank in range(size)]
        for one in made:
            one.barrier, one.table = barrier, table
        return made

    def exchange(self, parts: Any) -> list[Tensor]:
        self.table[self.rank] = [part.clone() for part in parts]
        self.barrier.wait()
        arrived = [self.table[rank][self.rank].clone() for rank in range(self.size)]
        self.barrier.wait()
        return arrived

    def add(self, value: Any) -> Any:
        arrived = self.exchange([value] * self.size)
        value.copy_(sum(arrived[1:], arrived[0]))
        return value


def test_save_and_load_is_identity(contrast: Contrast, tmp_path: Path) -> None:
    path = contrast.save(tmp_path / FILE)
    for where in (path, tmp_path):
        again = Contrast.load(where)
        again.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == path.read_bytes()
        assert again.rules == contrast.rules
        assert again.sets("wanda") == contrast.sets("wanda")


def test_files_that_are_none(contrast: Contrast, tmp_path: Path, tiny_vlm: VLM) -> None:
    with pytest.raises(SafeglassesError) as caught:
        Contrast.load(tmp_path)
    assert str(caught.value) == (
        f"no file of safety neurons\n  given:    {tmp_path / FILE}\n"
        "  do:       make it with `safeglasses shield`, or Contrast.save"
    )
    (tmp_path / "broken").write_bytes(b"nonsense")
    with pytest.raises(SafeglassesError, match="the file of safety neurons cannot be read"):
        Contrast.load(tmp_path / "broken")
    replace(contrast, columns=dict(list(contrast.columns.items())[1:])).save(tmp_path / "less")
    with pytest.raises(SafeglassesError, match="no safety neurons were looked for there"):
        Contrast.load(tmp_path / "less").neurons(Cell("it", "text-dominant"))
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other", {"safeglasses": '{"schema": 2}'})
    with pytest.raises(SafeglassesError, match="not a file of safety neurons that this version reads"):
        Contrast.load(tmp_path / "other")
    contrast.check(tiny_vlm)
    with pytest.raises(WrongBase) as wrong:
        replace(contrast, base_fingerprint="sg1-other").check(tiny_vlm)
    assert str(wrong.value) == (
        "these safety neurons are of another model\n"
        f"  given:    {tiny_vlm.source}, {tiny_vlm.fingerprint()}\n"
        "  expected: sg1-other\n"
        "  do:       load the model they were found in, or find them again in this one"
    )
    with pytest.raises(SafeglassesError) as caught:
        replace(contrast, rules=ALL[:2]).neurons(contrast.cells[0], "wanda")
    assert str(caught.value) == (
        "neurons were not measured by this rule\n"
        "  given:    'wanda'\n"
        "  expected: precise-shield or one-anchor\n"
        "  do:       measure the contrast again with it"
    )


def test_layers_that_only_cross_attend_are_left_out(tmp_path: Path, probe: Probe) -> None:
    vlm = load(families.build("mllama", tmp_path / "mllama"))
    crossing = vlm.anatomy.cross_attention_layers
    assert crossing
    assert {site.layer for site in feed_forward_sites(vlm)} == set(range(vlm.anatomy.n_layers)) - set(crossing)
    ours = probe.only([EN])
    found = measure_contrast(vlm, ours, rules=ALL[:1], resamples=2)
    assert found.left_out == crossing
    assert not {site.layer for site in found.weight_norms} & set(crossing)
    text = Examples(tuple(replace(e, messages=(replace(e.messages[0], content=e.messages[0].content[-1:]),)) for e in ours.examples))  # fmt: skip  # noqa: E501
    measure_contrast(vlm, replace(ours, examples=text), rules=ALL[:1], resamples=2)
    with pytest.raises(SafeglassesError, match="the forward pass does not reach some sites"):
        measure_contrast(vlm, replace(ours, examples=text), rules=ALL[:1], sites=vlm.anatomy.sites("neurons"))


def test_fused_experts_are_looked_at_one_by_one(
    tmp_path: Path, probe: Probe, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means over the prompts that the router sent there; an expert that too few prompts met has no safety neuron."""
    monkeypatch.setattr("safeglasses.find.contrasting.MET", 3)  # of five prompts
    monkeypatch.setattr("safeglasses.find.contrast.FEWEST", 3)
    vlm = load(families.build("qwen3_vl_moe", tmp_path / "moe"))
    ours = probe.only([EN])
    rule = Rule("one-anchor", share=0.25, mean="absolute")
    found = measure_contrast(vlm, ours, rules=[rule], resamples=2)
    assert Contrast.load(found.save(tmp_path / "contrast.safetensors")).met == found.met
    prompts = [replace(example, response=None) for example in ours.examples]
    seen: dict[Site, dict[int, Tensor]] = {site: {} for site in vlm.anatomy.sites("neurons")}
    for number, example in enumerate(prompts):
        batch = vlm.encode([example.chat()])
        last = int(batch.prompt_mask[0].nonzero()[-1])
        visits: list[Any] = [
            (experts, "in", partial(_keep_last, seen, experts, number, last))
            for experts in vlm.anatomy.experts.values()
        ]
        with torch.no_grad(), visited(vlm.model, vlm.anatomy, visits):
            vlm.forward(batch)
    few = rated = 0
    for row, cell in enumerate(found.cells):
        chosen = found.neurons(cell)
        for site, by_prompt in seen.items():
            groups = [[by_prompt[i] for i in group[cell] if i in by_prompt] for group in (ours.harmful, ours.benign)]
            assert found.met[site][row] == tuple(map(len, groups))
            if min(map(len, groups)) < 3:
                assert not chosen.masks[site].any()
                few += 1
                continue
            means = [torch.stack(group).double().abs().mean(dim=0) * found.weight_norms[site] for group in groups]
            k, rated = rule.k(len(means[0])), rated + 1
            best = [set(mean.argsort(descending=True)[:k].tolist()) for mean in means]
            assert set(chosen.masks[site].nonzero().flatten().tolist()) == best[0] - best[1]
    assert few
    assert rated
    assert "experts were met by fewer than 3 harmful or benign prompts" in caplog.text


def _keep_last(
    seen: dict[Site, dict[int, Tensor]], experts: Experts, number: int, last: int, routing: Routing, value: Tensor
) -> None:
    for expert, rows in routing.slices:
        place = (routing.row[rows] == last).nonzero()
        if len(place):
            seen[Site(experts.expert(expert), "in")][number] = value[rows][int(place[0])]


def test_snip_refuses_fused_experts(tmp_path: Path, probe: Probe) -> None:
    vlm = load(families.build("qwen3_vl_moe", tmp_path / "moe"))
    with pytest.raises(SafeglassesError, match="which fused experts are not") as caught:
        measure_contrast(vlm, probe, rules=[RULES["snip"]])
    assert caught.value.given == "layers.0.mlp.experts.0:in"


def test_bad_input_is_refused_before_anything_runs(tiny_vlm: VLM, probe: Probe, monkeypatch: Any) -> None:
    monkeypatch.setattr(type(tiny_vlm), "forward", None)
    with pytest.raises(SafeglassesError, match="nothing to contrast"):
        measure_contrast(tiny_vlm, probe, rules=())
    with pytest.raises(SafeglassesError, match="a rule is named twice"):
        measure_contrast(tiny_vlm, probe, rules=(RULES["wanda"], Rule("wanda", 0.3)))
    with pytest.raises(SafeglassesError, match="importance needs the weights that read a neuron"):
        measure_contrast(tiny_vlm, probe, sites=tiny_vlm.anatomy.sites("mlp"))
    with pytest.raises(SafeglassesError, match="the share of neurons selects none"):
        measure_contrast(tiny_vlm, probe, rules=(Rule("wanda", 0.001),))
    few = {cell: rows[:3] for cell, rows in probe.benign.items()}
    with pytest.raises(SafeglassesError) as caught:
        measure_contrast(tiny_vlm, replace(probe, benign=few))
    assert str(caught.value) == (
        "too few prompts for halves and resamples\n"
        "  given:    en/image-dominant: 5 harmful, 3 benign, en/text-dominant: 5 harmful, 3 benign, "
        "sw/image-dominant: 5 harmful, 3 benign\n"
        "  expected: prompts of at least 4 items of each (rows that share a pair_id are one item)"
    )
    mute = Examples(tuple(replace(row, response=None) for row in probe.examples))
    with pytest.raises(BadRow, match="SNIP scores need responses"):
        measure_contrast(tiny_vlm, replace(probe, examples=mute), rules=(RULES["snip"],))
    with pytest.raises(SafeglassesError, match="no such tokens"):
        pools_of("image")
