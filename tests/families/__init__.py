"""Tiny random checkpoints of many model families, built offline; chats to try them on."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from families import both, gemmas, llavas, moes, others, qwens, second
from families.parts import VOCAB, Family

_CORPUS = (
    "a picture of a red dog and the blue cat on a green chair you are a stupid worthless idiot shut up "
    "what is in the picture describe what you see I cannot help with that request sorry kindly thank you"
)
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
_NAMED = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% elif c.type == 'video' %}VIDEO{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECS = {**llavas.SPECS, **gemmas.SPECS, **qwens.SPECS, **moes.SPECS, **others.SPECS, **both.SPECS, **second.SPECS}
EVERY = tuple(_SPECS)
"""All families, in the order of docs/families.md."""
NEED_TORCHVISION = tuple(second.SPECS)
"""Those that are looked at where there is torchvision alone."""
FAMILIES = tuple(name for name in EVERY if name not in NEED_TORCHVISION or is_torchvision_available())
"""Those that can chat here."""
MIXTURES = tuple(name for name in FAMILIES if name in moes.SPECS)
"""Those with fused experts, beside linear maps or in all layers."""
TEXT_ONLY = tuple(name for name in FAMILIES if _SPECS[name].processor is None)
PICTURES = {name: () if name in TEXT_ONLY else _SPECS[name].pictures for name in EVERY}
"""How many pictures one chat with each family may hold, as far as the tests go."""
VIDEOS = tuple(name for name in EVERY if _SPECS[name].video)
"""Those that take videos, where there is torchvision."""
SIZES = ((24, 24), (40, 24), (24, 60), (12, 12), (33, 50))
"""Picture sizes that families treat differently."""


def build(family: str, folder: Path) -> Path:
    """Write a tiny random checkpoint of a family into a folder and return the folder."""
    spec = _SPECS[family]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(spec)
    ids = tokenizer.get_vocab()
    config = spec.config(ids)
    module = importlib.import_module(type(config).__module__.rpartition(".")[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(module, spec.model)(config).eval()
        for name, parameter in model.named_parameters():  # sharper than the default, so that outputs differ
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.15)
            elif not name.endswith("norm.weight"):
                parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = ids["</s>"]
    model.generation_config.pad_token_id = ids["<pad>"]
    model.generation_config.bos_token_id = ids["<s>"]
    model.save_pretrained(folder)
    template = TEMPLATE.replace("IMAGE", spec.image).replace("VIDEO", spec.video)
    if spec.processor is None:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    else:
        processor = spec.processor(tokenizer)
        processor.chat_template = template
        processor.save_pretrained(folder)
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a noisy picture."""
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def film(frames: int, width: int = 24, height: int = 24, seed: int = 0) -> list[Image.Image]:
    """Return the noisy frames of a video."""
    return [picture(width, height, seed=1000 * (seed + 1) + number) for number in range(frames)]


def messages(index: int, *, pictures: int = 1) -> list[dict[str, Any]]:
    """Return the same user message for the same index; lengths and picture sizes differ between indices."""
    image = {"type": "image", "image": picture(*SIZES[index % len(SIZES)], seed=index)}
    return [
        {
            "role": "user",
            "content": [image] * pictures + [{"type": "text", "text": "what is " * index + "this"}],
        }
    ]


def _tokenizer(spec: Family) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [_CORPUS],
        trainers.BpeTrainer(
            vocab_size=VOCAB - 50, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    extra = list(dict.fromkeys([*spec.named.values(), *spec.tokens]))
    raw.add_special_tokens(extra)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        **_NAMED,
        extra_special_tokens=spec.named,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
