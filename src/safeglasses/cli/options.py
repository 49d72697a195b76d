"""Options that several verbs share, so that they read and behave alike."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeglasses.errors import SafeglassesError

if TYPE_CHECKING:
    from safeglasses.model.anatomy import What


class Where(StrEnum):
    """Families of sites."""

    LINEARS = "linears"
    MLP = "mlp"
    NEURONS = "neurons"
    ATTENTION = "attention"
    HEADS = "heads"
    VISION = "vision"
    PROJECTOR = "projector"
    ENCODER = "encoder"
    CROSSING = "crossing"


class Part(StrEnum):
    """Which prompts of a file are answered."""

    FIND = "find"
    CALIBRATE = "calibrate"
    TEST = "test"
    ALL = "all"


class Failing(StrEnum):
    """What happens when a part of a stack cannot do its work."""

    CLOSED = "closed"
    OPEN = "open"


_WHERE = (
    "outputs of all linear maps, of the MLPs' or attention's; FFN neurons; what attention heads write; beyond the "
    "decoder the vision tower, the projector, an encoder, cross-attention to pictures. May be repeated"
)
Sites = Annotated[list[Where] | None, typer.Option(help=f"Where to look: {_WHERE}.", show_default="linears")]
OtherSites = Annotated[
    list[Where] | None, typer.Option("--sites", help=f"Where to look and act: {_WHERE}.", show_default="the recipe's")
]


def where(sites: list[Where] | None, default: Where = Where.LINEARS) -> "What | tuple[What, ...]":
    """Return families of sites as the library takes them: one as a word, several as a tuple."""
    named: list[What] = [site.value for site in sites or [default]]
    return named[0] if len(named) == 1 else tuple(named)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or a hub id.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Budget = Annotated[
    str | None, typer.Option(help="Time for calibration, e.g. 90s, 5m, 2h.", show_default="a middling effort")
]
Limit = Annotated[int | None, typer.Option(help="Use at most N examples per split: a quick look.", show_default="all")]
BatchSize = Annotated[str, typer.Option(help="Rows per forward pass: auto, or a count; halved when memory runs out.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Where the weights go: auto, cpu, cuda, cuda:1 …", show_default="one device"),
]
Pools = Annotated[str, typer.Option(help="How activations are summarised: SPAN:HOW, separated by commas.")]
Memory = Annotated[
    str | None,
    typer.Option(help="What each process may use, e.g. 8GB, 500MB, 2GiB.", show_default="60% of what is free"),
]
Revision = Annotated[str | None, typer.Option(help="Hub revision of the model.", show_default="the newest")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip rows that cannot be used, and count them.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what lies at the output.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; progress and logs on stderr.")]
Prompts = Annotated[
    Path | None,
    typer.Option(help="Prompts: .jsonl, .parquet or a folder.", show_default="MM-TOXIC-QA (open)"),
]
Split = Annotated[Part, typer.Option(help="Which prompts; `fit` looks at find and calibrate.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer.", min=1)]
Greedy = Annotated[bool, typer.Option("--greedy", help="Likeliest tokens instead of sampling.")]
Drawn = Annotated[
    int | None, typer.Option(help="At most N prompts, always the same draw of them.", show_default="all", min=1)
]
Defences = Annotated[
    list[str],
    typer.Option(help="Stacks, separated by commas: a,b,a+b (docs/defences.md). May be given again."),
]
Stacks = Annotated[
    Path | None, typer.Option(help="TOML: named stacks, prompts, what happens on failure.", show_default=False)
]
DefenceJudge = Annotated[
    str | None, typer.Option(help="Who judges inside stacks, written as --judge.", show_default="linear")
]
OnFailure = Annotated[
    Failing | None,
    typer.Option(help="A part that cannot work refuses (closed) or is left out (open).", show_default="closed"),
]
_JUDGE = "lexicon[:WORDS.txt], complied, linear, classifier:ID?label=toxic, guard:ID or chat:URL?model=NAME"
Judge = Annotated[str | None, typer.Option(help=f"Who judges answers: {_JUDGE}.", show_default=False)]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help=f"Who judges answers: {_JUDGE}. May be given again: the first decides, all are recorded.",
        show_default="lexicon, linear",
    ),
]
Refusals = Annotated[
    str | None,
    typer.Option(help="lexicon:FILE of refusal phrases.", show_default="the shipped multilingual list"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Debug logs, and tracebacks with errors.")]
Strength = Annotated[
    float | None,
    typer.Option(help="0 = as without glasses, 1 = as fitted.", show_default="as the glasses were saved"),
]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Then upload it to this repository.", show_default="no"),
]
Public = Annotated[bool, typer.Option("--public", help="Let everyone see that repository; otherwise it is private.")]
ReplaceOnHub = Annotated[bool, typer.Option("--replace-on-hub", help="Replace what that repository holds.")]


def listed(texts: list[str]) -> list[str]:
    """Take apart an option that may be given again and whose values are separated by commas."""
    return [one.strip() for text in texts for one in text.split(",") if one.strip()]


def batch_size(text: str) -> int | str:
    """Read ``auto`` or a positive count.

    Raises:
        SafeglassesError: the text is neither.
    """
    if text == "auto":
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise SafeglassesError("not a batch size", given=f"--batch-size {text}", expected="auto, or a count such as 8")
