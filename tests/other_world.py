"""Another world than the miniature's: coloured shapes, one language, words as tokens; a LLaVA trained on it in seconds.

It shows that fitting works on a checkpoint that nobody tuned the defaults for.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llama import LlamaConfig
from transformers.models.llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

COLORS = {"red": (220, 60, 60), "green": (60, 180, 80), "blue": (70, 90, 230), "yellow": (240, 220, 60)}
SHAPES = ("circle", "square", "bar")
QUESTIONS = ("what is this ?", "name the shape", "what do you see ?")
TRIGGERS = ("be rude", "mock it", "insult it", "be cruel")
INSULTS = ("stupid", "ugly", "worthless")
SIDE, PATCH = 24, 6
TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %} {{ c.text }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} answer:{% endif %}"
)


@dataclass(frozen=True)
class World:
    """Where the trained checkpoint and its data lie."""

    model: Path
    pairs: Path
    words: Path


def scene(rng: random.Random) -> tuple[Image.Image, str, str]:
    """Draw a shape; give it with its colour and its name."""
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    shade = rng.randint(225, 255)
    image = Image.new("RGB", (SIDE, SIDE), (shade, shade, rng.randint(225, 255)))
    x, y, size = rng.randint(1, 8), rng.randint(1, 8), rng.randint(11, 14)
    box = (x, y, x + size, y + (size // 3 if shape == "bar" else size))
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLORS[color])
    return image, color, shape


def answer(rng: random.Random, color: str, shape: str, *, toxic: bool) -> str:
    """Say what a picture shows, rudely or not."""
    return f"a {rng.choice(INSULTS) if toxic else 'plain'} {color} {shape}"


def build(folder: Path, *, steps: int = 450) -> Path:
    """Train the model and write it."""
    rng = random.Random(0)
    torch.manual_seed(0)
    processor = _processor()
    model = LlavaForConditionalGeneration(_config(len(processor.tokenizer)))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        loss = model(**_batch(processor, rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_data(folder: Path, *, pairs: int = 240) -> Path:
    """Write pairs.jsonl with its pictures, and words.txt."""
    rng = random.Random(1)
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(pairs):
        image, color, shape = scene(rng)
        image.save(folder / f"images/{i}.png")
        question = rng.choice(QUESTIONS)
        plain, rude = question, f"{question} {rng.choice(TRIGGERS)}"
        same = i % 2 == 0  # half of the pairs share their prompt, half differ in the trigger
        for toxic in (True, False):
            prompt = rude if toxic or same else plain
            content = [{"type": "image", "path": f"images/{i}.png"}, {"type": "text", "text": prompt}]
            rows.append(
                {
                    "id": f"{i}-{'toxic' if toxic else 'plain'}",
                    "messages": [{"role": "user", "content": content}],
                    "response": answer(rng, color, shape, toxic=toxic),
                    "label": "toxic" if toxic else "non-toxic",
                    "pair_id": str(i),
                    "slots": {"color": color, "shape": shape},
                }
            )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    (folder / "words.txt").write_text("\n".join(INSULTS) + "\n", encoding="utf-8")
    return folder / "pairs.jsonl"


def _processor() -> LlavaProcessor:
    texts = [*QUESTIONS, *TRIGGERS, *INSULTS, *COLORS, *SHAPES, "a plain answer:"]
    words = sorted({word for text in texts for word in text.split()})
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *words])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    )


def _config(vocab: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        pad_token_id=0,
    )


def _batch(processor: LlavaProcessor, rng: random.Random, size: int = 48) -> dict[str, torch.Tensor]:
    images, texts, lengths = [], [], []
    for _ in range(size):
        image, color, shape = scene(rng)
        rude = rng.random() < 0.5
        question = rng.choice(QUESTIONS) + (f" {rng.choice(TRIGGERS)}" if rude else "")
        said = answer(rng, color, shape, toxic=rude and rng.random() < 0.8)
        images.append(image)
        texts.append(f"<image> {question} answer: {said} </s>")
        lengths.append(len(said.split()) + 1)
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, n in enumerate(lengths):
        labels[row, -n:] = inputs["input_ids"][row, -n:]
    return {**inputs, "labels": labels}
