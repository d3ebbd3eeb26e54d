"""The document's linear layer, whose low-bit numbers are combined in 32-bit words."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitwright.core import bitpack
from bitwright.core.codebook import FP8_MAX
from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.formats.stored import check_finite, check_group_index, unsigned_codes
from bitwright.kernels.table import Kernel, PackedWeight
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.fp8 import power_scale, through_fp8

__all__ = ["WeightOnlyLinear"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class WeightOnlyLinear(QuantizedLinear):
    """A linear layer that keeps its weight in low bits and runs from them; ``algorithm`` says how it was made.

    Example:
        >>> layer = model.get_submodule("model.layers.0.mlp.down_proj")
        >>> words = layer.compress()  # qweight and qzeros as int32 words, scales, g_idx
        >>> weight = layer.decompress()  # float32 [out, in]
    """

    activation_scale: Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None,
        kernel: Kernel,
        input_scale: Tensor | None = None,
        *,
        algorithm: str = "",
    ) -> None:
        super().__init__(weight, bias, kernel, input_scale)
        self.algorithm = algorithm
        self.register_buffer("activation_scale", None)

    @classmethod
    def adopt(cls, layer: QuantizedLinear, algorithm: str) -> WeightOnlyLinear:
        """The same layer under this name; the packed numbers are shared."""
        adopted = cls(layer.packed, None, layer.kernel, layer.input_scale, algorithm=algorithm)
        adopted.bias = layer.bias
        adopted.train(layer.training)
        if isinstance(layer, WeightOnlyLinear) and layer.activation_scale is not None:
            adopted.round_inputs(float(layer.activation_scale))
        return adopted

    def round_inputs(self, scale: float) -> None:
        """Compute from now on with inputs rounded to e4m3 multiples of ``scale``, and with such weights."""
        device = next(iter(self.packed.tensors.values())).device
        self.activation_scale = torch.tensor(scale, dtype=torch.float32, device=device)

    def has_fp8_weights(self) -> bool:
        """Whether every weight is an exact e4m3 multiple of one power of two, as those of an fp8-aware GPTQ are."""
        weight = self.decompress()
        return torch.equal(through_fp8(weight, power_scale(weight)), weight)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]``, same dtype.

        With fp8 inputs every product is one of two e4m3 numbers, exact in float32, and sums are float32: what a unit
        for fp8 matrices computes, on any machine.
        """
        if self.activation_scale is None:
            return super().forward(x)
        numbers = x.to(torch.float32)
        if self.input_scale is not None:
            numbers = numbers * self.input_scale
        weight = self.decompress()
        scale, step = self.activation_scale, power_scale(weight)
        product = _to_e4m3(numbers / scale) @ _to_e4m3(weight / step).t()
        product = product * (scale * step)
        return (product if self.bias is None else product + self.bias.to(torch.float32)).to(x.dtype)

    def compress(self) -> dict[str, Tensor]:
        """The stored tensors, by name.

        ``qweight``: int32 ``[out, words]``, each row of codes one stream of bits, least bit first. ``scales``: as they
        are; or, where they are quantized themselves, ``scales.qweight``, ``scales.scales``, ... ``qzeros``: int32, all
        integer zero points one stream; ``zeros``: float ones. ``g_idx``: int32 ``[in]``, the group of each column,
        where groups are no runs of columns. ``input_scale``: float32 ``[in]``, and ``activation_scale``: one float32,
        if there are any.
        """
        tensors = _compress(self.unpack())
        own = {"input_scale": self.input_scale, "activation_scale": self.activation_scale}
        return tensors | {name: tensor for name, tensor in own.items() if tensor is not None}

    def decompress(self) -> Tensor:
        """The weight, float32 ``[out, in]``."""
        return self.dequantize()

    @classmethod
    def from_compressed(
        cls, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int], *, algorithm: str, name: str
    ) -> WeightOnlyLinear:
        """The inverse of :meth:`compress`; ``bias`` may be among the tensors, ``name`` is for messages.

        Raises:
            BitwrightError: BW303 for a tensor that is missing or belongs to no layer, BW304 for one of another dtype or
                shape, BW309 for scales that are not finite, BW311 for an index out of range.
        """
        rest = dict(tensors)
        tensor = _decompress(rest, scheme.weight, shape, name)
        bias = _take(rest, name, "bias", FLOATS, (shape[0],)) if "bias" in rest else None
        scale = _take(rest, name, "input_scale", (torch.float32,), (shape[1],)) if "input_scale" in rest else None
        has_fp8_inputs = "activation_scale" in rest
        activation = _take(rest, name, "activation_scale", (torch.float32,), ()) if has_fp8_inputs else None
        if rest:
            stray = ", ".join(f"{name}.{field}" for field in rest)
            raise BitwrightError("BW303", f"unexpected tensors: {stray}", suggestion="they belong to another layer")
        layer = cls.adopt(QuantizedLinear.build(tensor, bias, scheme, scale), algorithm)
        if activation is not None:
            check_finite(f"{name}.activation_scale", activation)
            layer.round_inputs(float(activation))
        return layer

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, algorithm={self.algorithm}"


