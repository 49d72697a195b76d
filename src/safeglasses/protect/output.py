"""Parts that look at an answer before the user does: ECSO, self-examination, a judge."""

from dataclasses import dataclass

from safeglasses.measure.verdicts import Judge
from safeglasses.protect.parts import SHORT, Place, failed, self_check
from safeglasses.protect.steps import (
    Ask,
    Check,
    Failed,
    Inner,
    Judged,
    Log,
    OnFailure,
    Prompt,
    Refused,
    Said,
    Steps,
    ask,
)
from safeglasses.protect.wording import Wording


@dataclass(frozen=True)
class Ecso:
    """Answer, let the model check its own answer; if unsafe, describe the picture for the request and answer by text.

    Source: Gou et al. 2024, "Eyes Closed, Safety On: Protecting Multimodal LLMs via Image-to-Text Transformation"
    (arXiv 2403.09572). Differences: the check is read as yes, no or neither, and neither is a failure (the paper takes
    what holds no "yes" for safe); requests without a picture pass unchecked, as there are no eyes to close.
    """

    wording: Wording
    """``check``, ``yes``, ``no``, ``caption`` and ``answer``."""
    on_failure: OnFailure = "closed"
    """What happens when a step fails; open, the first answer stands."""
    name: str = "ecso"
    """Text form."""
    place: Place = "output"
    """Where it acts."""
    local: str = ""
    """Nothing that a server lacks."""

    @property
    def identity(self) -> str:
        """Everything on which its answers depend."""
        return repr(self)

    def steps(self, prompt: Prompt, inner: Inner, log: Log) -> Steps[str]:
        """Answer, check, describe, answer again."""
        text = yield from inner(prompt)
        if not prompt.media:
            log.note(self.name, "no picture")
            return text
        try:
            slots = {"q": prompt.asked, "a": text}
            unsafe = yield from self_check(self.wording, prompt, "check", slots, pictures=True)
            log.note(self.name, "unsafe" if unsafe else "safe")
            if not unsafe:
                return text
            question = self.wording.text(prompt.language, "caption", q=prompt.asked)
            said: Said
            (said,) = yield from ask(Ask("caption", prompt.alone(question, pictures=True), SHORT))
            if not said.text:
                raise Failed("an empty caption")
            log.note(self.name, "caption", said.text)
            words = self.wording.text(prompt.language, "answer", q=prompt.text, caption=said.text)
            second = yield from inner(prompt.without_pictures().saying(words))
            log.note(self.name, "answered without the picture")
            return second
        except Failed as error:
            failed(self.name, self.on_failure, error, log)
            return text


@dataclass(frozen=True)
class SelfDefense:
    """The model reads its own answer as a text of unknown origin; if it finds it harmful, the answer is refused.

    Source: Phute et al. 2023, "LLM Self Defense: By Self Examination, LLMs Know They Are Being Tricked" (arXiv
    2308.07308). There a second instance examines; here it is the same model in a new chat, without picture or request
    (a wording may show the request: ``{q}``).
    """

    wording: Wording
    """``check``, ``yes``, ``no``."""
    on_failure: OnFailure = "closed"
    """What happens when the examination's answer is neither yes nor no."""
    pictures: bool = False
    """Show the pictures to the examiner as well, for models that answer nothing without one."""
    name: str = "self-defense"
    """Text form."""
    place: Place = "output"
    """Where it acts."""
    local: str = ""
    """Nothing that a server lacks."""

    @property
    def identity(self) -> str:
        """Everything on which its answers depend."""
        return repr(self)

    def steps(self, prompt: Prompt, inner: Inner, log: Log) -> Steps[str]:
        """Answer, examine."""
        text = yield from inner(prompt)
        try:
            slots = {"q": prompt.asked, "a": text}
            unsafe = yield from self_check(self.wording, prompt, "check", slots, pictures=self.pictures)
        except Failed as error:
            failed(self.name, self.on_failure, error, log)
            return text
        log.note(self.name, "unsafe" if unsafe else "safe")
        if unsafe:
            raise Refused
        return text


@dataclass(frozen=True)
class Filter:
    """A judge reads every answer; what it finds harmful is replaced by a polite refusal."""

    judge: Judge
    """Who reads."""
    name: str = "filter"
    """Text form."""
    on_failure: OnFailure = "closed"
    """What happens when the judge is down or cannot tell."""
    place: Place = "output"
    """Where it acts."""
    local: str = ""
    """Nothing that a server lacks."""

    @property
    def identity(self) -> str:
        """Everything on which its answers depend."""
        return f"{self.name} {self.judge.name} {self.on_failure}"

    def steps(self, prompt: Prompt, inner: Inner, log: Log) -> Steps[str]:
        """Answer, judge."""
        text = yield from inner(prompt)
        try:
            judged: Judged
            (judged,) = yield from ask(Check(self.judge, prompt.asked, text))
        except Failed as error:
            failed(self.name, self.on_failure, error, log)
            return text
        log.note(self.name, "unsafe" if judged.verdict.harmful else "safe", judged.verdict.reason)
        if judged.verdict.harmful:
            raise Refused
        return text
