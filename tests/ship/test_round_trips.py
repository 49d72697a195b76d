"""Every family: wearing glasses = IA3 in PEFT = LoRA in PEFT = a folded checkpoint, loaded again."""

import pytest
import torch

import families
from shipped import FORMS, travel

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # raised inside PEFT
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),  # glm4v
]


# of families with fused experts no adapter carries all neurons: tests/test_families.py has them all
@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name not in families.MIXTURES])
def test_every_form_gives_the_logits_of_wearing(family, folder_of, tmp_path):
    trip = travel(folder_of(family), tmp_path, torch.float32)
    assert trip.glasses > 1, "glasses that change little would prove little"
    assert trip.inputs > 5
    assert list(trip.differences) == list(FORMS)
    assert trip.differences["IA3 in PEFT"] == 0
    assert max(trip.differences.values()) <= 1e-5, trip


def test_there_are_enough_families_and_some_change_biases(folder_of, tmp_path):
    assert len(set(families.FAMILIES) - set(families.TEXT_ONLY)) >= 8
    assert travel(folder_of("opt"), tmp_path, torch.float32).biases


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
def test_bfloat16_differs_by_rounding(family, folder_of, tmp_path):
    """Within 2^-5 of the largest logit; the worn model itself is about as far from float32."""
    trip = travel(folder_of(family), tmp_path, torch.bfloat16)
    assert trip.differences["IA3 in PEFT"] == 0
    assert 0 < max(trip.differences.values()) <= 2**-5 * trip.logits < trip.glasses / 10
