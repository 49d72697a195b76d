"""Glasses folders that were tampered with by hand, each with the text that refuses it; see also the fuzzer."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from defend.damage import CONFIG, FILES, SITES, TABLE, TENSORS, copies, edit, original, refusal, reseal
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.record import RECORD
from safeglasses.errors import PartialMatch, WrongBase


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    return copies(tmp_path)


RECORDS = {
    "strength as text": (lambda r: r.update(strength="1"), "strength: Input should be a valid"),
    "strength as truth": (lambda r: r.update(strength=True), "strength: Input should be a valid"),
    "negative strength": (lambda r: r.update(strength=-1), "strength -1"),
    "huge strength": (lambda r: r.update(strength=10**400), "strength"),
    "other strength": (lambda r: r.update(strength=0.5), "safeglasses stack FOLDER --strength 0.5 --out NEW"),
    "width as text": (lambda r: r["widths"].update({str(SITES[0]): "6"}), "widths.layers.0.mlp.up_proj:out: Input"),
    "width as fraction": (lambda r: r["widths"].update({str(SITES[0]): 6.0}), "widths.layers.0.mlp.up_proj:out: Input"),
    "no width": (lambda r: r["widths"].update({str(SITES[0]): 0}), "a width of 0 at layers.0.mlp.up_proj:out"),
    "memory bomb": (lambda r: r["widths"].update({str(SITES[0]): 2**60}), f"a width of {2**60} at layers.0"),
    "smaller bomb": (lambda r: r["widths"].update({str(SITES[0]): 2**24}), "tensors of another shape or type"),
    "path for a site": (lambda r: r["widths"].update({"../../x:out": 6}), "'../../x:out' is not a site address"),
    "one site more": (lambda r: r["widths"].update({"layers.5.mlp.up_proj:out": 6}), "target_modules is without model"),
    "path for a file": (lambda r: r["files"].update({"../neurons.parquet": "0" * 64}), "files must have the SHA-256"),
    "absolute file": (lambda r: r["files"].update({"/etc/passwd": "0" * 64}), "files must have the SHA-256"),
    "no hash": (lambda r: r["files"].pop(TABLE), "files must have the SHA-256"),
    "path for the decoder": (lambda r: r["base"].update(decoder_path="../x"), "base.decoder_path '../x'"),
    "number for the source": (lambda r: r["base"].update(source=1), "source: Input should be a valid string"),
    "truth as number": (lambda r: r["base"].update(conv1d=0), "conv1d: Input should be a valid boolean"),
    "unknown in base": (lambda r: r["base"].update(trust_remote_code=True), "unknown entry 'trust_remote_code'"),
    "no fingerprint": (lambda r: r["base"].pop("fingerprint"), "base.fingerprint 'None'"),
    "list for base": (lambda r: r.update(base=[]), "base: Input should be"),
    "unknown entry": (lambda r: r.update(x=1), "x: Unexpected keyword argument"),
    "schema without seal": (lambda r: r.update(schema=1), "schema 1 with sha256"),
    "move from nowhere": (
        lambda r: r["moved"].update({"layers.9.mlp.down_proj:in": str(SITES[0])}),
        "moved layers.9.mlp.down_proj:in to layers.0.mlp.up_proj:out",
    ),
    "move to an input": (
        lambda r: r["moved"].update({str(SITES[1]): str(SITES[3])}),
        "moved layers.0.mlp.down_proj:in to layers.11.mlp.down_proj:in",
    ),
    "neurons that are not there": (lambda r: r.update(n_neurons=10**9), "1000000000 of 24 neurons"),
    "another count": (lambda r: r.update(n_neurons=15), "16 rows of"),
}


@pytest.mark.parametrize("change", RECORDS)
def test_records_that_are_refused(fresh, change):
    folder, (apply, said) = fresh(), RECORDS[change]
    edit(folder, RECORD, apply)
    assert said in refusal(folder)


CONFIGS = {
    "modules taken out again": (
        lambda c: c.update(exclude_modules=["model"]),
        "exclude_modules is ['model'], not None",
    ),
    "another library": (
        lambda c: c.update(auto_mapping={"parent_library": "os"}),
        "auto_mapping is {'parent_library': 'os'}, not None",
    ),
    "other modules saved": (
        lambda c: c.update(modules_to_save=["lm_head"]),
        "modules_to_save is ['lm_head'], not None",
    ),
    "other layout": (lambda c: c.update(fan_in_fan_out=True), "fan_in_fan_out is True, not False"),
    "number for truth": (lambda c: c.update(fan_in_fan_out=0), "fan_in_fan_out is 0, not False"),
    "text for modules": (lambda c: c.update(target_modules=".*"), "target_modules is '.*', not ["),
    "module twice": (lambda c: c["target_modules"].append(c["target_modules"][0]), "a list with repeats"),
    "number for a module": (lambda c: c["target_modules"].append(1), "something that is no text"),
    "one module more": (lambda c: c["target_modules"].append("lm_head"), "target_modules is with lm_head"),
    "another side": (lambda c: c["feedforward_modules"].clear(), "feedforward_modules is without model.language"),
    "missing": (lambda c: c.pop("inference_mode"), "inference_mode is missing"),
    "unknown": (lambda c: c.update(layers_pattern="x"), "'layers_pattern' is unknown"),
    "base of another type": (lambda c: c.update(base_model_name_or_path=["a"]), "base_model_name_or_path is ['a']"),
}


@pytest.mark.parametrize("change", CONFIGS)
def test_adapter_configs_that_are_refused(fresh, change):
    folder, (apply, said) = fresh(), CONFIGS[change]
    edit(folder, CONFIG, apply)
    assert said in refusal(folder)


def test_notes_changed_by_hand(fresh):
    folder = fresh()
    record = json.loads((folder / RECORD).read_text())
    record["notes"]["learned"] = []
    (folder / RECORD).write_text(json.dumps(record))
    assert refusal(folder).startswith("glasses.json was changed after saving\n")


def test_another_base_is_refused_when_worn(fresh, tiny_vlm):
    folder = fresh()
    edit(folder, RECORD, lambda record: record["base"].update(fingerprint="sg1-b"))
    with pytest.raises(WrongBase), Glasses.load(folder).worn(tiny_vlm):
        pass


# JSON that parsers disagree on

TEXTS = {
    "repeated name": ('"strength": 0.8', '"strength": 0.5, "strength": 0.8', "'strength' is there twice"),
    "not a number": ('"strength": 0.8', '"strength": NaN', "NaN is no JSON number"),
    "too large a number": ('"strength": 0.8', '"strength": 1e999', "1e999 is too large a number"),
    "lone surrogate": ('"recipe": "test"', '"recipe": "\\ud800"', "surrogates not allowed"),
    "too many digits": ('"n_neurons": 16', f'"n_neurons": {"9" * 5000}', "integer string conversion"),
    "deep nesting": ('"choice": {', '"deep": ' + "[" * 90_000 + "]" * 90_000 + ', "choice": {', "recursion"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_json_that_has_no_one_meaning(fresh, name):
    folder, (old, new, said) = fresh(), TEXTS[name]
    text = (folder / RECORD).read_text()
    assert old in text
    (folder / RECORD).write_text(text.replace(old, new))
    found = refusal(folder)
    assert found.startswith("the file is not JSON\n")
    assert said in found


def test_json_of_the_wrong_kind_or_size(fresh):
    folder = fresh()
    for name in (RECORD, CONFIG):
        content = (folder / name).read_bytes()
        (folder / name).write_text("[]")
        assert refusal(folder).startswith("the file is no JSON object\n")
        with (folder / name).open("wb") as file:
            file.truncate(2**40)  # sparse: a terabyte that takes no disk
        assert refusal(folder).startswith("a file is too large for what it should be\n")
        (folder / name).write_bytes(content)
    Glasses.load(folder)


# tensors and table, hashes fitting


def tensors_of(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    reseal(folder)


KEY = "base_model.model.model.language_model.layers.0.mlp.up_proj.ia3_l"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[KEY].fill_(float("nan")), "1 of 4 tensors with other values"),
        (lambda t: t[KEY].mul_(1 + 2**-22), "1 of 4 tensors with other values"),
        (lambda t: t.update({KEY: t[KEY].half().float()[:5]}), "of another shape or type"),
        (lambda t: t.update({KEY: t[KEY].double()}), "of another shape or type"),
        (lambda t: t.update({KEY: t[KEY].bfloat16()}), "of another shape or type"),
        (lambda t: t.update({KEY: t[KEY].reshape(1, -1).clone()}), "of another shape or type"),
        (lambda t: t.pop(KEY), "1 of 4 tensors missing"),
        (lambda t: t.update({"../x": t[KEY].clone()}), "1 of 4 tensors unknown: ../x"),
    ],
)
def test_tensors_that_are_refused(fresh, change, said):
    folder = fresh()
    tensors_of(folder, change)
    assert said in refusal(folder)


def column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


TABLES = {
    "no column": (lambda t: t.drop(["index"]), "no column index"),
    "column twice": (lambda t: t.append_column("factor", t["factor"]), "8 columns, 7 of them with names of their own"),
    "another type": (lambda t: column(t, "index", t["index"].cast(pa.int64())), "column 'index' of type int64"),
    "wider factors": (lambda t: column(t, "factor", t["factor"].cast(pa.float64())), "column 'factor' of type double"),
    "text for evidence": (lambda t: t.append_column("x", t["kind"]), "column 'x' of type string"),
    "rows missing": (lambda t: t.slice(1), "15 rows of"),
    "rows twice": (lambda t: pa.concat_tables([t, t]), "32 rows of"),
    "nothing in a row": (
        lambda t: column(t, "index", pa.array([None, *t["index"].to_pylist()[1:]], pa.int32())),
        "nothing in a row of column 'index'",
    ),
    "index out of range": (
        lambda t: column(t, "index", pa.array([6, *t["index"].to_pylist()[1:]], pa.int32())),
        "an index twice or out of range",
    ),
    "negative index": (
        lambda t: column(t, "index", pa.array([-1, *t["index"].to_pylist()[1:]], pa.int32())),
        "an index twice or out of range",
    ),
    "no number": (
        lambda t: column(t, "factor", pa.array([float("nan"), *t["factor"].to_pylist()[1:]], pa.float32())),
        "with other values",
    ),
    "path for a site": (
        lambda t: column(t, "site", pa.array(["../../x:out", *t["site"].to_pylist()[1:]])),
        "'../../x:out'",
    ),
    "another site": (
        lambda t: column(t, "site", pa.array(["layers.7.fc1:out", *t["site"].to_pylist()[1:]])),
        "names a site that glasses.json does not",
    ),
    "long texts": (
        lambda t: column(t, "kind", pa.array([f"{i}" + "x" * 2**17 for i in range(len(t))])),
        "bytes in all, not 16 rows",
    ),
}


@pytest.mark.parametrize("change", TABLES)
def test_tables_that_are_refused(fresh, change):
    folder, (apply, said) = fresh(), TABLES[change]
    pq.write_table(apply(pq.read_table(folder / TABLE)), folder / TABLE, use_dictionary=False)
    reseal(folder)
    assert said in refusal(folder)


def test_no_memory_is_taken_for_widths_that_no_file_bears_out(fresh, monkeypatch):
    folder = fresh()
    edit(folder, RECORD, lambda r: r["widths"].update({str(site): 2**24 for site in SITES}))

    def full(size, *_, **__):
        raise AssertionError(f"took memory for {size}")

    monkeypatch.setattr("safeglasses.defend.table.torch.full", full)
    assert "4 of 4 tensors of another shape or type" in refusal(folder)


# files


@pytest.mark.parametrize("name", FILES)
def test_missing_and_empty_files(fresh, name):
    folder = fresh()
    (folder / name).write_bytes(b"")
    if name == "README.md":
        assert Glasses.load(folder) == original()
    else:
        refusal(folder)
    (folder / name).unlink()
    if name == "README.md":
        assert Glasses.load(folder) == original()
    else:
        refusal(folder)


@pytest.mark.parametrize("name", FILES[:4])
def test_what_is_no_ordinary_file_is_not_read(fresh, name):
    folder = fresh()
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    for make in (Path.mkdir, os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p)):
        make(folder / name)
        refusal(folder)
        (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
    elsewhere = folder.parent / "blob"  # the hub's cache is made of such links
    elsewhere.write_bytes(content)
    (folder / name).symlink_to(elsewhere)
    assert Glasses.load(folder) == original()
    elsewhere.write_bytes(content[:-2])
    refusal(folder)


def test_other_files_beside_them_change_nothing(fresh):
    folder = fresh()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    (folder / "notes.txt").write_text("mine")
    (folder / "sub").mkdir()
    assert Glasses.load(folder) == original()


def test_files_of_two_folders_do_not_mix(fresh, tmp_path):
    other = replace(original(), factors={site: row * 0.5 for site, row in original().factors.items()})
    other.save(tmp_path / "other")
    for name in FILES[:4]:
        folder = fresh()
        shutil.copy(tmp_path / "other" / name, folder / name)
        if name == CONFIG:  # the same modules of the same model
            assert Glasses.load(folder) == original()
        else:
            with pytest.raises(PartialMatch):
                Glasses.load(folder)


def test_a_folder_of_the_first_schema_is_still_read(fresh):
    folder = fresh()
    record = json.loads((folder / RECORD).read_text())
    del record["sha256"]
    (folder / RECORD).write_text(json.dumps({**record, "schema": 1}))
    assert Glasses.load(folder) == original()
