import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from safeglasses.errors import SafeglassesError
from safeglasses.measure.classifier import TextClassifier
from safeglasses.measure.judges import ClassifierJudge, judge_from

LAW = settings(deadline=None, max_examples=50)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "nice", "stupid", "cat", "broken", "and", "the"]
TEXTS = ["a nice cat", "stupid", "the stupid cat and the cat", "a", "and and and and and nice"]
SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 1.0,
    "pad_token_id": 0,
}


def _tokenizer(limit: int) -> PreTrainedTokenizerFast:
    unknown, padding = {"unk_token": "[UNK]"}, {"pad_token": "[PAD]"}
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, **unknown))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=limit, **unknown, **padding)


def _build(folder: Path, labels: Sequence[str], *, problem_type: Any = None, limit: int = 12) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = BertConfig(**SHAPE, max_position_embeddings=32, id2label=dict(enumerate(labels)))
        config.problem_type = problem_type
        model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    _tokenizer(limit).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def toxic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("toxic"), ["fine", "toxic", "spam"])


def _logits(folder: Path, text: str) -> torch.Tensor:
    """Oracle: one text at a time, no padding, ids by hand."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[2, *(WORDS.index(word) for word in text.split()), 3]])
    with torch.no_grad():
        return model(ids).logits[0].double()


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_scores_are_the_softmax_of_each_text_alone(toxic: Path, batch: int) -> None:
    judge = ClassifierJudge(toxic, label="toxic", batch=batch)
    verdicts = judge.judge(TEXTS)
    for text, verdict in zip(TEXTS, verdicts, strict=True):
        expected = _logits(toxic, text).softmax(0)[1].item()
        assert verdict.score == pytest.approx(expected, abs=1e-5)
        assert verdict.harmful is (expected >= 0.5)
        assert verdict.reason == f"toxic {expected:.3f}"
    assert len({v.score for v in verdicts}) == len(TEXTS)


def test_labels_that_do_not_exclude_each_other_get_a_sigmoid(tmp_path: Path) -> None:
    folder = _build(tmp_path, ["insult", "threat"], problem_type="multi_label_classification")
    verdicts = ClassifierJudge(folder, label="threat").judge(TEXTS)
    for text, verdict in zip(TEXTS, verdicts, strict=True):
        assert verdict.score == pytest.approx(_logits(folder, text)[1].sigmoid().item(), abs=1e-5)


def test_a_single_label_gets_a_sigmoid_and_need_not_be_named(tmp_path: Path) -> None:
    folder = _build(tmp_path, ["toxicity"])
    judge = ClassifierJudge(folder)
    assert judge.name == f"classifier:{folder}?label=toxicity&threshold=0.5"
    assert judge.judge(["stupid"])[0].score == pytest.approx(_logits(folder, "stupid").sigmoid().item(), abs=1e-5)


def test_a_text_describes_a_classifier(toxic: Path) -> None:
    judge = judge_from(f"classifier:{toxic}?label=spam&threshold=0.25&batch=2")
    assert judge.name == f"classifier:{toxic}?label=spam&threshold=0.25"
    scores = [_logits(toxic, text).softmax(0)[2].item() for text in TEXTS]
    assert [v.harmful for v in judge.judge(TEXTS)] == [score >= 0.25 for score in scores]


@pytest.mark.parametrize(
    ("query", "what"),
    [("?label=Toxic", "the classifier has no such label"), ("", "which label is the harmful one?")],
)
def test_labels_are_listed_when_none_fits(toxic: Path, query: str, what: str) -> None:
    with pytest.raises(SafeglassesError) as error:
        judge_from(f"classifier:{toxic}{query}")
    assert error.value.what == what
    assert error.value.expected == "fine, toxic, spam"
    assert error.value.do == "write ?label=NAME after the classifier"


def test_what_cannot_be_scored_is_unscored(toxic: Path, tmp_path: Path) -> None:
    for file in toxic.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bert.embeddings.word_embeddings.weight"][WORDS.index("broken")] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fits, too_long = " ".join(["a"] * 10), " ".join(["a"] * 11)  # and two special tokens
    verdicts = ClassifierJudge(tmp_path, label="toxic", batch=8).judge(
        ["a broken cat", "stupid", "", " \n", fits, too_long]
    )
    assert [v.reason for v in verdicts if v.score is None] == [
        "the classifier's score is not a number",
        "empty answer",
        "empty answer",
        "too long for the classifier: 13 tokens, at most 12",
    ]
    assert [v.score is None for v in verdicts] == [True, False, True, True, False, True]
    assert [v.harmful is None for v in verdicts] == [v.score is None for v in verdicts]
    assert verdicts[1].score == pytest.approx(_logits(toxic, "stupid").softmax(0)[1].item(), abs=1e-5)


@settings(LAW, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(width=32), min_size=1, max_size=5))
def test_a_broken_score_never_becomes_a_number(toxic: Path, monkeypatch: pytest.MonkeyPatch, raw: list[float]) -> None:
    judge = _cached(toxic)
    monkeypatch.setattr(TextClassifier, "scores", lambda self, texts: raw[: len(texts)])
    if any(score == score and abs(score) != float("inf") and not 0 <= score <= 1 for score in raw):
        with pytest.raises(SafeglassesError, match="not a score"):
            judge.judge(["cat"] * len(raw))
        return
    for score, verdict in zip(raw, judge.judge(["cat"] * len(raw)), strict=True):
        finite = 0 <= score <= 1
        assert (verdict.score, verdict.harmful) == ((score, score >= 0.5) if finite else (None, None))


_JUDGES: dict[Path, ClassifierJudge] = {}


def _cached(folder: Path) -> ClassifierJudge:
    return _JUDGES.setdefault(folder, ClassifierJudge(folder, label="toxic"))


def test_texts_longer_than_the_position_table_are_unscored(tmp_path: Path) -> None:
    shape: dict[str, Any] = SHAPE | {"pad_token_id": 1, "max_position_embeddings": 10}
    config = RobertaConfig(**shape, id2label={0: "toxic"})
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    _tokenizer(10**30).save_pretrained(tmp_path)
    verdicts = ClassifierJudge(tmp_path).judge([" ".join(["cat"] * 6), " ".join(["cat"] * 7)])
    assert verdicts[0].score is not None
    assert verdicts[1].reason == "too long for the classifier: 9 tokens, at most 8"


def test_an_untrained_head_is_refused(tmp_path: Path) -> None:
    config = BertConfig(**SHAPE, id2label={0: "fine", 1: "toxic"})
    BertModel(config).save_pretrained(tmp_path)
    _tokenizer(12).save_pretrained(tmp_path)
    with pytest.raises(SafeglassesError, match="the checkpoint has no trained classification head") as error:
        ClassifierJudge(tmp_path, label="toxic")
    assert "classifier.weight" in error.value.given


def test_a_regression_head_is_refused(tmp_path: Path) -> None:
    folder = _build(tmp_path, ["toxicity"], problem_type="regression")
    with pytest.raises(SafeglassesError, match="a regression head gives no probability"):
        ClassifierJudge(folder)


def test_a_folder_without_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SafeglassesError, match="the classifier cannot be loaded") as error:
        ClassifierJudge(tmp_path, label="toxic")
    assert error.value.given.startswith(f"{tmp_path}: ")


def test_pickled_weights_are_not_opened(toxic: Path, tmp_path: Path) -> None:
    for file in toxic.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SafeglassesError, match="the classifier cannot be loaded"):
        ClassifierJudge(tmp_path, label="toxic")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
