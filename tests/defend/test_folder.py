"""Loading a glasses folder: every way in which it can be wrong; the card."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from defend.conftest import glasses_for
from safeglasses.defend.card import glasses_card
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.home import Home
from safeglasses.defend.table import read_table, write_neurons
from safeglasses.errors import PartialMatch, SafeglassesError
from safeglasses.model.sites import Site

KEY = "base_model.model.model.language_model.layers.0.mlp.up_proj.ia3_l"


@pytest.fixture(scope="module")
def saved(tiny_vlm, tmp_path_factory):
    return glasses_for(tiny_vlm).save(tmp_path_factory.mktemp("saved") / "glasses", tiny_vlm)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "glasses")


def refusal(folder, kind=SafeglassesError):
    with pytest.raises(kind) as error:
        Glasses.load(folder)
    return str(error.value)


def edit(folder, name, change):
    record = json.loads((folder / name).read_text())
    change(record)
    (folder / name).write_text(json.dumps(record))


def test_no_such_folder(tmp_path):
    assert refusal(tmp_path / "none") == (
        "no such glasses folder\n"
        f"  given:    {tmp_path / 'none'}\n"
        "  expected: a folder that glasses.save or `safeglasses fit` wrote\n"
        "  do:       check the path; to use one from the hub: hf download REPO --local-dir FOLDER"
    )


def test_an_adapter_of_someone_else(folder):
    (folder / "glasses.json").unlink()
    assert refusal(folder) == (
        "this PEFT adapter holds no glasses\n"
        f"  given:    {folder} without glasses.json\n"
        "  expected: a folder that glasses.save or `safeglasses fit` wrote\n"
        "  do:       load it with peft"
    )


def test_a_shield(folder):
    (folder / "glasses.json").rename(folder / "shield.json")
    assert refusal(folder) == (
        "this folder holds a shield, not glasses\n"
        f"  given:    {folder}\n"
        "  expected: a folder that glasses.save or `safeglasses fit` wrote\n"
        "  do:       load it with peft as it is; `safeglasses fold MODEL --shield DIR` puts it into the weights, for "
        "every other runtime"
    )


def test_a_folder_of_something_else(tmp_path):
    assert refusal(tmp_path) == (
        "this folder holds no glasses\n"
        f"  given:    {tmp_path} without glasses.json\n"
        "  expected: a folder that glasses.save or `safeglasses fit` wrote\n"
        "  do:       look for glasses/ inside a run folder"
    )


def test_newer_schema(folder):
    edit(folder, "glasses.json", lambda record: record.update(schema=4, widths="something new"))
    assert refusal(folder) == (
        "these glasses were written by a newer version of safeglasses\n"
        f"  given:    schema 4 in {folder / 'glasses.json'}\n"
        "  expected: schema 3 or older\n"
        "  do:       pip install --upgrade safeglasses"
    )


@pytest.mark.parametrize("schema", [None, "1", 0, True])
def test_no_schema(folder, schema):
    edit(folder, "glasses.json", lambda record: record.update(schema=schema))
    assert refusal(folder) == (
        f"glasses.json has no schema number\n  given:    {folder / 'glasses.json'}: {str(schema)!r}\n  expected: 1 to 3"
    )


def test_damaged_record(folder):
    edit(folder, "glasses.json", lambda record: record.pop("widths"))
    assert refusal(folder) == (
        "glasses.json is damaged\n"
        f"  given:    {folder / 'glasses.json'}: widths: Field required\n"
        "  do:       restore the folder, or make the glasses again"
    )
    (folder / "glasses.json").write_text("{")
    assert refusal(folder).startswith("the file is not JSON\n")


def test_missing_file(folder):
    (folder / "neurons.parquet").unlink()
    assert refusal(folder) == (
        "a file of these glasses is missing\n"
        f"  given:    {folder} without neurons.parquet\n"
        "  do:       restore the folder, or make the glasses again"
    )


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_edited_values(folder):
    change_tensors(folder, lambda t: t.update({KEY: t[KEY] * 0.5}))
    assert refusal(folder, PartialMatch) == (
        "the adapter is not what the table of neurons says: one of the files was changed after saving\n"
        f"  given:    {folder / 'adapter_model.safetensors'}: 1 of 14 tensors with other values: {KEY}\n"
        "  expected: the factors of the table at the strength in glasses.json\n"
        "  do:       restore the folder; to change the strength: safeglasses stack FOLDER --strength 0.5 --out NEW, "
        'or in Python Glasses.load(FOLDER).at(0.5).save("NEW")'
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.update({KEY: t[KEY][:-1].clone()}), "of another shape or type"),
        (lambda t: t.update({KEY: t[KEY].double()}), "of another shape or type"),
        (lambda t: t.pop(KEY), "missing"),
        (lambda t: t.update({KEY + "x": t[KEY].clone()}), "unknown"),
    ],
)
def test_edited_tensors(folder, change, what):
    change_tensors(folder, change)
    key = KEY + "x" if what == "unknown" else KEY
    assert refusal(folder, PartialMatch) == (
        "the adapter is not what the table of neurons says: one of the files was changed after saving\n"
        f"  given:    {folder / 'adapter_model.safetensors'}: 1 of 14 tensors {what}: {key}\n"
        "  expected: the files as they were written together\n"
        "  do:       restore the folder, or make the glasses again"
    )


def test_broken_tensors(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    assert refusal(folder).startswith("could not read the adapter\n")


def test_edited_config(folder):
    module = "model.language_model.layers.0.mlp.up_proj"
    edit(folder, "adapter_config.json", lambda config: config["target_modules"].remove(module))
    assert refusal(folder, PartialMatch) == (
        "the adapter is not what the table of neurons says: one of the files was changed after saving\n"
        f"  given:    {folder / 'adapter_config.json'}: target_modules is without {module}\n"
        "  expected: the files as they were written together\n"
        "  do:       restore the folder, or make the glasses again"
    )


def test_another_kind_of_adapter(folder):
    edit(folder, "adapter_config.json", lambda config: config.update(peft_type="LORA"))
    assert f"{folder / 'adapter_config.json'}: peft_type is 'LORA'" in refusal(folder, PartialMatch)


def test_base_model_may_move(folder):
    edit(folder, "adapter_config.json", lambda config: config.update(base_model_name_or_path="owner/model"))
    Glasses.load(folder)


def test_edited_strength(folder):
    edit(folder, "glasses.json", lambda record: record.update(strength=0.5))
    text = refusal(folder, PartialMatch)
    assert "14 of 14 tensors with other values" in text
    assert "to change the strength: safeglasses stack FOLDER --strength 0.5 --out NEW" in text


def test_edited_table(folder):
    path = folder / "neurons.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    assert refusal(folder, PartialMatch) == (
        "the table of neurons was changed after saving\n"
        f"  given:    {path}\n"
        "  expected: a file with the SHA-256 in glasses.json\n"
        "  do:       restore the folder; for other factors make new glasses: Glasses(factors, ...)"
    )


# the card


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_card_of_a_local_model(saved, tiny_vlm):
    text = (saved / "README.md").read_text()
    assert front_matter(text) == {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["safeglasses", "safety", "ia3"],
    }
    assert 'PeftModel.from_pretrained(model, "THIS_FOLDER")' in text
    assert f"load({tiny_vlm.source!r})" in text


@pytest.mark.parametrize(("multimodal", "tag"), [(True, "image-text-to-text"), (False, "text-generation")])
def test_card_of_a_hub_model(saved, multimodal, tag):
    record = json.loads((saved / "glasses.json").read_text())
    record["base"].update(source="owner/model-7b", multimodal=multimodal)
    assert front_matter(glasses_card(record)) == {
        "base_model": "owner/model-7b",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": tag,
        "tags": ["safeglasses", "safety", "ia3"],
    }


def test_record(saved, tiny_vlm):
    record = json.loads((saved / "glasses.json").read_text())
    assert list(record) == [
        "schema",
        "recipe",
        "strength",
        "base",
        "n_neurons",
        "widths",
        "moved",
        "notes",
        "files",
        "sha256",
    ]
    assert record["base"] == {
        "fingerprint": tiny_vlm.fingerprint(),
        "source": tiny_vlm.source,
        "revision": None,
        "decoder_path": "model.language_model",
        "multimodal": True,
        "conv1d": False,
        "norms": Home.of(tiny_vlm).norms,
    }
    assert record["n_neurons"] == glasses_for(tiny_vlm).n_neurons
    assert torch.tensor(list(record["widths"].values())).sum() == sum(tiny_vlm.anatomy.linears.values())


# addresses in the table


def test_the_table_prints_addresses_by_half(tmp_path):
    sites = {Site("layers.0.mlp.gate_up_proj", "out"): 6, Site("layers.1.mlp.experts.3", "up"): 3}
    masks = {site: torch.ones(width, dtype=torch.bool) for site, width in sites.items()}
    n_rows = write_neurons(
        tmp_path / "neurons.parquet", masks, {"factor": {s: torch.zeros(w) for s, w in sites.items()}}
    )
    table = pq.read_table(tmp_path / "neurons.parquet")
    fused = [f"layers.0.mlp.gate_up_proj:{half}#{i}" for half in ("gate", "up") for i in range(3)]
    assert table.column("neuron").to_pylist() == [*fused, *(f"layers.1.mlp.experts.3:up#{i}" for i in range(3))]
    assert table.column("index").to_pylist() == [*range(6), *range(3)]
    for kept in (table, table.drop_columns("neuron")):  # files of before have no such column
        pq.write_table(kept, tmp_path / "neurons.parquet")
        factors, columns = read_table(tmp_path / "neurons.parquet", sites, n_rows=n_rows)
        assert {site: len(row) for site, row in factors.items()} == sites
        assert not columns
