"""Keys, or values, that are a tensor to a model and stay packed until somebody computes with them.

A model hands what its cache gives to an attention function, whichever it is configured with. What those do to keys and
values is little: repeat heads, transpose, multiply, or call ``scaled_dot_product_attention``. Exactly this is done on
the packed numbers, block by block. Everything else gets an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bitwright.models.kv_attention import attend, mix, scores
from bitwright.models.kv_storage import Side, View

__all__ = ["PackedTensor"]

HARMLESS = ("__get__", "size", "dim", "numel", "is_floating_point", "__len__", "nelement", "ndimension", "is_complex")
WHOLE = slice(None)
HEADS_APART = (WHOLE, WHOLE, None, WHOLE, WHOLE)  # how repeat_kv begins


class PackedTensor(Tensor):
    """The keys or values that the queries of one step see, ``[batch, heads, columns, head_dim]``.

    ``form`` says how they lie: ``plain``; ``turned``: the last two dimensions exchanged; ``apart``: with a dimension
    for repeated heads after that of the heads, not merged yet. ``repeats``: how often each head is there.
    """

    view_of: View
    side: Side
    form: str
    repeats: int

    @staticmethod
    def __new__(cls, view: View, side: Side, form: str = "plain", repeats: int = 1) -> PackedTensor:
        batch, heads, columns = view.shape
        width, device = view.widths[side], view.limits.device
        shapes = {
            "plain": (batch, heads * repeats, columns, width),
            "turned": (batch, heads * repeats, width, columns),
            "apart": (batch, heads, repeats, columns, width),
        }
        made = Tensor._make_wrapper_subclass(cls, shapes[form], dtype=view.dtype, device=device)
        made.view_of, made.side, made.form, made.repeats = view, side, form, repeats
        assert isinstance(made, PackedTensor)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedTensor({self.side}, {self.view_of.codes[self.side].name}, shape={tuple(self.shape)})"

    def unpack(self) -> Tensor:
        """An ordinary tensor of the same numbers, as the last query sees them."""
        whole = self.view_of.whole(self.side)
        batch, heads, columns, width = whole.shape
        apart = whole[:, :, None].expand(batch, heads, self.repeats, columns, width)
        if self.form == "apart":
            return apart
        merged = whole if self.repeats == 1 else apart.reshape(batch, heads * self.repeats, columns, width)
        return merged.transpose(2, 3) if self.form == "turned" else merged

    def in_form(self, form: str, repeats: int | None = None) -> PackedTensor:
        return PackedTensor(self.view_of, self.side, form, self.repeats if repeats is None else repeats)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do on packed numbers what can be; unpack for anything else."""
        keywords = dict(kwargs or {})
        if getattr(func, "__name__", "") in HARMLESS or func in (Tensor.__repr__,):
            return super().__torch_function__(func, types, args, keywords)  # type: ignore[no-untyped-call]
        action = ACTIONS.get(func)
        if action is not None:
            result = action(*args, **keywords)
            if result is not NotImplemented:
                return result
        plain, named = _unpacked(args), {name: _unpacked(value) for name, value in keywords.items()}
        return func(*plain, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """For what reaches torch on other ways."""
        return func(*_unpacked(args), **{name: _unpacked(value) for name, value in (kwargs or {}).items()})


def _unpacked(value: Any) -> Any:
    if isinstance(value, PackedTensor):
        return value.unpack()
    return type(value)(map(_unpacked, value)) if type(value) in (tuple, list) else value


def _index(packed: PackedTensor, index: Any) -> Any:
    is_split = isinstance(index, tuple) and index == HEADS_APART
    return packed.in_form("apart", 1) if is_split and packed.form == "plain" and packed.repeats == 1 else NotImplemented


def _expand(packed: PackedTensor, *sizes: Any) -> Any:
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if packed.form != "apart" or len(sizes) != 5:
        return NotImplemented
    shape = packed.shape
    is_repeat = all(size in (-1, old) for at, (size, old) in enumerate(zip(sizes, shape, strict=True)) if at != 2)
    return packed.in_form("apart", sizes[2]) if is_repeat and packed.repeats == 1 and sizes[2] > 0 else NotImplemented


def _reshape(packed: PackedTensor, *sizes: Any) -> Any:
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    merged = packed.in_form("plain")
    return merged if packed.form == "apart" and tuple(merged.shape) == sizes else NotImplemented


def _repeat(packed: PackedTensor, repeats: Any, dim: int | None = None, *, output_size: int | None = None) -> Any:
    is_heads = type(repeats) is int and dim in (1, -3) and packed.form == "plain" and packed.repeats == 1
    return packed.in_form("plain", repeats) if is_heads else NotImplemented


def _transpose(packed: PackedTensor, dim0: Any = None, dim1: Any = None) -> Any:
    if not isinstance(packed, PackedTensor) or not isinstance(dim0, int) or not isinstance(dim1, int):
        return NotImplemented
    other = {"plain": "turned", "turned": "plain"}.get(packed.form)
    is_last = {dim0 % 4, dim1 % 4} == {2, 3}
    return packed.in_form(other) if other is not None and is_last else NotImplemented


def _multiply(left: Any, right: Any) -> Any:
    if not isinstance(right, PackedTensor) or isinstance(left, PackedTensor) or left.dim() != 4:
        return NotImplemented
    repeats = _repeats(left, right)
    if repeats is None or not _fits(left, right):
        return NotImplemented
    if right.side == "key" and right.form == "turned":
        return scores(right.view_of, left, repeats)
    return mix(right.view_of, left, repeats) if right.side == "value" and right.form == "plain" else NotImplemented


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    both = isinstance(key, PackedTensor) and isinstance(value, PackedTensor) and not isinstance(query, PackedTensor)
    if not both or key.view_of is not value.view_of or dropout_p or {key.form, value.form} != {"plain"}:
        return NotImplemented
    if query.dim() != 4 or not _fits(query, key) or (attn_mask is not None and attn_mask.dim() > 4):
        return NotImplemented
    repeats = _repeats(query, key, enable_gqa=enable_gqa)
    if repeats is None:
        return NotImplemented
    return attend(key.view_of, query, mask=attn_mask, is_causal=is_causal, scale=scale, repeats=repeats)


def _repeats(left: Tensor, packed: PackedTensor, *, enable_gqa: bool = False) -> int | None:
    """How many heads of ``left`` share one of keys or values; ``None`` if they do not go together.

    A single head is broadcast, as in multi-query attention.
    """
    batch, heads, _ = packed.view_of.shape
    is_shared = enable_gqa and left.shape[1] % heads == 0
    alike = left.shape[1] == heads * packed.repeats or heads * packed.repeats == 1 or is_shared
    return left.shape[1] // heads if alike and left.shape[0] == batch else None


def _fits(query: Tensor, packed: PackedTensor) -> bool:
    """Whether each query is one of those that this step has brought; and nobody wants gradients."""
    limits = packed.view_of.limits
    return len(limits) in (1, query.shape[2]) and not (torch.is_grad_enabled() and query.requires_grad)


ACTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.__getitem__: _index,
    Tensor.expand: _expand,
    Tensor.reshape: _reshape,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.repeat_interleave: _repeat,
    torch.repeat_interleave: _repeat,
    Tensor.matmul: _multiply,
    Tensor.__matmul__: _multiply,
    torch.matmul: _multiply,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}
