"""What transformers needs of what is installed, and does not say."""

from importlib import import_module, metadata
from importlib.util import find_spec

from safeglasses.errors import SafeglassesError


def check_torchvision() -> None:
    """Check that torchvision, if it is installed, can be imported: transformers imports it wherever it finds it.

    Raises:
        SafeglassesError: it was built for another PyTorch.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        found = (next(iter(metadata.distributions(name=name)), None) for name in ("torchvision", "torch"))
        versions = [f"{one.name} {one.version}" for one in found if one is not None]
        raise SafeglassesError(
            "torchvision is installed, but cannot be loaded beside the installed torch",
            given=f"{(str(error).strip() or repr(error)).splitlines()[0]} ({', '.join(versions)})",
            expected="torchvision of the same release and build (CPU, CUDA …) as torch, or none",
            do="install both from one index (https://pytorch.org/get-started), or pip uninstall torchvision: only "
            "videos and a few processors need it",
        ) from error
