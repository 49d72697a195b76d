"""Cut a model's weights over the processes of a job, for models larger than one device."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from safeglasses.errors import SafeglassesError
from safeglasses.model.vlm import VLM


def shard(vlm: VLM, processes: int) -> None:
    """Cut the model in place with PyTorch's FSDP2: each layer is gathered when a forward pass reaches it.

    Every forward pass then needs all processes at once.

    Raises:
        SafeglassesError: there is one process only, so nothing could be cut.
    """
    if processes == 1:
        raise SafeglassesError(
            "a model cannot be cut over one process",
            given="--fsdp with 1 process",
            expected="at least 2",
            do="start it with torchrun, or spread the model over the devices of one process: --device-map auto",
        )
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (processes,))
    layers = vlm.model.get_submodule(vlm.anatomy.absolute_path(vlm.anatomy.layers_path))
    for layer in layers.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(vlm.model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward pass of a model needs all processes (FSDP2)."""
    return any(isinstance(part, FSDPModule) for part in model.modules())
