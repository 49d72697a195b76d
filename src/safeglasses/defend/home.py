"""Where glasses belong: the base model as files name it, and checks that every factor finds its neurons."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers.pytorch_utils import Conv1D

from safeglasses.defend.factors import Factors, in_order
from safeglasses.errors import PartialMatch, WrongBase
from safeglasses.model.anatomy import Anatomy, module
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM
from safeglasses.model.weights import agreement, norms

_log = logging.getLogger(__name__)
_SMOOTHED = ("awq", "compressed-tensors")  # may divide norms by what they multiply into the next map (AWQ, SmoothQuant)
FOLDED = "safeglasses_folded"  # the entry of config.json that says a checkpoint has glasses folded in
Kind = Literal["glasses", "shield"]
_MADE: dict[Kind, tuple[str, str]] = {
    "glasses": ("these glasses were made", "fit glasses to this one: safeglasses fit"),
    "shield": ("this shield was made", "tune a shield for this one"),
}


@dataclass(frozen=True)
class Home:
    """What adapter files say of the base model beyond its fingerprint."""

    source: str
    """Folder or hub id that the model was loaded from."""
    revision: str | None
    """Revision on the hub, if one was given."""
    decoder_path: str
    """Absolute module path of the decoder; empty when the decoder is the model."""
    multimodal: bool
    """Whether the model takes pictures."""
    conv1d: bool
    """Whether the maps store their weight as (in, out), which PEFT calls ``fan_in_fan_out``."""
    norms: str | None = None
    """Digest of the decoder's norms (`weights.norms`), which quantisation leaves alone; None: not known."""

    @classmethod
    def of(cls, vlm: VLM) -> "Home":
        """Describe a loaded model."""
        parts = vlm.anatomy
        return cls(
            source=vlm.source,
            revision=vlm.revision,
            decoder_path=parts.decoder_path,
            multimodal=vlm.is_multimodal,
            conv1d=any(isinstance(module(vlm.model, parts, path), Conv1D) for path in parts.linears),
            norms=norms(vlm.model.get_submodule(parts.decoder_path), parts.layers_path),
        )

    def absolute(self, path: str) -> str:
        """Name a site's module as PEFT wants it: by its path in the model."""
        if path.startswith("/"):
            return path[1:]
        return f"{self.decoder_path}.{path}" if self.decoder_path else path


def check_base(vlm: VLM, base_fingerprint: str, home: Home | None, kind: Kind = "glasses") -> None:
    """Refuse a model that is not the base that something was made for, or that has it folded in already.

    A quantised copy of the base has another fingerprint; it is recognised by its norms (`check_norms`).

    Raises:
        WrongBase: naming both models and both fingerprints.
    """
    check_unfolded(vlm.model.config, vlm.source, base_fingerprint, home)
    fingerprint = vlm.fingerprint()
    if fingerprint == base_fingerprint:
        return
    method = quantisation(vlm.model.config)
    if method is None:
        raise another_base(vlm.source, fingerprint, base_fingerprint, home, kind)
    theirs = norms(vlm.model.get_submodule(vlm.anatomy.decoder_path), vlm.anatomy.layers_path)
    check_norms(f"{vlm.source} ({method})", method, theirs, base_fingerprint, home, kind)


def check_unfolded(config: Any, source: str, base_fingerprint: str, home: Home | None) -> None:
    """Refuse a model whose config says that glasses or a shield made for this base are folded in.

    Raises:
        WrongBase: naming what is folded in.
    """
    for record in getattr(config, FOLDED, None) or ():
        if record["base_fingerprint"] == base_fingerprint:
            theirs = "a shield" if record.get("kind") == "shield" else "glasses"
            raise WrongBase(
                f"this model already has {theirs} made for its base folded in; more would multiply with them",
                given=f"{source}, with {record['recipe']} at strength {record['strength']:g} folded in",
                expected=f"the model before folding: {_base(base_fingerprint, home)}",
                do="use the folded model as it is, or load the base model",
            )


def another_base(
    source: str, fingerprint: str, base_fingerprint: str, home: Home | None, kind: Kind = "glasses"
) -> WrongBase:
    """Return the refusal of a model with another fingerprint than the base's."""
    made, instead = _MADE[kind]
    return WrongBase(
        f"{made} for another model",
        given=f"{source} (fingerprint {fingerprint})",
        expected=_base(base_fingerprint, home),
        do=f"load that model, or {instead}",
    )


def quantisation(config: Any) -> str | None:
    """Return the quantisation method that a config names, such as ``gptq``; None for an ordinary model."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "of an unknown method")


def check_norms(
    given: str, method: str, theirs: str | None, base_fingerprint: str, home: Home | None, kind: Kind = "glasses"
) -> None:
    """Refuse a quantised model whose norms are not those of the base; warn that agreement is no proof.

    A fine-tuned copy that froze its norms passes: the proof is ``safeglasses verify``. Where quantisation
    may rewrite the norms inside the layers, those outside (the final norm) must agree.

    Raises:
        WrongBase: the norms differ, or one side does not know them.
    """
    mine = home.norms if home is not None else None
    found = agreement(mine, theirs)
    if found == "all" or (found == "outside" and method in _SMOOTHED):
        which = "the norms" if found == "all" else "the norms outside the layers (all that this method leaves alone)"
        _log.warning(
            "%s has no fingerprint that could be compared with the base's; %s of its decoder are the base's, "
            "but those of a fine-tuned copy may be too: the proof is `safeglasses verify`",
            given,
            which,
        )
        return
    known = mine is not None and theirs is not None
    again = "give these glasses their base's norms: Glasses.load(FOLDER).save(NEW, safeglasses.load(BASE))"
    raise WrongBase(
        f"{_MADE[kind][0]} for another model" if known else "a quantised model that cannot be recognised",
        given=f"{given}, norms {theirs or 'not known'}",
        expected=f"{_base(base_fingerprint, home)}, norms {mine or 'not known'}",
        do=("load that model or a quantised copy of it" if known or mine is not None else again)
        + "; or fold into the unquantised model first, then quantise the result",
    )


def check_fit(anatomy: Anatomy, factors: Factors) -> None:
    """Refuse factors that do not all find a module of their width.

    Raises:
        PartialMatch: naming the modules that are missing or of another width.
    """
    check_widths(anatomy, {site: len(row) for site, row in factors.items()}, "the glasses fit")


def check_widths(anatomy: Anatomy, widths: Mapping[Site, int], fitting: str) -> None:
    """Refuse sites that do not all find a module of their width.

    Args:
        anatomy: of the model.
        widths: neurons per site.
        fitting: how the message begins, e.g. ``the glasses fit``.

    Raises:
        PartialMatch: naming the modules that are missing or of another width.
    """
    problems = []
    for site in in_order(widths):
        try:
            width = anatomy.width(site)
        except PartialMatch:
            problems.append(f"{site} (no such module)")
            continue
        if width != widths[site]:
            problems.append(f"{site} (width {width}, not {widths[site]})")
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise PartialMatch(
            f"{fitting} only a part of this model",
            given=f"{len(problems)} of {len(widths)} sites do not match: {', '.join(problems[:8])}{more}",
            expected="every site to name a module of the decoder with as many neurons",
            do="wear them on the model they were made for; safeglasses inspect MODEL lists sites",
        )


def _base(fingerprint: str, home: Home | None) -> str:
    return f"{home.source if home is not None else 'a model'} (fingerprint {fingerprint})"
