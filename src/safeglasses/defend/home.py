"""Where glasses belong: the base model as files name it, and checks that every factor finds its neurons."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.pytorch_utils import Conv1D

from safeglasses.defend.factors import Factors, in_order
from safeglasses.errors import PartialMatch, WrongBase
from safeglasses.model.anatomy import Anatomy, module
from safeglasses.model.vlm import VLM

FOLDED = "safeglasses_folded"  # the entry of config.json that says a checkpoint has glasses folded in


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
        )

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Home":
        """Read what `dataclasses.asdict` wrote; other keys are ignored."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})

    def absolute(self, path: str) -> str:
        """Name a decoder-relative module as PEFT wants it."""
        return f"{self.decoder_path}.{path}" if self.decoder_path else path


def check_base(vlm: VLM, base_fingerprint: str, home: Home | None) -> None:
    """Refuse a model that is not the base these glasses were made for, or that has them folded in already.

    Raises:
        WrongBase: naming both models and both fingerprints.
    """
    made_for = f"{home.source if home is not None else 'a model'} (fingerprint {base_fingerprint})"
    for record in getattr(vlm.model.config, FOLDED, None) or ():
        if record["base_fingerprint"] == base_fingerprint:
            raise WrongBase(
                "this model already has glasses made for its base folded in; more would multiply with them",
                given=f"{vlm.source}, with {record['recipe']} at strength {record['strength']:g} folded in",
                expected=f"the model before folding: {made_for}",
                do="use the folded model as it is, or load the base model",
            )
    fingerprint = vlm.fingerprint()
    if fingerprint != base_fingerprint:
        raise WrongBase(
            "these glasses were made for another model",
            given=f"{vlm.source} (fingerprint {fingerprint})",
            expected=made_for,
            do="load that model, or fit glasses to this one: safeglasses fit",
        )


def check_fit(anatomy: Anatomy, factors: Factors) -> None:
    """Refuse factors that do not all find a module of their width.

    Raises:
        PartialMatch: naming the modules that are missing or of another width.
    """
    problems = []
    for site in in_order(factors):
        widths = anatomy.linears if site.side == "out" else anatomy.in_features
        if site.path not in widths:
            problems.append(f"{site} (no such module)")
        elif widths[site.path] != len(factors[site]):
            problems.append(f"{site} (width {widths[site.path]}, not {len(factors[site])})")
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise PartialMatch(
            "the glasses fit only a part of this model",
            given=f"{len(problems)} of {len(factors)} sites do not match: {', '.join(problems[:8])}{more}",
            expected="every site to name a module of the decoder with as many neurons",
            do="wear them on the model they were made for; safeglasses inspect MODEL lists sites",
        )