def _to_e4m3(values: Tensor) -> Tensor:
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def _compress(tensor: QuantizedTensor) -> dict[str, Tensor]:
    scheme = tensor.scheme
    tensors = {"qweight": bitpack.pack(unsigned_codes(tensor.codes, scheme), scheme.bits)}
    if isinstance(tensor.scale, Tensor):
        tensors["scales"] = tensor.scale
    else:
        tensors |= {f"scales.{name}": value for name, value in _compress(tensor.scale).items()}
    if tensor.zero is not None and scheme.zero == "integer":
        tensors["qzeros"] = bitpack.pack(unsigned_codes(tensor.zero, scheme).reshape(-1), scheme.bits)
    elif tensor.zero is not None:
        tensors["zeros"] = tensor.zero
    if tensor.group_index is not None:
        tensors["g_idx"] = tensor.group_index
    return tensors


def _decompress(rest: dict[str, Tensor], scheme: QuantScheme, shape: tuple[int, int], name: str) -> QuantizedTensor:
    """Take the tensors of one quantized tensor out of ``rest``."""
    words = (shape[0], bitpack.packed_words(shape[1], scheme.bits))
    codes = bitpack.unpack(_take(rest, name, "qweight", (torch.int32,), words), scheme.bits, shape[1])
    groups = 1 if scheme.group is None else -(-shape[scheme.axis] // scheme.group)
    grid = (shape[0], groups) if scheme.axis == 1 else (groups, shape[1])
    count = grid[0] * grid[1]
    floats = (scheme.scale_dtype, torch.float32)
    scale: Tensor | QuantizedTensor
    if scheme.scale_scheme is None:
        scale = _take(rest, name, "scales", floats, grid)
        check_finite(f"{name}.scales", scale)
    else:
        nested = {key.removeprefix("scales."): rest.pop(key) for key in list(rest) if key.startswith("scales.")}
        scale = _decompress(nested, scheme.scale_scheme, (1, count), f"{name}.scales")
    zero = None
    if not scheme.symmetric and scheme.zero == "integer":
        stream = _take(rest, name, "qzeros", (torch.int32,), (bitpack.packed_words(count, scheme.bits),))
        zero = _signed(bitpack.unpack(stream, scheme.bits, count), scheme).view(grid)
    elif not scheme.symmetric:
        zero = _take(rest, name, "zeros", floats, grid)
        check_finite(f"{name}.zeros", zero)
    index = None
    if "g_idx" in rest:
        index = _take(rest, name, "g_idx", (torch.int32,), (shape[1],))
        check_group_index(f"{name}.g_idx", index, groups)
    return QuantizedTensor(scheme=scheme, codes=_signed(codes, scheme), scale=scale, zero=zero, group_index=index)


def _take(
    rest: dict[str, Tensor], name: str, field: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> Tensor:
    if field not in rest:
        raise BitwrightError("BW303", f"the tensor {name}.{field} is missing", suggestion="save the model again")
    tensor = rest.pop(field)
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        wanted = " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
        raise BitwrightError(
            "BW304",
            f"{name}.{field} is {tensor.dtype} {list(tensor.shape)}; {wanted} {list(shape)} is called for",
            why="by the record of the layer in qconfig.json",
            suggestion="save the model again",
        )
    return tensor


def _signed(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """The inverse of :func:`unsigned_codes`."""
    return codes if scheme.code_dtype == torch.uint8 else (codes + (scheme.code_min & 0xFF)).view(torch.int8)
