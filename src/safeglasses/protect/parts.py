"""What every part of a stack has, and the parts at the input: words around a request, a look at text in pictures."""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar, runtime_checkable

from safeglasses.data.records import Text, Turn
from safeglasses.protect.steps import Ask, Failed, Inner, Log, OnFailure, Prompt, Refused, Said, Steps, ask
from safeglasses.protect.wording import Wording

T = TypeVar("T")
Place = Literal["input", "neuron", "decoding", "output"]
SHORT = 64
"""Longest reply to a question about an answer or a picture."""


@runtime_checkable
class Part(Protocol):
    """One defence at one place."""

    @property
    def name(self) -> str:
        """Its text form."""
        ...

    @property
    def place(self) -> Place:
        """Where it acts."""
        ...

    @property
    def local(self) -> str:
        """What it needs of a model that no server offers; empty when any server will do."""
        ...

    @property
    def identity(self) -> str:
        """Everything on which its answers depend."""
        ...

    def steps(self, prompt: Prompt, inner: Inner, log: Log) -> Steps[str]:
        """Answer a prompt by means of what lies further in."""
        ...


def failed(part: str, policy: OnFailure, error: Failed, log: Log) -> None:
    """Write a failure down, and go on only if the part fails open.

    Raises:
        Refused: it fails closed.
    """
    log.note(part, f"failed {policy}", error.what)
    if policy == "closed":
        raise Refused


@dataclass(frozen=True)
class Reminder:
    """Words before and after the request, or in a system turn; which words, says the wording.

    ``self-reminder``: the request between two reminders to be responsible. Source: Xie et al. 2023, "Defending ChatGPT
    against jailbreak attack via self-reminders" (Nature Machine Intelligence 5); there the first is a system prompt on
    some models, here both stand in the user's turn, since many templates know no system turn.
    ``adashield-s``: the static shield prompt. Source: Wang et al. 2024, "AdaShield" (arXiv 2403.09513), section 3.2;
    the adaptive pool of prompts (AdaShield-A) is not here.
    ``xsafety``: think in English, answer in the user's language. Source: Wang et al. 2023, "All Languages Matter"
    (XSafety, arXiv 2310.00905), section 4.
    ``system``: a text of your own as system turn.

    Failing means that the longer prompt could not be answered; open, the request is asked as it came.
    """

    name: str
    """Text form."""
    wording: Wording
    """``before``, ``after`` and ``system``, each where it is there."""
    on_failure: OnFailure = "closed"
    """What happens when the longer prompt cannot be answered."""
    place: Place = "input"
    """Where it acts."""
    local: str = ""
    """Nothing that a server lacks."""

    @property
    def identity(self) -> str:
        """Everything on which its answers depend."""
        return repr(self)

    def steps(self, prompt: Prompt, inner: Inner, log: Log) -> Steps[str]:
        """Put the words around the request."""
        try:
            return (yield from inner(self.around(prompt)))
        except Failed as error:
            failed(self.name, self.on_failure, error, log)
        return (yield from inner(prompt))

    def around(self, prompt: Prompt) -> Prompt:
        """Return what the model reads."""
        words = {
            key: self.wording.text(prompt.language, key)
            for key in ("before", "after", "system")
            if self.wording.has(key)
        }
        around = (words.get("before", ""), prompt.text, words.get("after", ""))
        changed = prompt.saying("\n".join(text for text in around if text))
        if "system" not in words:
            return changed
        first, *rest = changed.turns
        if first.role != "system":
            return replace(changed, turns=(Turn("system", (Text(words["system"]),)), *changed.turns))
        return replace(changed, turns=(Turn("system", (Text(words["system"] + "\n\n"), *first.content)), *rest))


@dataclass(frozen=True)
class Typographic:
    """Reads the text in pictures, and refuses when text and request together ask for harm.

    Source: the attack that it answers is FigStep (Gong et al. 2023, arXiv 2311.05608), whose section on defences reads
    pictures by OCR; here the model itself reads them, and itself says whether the text is harmful.
    """

    wording: Wording
    """``read``, ``nothing``, ``check``, ``yes``, ``no``."""
    on_failure: OnFailure = "closed"
    """What happens when the picture cannot be read, or the check's answer is neither yes nor no."""
    name: str = "typographic"
    """Text form."""
    place: Place = "input"
    """Where it acts."""
    local: str = ""
    """Nothing that a server lacks."""

    @property
    def identity(self) -> str:
        """Everything on which its answers depend."""
        return repr(self)

    def steps(self, prompt: Prompt, inner: Inner, log: Log) -> Steps[str]:
        """Read, check, and only then ask."""
        try:
            unsafe = (yield from self._unsafe(prompt, log)) if prompt.media else False
        except Failed as error:
            failed(self.name, self.on_failure, error, log)
            unsafe = False
        if unsafe:
            raise Refused
        return (yield from inner(prompt))

    def _unsafe(self, prompt: Prompt, log: Log) -> Steps[bool]:
        question = self.wording.text(prompt.language, "read")
        said: Said
        (said,) = yield from ask(Ask("read", prompt.alone(question, pictures=True), SHORT))
        nothing = {self.wording.text(tag, "nothing").casefold() for tag in (prompt.language, None)}
        if not said.text or said.text.casefold().strip(" .!\"'") in nothing:
            return False
        log.note(self.name, "text in the picture", said.text)
        harmful = yield from self_check(self.wording, prompt, "check", {"q": prompt.asked, "text": said.text})
        log.note(self.name, "unsafe" if harmful else "safe")
        return harmful


def self_check(
    wording: Wording, prompt: Prompt, key: str, slots: dict[str, str], *, pictures: bool = False
) -> Steps[bool]:
    """Ask the model a question that it answers with yes or no.

    Raises:
        Failed: it could not be asked, or its answer is neither.
    """
    question = wording.text(prompt.language, key, **slots)
    said: Said
    (said,) = yield from ask(Ask("check", prompt.alone(question, pictures=pictures), SHORT))
    affirmed = wording.affirmed(prompt.language, said.text)
    if affirmed is None:
        raise Failed(f"neither yes nor no: {said.text[:80]!r}")
    return affirmed
