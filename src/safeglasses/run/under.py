"""Defences at the input under which glasses are calibrated: the words that they put around every request."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.model.vlm import VLM
from safeglasses.protect.compose import compose
from safeglasses.protect.parts import Reminder
from safeglasses.protect.steps import Prompt


@dataclass(frozen=True)
class Under:
    """What the model reads when these parts stand before it."""

    name: str
    """Text form, e.g. ``self-reminder``."""
    parts: tuple[Reminder, ...]
    """From the outside in."""
    identity: str
    """Everything on which what it reads depends."""

    @classmethod
    def read(cls, text: str) -> "Under":
        """Read parts joined by ``+``.

        Raises:
            SafeglassesError: no such part, or one that does more than put words around a request.
        """
        stack = compose(text)
        words = tuple(part for part in stack.parts if isinstance(part, Reminder))
        others = [part.name for part in stack.parts if not isinstance(part, Reminder)]
        if others or not words:
            raise SafeglassesError(
                "glasses cannot be calibrated under that",
                given=", ".join(others) or text,
                expected="words around the request: self-reminder, adashield-s, xsafety or system:FILE, joined by +",
                do="compare other stacks with the finished glasses: safeglasses grid --defences …+glasses:RUN/glasses",
            )
        return cls(text, words, stack.identity)

    def __call__(self, example: Example) -> Example:
        """Return the example as the model reads it; response, label and all else stay."""
        prompt = Prompt.of(example)
        for part in self.parts:
            prompt = part.around(prompt)
        return replace(example, messages=prompt.turns)

    def refused(self, vlm: VLM, examples: Iterable[Example]) -> Sequence[SafeglassesError | None]:
        """Return why a model does not read these words, for one example of every number of pictures; None: it does."""
        kinds = {example.layout: example for example in examples}
        found: list[SafeglassesError | None] = []
        for example in kinds.values():
            try:
                vlm.lengths([self(example).chat(with_response=False)])
            except SafeglassesError as error:
                found.append(error)
            else:
                found.append(None)
        return found
