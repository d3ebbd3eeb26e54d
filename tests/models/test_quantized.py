"""The quantized layer: small, exact, and of the dtype of its input."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.kernels import reference
from bitwright.kernels.gpu import linear as gpu_linear
from bitwright.models.blocks import linear_weight
from bitwright.models.quantized import QuantizedLinear

NAMES = ["w1g32", "w3g32-asym", "w4g128", "w8", "nf4g64-dq", "fp8", "a16w4", "w4g32-axis0", "w8a8", "a8w4", "w4g32-a8"]


def layer(name: str, shape: tuple[int, int] = (48, 160), bias: bool = True) -> tuple[QuantizedTensor, QuantizedLinear]:
    scheme = parse(name)
    tensor = QuantizedTensor.quantize(torch.randn(shape), scheme.weight)
    return tensor, QuantizedLinear.build(tensor, torch.randn(shape[0]) if bias else None, scheme)


@pytest.mark.parametrize("name", NAMES)
def test_the_output_has_the_dtype_of_the_input(name: str) -> None:
    """W37."""
    _, module = layer(name)
    x = torch.randn(2, 5, 160)
    exact = module(x)
    assert exact.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        y = module(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.35)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_as_small_as_what_is_stored(name: str) -> None:
    """W38: before and after it has run, down to layers that are smaller than any real one."""
    for shape in [(48, 160), (17, 33)]:
        tensor, module = layer(name, shape)
        stored = tensor.stored_bits() / 8
        for _ in range(2):
            total = sum(buffer.untyped_storage().nbytes() for buffer in module.buffers())
            assert total == module.resident_bytes() <= max(stored * 1.1, stored + 16)
            module(torch.randn(3, shape[1]))


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_comes_back(name: str) -> None:
    tensor, module = layer(name)
    assert torch.equal(module.unpack().codes, tensor.codes)
    assert torch.equal(module.dequantize(), tensor.dequantize())
    assert module.dequantize().dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_dtype_leaves_the_weight_alone(name: str) -> None:
    tensor, module = layer(name)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        module.to(dtype)
        assert torch.equal(module.dequantize(), tensor.dequantize())
        assert module.bias is not None
        assert module.bias.dtype == dtype
    assert module.to("meta").packed.tensors["codes"].device.type == "meta"


def test_state_dict_and_copies_carry_the_weight() -> None:
    tensor, module = layer("w4g32-asym-dq")
    _, other = layer("w4g32-asym-dq")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.dequantize(), tensor.dequantize())
    duplicate = copy.deepcopy(module)
    assert torch.equal(duplicate.dequantize(), tensor.dequantize())
    duplicate.packed.tensors["codes"].zero_()
    assert torch.equal(module.dequantize(), tensor.dequantize())


def test_it_stands_for_a_conv1d() -> None:
    """W41."""
    conv = Conv1D(40, 64)
    scheme = parse("w8")
    tensor = QuantizedTensor.quantize(linear_weight(conv).detach(), scheme.weight)
    module = QuantizedLinear.build(tensor, conv.bias, scheme)
    assert (module.out_features, module.in_features) == (40, 64)
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        conv.weight.copy_(tensor.dequantize().t())
        torch.testing.assert_close(module(x), conv(x), rtol=1e-5, atol=1e-5)


def test_it_has_nothing_to_train() -> None:
    _, module = layer("w4g32")
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module(torch.randn(1, 160)).grad_fn is None


def test_a_bias_of_another_size_is_refused() -> None:
    scheme = parse("w8")
    with pytest.raises(ValueError, match=r"\[3\] for 4 output features"):
        QuantizedLinear.build(QuantizedTensor.quantize(torch.randn(4, 8), scheme.weight), torch.zeros(3), scheme)


def test_its_description_names_scheme_and_kernel() -> None:
    _, module = layer("w4g32", bias=False)
    assert repr(module) == "QuantizedLinear(in=160, out=48, bias=False, scheme=w4g32, kernel=reference)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_scale_multiplies_the_input(dtype: torch.dtype) -> None:
    tensor, plain = layer("w4g32")
    scale = torch.rand(160) + 0.5
    scheme = parse("w4g32")
    module = QuantizedLinear.build(tensor, plain.bias, scheme, input_scale=scale).to(dtype)
    assert module.input_scale is not None
    assert torch.equal(module.input_scale, scale)  # a change of dtype leaves it alone
    x = torch.randn(3, 160).to(dtype)
    assert torch.equal(module(x), plain.to(dtype)((x.float() * scale).to(dtype)))
    assert "input_scale=True" in repr(module)


@pytest.mark.parametrize("scale", [torch.ones(48), torch.ones(160, 1), torch.ones(160, dtype=torch.float16)])
def test_an_input_scale_of_another_kind_is_refused(scale: torch.Tensor) -> None:
    tensor, _ = layer("w4g32")
    with pytest.raises(ValueError, match="160 input features; float32"):
        QuantizedLinear.build(tensor, None, parse("w4g32"), input_scale=scale)


def test_a_move_to_another_device_packs_for_the_kernel_that_is_first_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the layer came from a GPU: what it was packed for there is unpacked, moved, and packed for this device."""
    tensor, module = layer("w4g128")
    elsewhere = SimpleNamespace(tensors={"codes": SimpleNamespace(device=torch.device("cuda"))}, shape=tensor.shape)
    former = replace(reference.KERNEL, name="former", unpack=lambda _packed: tensor)
    monkeypatch.setattr("bitwright.models.quantized.select", lambda _spec: gpu_linear.KERNEL)
    module._pack_again(elsewhere, former)
    assert module.kernel is gpu_linear.KERNEL and "packed_counters" in dict(module.named_buffers())
    assert torch.equal(module.unpack().codes, tensor.codes) and torch.equal(module.dequantize(), tensor.dequantize())
    module.float()  # a change of dtype alone packs nothing
    assert module.kernel is gpu_linear.KERNEL
