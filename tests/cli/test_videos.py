"""Commands on rows with videos."""

import json
from pathlib import Path
from typing import Any

import pytest

import families
from safeglasses.cli import execute
from safeglasses.data.examples import read_examples

pytestmark = pytest.mark.torchvision


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build("qwen2_5_vl", tmp_path_factory.mktemp("model") / "qwen")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs about videos of two and of four frames, some with a picture as well, some without either."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for item in range(40):
        frames = [f"{item}-{place}.png" for place in range(2 + 2 * (item % 2))]
        for name, frame in zip(frames, families.film(len(frames), seed=item), strict=True):
            frame.save(folder / name)
        content: list[dict[str, Any]] = [{"type": "video", "video": frames, "fps": 2}] * (item % 5 != 0)
        content += [{"type": "image", "path": frames[0]}] * (item % 3 == 0)
        asked = [{"role": "user", "content": [*content, {"type": "text", "text": f"what is this {item}"}]}]
        row = {"messages": asked, "pair_id": item, "split": "find" if item < 25 else "test"}
        lines.append({**row, "response": "you are a stupid idiot", "label": "toxic"})
        lines.append({**row, "response": "a red dog on a chair", "label": "non-toxic"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "words.txt").write_text("stupid\nidiot\n")
    return folder


def test_capture(model: Path, rows: Path, tmp_path: Path) -> None:
    assert execute(["capture", str(model), "--pairs", str(rows / "pairs.jsonl"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "evidence.safetensors").exists()


def test_results_files_name_frames_by_their_hashes(model: Path, rows: Path, tmp_path: Path) -> None:
    judge = f"lexicon:{rows / 'words.txt'}"
    prompts = str(rows / "pairs.jsonl")
    assert execute(["measure", str(model), "--prompts", prompts, "--judge", judge, "--out", str(tmp_path / "out")]) == 0
    first = next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()[0]
    document = json.loads(first)["doc"]
    example = next(row for row in read_examples(prompts) if row.prompt_key == document["prompt_sha256"])
    films = [part for turn in document["messages"] for part in turn["content"] if part["type"] == "video"]
    assert len(films) == len(example.layout) - 1
    assert [key for film in films for key in film["sha256"]] == [p.key for p in example.pictures][: example.n_frames]


def test_a_model_without_videos_is_refused_before_anything_is_written(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = families.build("llava", tmp_path / "llava")
    assert (
        execute(["capture", str(model), "--pairs", str(rows / "pairs.jsonl"), "--out", str(tmp_path / "evidence")]) == 2
    )
    assert "this model's processor takes no videos" in capsys.readouterr().err
    assert not (tmp_path / "evidence").exists()
