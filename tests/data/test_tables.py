"""The same rows come out of JSONL, Parquet, folders and saved datasets."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from safeglasses.data.examples import Examples, read_examples
from safeglasses.errors import BadRow, SafeglassesError

datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(4):
        Image.new("RGB", (6, 4), (index * 60, 0, 0)).save(tmp_path / f"{index}.png")
    return tmp_path


def row(index: int, image: object) -> dict[str, object]:
    content = [image, {"type": "text", "text": "What is it?\u2028"}]
    return {
        "id": str(index),
        "messages": [{"role": "user", "content": content}],
        "response": "red",
        "label": "toxic" if index % 2 else "non-toxic",
        "slots": {"colour": "red"} if index else {"shape": "square"},
    }


@pytest.fixture
def expected(folder: Path) -> Examples:
    path = folder / "rows.jsonl"
    rows = [row(index, {"type": "image", "path": f"{index}.png"}) for index in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(path)


def test_parquet_with_pictures_inside_the_messages(folder: Path, expected: Examples) -> None:
    rows = [
        row(index, {"type": "image", "bytes": (folder / f"{index}.png").read_bytes(), "path": None})
        for index in range(4)
    ]
    path = folder / "elsewhere" / "rows.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_examples(path) == expected


def test_parquet_maps_are_slots(folder: Path) -> None:
    kind = pyarrow.schema(
        {
            "messages": pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})),
            "slots": pyarrow.map_(pyarrow.string(), pyarrow.string()),
        }
    )
    rows = [{"messages": [{"role": "user", "content": "hi"}], "slots": [("a", "b"), ("c", None)]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=kind), folder / "rows.parquet")
    (example,) = read_examples(folder / "rows.parquet")
    assert (example.id, example.slots) == ("rows.parquet:1", {"a": "b"})


def dataset(folder: Path, column: str, feature: object) -> datasets.Dataset:
    """Rows in the manner of TRL: placeholders in the messages, pictures in a column."""
    several = column == "images"
    rows = [row(index, {"type": "image"}) for index in range(4)]
    paths = [str(folder / f"{index}.png") for index in range(4)]
    table = datasets.Dataset.from_list(
        [{**row, column: [path] if several else path} for row, path in zip(rows, paths, strict=True)]
    )
    return table.cast_column(column, feature)


@pytest.mark.parametrize(
    ("column", "feature"), [("image", datasets.Image()), ("images", datasets.List(datasets.Image()))]
)
def test_what_datasets_writes(folder: Path, expected: Examples, column: str, feature: object) -> None:
    table = dataset(folder, column, feature)
    table.to_parquet(folder / "pictures.parquet")
    assert read_examples(folder / "pictures.parquet") == expected
    table.select([3, 1, 2, 0]).select([3, 1, 2, 0]).save_to_disk(folder / "saved")
    assert read_examples(folder / "saved") == expected
    datasets.DatasetDict({"a": table.select([0, 1]), "b": table.select([2, 3])}).save_to_disk(folder / "dict")
    assert read_examples(folder / "dict") == expected
    assert read_examples(folder / "dict")[1:].split("find").rows == expected[1:].split("find").rows


def test_bad_rows_of_a_saved_dataset_are_named(folder: Path) -> None:
    table = dataset(folder, "image", datasets.Image()).map(lambda row: {"label": "bad" if row["id"] == "2" else None})
    datasets.DatasetDict({"train": table}).save_to_disk(folder / "saved")
    with pytest.raises(BadRow) as error:
        read_examples(folder / "saved")
    assert error.value.what == f'{folder}/saved/train:3: unknown "label"'


def test_folders(folder: Path, expected: Examples) -> None:
    (folder / "rows.jsonl").rename(folder / "data.jsonl")
    assert read_examples(folder) == expected
    rows = [{**row(index, {"type": "image"}), "file_name": f"{index}.png"} for index in range(4)]
    (folder / "data.jsonl").rename(folder / "kept")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_examples(folder) == expected
    hub = folder / "hub"
    (hub / "data").mkdir(parents=True)
    for part in range(2):
        table = dataset(folder, "image", datasets.Image()).select([2 * part, 2 * part + 1])
        table.to_parquet(hub / "data" / f"train-0000{part}-of-00002.parquet")
    assert read_examples(hub) == expected


def test_a_folder_with_several_sets_of_rows(folder: Path) -> None:
    for name in ("data.jsonl", "a.parquet"):
        (folder / name).touch()
    with pytest.raises(SafeglassesError) as error:
        read_examples(folder)
    assert str(error.value) == (
        "the folder holds several sets of rows\n"
        f"  given:    {folder}/data.jsonl, {folder}/a.parquet\n"
        "  expected: one of them\n"
        "  do:       give the file itself"
    )


def test_damaged_tables(folder: Path) -> None:
    (folder / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SafeglassesError, match="the Parquet file cannot be read") as error:
        read_examples(folder / "a.parquet")
    assert error.value.given.startswith(f"{folder}/a.parquet (")
    assert error.value.do == "was it cut off? write or fetch it again"
    (folder / "saved").mkdir()
    (folder / "saved" / "state.json").write_text("{}")
    with pytest.raises(SafeglassesError, match="the datasets folder cannot be read") as error:
        read_examples(folder / "saved")
    assert error.value.do == "save it again with save_to_disk"
