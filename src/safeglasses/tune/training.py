"""Tune given neurons of a model, and nothing else.

The base is frozen and read only; what is trained has no numbers for other rows, so that neither AdamW's decay nor its
moments nor the clipping of gradients can reach or see them. At the end the base's bits are compared with what they
were.

Source: Shi et al. 2026, Precise Shield (arXiv 2604.08881), section on tuning: W' = W₀ + (M ∘ B) A.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from safeglasses.data.examples import Example
from safeglasses.defend.home import Home, check_unfolded
from safeglasses.errors import SafeglassesError
from safeglasses.files import check_target, read_json, write_json
from safeglasses.find.selection import Selection
from safeglasses.model.anatomy import module
from safeglasses.model.vlm import VLM
from safeglasses.progress import Progress, Quiet
from safeglasses.tune.config import MODES, Mode, TuneConfig
from safeglasses.tune.counting import counts_of
from safeglasses.tune.encoding import answers, preferences
from safeglasses.tune.layers import (
    aliases_quiet,
    changes_of,
    check_names_kept,
    confine,
    layer_of,
    peft_config,
    restored,
    trainable,
)
from safeglasses.tune.routed import ExpertRows, experts_trained
from safeglasses.tune.shield import Shield, digest_of
from safeglasses.tune.targets import Target, check_plain, targets_of
from safeglasses.tune.trainer import (
    AnswerTrainer,
    Make,
    arguments,
    is_first,
    model_of,
    random_states_kept,
    run,
    the_group,
    world_size,
)
from safeglasses.tune.unchanged import checksums, refuse_leaks

INPUTS = "inputs.json"


def tune(
    vlm: VLM,
    neurons: Selection,
    examples: Sequence[Example],
    *,
    mode: Mode = "lora",
    config: TuneConfig | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Shield:
    """Train a change of the model that is confined to given neurons; the model itself stays as it is.

    Under ``torchrun`` every process calls it with the same arguments, and all get the shield.

    Args:
        vlm: the base model.
        neurons: over ``vlm.anatomy.sites("neurons")``; a layer whose site is absent is left alone.
        examples: rows with a response as target (refusals and helpful answers), whatever their labels; in
            ``freeze`` pairs of a toxic and a non-toxic response to one prompt.
        mode: ``lora``: W' = W₀ + (M ∘ B) A on gate and up, A dense (the paper's); ``rows``: the neurons' rows
            themselves; ``freeze``: everything else in the feed-forward blocks, by preference (SafeNeuron);
            ``plain``: LoRA on gate and up without a mask, with as many parameters as ``lora`` (a control).
        config: numbers of the training.
        out: folder for the shield. If it is there with the same inputs, it is read; what a killed training left
            beside it is gone on with.
        progress: told steps.

    Raises:
        SafeglassesError: the model, the selection, the examples or the folder does not allow it; raised before
            anything is trained. Or the loss became no number.
        BadRow: an example without a target, or longer than the model's context.
        PartialMatch: a site is missing or of another width.
    """
    config, show = config or TuneConfig(), progress or Quiet()
    if mode not in MODES:
        raise SafeglassesError("no such way to tune", given=repr(mode), expected=", ".join(MODES))
    check_plain(vlm.model.config)
    targets = targets_of(vlm.anatomy, vlm.model.config.get_text_config(decoder=True), neurons, mode, config)
    linear = [target for target in targets if target.part is None]
    if linear:
        check_names_kept(vlm.model, peft_config(vlm.anatomy, linear, config, transposed=_is_transposed(vlm, linear)))
    fingerprint = vlm.fingerprint()
    check_unfolded(vlm.model.config, vlm.source, fingerprint, None)
    inputs = _inputs(fingerprint, neurons, examples, mode, config)
    if out is not None and out.exists():
        return _finished(out, inputs)
    folder = _working_folder(out, inputs)
    with show.stage("check the base"):
        before = checksums(vlm.model)
    with random_states_kept(), restored(vlm.model), aliases_quiet():
        torch.manual_seed(config.seed)
        with experts_trained(vlm.model, vlm.anatomy, targets, config.scale) as fused:
            make = (
                _by_preference(vlm, linear, examples, config, folder)
                if mode == "freeze"
                else _by_answers(vlm, linear, fused, examples, config, folder)
            )
            with show.stage("tune, steps") as advance:
                peft, losses = run(make, folder, advance)
            changes = changes_of(peft, vlm.anatomy, linear)
            changes |= {path: change for rows in fused.values() for path, change in rows.changes().items()}
    with show.stage("check the base"):
        refuse_leaks(before, vlm.model)
    shield = Shield(
        mode=mode,
        changes=changes,
        neurons=Selection({site: mask for site, mask in neurons.masks.items() if bool(mask.any())}),
        base_fingerprint=fingerprint,
        counts=counts_of(targets, neurons, vlm.model),
        config=config.record(),
        notes={"losses": losses, "examples": len(examples), "inputs": inputs},
        home=Home.of(vlm),
    )
    if out is not None and is_first():
        shield.save(out, vlm)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)
    return shield


def _by_answers(
    vlm: VLM,
    targets: Sequence[Target],
    fused: Mapping[str, ExpertRows],
    examples: Sequence[Example],
    config: TuneConfig,
    folder: Path,
) -> Make:
    groups = answers(vlm, examples, config.micro_batch, config.seed)
    given = arguments(config, folder, len(groups), on_cpu=vlm.device.type == "cpu", kind=TrainingArguments)

    def make(callbacks: list[TrainerCallback]) -> Trainer:
        torch.manual_seed(config.seed)
        peft: Any = vlm.model.requires_grad_(False)
        if targets:
            lora = peft_config(vlm.anatomy, targets, config, transposed=_is_transposed(vlm, targets))
            peft = get_peft_model(vlm.model, lora)
            confine(peft, vlm.anatomy, targets)
        for rows in fused.values():
            rows.requires_grad_(True)
        return AnswerTrainer(
            model=peft,
            args=given,
            data_collator=the_group,
            train_dataset=groups,
            callbacks=callbacks,
            keeps_logits="logits_to_keep" in vlm.encoder.accepted,
            decay=_rows_of(vlm, peft, targets, fused) if config.weight_decay else {},
        )

    return make


def _by_preference(
    vlm: VLM, targets: Sequence[Target], examples: Sequence[Example], config: TuneConfig, folder: Path
) -> Make:
    try:
        from safeglasses.tune import preference
    except ImportError as error:
        raise SafeglassesError(
            "preference training needs TRL, which is not installed",
            given=str(error),
            do="pip install 'safeglasses[tune]'",
        ) from error
    groups = preferences(vlm, preference.pairs_of(examples), config.micro_batch, config.seed)
    options = {"beta": config.beta, "bf16": False, "disable_dropout": False, "max_length": None}
    on_cpu = vlm.device.type == "cpu"
    given = arguments(config, folder, len(groups), on_cpu=on_cpu, kind=preference.DPOConfig, more=options)
    lora = peft_config(vlm.anatomy, targets, replace(config, dropout=0), transposed=_is_transposed(vlm, targets))

    def make(callbacks: list[TrainerCallback]) -> Trainer:
        trainer = preference.PreferenceTrainer(
            model=vlm.model,
            args=given,
            data_collator=lambda items: groups[items[0]["index"]],
            train_dataset=preference.indices(len(groups)),
            processing_class=vlm.processor,
            callbacks=callbacks,
            peft_config=lora,
        )
        confine(model_of(trainer), vlm.anatomy, targets)
        return trainer

    return make


def _rows_of(vlm: VLM, peft: Any, targets: Sequence[Target], fused: Mapping[str, ExpertRows]) -> Mapping[str, Tensor]:
    """Return W₀'s rows by the names of the parameters that are their changes (``rows``); none in other modes."""
    names = {id(parameter): name for name, parameter in trainable(peft).items()}
    found = {}
    for path, rows in fused.items():
        if rows.targets[0].one_hot:
            base = vlm.model.get_parameter(vlm.anatomy.absolute_path(path)).detach()
            found[names[id(rows.a)]] = rows.rows_in(base).to(rows.a.dtype)
    for target in (target for target in targets if target.one_hot):
        layer = layer_of(peft, vlm.anatomy, target)
        base = layer.get_base_layer().weight.detach()
        base = base.T if isinstance(layer.get_base_layer(), Conv1D) else base
        (change,) = [p for p in layer.parameters() if p.requires_grad]
        found[names[id(change)]] = base[target.rows].to(change.dtype)
    return found


