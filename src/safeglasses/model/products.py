"""Fused experts that compute in a way of their own (Llama 4, Step 3.7): their products with 3-D parameters, seen.

No module and no interface of transformers stands between these experts' neurons and their weights. But whatever the
code, neurons are made by a product with the parameter that makes them and read by one with the down projection. So
while such a module's forward runs, a `TorchFunctionMode` looks at PyTorch's calls: a product with one of the parameters
(or with a view of it) shows its operand or its result. The model's own code runs, unchanged. Whatever is done with
these parameters besides is an error, and so is a product of which the tokens cannot be told.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from safeglasses.errors import SafeglassesError
from safeglasses.model.experts import Experts
from safeglasses.model.routes import Routing
from safeglasses.model.sites import Side

Show = Callable[[Side, Routing, Tensor], Tensor]
"""Gets a side, which tokens its values are of, and the values ``[row, neuron]``; returns those to go on with."""
_PRODUCTS: tuple[Any, ...] = (
    torch.bmm,
    torch.matmul,
    Tensor.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.nn.functional.linear,
)


class Products(TorchFunctionMode):
    """Active while the forward of one module of fused experts runs."""

    def __init__(self, module: nn.Module, experts: Experts, show: Show) -> None:
        super().__init__()
        self._experts, self._show = experts, show
        self._parameters = {name: module.get_parameter(name) for name in (*experts.makers, experts.down)}
        self._given: Tensor | None = None
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._sent: Bool[Tensor, "expert token"] | None = None
        self._rows: dict[int, Tensor] = {}
        self._seen: set[str] = set()

    def begin(self, given: Tensor) -> None:
        """Start watching a forward.

        Args:
            given: the module's first argument.
        """
        self._given, self._taken, self._sent, self._rows, self._seen = given, [], None, {}, set()
        self.__enter__()

    def check(self) -> None:
        """See at the end of a forward that all of it was understood: no silent pass.

        Raises:
            SafeglassesError: a parameter was in no product.
        """
        unseen = self._parameters.keys() - self._seen
        if unseen and self._given is not None and self._given.numel():
            raise self._strange(f"no product with {min(unseen)}")

    def end(self) -> None:
        """Stop watching; also after an error inside."""
        self._given, self._taken, self._sent, self._rows, self._seen = None, [], None, {}, set()
        self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one call of PyTorch's."""
        named = kwargs or {}
        touched = [(name, value) for value in (*args, *named.values()) if (name := self._name(value)) is not None]
        if func in _PRODUCTS and len(touched) == 1 and not named and len(args) > 1 and touched[0][1] is args[1]:
            return self._product(func, touched[0][0], *args)
        result = func(*args, **named)
        if touched and isinstance(result, Tensor) and self._name(result) is None:
            raise self._strange(getattr(func, "__name__", str(func)))
        if func is Tensor.__getitem__ and isinstance(args[0], Tensor) and args[0] is self._given:
            index = args[1]
            if isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64:
                self._taken.append((result, index))
        return result

    def _name(self, value: Any) -> str | None:
        """Return which parameter a tensor is a view of."""
        if not isinstance(value, Tensor) or value.ndim < 2:
            return None
        place, start = value.untyped_storage().data_ptr(), value.storage_offset()
        for name, whole in self._parameters.items():
            first = whole.storage_offset()
            if whole.untyped_storage().data_ptr() == place and first <= start < first + whole.numel():
                return name
        return None

    def _product(self, func: Any, name: str, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if rest and any(value is not None for value in rest):
            raise self._strange(f"{func.__name__} with a bias")
        self._seen.add(name)
        maker = name != self._experts.down
        where = self._places(x, weight, name, maker=maker)
        if not maker:
            x = self._shown("in", x, *where)
        value = func(x, weight)
        if not maker:
            return self._shown("out", value, *where)
        if name != "gate_up_proj":
            return self._shown("gate" if name == "gate_proj" else "up", value, *where, x)
        if self._experts.interleaved:
            halves = self._shown("gate", value[..., 0::2], *where, x), self._shown("up", value[..., 1::2], *where, x)
            return torch.stack(halves, dim=-1).flatten(-2)
        gate, up = value.chunk(2, dim=-1)
        return torch.cat([self._shown("gate", gate, *where, x), self._shown("up", up, *where, x)], dim=-1)

    def _places(
        self, x: Tensor, weight: Tensor, name: str, *, maker: bool
    ) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"], bool]:
        """Return the expert and the token of every value that the router sent, and whether all experts are there."""
        whole = self._parameters[name]
        if weight.ndim == 3 and x.ndim == 3 and len(weight) == len(x) == len(whole):
            if maker:
                self._sent = (x != 0).any(dim=-1)  # experts that are given every token get zeros for those not sent
            if self._sent is None or self._sent.shape != x.shape[:2]:
                raise self._strange("a down projection of other tokens")
            numbers, tokens = self._sent.nonzero(as_tuple=True)
            return numbers, tokens, True
        number, rest = divmod(int(weight.storage_offset()) - int(whole.storage_offset()), int(whole.stride(0)))
        if weight.ndim != 2 or x.ndim != 2 or rest or not 0 <= number < len(whole):
            raise self._strange(f"a product of shapes {tuple(x.shape)} and {tuple(weight.shape)}")
        if maker:
            taken = next((index for rows, index in reversed(self._taken) if rows is x), None)
            if taken is None:
                raise self._strange("rows that it did not take from what it was given")
            self._rows[number] = taken
        if number not in self._rows or len(self._rows[number]) != len(x):
            raise self._strange("a down projection of other tokens")
        return torch.full_like(self._rows[number], number), self._rows[number], False

    def _shown(
        self, side: Side, value: Tensor, numbers: Tensor, tokens: Tensor, whole: bool, x: Tensor | None = None
    ) -> Tensor:
        if self._given is None:
            raise RuntimeError("only between begin and end")
        given = self._given if not whole else value.new_empty(value.shape[1], 0)  # only how many tokens there are
        place = (numbers, tokens)
        seen = value[place] if whole else value
        read = x[place] if whole and x is not None else None
        every = torch.arange(self._experts.n_experts, device=numbers.device)
        ends = torch.searchsorted(numbers, every, right=True)
        changed = self._show(side, Routing(numbers, tokens, ends, given, whole, read), seen)
        if changed is seen:
            return value
        return value.index_put(place, changed) if whole else changed

    def _strange(self, what: str) -> SafeglassesError:
        return SafeglassesError(
            "these experts compute in a way of their own that is not understood",
            given=f"{self._experts.path}: {what}",
            expected="products of tokens with the experts' parameters, all experts at once or one after the other",
            do='use sites="linears", which leaves fused experts out',
        )
