"""Look at a model's weights: who they are, and whether they are numbers."""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from safeglasses.errors import SafeglassesError

_SAMPLES = 64


def fingerprint(model: nn.Module) -> str:
    """Return ``sg1-`` + 32 hex digits: SHA-256 over every parameter's name, shape and 64 strided values.

    Values are rounded to bfloat16 first, so that the dtype of loading does not matter.

    Raises:
        SafeglassesError: weights without values (meta device).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        _require_values(name, parameter)
        values = whole(parameter).reshape(-1)
        count = min(_SAMPLES, values.numel())
        index = torch.linspace(0, max(values.numel() - 1, 0), count, dtype=torch.float64).long()
        sample = values[index.to(values.device)].to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(sample.numpy().astype("<i2").tobytes())
    return "sg1-" + digest.hexdigest()[:32]


def whole(parameter: Tensor) -> Tensor:
    """Return the values of a parameter, put together from all processes where the model is cut over them."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def check_finite(model: nn.Module, source: str) -> None:
    """Check that every weight is a number.

    Raises:
        SafeglassesError: a weight is NaN or infinite, or has no value (meta device).
    """
    for name, parameter in model.named_parameters():
        _require_values(name, parameter)
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise SafeglassesError(
                "the model's weights are not all numbers",
                given=f"{bad} NaN or infinite value(s) in {name} of {source}",
                expected="finite weights",
                do="get the checkpoint again, or load it in the dtype it was saved in",
            )


def _require_values(name: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise SafeglassesError(
            "the model has no weights",
            given=f"{name} is on the meta device",
            expected="loaded weights",
            do="load the model with safeglasses.load, without offloading to disk",
        )