def _is_transposed(vlm: VLM, targets: Sequence[Target]) -> bool:
    return isinstance(module(vlm.model, vlm.anatomy, targets[0].path), Conv1D)


def _inputs(
    fingerprint: str, neurons: Selection, examples: Sequence[Example], mode: Mode, config: TuneConfig
) -> dict[str, Any]:
    """Return what a training was made from: equal for equal results."""
    rows = hashlib.sha256(json.dumps([example.digest for example in examples]).encode()).hexdigest()
    return {
        "base": fingerprint,
        "neurons": digest_of(neurons),
        "examples": rows,
        "mode": mode,
        "config": json.loads(json.dumps(config.record())),
    }


def _finished(out: Path, inputs: Mapping[str, Any]) -> Shield:
    shield = Shield.load(out)
    _check_same(out, shield.notes.get("inputs"), inputs)
    return shield


def _check_same(folder: Path, found: Any, inputs: Mapping[str, Any]) -> None:
    if found == inputs:
        return
    known = found if isinstance(found, dict) else {}
    other = [name for name in inputs if known.get(name) != inputs[name]]
    raise SafeglassesError(
        "the folder belongs to another training",
        given=f"{folder}, with another {', '.join(other) or 'format'}",
        expected="the same model, neurons, examples, mode and numbers",
        do="choose another folder, or remove this one",
    )


def _working_folder(out: Path | None, inputs: Mapping[str, Any]) -> Path:
    """Return where checkpoints go: beside the output, so that a killed training is found again."""
    if out is None:
        return Path(mkdtemp(prefix="safeglasses-"))
    check_target(out, overwrite=False)
    folder = out.with_name(f".{out.name}.training")
    whole = {**inputs, "processes": world_size()}
    if (folder / INPUTS).exists():
        _check_same(folder, read_json(folder / INPUTS), whole)
    elif is_first():
        write_json(folder / INPUTS, whole)
    return folder
