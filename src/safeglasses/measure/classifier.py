"""A Hugging Face text classifier, reduced to the probability of one label."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from safeglasses.errors import SafeglassesError

_UNLIMITED = 1_000_000  # tokenizers that know no limit report about 1e30


class TextClassifier:
    """The model, its tokenizer and the label that counts."""

    label: str
    """Name of the label, as in the model's config."""
    max_tokens: int
    """Longest text in tokens, special tokens included."""

    def __init__(self, source: str, *, label: str | None, device: str | None, revision: str | None) -> None:
        """Load from a folder or hub id; the label is checked before the weights are read.

        Raises:
            SafeglassesError: as said in `ClassifierJudge`.
        """
        try:
            config: Any = AutoConfig.from_pretrained(source, revision=revision)
        except (OSError, ValueError) as error:
            raise _unloadable(source, error) from error
        self._index = _label_index(config.id2label, label)
        self.label = config.id2label[self._index]
        self._sigmoid = _uses_sigmoid(config)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=revision)
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                source, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise _unloadable(source, error) from error
        model, info = loaded
        if info["missing_keys"]:
            raise SafeglassesError(
                "the checkpoint has no trained classification head",
                given=f"{source}: {', '.join(sorted(info['missing_keys'])[:4])} missing",
                expected="a model fine-tuned for sequence classification",
            )
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.eval().to(self._device)
        self.max_tokens = _max_tokens(model, self._tokenizer)
        if self._tokenizer.pad_token is None:
            raise SafeglassesError(
                "the classifier's tokenizer has no padding token",
                given=source,
                do="set `pad_token` and save it",
            )
        # classifiers made of decoders find their last token by the padding id
        self._model.config.pad_token_id = self._tokenizer.pad_token_id

    def n_tokens(self, text: str) -> int:
        """Length of a text in tokens, special tokens included."""
        return len(self._tokenizer(text, truncation=False, verbose=False)["input_ids"])

    @torch.no_grad()
    def scores(self, texts: Sequence[str]) -> list[float]:
        """Probability of the label per text; NaN where any logit is not finite."""
        inputs = self._tokenizer(list(texts), padding=True, truncation=False, return_tensors="pt")
        logits = self._model(**inputs.to(self._device)).logits.double().cpu()
        probabilities = logits.sigmoid() if self._sigmoid else logits.softmax(-1)
        broken = ~logits.isfinite().all(-1)
        return probabilities[:, self._index].masked_fill(broken, float("nan")).tolist()


def _label_index(id2label: dict[int, str], label: str | None) -> int:
    if label is None and len(id2label) == 1:
        return next(iter(id2label))
    for index, name in id2label.items():
        if name == label:
            return index
    raise SafeglassesError(
        "the classifier has no such label" if label else "which label is the harmful one?",
        given=label or "",
        expected=", ".join(id2label.values()),
        do="write ?label=NAME after the classifier",
    )


def _uses_sigmoid(config: Any) -> bool:
    """Several labels exclude each other unless the config says otherwise; one label alone cannot.

    Raises:
        SafeglassesError: a regression head, whose output is no probability.
    """
    if config.problem_type == "regression":
        raise SafeglassesError(
            "a regression head gives no probability",
            given="problem_type: regression",
            expected="single_label_classification or multi_label_classification in its config.json",
        )
    return config.problem_type == "multi_label_classification" or len(config.id2label) == 1


def _max_tokens(model: nn.Module, tokenizer: Any) -> int:
    """Smallest limit that is known: the tokenizer's, the config's, the position table's.

    RoBERTa's table starts counting after its padding index, so its config overstates the length by two.
    """
    config: Any = model.config
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or _UNLIMITED]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(_UNLIMITED, *(limit for limit in limits if limit > 0))


def _unloadable(source: str, error: Exception) -> SafeglassesError:
    return SafeglassesError(
        "the classifier cannot be loaded",
        given=f"{source}: {str(error).splitlines()[0]}",
        expected="a folder or hub id with config.json, tokenizer and model.safetensors of a text classifier",
    )
