"""Quantized layers that run from dense weights for a while compute what they did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.decoded import DecodedLinear, decoded


def quantized(scheme: LayerScheme, dtype: torch.dtype, input_scale: torch.Tensor | None = None) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    tensor = QuantizedTensor.quantize(torch.randn(24, 40, generator=generator), scheme.weight)
    return QuantizedLinear.build(tensor, torch.randn(24, generator=generator).to(dtype), scheme, input_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["w4g16", "w3g16-asym", "nf4g16"])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_the_same_outputs_from_dense_weights(scheme: str, dtype: torch.dtype, is_scaled: bool) -> None:
    scale = torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.5 if is_scaled else None
    model = nn.Sequential(quantized(parse(scheme), dtype, scale), nn.Linear(24, 3, dtype=dtype))
    x = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    first = model[0]
    before = first(x)
    with decoded(model, {"0": dtype, "1": dtype}):
        assert isinstance(model[0], DecodedLinear) and type(model[1]) is nn.Linear
        inside = model[0](x)
    assert model[0] is first and inside.dtype == dtype
    step = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(inside, before, rtol=step, atol=step)


def test_layers_come_back_after_a_failure_and_integer_activations_stay() -> None:
    layer = quantized(parse("w8a8"), torch.float32)
    model = nn.Sequential(layer, quantized(parse("w4g8"), torch.float32))
    second = model[1]
    with pytest.raises(RuntimeError), decoded(model, {"0": torch.float32, "1": torch.float32}):
        assert model[0] is layer and model[1] is not second
        raise RuntimeError
    assert model[1] is second
