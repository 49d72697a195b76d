"""Let torchvision's Python half work where its compiled half does not load.

The wheels of package indices are often built for CUDA; beside a PyTorch for the CPU they stop at "operator
torchvision::nms does not exist". Pictures and videos are resized by the Python half alone, so the tests declare what it
misses.
"""

import sys
from importlib import import_module
from importlib.util import find_spec

import torch

_KEPT = []
"""A library's operators last as long as it does."""


def mend() -> None:
    """Make ``import torchvision`` work, if it is installed; do nothing where it does, or where it is not."""
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import_module("torchvision")
