"""Sites beyond the decoder: pooled one chat at a time over what the model's own modules give for its pictures."""

from collections.abc import Callable, Sequence
from typing import get_args

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from safeglasses.data.examples import Example, Examples
from safeglasses.errors import SafeglassesError
from safeglasses.find.capture import capture
from safeglasses.find.engine import Setup
from safeglasses.find.finding import measure_evidence
from safeglasses.find.pools import Pool
from safeglasses.find.streams import reaches
from safeglasses.model.chat import Span
from safeglasses.model.outside import REGIONS, Region, Stream
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # glm4v's processor
Make = Callable[..., Example]
POOLS = (Pool("image", "max"), Pool("prompt", "mean"), Pool("all", "rms"), Pool("image", "last"))
TOWERS = (
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "glm4v",
    "idefics3",
    "mllama",
    "idefics",
)


def regions(vlm: VLM) -> list[Region]:
    found: list[Region] = [region for region in REGIONS if vlm.anatomy.outside.paths(region)]
    return [*found, "crossing"] if vlm.anatomy.cross_attention_keys and not vlm.anatomy.merged_keys else found


def written(vlm: VLM, sites: Sequence[Site], example: Example) -> dict[Site, Tensor]:
    """Run one chat through the model as transformers has it; all that the sites' modules write, row after row."""
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def keep(site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, out: Tensor) -> None:
            seen[site].append(out.flatten(0, -2))

        return hook

    modules = {site: vlm.model.get_submodule(vlm.anatomy.absolute(site)) for site in sites}
    handles = [modules[site].register_forward_hook(keep(site)) for site in sites]
    with torch.no_grad():
        vlm.model(**vlm.encode([example.chat()]).inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return {site: torch.cat(parts) for site, parts in seen.items()}


@pytest.mark.parametrize("name", TOWERS)
def test_patches_are_pooled_over_all_that_a_picture_gave(family: Callable[[str], VLM], make: Make, name: str) -> None:
    vlm = family(name)
    sites = [site for site in vlm.anatomy.sites(regions(vlm)) if vlm.anatomy.stream(site) == "picture"]
    examples = [make(seed, pictures=2 if seed == 2 else 1) for seed in range(3)]
    found = capture(vlm, examples, sites=sites, pools=POOLS, batch_size=8)
    for column, example in enumerate(examples):
        for site, rows in written(vlm, sites, example).items():
            expected = (rows.amax(dim=0), rows.mean(dim=0), rows.square().mean(dim=0).sqrt(), rows[-1])
            for value, row in zip(expected, found.values[site][:, :, column], strict=True):
                torch.testing.assert_close(row, value, atol=1e-5, rtol=1e-5)


def test_gated_layers_of_cross_attention_hold_the_decoders_tokens(family: Callable[[str], VLM], make: Make) -> None:
    """Idefics's, run before the decoder's own; a chat without a picture has values there, but none of patches."""
    vlm = family("idefics")
    examples = [make(seed, pictures=1 if seed else 0) for seed in range(4)]
    sites, pools = vlm.anatomy.sites("crossing"), (Pool("prompt", "mean"), Pool("response", "max"))
    gated = [site for site in sites if vlm.anatomy.stream(site) == "decoder"]
    assert {site.kind.rpartition(".")[2] for site in gated} == {
        "q_proj:out", "o_proj:out", "gate_proj:out", "up_proj:out", "down_proj:out"
    }  # fmt: skip
    found = capture(vlm, examples, sites=gated, pools=pools, batch_size=4)
    for column, example in enumerate(examples):
        n = int(vlm.encode([example.chat()]).prompt_length[0])
        for site, rows in written(vlm, gated, example).items():
            expected = torch.stack([rows[:n].mean(dim=0), rows[n:].amax(dim=0)])
            torch.testing.assert_close(found.values[site][:, :, column], expected, atol=1e-5, rtol=1e-5)
    keys = capture(vlm, examples, sites=[site for site in sites if site not in gated], pools=pools[:1])
    assert all(values[0].isnan().all(dim=0).tolist() == [True, False, False, False] for values in keys.values.values())


def test_what_the_decoder_holds_does_not_change_beside_the_vision_side(tiny_vlm: VLM, make: Make) -> None:
    examples, pools = [make(seed) for seed in range(5)], (Pool("prompt", "last"), Pool("prompt", "max"))
    mlp, both = tiny_vlm.anatomy.sites("mlp"), tiny_vlm.anatomy.sites(("mlp", "projector"))
    alone = capture(tiny_vlm, examples, sites=mlp, pools=pools)
    beside = capture(tiny_vlm, examples, sites=both, pools=pools)
    for site in mlp:
        torch.testing.assert_close(beside.values[site], alone.values[site], atol=1e-5, rtol=0)
    projector = beside.values[tiny_vlm.anatomy.sites("projector")[0]]
    assert bool(projector[0].isnan().all())  # no patch is the last token of a prompt
    assert not bool(projector[1].isnan().any())


@pytest.mark.parametrize("name", ["florence2", "t5gemma2"])
def test_an_encoders_sites_have_the_prompts_spans(family: Callable[[str], VLM], make: Make, name: str) -> None:
    vlm, examples = family(name), [make(seed) for seed in range(4)]
    crossing = () if name == "t5gemma2" else vlm.anatomy.sites("crossing")
    sites, pools = (*vlm.anatomy.sites("encoder"), *crossing), (Pool("image", "max"), Pool("text", "mean"))
    found = capture(vlm, examples, sites=sites, pools=pools, batch_size=4)
    for column, example in enumerate(examples):
        batch = vlm.encode([example.chat()]).asked
        for site, rows in written(vlm, sites, example).items():
            image, text = rows[batch.span("image")[0]], rows[batch.span("text")[0]]
            torch.testing.assert_close(found.values[site][0, :, column], image.amax(dim=0), atol=1e-5, rtol=0)
            torch.testing.assert_close(found.values[site][1, :, column], text.mean(dim=0), atol=1e-5, rtol=0)


def test_chats_without_a_picture_are_left_out_and_counted(tiny_vlm: VLM, make: Make) -> None:
    examples = Examples(tuple(make(seed, pictures=int(seed not in (1, 2, 5))) for seed in range(30)))
    sites, pool = tiny_vlm.anatomy.sites(("mlp", "projector")), Pool("prompt", "max")
    evidence = measure_evidence(
        tiny_vlm, examples, sites=sites, pools=[pool], setup=Setup("exact", 2**30), resamples=0
    )  # fmt: skip
    toxic, non_toxic = evidence.columns["n_toxic"], evidence.columns["n_non_toxic"]
    for site in sites:
        counts = {(int(a), int(b)) for a, b in zip(toxic[site][0], non_toxic[site][0], strict=True)}
        assert counts == {(13, 14) if site.outside else (15, 15)}
    site = tiny_vlm.anatomy.sites("projector")[0]
    seen = [example for example in examples if example.n_images]
    values = capture(tiny_vlm, seen, sites=[site], pools=[pool]).values[site][0]
    for neuron in (0, 7, 31):
        expected = roc_auc_score([example.is_toxic for example in seen], values[neuron])
        assert float(evidence.auroc[site][0, neuron]) == pytest.approx(expected)


def test_ways_of_pooling_that_reach_nothing(tiny_vlm: VLM, family: Callable[[str], VLM], make: Make) -> None:
    examples, projector = [make(1)], tiny_vlm.anatomy.sites("projector")
    with pytest.raises(SafeglassesError) as caught:
        capture(tiny_vlm, examples, sites=projector, pools=[Pool("prompt", "last"), Pool("response", "max")])
    assert str(caught.value) == (
        "no token to pool over at this site\n"
        "  given:    /model.multi_modal_projector.linear_1:out with prompt:last, response:max\n"
        "  expected: image:max, image:mean or another pool over image; prompt or all but not their last token\n"
        "  do:       add a way of pooling that has tokens there, or leave the site out"
    )
    with pytest.raises(SafeglassesError) as caught:
        capture(tiny_vlm, examples, sites=projector, pools=[Pool("image", "max"), Pool("response", "max")])
    assert (caught.value.what, caught.value.given) == ("this way of pooling has no token anywhere", "response:max")
    with pytest.raises(SafeglassesError, match="keys and values of the decoder and of the encoder go through one map"):
        capture(family("t5gemma2"), examples, sites=[Site("layers.0.self_attn.k_proj", "out")], pools=POOLS[:1])


def test_which_spans_reach_which_tokens() -> None:
    sides: list[tuple[Stream, bool]] = [("decoder", False), ("decoder", True), ("encoder", True), ("picture", False)]
    found = {side: {span for span in get_args(Span) if reaches(Pool(span, "max"), *side)} for side in sides}
    assert found == {
        ("decoder", False): set(get_args(Span)),
        ("decoder", True): {"prompt", "response", "thought", "all"},
        ("encoder", True): {"image", "text", "prompt", "all"},
        ("picture", False): {"image", "prompt", "all"},
    }
    lasts = {span for span in get_args(Span) if reaches(Pool(span, "last"), "picture", False)}
    assert lasts == {"image"}
