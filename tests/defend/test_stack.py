"""Several glasses at once: laws of the product, what a report says of them, and the verb."""

import json
from itertools import permutations

import pyarrow.parquet as pq
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from defend.conftest import batch_for, glasses_for, logits_of
from safeglasses.cli.outcome import Outcome
from safeglasses.cli.stack import stack as verb
from safeglasses.defend.glasses import Glasses
from safeglasses.defend.home import Home
from safeglasses.defend.stack import multiply, names_of, stack, stack_folders
from safeglasses.errors import SafeglassesError, WrongBase
from safeglasses.files import sha256_file
from safeglasses.model.sites import Site

UP, DOWN = Site("layers.3.mlp.up_proj", "out"), Site("layers.10.mlp.down_proj", "in")
HOME = Home("owner/model", None, "model.language_model", True, False)
FACTOR = st.floats(-2, 2, width=32)
ROW = arrays("float32", 4, elements=FACTOR).map(torch.from_numpy)
STRENGTH = st.sampled_from([0.25, 0.5, 1.0, 1.5])


def made(*rows, recipe="test", sites=(UP, DOWN), **more):
    factors = {site: torch.as_tensor(row, dtype=torch.float32) for site, row in zip(sites, rows, strict=False)}
    return Glasses(factors, more.pop("base", "sg1-a"), recipe, home=HOME, **more)


def message(error):
    return str(error.value)


# the product


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(ROW, ROW, STRENGTH), min_size=2, max_size=3))
def test_the_order_of_parts_changes_no_bit(parts):
    glasses = [made(up, down) for up, down, _ in parts]
    strengths = [strength for _, _, strength in parts]
    first = stack(glasses, strengths).glasses.factors
    for order in permutations(range(len(parts))):
        again = stack([glasses[i] for i in order], [strengths[i] for i in order]).glasses.factors
        assert all(torch.equal(first[site].view(torch.int32), again[site].view(torch.int32)) for site in (UP, DOWN))


