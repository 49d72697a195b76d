"""Small data for whole commands on the tiny random model."""

import json
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs, prompts, a lexicon and pictures; treat it as read-only."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "words.txt").write_text("stupid\nidiot\n")
    pairs, prompts = [], []
    for i in range(120):
        Image.new("RGB", (24, 24), (2 * i, 255 - 2 * i, 7 * i % 256)).save(folder / f"{i}.png")
        prompt = [{"type": "image", "path": f"{i}.png"}, {"type": "text", "text": "what is in the picture"}]
        messages = [{"role": "user", "content": prompt}]
        split = ("find", "find", "find", "calibrate", "test")[i % 5]
        benign = i % 4 == 3  # nobody insults these pictures
        responses = {"toxic": "you stupid idiot", "non-toxic": "a red dog"}
        for label, response in list(responses.items())[benign:]:
            common = {"messages": messages, "pair_id": i, "split": split}
            pairs.append({**common, "id": f"{i}-{label}", "label": label, "response": response})
        prompts.append(
            {
                "id": f"p{i}",
                "messages": messages,
                "split": split,
                "label": "non-toxic" if benign else "toxic",
                "response": "a blue cat" if benign else None,
                "condition": "adversarial" if i % 2 else "standard",
                "slots": {"color": "red"},
            }
        )
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
