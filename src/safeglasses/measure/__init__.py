"""Prove what a defence does: answers, verdicts, rates with intervals, fluency, utility, refusals.

``safeglasses.measure`` is this room and also the verb: to call it is to call
`safeglasses.measure.measurement.measure`.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeglasses.measure.measurement import Measurement


class _Room(ModuleType):
    """A package that can be called; importing any submodule would hide a function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> "Measurement":
        from safeglasses.measure.measurement import measure

        return measure(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
