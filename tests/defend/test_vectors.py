"""Glasses that IA3 cannot carry: our own file of factors, and everything that must refuse it or be refused by it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file

import families
from defend.damage import edit, refusal, reseal
from families.unrolled import NOT_OURS, chat
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.stack import stack_folders
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.ship.export import export_ia3, export_lora, export_sglang
from safeglasses.ship.hub import _files_of
from safeglasses.ship.verify import load_any

pytestmark = pytest.mark.filterwarnings(NOT_OURS)
EXPERT = Site("layers.1.mlp.experts.2", "gate")
FILES = {"glasses.safetensors", "glasses.json", "neurons.parquet", "README.md"}


def mixed(vlm: VLM, *, seed: int = 0) -> Glasses:
    """Factors of every third expert side and of both sides of some linear maps."""
    generator = torch.Generator().manual_seed(seed)
    fused = [s for e in vlm.anatomy.experts.values() for s in e.sites("gate", "up", "in", "out")][::3]
    linear = [Site(path, side) for path in list(vlm.anatomy.linears)[:2] for side in ("in", "out")]
    rows = {s: torch.rand(vlm.anatomy.width(s), generator=generator) for s in (*fused, *linear)}
    factors = {s: torch.where(row < 0.5, row, 1.0) for s, row in rows.items()}
    columns = {"auroc all:max": {site: row / 2 for site, row in factors.items()}}
    return Glasses(factors, vlm.fingerprint(), "made up", 0.75, columns, {"why": "a test"})


@pytest.fixture(scope="module")
def vlm(family: Callable[[str], VLM]) -> VLM:
    return family("qwen3_vl_moe")


@pytest.fixture(scope="module")
def saved(vlm: VLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed(vlm).save(tmp_path_factory.mktemp("vectors") / "glasses", vlm)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "glasses")


@pytest.mark.parametrize("name", families.MIXTURES)
def test_saved_is_loaded_and_worn(name: str, family: Callable[[str], VLM], tmp_path: Path) -> None:
    vlm = family(name)
    glasses = mixed(vlm)
    folder = glasses.save(tmp_path / "glasses", vlm)
    assert {path.name for path in folder.iterdir()} == FILES
    loaded = Glasses.load(folder)
    assert loaded == glasses
    assert loaded.identity == glasses.identity
    batch = vlm.encode([chat(vlm, 1, "a red dog")])
    with torch.no_grad():
        with glasses.worn(vlm):
            expected = vlm.forward(batch)
        with loaded.worn(vlm):
            assert torch.equal(vlm.forward(batch), expected)


def test_the_folder_says_who_loads_it(saved: Path, vlm: VLM) -> None:
    record = json.loads((saved / "glasses.json").read_text())
    assert (record["schema"], record["form"], record["loads_in"]) == (3, "factors", ["safeglasses"])
    assert record["files"].keys() == {"glasses.safetensors", "neurons.parquet"}
    text = (saved / "README.md").read_text()
    assert "**Only safeglasses loads this folder.**" in text
    assert "PeftModel" not in text
    assert ModelCard(text).data.to_dict()["library_name"] == "safeglasses"
    linear = replace(mixed(vlm), factors={Site("layers.0.self_attn.q_proj", "out"): torch.zeros(32)}, columns={})
    assert linear.loads_in_peft
    assert not mixed(vlm).loads_in_peft


def test_vectors_are_those_that_act(saved: Path, vlm: VLM) -> None:
    acting = mixed(vlm).effective()
    stored = load_file(saved / "glasses.safetensors")
    assert stored.keys() == {str(site) for site in acting}
    assert all(torch.equal(stored[str(site)], row) for site, row in acting.items())


def test_same_glasses_same_bytes(saved: Path, vlm: VLM, tmp_path: Path) -> None:
    again = Glasses.load(saved).save(tmp_path / "again")  # without the model
    for name in FILES:
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name


def test_stacked_and_at_another_strength(saved: Path, vlm: VLM, tmp_path: Path) -> None:
    other = mixed(vlm, seed=1).save(tmp_path / "other", vlm)
    product = stack_folders([str(saved), str(other)], [1.0, 0.5]).glasses
    product.save(tmp_path / "product")
    assert Glasses.load(tmp_path / "product") == product
    expected = Glasses.load(saved).at(1.0).effective()[EXPERT] * Glasses.load(other).at(0.5).effective()[EXPERT]
    assert torch.equal(product.effective()[EXPERT], expected)


def test_peft_fails_and_wears_nothing(saved: Path, vlm: VLM) -> None:
    before = set(vlm.model.state_dict())
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(vlm.model, str(saved))
    with pytest.raises((ValueError, OSError), match="adapter"):
        vlm.model.load_adapter(str(saved))
    assert set(vlm.model.state_dict()) == before


def test_an_adapter_beside_them_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(PartialMatch) as caught:
        Glasses.load(folder)
    assert str(caught.value) == (
        "an adapter lies beside glasses that IA3 cannot carry: PEFT would wear a part of them\n"
        f"  given:    {folder / 'adapter_config.json'}\n"
        "  expected: glasses.safetensors, neurons.parquet\n"
        "  do:       remove adapter_config.json, or make the glasses again"
    )


def rewrite(folder: Path, change: Callable[[dict], object], **said: object) -> None:
    path = folder / "glasses.safetensors"
    tensors = load_file(path)
    change(tensors)
    base = json.loads((folder / "glasses.json").read_text())["base"]
    known = {"schema": 1, "base_fingerprint": base["fingerprint"], "decoder_path": base["decoder_path"]}
    save_file(tensors, path, metadata={"safeglasses": json.dumps(known | said)})


KEY = str(EXPERT)


@pytest.mark.parametrize(
    ("change", "metadata", "said"),
    [
        (lambda t: t.update({KEY: t[KEY] * 0.5}), {}, "tensors with other values: " + KEY),
        (lambda t: t.update({KEY: t[KEY][:-1].clone()}), {}, "of another shape or type: " + KEY),
        (lambda t: t.update({KEY: t[KEY].half()}), {}, "of another shape or type: " + KEY),
        (lambda t: t.pop(KEY), {}, "tensors missing: " + KEY),
        (
            lambda t: t.update({KEY.replace("gate", "in"): t[KEY].clone()}),
            {},
            "tensors unknown: " + KEY.replace("gate", "in"),
        ),
        (lambda _: None, {"base_fingerprint": "sg1-0"}, 'metadata \'{"schema": 1, "base_fingerprint": "sg1-0"'),
        (lambda _: None, {"decoder_path": "elsewhere"}, '"decoder_path": "elsewhere"}\', not \'{"schema": 1'),
        (lambda _: None, {"schema": 2}, 'metadata \'{"schema": 2'),
    ],
)
def test_whatever_does_not_match_completely_is_refused(folder, change, metadata, said) -> None:
    rewrite(folder, change, **metadata)
    with pytest.raises(PartialMatch) as caught:
        Glasses.load(folder)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(form="ia3"), "form 'ia3' in schema 3"),
        (lambda r: r.pop("form"), "form 'None' in schema 3"),
        (lambda r: r.update(loads_in=["safeglasses", "peft"]), "form 'factors' in schema 3"),
        (lambda r: r.update(schema=2), "form 'factors' in schema 2"),
        (lambda r: r.update(form=["factors"]), "form \"['factors']\" in schema 3"),
        (lambda r: r["widths"].pop(KEY), "tensors unknown: " + KEY),
        (lambda r: r["widths"].update({"layers.1.mlp.experts.9:in": 24}), "tensors missing: layers.1.mlp.experts.9:in"),
        (lambda r: r["files"].pop("glasses.safetensors"), "files must have the SHA-256 of glasses.safetensors"),
        (lambda r: r.update(recipe="another"), "glasses.json was changed after saving"),
    ],
)
def test_records_that_are_refused(folder, change, said) -> None:
    record = json.loads((folder / "glasses.json").read_text())
    change(record)
    (folder / "glasses.json").write_text(json.dumps(record))
    assert said in refusal(folder)


def test_an_edited_table_is_refused(folder: Path) -> None:
    path = folder / "neurons.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    assert "the table of neurons was changed after saving" in refusal(folder)
    (folder / "glasses.safetensors").unlink()
    assert "a file of these glasses is missing" in refusal(folder)


FIRST = "layers.0.mlp.experts.0:gate, one of 11 such sites of 15"


@pytest.mark.parametrize(
    ("export", "what"),
    [(export_ia3, "an IA3 adapter"), (export_lora, "this LoRA"), (export_sglang, "hooks of SGLang")],
)
def test_no_export_carries_a_part(export, what: str, saved: Path, vlm: VLM, tmp_path: Path) -> None:
    with pytest.raises(SafeglassesError) as caught:
        export(vlm, Glasses.load(saved), tmp_path / "out")
    assert str(caught.value) == (
        f"{what} cannot carry factors of fused experts: they are slices of parameters, not modules\n"
        f"  given:    {FIRST}\n"
        "  expected: factors of linear maps\n"
        "  do:       fold them into the checkpoint, which any runtime serves then: "
        "safeglasses fold MODEL --glasses FOLDER --out OUT"
    )
    assert not (tmp_path / "out").exists()


def test_verified_as_a_model_they_say_what_they_are(saved: Path) -> None:
    with pytest.raises(SafeglassesError) as caught:
        load_any(saved)
    assert str(caught.value) == (
        "these glasses are no adapter: they scale fused experts, which IA3 has no place for\n"
        f"  given:    {saved}\n"
        "  expected: a model, or an adapter that PEFT loads\n"
        "  do:       fold them (safeglasses fold) and verify the folded checkpoint"
    )


def test_the_hub_gets_the_whole_folder(folder: Path) -> None:
    assert _files_of(folder).keys() == FILES
    edit(folder, "glasses.json", lambda record: record.update(strength=0.5))
    reseal(folder, hashes=False)
    with pytest.raises(PartialMatch, match="with other values"):
        _files_of(folder)
