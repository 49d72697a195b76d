"""What calibration learns from: contrasts under one prompt, prompts to sample, benign answers to keep."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from safeglasses.data.examples import Example, Examples
from safeglasses.errors import SafeglassesError


@dataclass(frozen=True)
class Contrast:
    """One prompt with an answer that must become unlikely and one that must become likely."""

    prompt: Example
    """The example whose messages are asked."""
    toxic: str
    """The answer to turn away from."""
    benign: str
    """The answer to turn to."""


@dataclass(frozen=True)
class Lessons:
    """What strengths are learned from."""

    contrasts: tuple[Contrast, ...]
    """Toxic against benign answers under the same prompt, from the pairs."""
    eliciting: tuple[Example, ...]
    """Prompts that the model answers itself; its own toxic answers join the contrasts. Their response is benign."""
    benign: tuple[Example, ...]
    """Benign prompts with reference responses: here the worn model must stay the base model."""


@dataclass(frozen=True)
class CalibrationData:
    """What calibration learns from, compares candidates on, and learns from once the choice is made."""

    find: Lessons
    """The find split: every candidate is learned from it."""
    held_out: tuple[Example, ...]
    """Eliciting and benign prompts of the calibrate split: candidates are compared on them, before any gradient
    sees them."""
    both: Lessons
    """Find and calibrate split together: the chosen candidate is learned once more from them."""


def _benign_answers(pairs: Sequence[Example]) -> dict[str, str]:
    """Benign responses by prompt and by pair id; the same prompt wins over the same pair."""
    answers: dict[str, str] = {}
    for example in pairs:
        if not example.is_toxic and example.response:
            answers.setdefault(f"prompt:{example.prompt_key}", example.response)
            if example.pair_id is not None:
                answers.setdefault(f"pair:{example.pair_id}", example.response)
    return answers


def calibration_data(pairs: Examples, prompts: Examples) -> CalibrationData:
    """Arrange the user's pairs and prompts for calibration.

    Strengths are learned where the neurons were found, and chosen where neither looked: other pictures and other
    wordings, as in the test split. A toxic example is contrasted with a benign response to the same prompt, else with
    that of its pair id.

    Args:
        pairs: all pairs; the test split is not looked at.
        prompts: all prompts; the test split is not looked at.

    Raises:
        SafeglassesError: no contrast can be made, or a slice is empty.
    """
    data = CalibrationData(
        find=_lessons(pairs.split("find").rows, prompts.split("find").rows),
        held_out=prompts.split("calibrate").rows,
        both=_lessons(
            pairs.split("find").rows + pairs.split("calibrate").rows,
            prompts.split("find").rows + prompts.split("calibrate").rows,
        ),
    )
    _check(data)
    return data


def _lessons(pairs: Sequence[Example], prompts: Sequence[Example]) -> Lessons:
    answers = _benign_answers(pairs)
    contrasts = []
    for example in pairs:
        if not example.is_toxic or not example.response:
            continue
        benign = answers.get(f"prompt:{example.prompt_key}") or answers.get(f"pair:{example.pair_id}")
        if benign is not None:
            contrasts.append(Contrast(example, example.response, benign))
    eliciting = {c.prompt.prompt_key: replace(c.prompt, response=c.benign) for c in contrasts}
    eliciting |= {p.prompt_key: p for p in prompts if p.label != "non-toxic" and p.response}
    benign = [p for p in prompts if p.label == "non-toxic" and p.response]
    benign += [e for e in pairs if not e.is_toxic and e.response and e.prompt_key not in eliciting]
    return Lessons(tuple(contrasts), tuple(eliciting.values()), tuple(benign))


def _check(data: CalibrationData) -> None:
    if not data.find.contrasts:
        raise SafeglassesError(
            "calibration found no contrast",
            given="no toxic example of the find split has a benign answer to its prompt or of its pair_id",
            expected="toxic and non-toxic responses that share their prompt or their pair_id",
            do="add pair_id to the rows, or use a recipe without calibration: --recipe sgm",
        )
    if not data.find.benign:
        raise SafeglassesError(
            "calibration has no benign prompts with responses to keep the model's behaviour on",
            expected='non-toxic rows whose prompt has no toxic response, or --prompts rows with "label": "non-toxic"',
            do="add such rows to the find split, or use --recipe sgm",
        )
    if not any(p.label != "non-toxic" for p in data.held_out):
        raise SafeglassesError(
            "the calibrate split has no eliciting prompt to choose candidates on",
            given=f"{len(data.held_out)} prompts in the calibrate split",
            do="give more prompts (some hundreds) with different pictures, or use --recipe sgm",
        )