@settings(deadline=None, max_examples=60)
@given(ROW, ROW, ROW, STRENGTH, STRENGTH)
def test_laws(x, y, z, s, t):
    a, b, c = made(x), made(y), made(z)
    acting = [1 - s * (1 - x.double()), 1 - t * (1 - y.double())]
    product = stack([a, b], [s, t]).glasses
    torch.testing.assert_close(product.factors[UP].double(), acting[0] * acting[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(stack([a, b]).glasses.factors[UP], (a * b).factors[UP])
    grouped = stack([stack([a, b]).glasses, c]).glasses.factors[UP]
    torch.testing.assert_close(grouped, stack([a, b, c]).glasses.factors[UP], rtol=1e-6, atol=1e-30)
    assert torch.equal(stack([a, made(torch.ones(4))]).glasses.factors[UP], x)  # identity
    assert stack([a]).glasses == a
    assert stack([a], s).glasses == a.at(s)
    left = stack([a, b], [s, 0])
    assert left.glasses == a.at(s)
    assert left.left_out == ("2",)
    assert left.names == ("1",)


def test_worn_at_once_is_worn_as_a_stack(tiny_vlm):
    a, b, c = (glasses_for(tiny_vlm, seed=seed) for seed in (1, 2, 3))
    batch = batch_for(tiny_vlm)
    with stack([a, b, c], [1, 0.5, 0.8]).glasses.worn(tiny_vlm):
        product = logits_of(tiny_vlm, batch)
    with a.worn(tiny_vlm), b.at(0.5).worn(tiny_vlm), c.at(0.8).worn(tiny_vlm):
        torch.testing.assert_close(product, logits_of(tiny_vlm, batch), rtol=1e-4, atol=1e-5)


def test_stack_keeps_evidence_and_notes_of_every_part():
    a = made([0.5, 1, 1, 1], recipe="hate", columns={"q": {UP: torch.tensor([0.1, 0.2, 0.3, 0.4])}}, notes={"n": 1})
    b = made([0.5, 0.5, 1, 1], recipe="violence", columns={"q": {UP: torch.tensor([0.5, 0.6, 0.7, 0.8])}})
    both = stack([a, b], [0.5, 1], names=["h", "v"], hashes=["1" * 64, "2" * 64]).glasses
    assert both.recipe == "hate × violence"
    assert both.strength == 1
    assert both.home == HOME
    assert torch.equal(both.columns["q h"][UP], a.columns["q"][UP])
    assert torch.equal(both.columns["q v"][UP], b.columns["q"][UP])
    assert both.columns["factor h"][UP].tolist() == [0.75, 1, 1, 1]
    assert both.notes["product_of"] == [
        {"name": "h", "recipe": "hate", "strength": 0.5, "notes": {"n": 1}, "sha256": "1" * 64},
        {"name": "v", "recipe": "violence", "strength": 1.0, "notes": {}, "sha256": "2" * 64},
    ]


@pytest.mark.parametrize(
    ("glasses", "strengths", "said"),
    [
        ([], None, "no glasses to stack\n  expected: at least one"),
        (
            [made([0.5]), made([0.5])],
            [1, 1, 1],
            "as many strengths as glasses are needed, or one for all\n  given:    3 strengths\n  expected: 1 or 2",
        ),
        (
            [made([0.5]), made([0.5])],
            0,
            "every part is left out\n  given:    strength 0 for all\n  expected: at least one strength above 0",
        ),
        (
            [made([0.5]), made([0.5, 1])],
            None,
            "glasses of different width cannot be worn at once\n"
            "  given:    layers.3.mlp.up_proj:out: 2 neurons\n  expected: 1 neurons",
        ),
        (
            [made([0.5]), made([0.5], base="sg1-b")],
            None,
            "glasses for different models cannot be worn at once\n  given:    sg1-b\n  expected: sg1-a",
        ),
    ],
)
def test_refused(glasses, strengths, said):
    with pytest.raises(WrongBase if "different models" in said else SafeglassesError) as error:
        stack(glasses, strengths)
    assert message(error) == said


def test_one_decoder_has_one_name():
    other = Glasses({UP: torch.zeros(1)}, "sg1-a", "test", home=Home("owner/text", None, "model", False, False))
    with pytest.raises(WrongBase) as error:
        stack([made([0.5]), other])
    assert "given:    'model' and 'model.language_model'" in message(error)


def test_overflow_is_refused():
    with pytest.raises(SafeglassesError, match="factors must be finite numbers"):
        stack([made([3e38]), made([3e38])])
    assert multiply([{UP: torch.tensor([1e30])}, {UP: torch.tensor([1e30])}, {UP: torch.tensor([1e-30])}])[UP] > 9e29


def test_many_extreme_parts_do_not_depend_on_their_order():
    values = [3e38] * 20 + [1e-38] * 20  # some orders of multiplying overflow, others vanish
    found = set()
    for seed in range(50):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
        found.add(multiply([{UP: torch.tensor([values[i]])} for i in order])[UP].item())
    assert len(found) == 1


# what they do to each other


def brute(a, b):
    """Conflicts by the definition, a neuron at a time."""
    pushes = lambda f: f > 1 or f < 0  # noqa: E731
    return [i for i, (f, g) in enumerate(zip(a, b, strict=True)) if (pushes(f) and g < 1) or (pushes(g) and f < 1)]


@settings(deadline=None, max_examples=100)
@given(ROW, ROW)
def test_conflicts_are_the_definition(x, y):
    (pair,) = stack([made(x), made(y)]).pairs
    wanted = brute(x.tolist(), y.tolist())
    assert pair.conflicts == len(wanted)
    assert {clash.neuron for clash in pair.largest} == {f"layers.3.mlp.up_proj:out#{i}" for i in wanted}
    apart = [abs(clash.factors[0] - clash.factors[1]) for clash in pair.largest]
    assert apart == sorted(apart, reverse=True)
    down = [0 <= f < 1 and 0 <= g < 1 for f, g in zip(x.tolist(), y.tolist(), strict=True)]
    assert pair.both_suppress == sum(down)
    assert pair.identical == torch.equal(x, y)


def test_report():
    a = made([1.5, 0.5, -0.5, 1.0], [0.25, 1, 1, 1], recipe="hate")
    b = made([0.25, 0.5, 0.5, 0.5], [0.5, 1, 1, 1], recipe="violence")
    found = stack([a, b], names=["hate", "violence"])
    (pair,) = found.pairs
    assert (pair.amplified, pair.flipped, pair.both_suppress) == (1, 1, 2)
    assert pair.jaccard == 2 / 5
    assert found.conflicts == 2
    assert json.loads(json.dumps(found.record())) == {
        "parts": [{"name": "hate", "strength": 1.0}, {"name": "violence", "strength": 1.0}],
        "left_out": [],
        "recipe": "hate × violence",
        "strength": 1.0,
        "n_neurons": 5,
        "conflicts": 2,
        "pairs": [
            {
                "names": ["hate", "violence"],
                "amplified": 1,
                "flipped": 1,
                "by_layer": {"3": 2},
                "by_kind": {"mlp.up_proj:out": 2},
                "largest": [
                    {
                        "neuron": "layers.3.mlp.up_proj:out#0",
                        "factors": {"hate": 1.5, "violence": 0.25},
                        "product": 0.375,
                    },
                    {
                        "neuron": "layers.3.mlp.up_proj:out#2",
                        "factors": {"hate": -0.5, "violence": 0.5},
                        "product": -0.25,
                    },
                ],
                "both_suppress": 2,
                "jaccard": 0.4,
                "deepest": {
                    "neuron": "layers.10.mlp.down_proj:in#0",
                    "factors": {"hate": 0.25, "violence": 0.5},
                    "product": 0.125,
                },
                "identical": False,
                "conflicts": 2,
            }
        ],
    }
    assert found.text() == (
        "hate at 1 × violence at 1: 5 neurons\n"
        "hate and violence: 2 conflicts, 2 neurons turned down by both (Jaccard 0.40)\n"
        "  1 amplified by one and turned down by the other, 1 flipped\n"
        "  layers: 3 (2)\n"
        "  kinds: mlp.up_proj:out (2)\n"
        "  layers.3.mlp.up_proj:out#0: hate 1.5, violence 0.25, together 0.375\n"
        "  layers.3.mlp.up_proj:out#2: hate -0.5, violence 0.5, together -0.25\n"
        "  turned down most by both: layers.10.mlp.down_proj:in#0: hate 0.25, violence 0.5, together 0.125"
    )


def test_conflicts_depend_on_strengths_and_sites():
    a, b = made([1.5, 0.5]), made([0.5, 0.5])
    assert stack([a, b]).conflicts == 1
    assert stack([a, b.at(0)]).pairs == ()
    assert stack([made([1.5]), made([0.5], sites=(DOWN,))]).conflicts == 0  # other neurons


def test_conflicts_can_be_refused():
    stack([made([0.5]), made([0.25])]).refuse_conflicts()
    with pytest.raises(SafeglassesError) as error:
        stack([made([1.5]), made([0.25])], names=["a", "b"]).refuse_conflicts()
    assert message(error) == (
        "these glasses conflict: what one amplifies or flips, another turns down\n"
        "  given:    a and b: 1 conflicts, 0 neurons turned down by both (Jaccard 0.00)\n"
        "             1 amplified by one and turned down by the other, 0 flipped\n"
        "             layers: 3 (1)\n"
        "             kinds: mlp.up_proj:out (1)\n"
        "             layers.3.mlp.up_proj:out#0: a 1.5, b 0.25, together 0.375\n"
        "  expected: no neuron on which two of them pull in opposite directions, and nothing twice\n"
        "  do:       leave one out (strength 0), or accept it with --conflicts warn"
    )
    with pytest.raises(SafeglassesError, match="is one of them there twice"):
        stack([made([0.5]), made([0.5])]).refuse_conflicts()


# folders


@pytest.fixture
def folders(tmp_path):
    made([1.5, 0.5], [0.25, 1], recipe="hate").save(tmp_path / "hate" / "glasses")
    made([0.25, 0.5], recipe="violence").save(tmp_path / "violence" / "glasses")
    return [tmp_path / name / "glasses" for name in ("hate", "violence")]


def test_names_of_folders(tmp_path):
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names_of([tmp_path / "x" / "glasses", tmp_path / "b"]) == ["x/glasses", "b"]
    assert names_of([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]
    same = names_of([tmp_path / "a", tmp_path / "a"])
    assert [name[-2:] for name in same] == ["-1", "-2"]


def test_a_stack_is_saved_and_stacked_again_without_a_model(folders, tmp_path):
    found = stack_folders(folders, [1, 0.5])
    for name in "ab":
        found.glasses.save(tmp_path / name)
    again = Glasses.load(tmp_path / "a")
    assert again == found.glasses
    parts = again.notes["product_of"]
    assert [part["sha256"] for part in parts] == [sha256_file(folder / "glasses.json") for folder in folders]
    assert all(sha256_file(path) == sha256_file(tmp_path / "b" / path.name) for path in (tmp_path / "a").iterdir())
    columns = pq.read_schema(tmp_path / "a" / "neurons.parquet").names
    assert columns[6:] == ["factor hate/glasses", "factor violence/glasses"]
    twice = stack_folders([tmp_path / "a", folders[0]])
    twice.glasses.save(tmp_path / "c")
    assert Glasses.load(tmp_path / "c") == twice.glasses
    assert "Part `hate/glasses` at strength `1.0`" in (tmp_path / "a" / "README.md").read_text()


def test_moved_factors_are_stacked_without_the_model(tiny_vlm, tmp_path):
    path = "layers.0.mlp.down_proj"
    both = {Site(path, side): torch.full((tiny_vlm.anatomy.width(Site(path, side)),), 0.5) for side in ("in", "out")}
    glasses = Glasses(both, tiny_vlm.fingerprint(), "test")
    glasses.save(tmp_path / "a", tiny_vlm)
    glasses_for(tiny_vlm).save(tmp_path / "b", tiny_vlm)
    found = stack_folders([tmp_path / "a", tmp_path / "b"], 0.5).glasses
    found.save(tmp_path / "c")
    again = Glasses.load(tmp_path / "c")
    assert again == found
    assert again.moves == {Site(path, "in"): Site("layers.0.mlp.up_proj", "out")}
    batch = batch_for(tiny_vlm)
    with again.worn(tiny_vlm):
        worn = logits_of(tiny_vlm, batch)
    with Glasses.load(tmp_path / "a").at(0.5).worn(tiny_vlm), Glasses.load(tmp_path / "b").at(0.5).worn(tiny_vlm):
        torch.testing.assert_close(logits_of(tiny_vlm, batch), worn, rtol=1e-4, atol=1e-5)


def run(*arguments):
    app = typer.Typer(add_completion=False)
    app.command()(verb)
    result = typer.main.get_command(app)([str(a) for a in arguments], prog_name="stack", standalone_mode=False)
    assert isinstance(result, Outcome)
    return result


def test_verb_stacks(folders, tmp_path, capsys):
    outcome = run(*folders, "--strength", "1", "--strength", "0.5", "--out", tmp_path / "out")
    assert Glasses.load(tmp_path / "out") == stack_folders(folders, [1, 0.5]).glasses
    outcome.show(as_json=True)
    record = json.loads(capsys.readouterr().out)
    assert record["glasses"] == str(tmp_path / "out")
    assert record["conflicts"] == 1
    assert [part["strength"] for part in record["parts"]] == [1, 0.5]
    outcome.show(as_json=False)
    shown = capsys.readouterr().out
    assert "hate/glasses and violence/glasses: 1 conflicts, 1 neurons turned down by both" in shown
    assert shown.endswith(f"glasses: {tmp_path / 'out'}\n")


def test_verb_changes_the_strength_of_one(folders, tmp_path):
    run(folders[0], "--strength", "0.5", "--out", tmp_path / "half")
    again = Glasses.load(tmp_path / "half")
    assert again == Glasses.load(folders[0]).at(0.5)
    assert json.loads((tmp_path / "half" / "glasses.json").read_text())["strength"] == 0.5
    run(tmp_path / "half", "--strength", "1", "--out", tmp_path / "whole")
    assert all(sha256_file(path) == sha256_file(tmp_path / "whole" / path.name) for path in folders[0].iterdir())


def test_verb_refuses_conflicts_and_writes_nothing(folders, tmp_path):
    with pytest.raises(SafeglassesError, match="these glasses conflict"):
        run(*folders, "--out", tmp_path / "out", "--conflicts", "refuse")
    with pytest.raises(SafeglassesError, match="as many strengths as glasses"):
        run(folders[0], "--strength", "1", "--strength", "2", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
