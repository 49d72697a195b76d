"""``safeglasses fold``: glasses and model become one ordinary checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeglasses.cli import options
from safeglasses.cli.outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console


def fold(
    model: options.Model,
    glasses: Annotated[Path, typer.Option(help="A folder of glasses.")],
    out: Annotated[Path, typer.Option(help="The new checkpoint.")],
    strength: options.Strength = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Outcome:
    """Fold glasses into a checkpoint of MODEL.

    The result is an ordinary checkpoint: whatever loads MODEL loads it too.
    """
    from safeglasses.cli.progress import calm_libraries, shown
    from safeglasses.defend.fold import fold_checkpoint
    from safeglasses.defend.glasses import Glasses
    from safeglasses.model.vlm import load

    calm_libraries()
    with shown() as progress:
        worn = Glasses.load(glasses)
        if strength is not None:
            worn = worn.at(strength)
        with progress.stage("load the model"):
            vlm = load(model, dtype=dtype, device_map=device_map, revision=revision)
        with progress.stage("fold and write"):
            fold_checkpoint(vlm, worn, out, overwrite=overwrite)
    record = {
        "checkpoint": str(out),
        "neurons": worn.n_neurons,
        "strength": worn.strength,
        "base": vlm.source,
    }

    def render(console: "Console") -> None:
        console.print(f"folded {worn.n_neurons:,} neurons at strength {worn.strength:g}", markup=False)
        console.print(f"checkpoint: {out}", markup=False, soft_wrap=True)

    return Outcome(record, render)
