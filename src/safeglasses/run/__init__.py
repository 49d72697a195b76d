"""The stages in order, with a run folder that resumes: `fit` and `demo`."""

from safeglasses.run.demo import demo
from safeglasses.run.fit import FitResult, fit

__all__ = ["FitResult", "demo", "fit"]
