"""Folding into the 3-D parameters of fused experts, in memory and on disk, in every layout."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import families
from families.unrolled import NOT_OURS, chat
from safeglasses.defend.glasses import Glasses
from safeglasses.model.vlm import VLM, load
from safeglasses.ship.fold import fold_checkpoint


def logits(vlm: VLM) -> Tensor:
    with torch.no_grad():
        return vlm.forward(vlm.encode([chat(vlm, index, "a red dog " * index) for index in (1, 3)]))


@pytest.mark.filterwarnings(NOT_OURS)
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "ernie4_5_vl_moe", "aria", "gpt_oss"])
def test_folded_is_worn_and_reloads(name: str, tmp_path: Path) -> None:
    base = families.build(name, tmp_path / "base")
    vlm = load(base)
    generator = torch.Generator().manual_seed(0)
    sites = [s for fused in vlm.anatomy.experts.values() for s in fused.sites("gate", "up", "in", "out")]
    factors = {site: torch.rand(vlm.anatomy.width(site), generator=generator) for site in sites[::3]}
    glasses = Glasses(factors=factors, base_fingerprint=vlm.fingerprint(), recipe="made up")
    before = logits(vlm)
    with glasses.worn(vlm):
        worn = logits(vlm)
    assert torch.equal(logits(vlm), before)
    assert not torch.allclose(worn, before, atol=1e-2)
    saved = glasses.save(tmp_path / "glasses", vlm)
    streamed = fold_checkpoint(base, saved, tmp_path / "streamed").folder
    glasses.fold(vlm)
    folded = logits(vlm)
    torch.testing.assert_close(folded, worn, atol=1e-4, rtol=1e-4)
    auto = AutoModelForImageTextToText if vlm.is_multimodal else AutoModelForCausalLM
    again = auto.from_pretrained(streamed, dtype="auto").eval()
    mine = dict(vlm.model.named_parameters())
    for path, parameter in again.named_parameters():
        assert torch.equal(parameter, mine[path]), path
