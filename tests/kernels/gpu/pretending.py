"""A device that is not the CPU, but computes on the CPU, so that code can be seen to keep its tensors on one device.

A tensor on it refuses to meet one of the CPU (numbers of no dimension apart), as on a GPU; a tensor made for it, or
like one of it, lies on it. What it computes is what the CPU computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["PretendGpu", "there"]

PLACE = torch.device("meta")  # torch needs no driver for it, and lets tensors on it be indexed
# Operations that bring numbers from one device to another.
TRANSFERS = ("aten._to_copy", "aten.copy_", "aten.to.", "aten.index_put", "aten.index.Tensor")


class _There(Tensor):
    """A tensor on the pretended device; ``held`` is the one that computes."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _There:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=PLACE, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"there({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


def there(tensor: Tensor) -> Tensor:
    """``tensor`` on the pretended device."""
    return _There(tensor.detach().clone())


def _compute(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the CPU; what comes out lies where it would."""
    flat, _ = tree_flatten((args, dict(kwargs)))
    tensors = [each for each in flat if isinstance(each, Tensor)]
    wanted = kwargs.get("device")
    is_transfer = str(function).startswith(TRANSFERS)
    met = {isinstance(each, _There) for each in tensors if each.dim() > 0}
    if len(met) > 1 and not is_transfer:
        raise RuntimeError(f"{function}: tensors on two devices, {PLACE} and cpu")
    if wanted is not None:
        lies_there = torch.device(wanted).type == PLACE.type
    else:
        first = tensors[0] if is_transfer and tensors else None
        lies_there = isinstance(first, _There) if first is not None else any(isinstance(t, _There) for t in tensors)
    plain = [
        tree_map(lambda each: each.held if isinstance(each, _There) else each, part) for part in (args, dict(kwargs))
    ]
    if wanted is not None:
        plain[1]["device"] = torch.device("cpu")
    plain[1].pop("pin_memory", None)
    result = function(*plain[0], **plain[1])
    known = {id(each.held): each for each in tensors if isinstance(each, _There)}

    def wrap(each: Any) -> Any:
        if not isinstance(each, Tensor) or not lies_there:
            return each
        return known[id(each)] if id(each) in known else _There(each)

    return tree_map(wrap, result)


class PretendGpu(TorchDispatchMode):
    """Within it tensors can be made on the device and moved to it."""

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _compute(function, args, kwargs or {})
