"""A trained change of a linear map, or of an expert's slice of a parameter: ΔW = scale · P_rows B A P_columns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safeglasses.model.sites import Site
from safeglasses.tune.slices import Slice


@dataclass(frozen=True, eq=False)
class Change:
    """What a training did to y = W x; rows and columns outside are exactly zero because they do not exist."""

    out: int
    """Rows of W."""
    into: int
    """Columns of W."""
    a: Float[Tensor, "rank column"]
    """LoRA's A, of the columns that may change."""
    b: Float[Tensor, "row rank"] | None
    """LoRA's B, of the rows that may change; None: the identity."""
    rows: Int[Tensor, " row"] | None
    """Rows that may change; None: all."""
    columns: Int[Tensor, " column"] | None
    """Columns that may change; None: all."""
    scale: float
    """What BA is multiplied by."""
    part: Slice | None = None
    """Which slice of a 3-D parameter W is; None: the weight of a module. Rows are always outputs, however it lies."""

    @property
    def touched(self) -> int:
        """Weights of W that may be others than before."""
        n_rows = self.out if self.rows is None else len(self.rows)
        return n_rows * (self.into if self.columns is None else len(self.columns))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Change":
        """Return it on a device, in a dtype."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        b = None if self.b is None else self.b.to(device, dtype)
        a = self.a.to(device, dtype)
        return Change(self.out, self.into, a, b, moved(self.rows), moved(self.columns), self.scale, self.part)

    def of(self, x: Float[Tensor, "*_ in"]) -> Float[Tensor, "*_ out"]:
        """Return ΔW x."""
        inside = x if self.columns is None else x.index_select(-1, self.columns)
        inner = torch.nn.functional.linear(inside, self.a)
        if self.b is not None:
            inner = torch.nn.functional.linear(inner, self.b)
        inner = inner * self.scale
        if self.rows is None:
            return inner
        return inner.new_zeros(*x.shape[:-1], self.out).index_copy_(-1, self.rows, inner)

    def add_to(self, block: Float[Tensor, "_row in"], first: int) -> None:
        """Add ΔW to a run of rows of W, in place and in the block's own type.

        Args:
            block: the rows; float64 keeps the sum exact enough to be rounded once.
            first: index of the first of them.
        """
        stop = first + len(block)
        index = torch.arange(self.out, device=block.device) if self.rows is None else self.rows.to(block.device)
        inside = ((index >= first) & (index < stop)).nonzero().flatten()
        if not len(inside):
            return
        chosen = inside.to(self.a.device)
        rows = self.a[chosen] if self.b is None else self.b[chosen]
        part = rows.to(block.device, block.dtype) * self.scale
        if self.b is not None:
            part = part @ self.a.to(block.device, block.dtype)
        here = index[inside] - first
        if self.columns is None:
            block.index_add_(0, here, part)
        else:
            columns = self.columns.to(block.device)
            block[here[:, None], columns] += part

    def delta(self) -> Float[Tensor, "out in"]:
        """Return the whole of ΔW, float64."""
        whole = torch.zeros(self.out, self.into, dtype=torch.float64)
        self.add_to(whole, 0)
        return whole

    def full(self) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """Return A and B as plain LoRA wants them: every row and column there, zero where nothing may change."""
        a = self.a
        if self.columns is not None:
            a = a.new_zeros(len(a), self.into).index_copy_(1, self.columns, self.a)
        b = torch.eye(len(a), dtype=a.dtype) if self.b is None else self.b
        if self.rows is not None:
            b = b.new_zeros(self.out, b.shape[1]).index_copy_(0, self.rows, b)
        return a, b


def makers(changes: Mapping[str, Change], sites: Iterable[Site]) -> dict[Site, dict[str, Change]]:
    """Return per site the changes of the maps, or slices of the expert, that make its neurons.

    Args:
        changes: by path.
        sites: inputs of maps that write the residual stream, or of fused experts.
    """
    linear: dict[str, Change] = {}
    experts: dict[str, dict[str, Change]] = {}
    for path, change in changes.items():
        where = linear if change.part is None else experts.setdefault(change.part.expert, {})
        where[path] = change

    def beside(site: Site) -> dict[str, Change]:
        block = site.path.rpartition(".")[0] + "."
        return {path: change for path, change in linear.items() if path.startswith(block) and path != site.path}

    return {site: experts.get(site.path, {}) if site.fused else beside(site) for site in sites}
