"""Rotating what a model hands from block to block, and its values, so that no channel is larger than the others.

The rotation is folded into the weights (QuaRot, Ashkboos et al. 2024; SpinQuant, Liu et al. 2024): a norm that only
divides by the root mean square commutes with it once its own weight is multiplied into the layers that read it. The
float model's output does not change. It is planned for the whole model and carried out tensor by tensor, so that a
model that is never in memory as a whole can be rotated while it is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.models.blocks import Blocks, find_blocks, linears, output_head
from bitwright.models.folding import is_norm, norm_offset
from bitwright.models.orthogonal import Orthogonal, make_orthogonal

__all__ = ["FAMILIES", "Rotation", "Step", "plan_rotation", "refuse_rotation", "rotate_model", "untie_head"]

# Model types whose blocks are two pre-norm branches on one residual stream, each tested. A model of another type may
# have modules of the same names and use them otherwise.
FAMILIES = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")
# Which norm's output the linears of a block read, and which write to the residual stream.
READS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.qkv_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.gate_up_proj": "post_attention_layernorm",
}
WRITES = ("self_attn.o_proj", "mlp.down_proj")
VALUES = ("self_attn.v_proj", "self_attn.qkv_proj")  # in a packed one, values are the last rows
BY_ROW = ("rotate_input", "scale_input", "rotate_heads")  # what treats each row of a matrix by itself
PIECE = 1 << 22  # numbers that are rotated together, in float64
Kind = Literal["rotate_input", "scale_input", "rotate_output", "rotate_values", "rotate_heads", "fill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One change of a tensor.

    ``rotate_input`` and ``rotate_output``: its last or its first dimension goes through the hidden rotation.
    ``rotate_values``: its rows from ``start``, and ``rotate_heads``: its columns, head by head through the head's.
    ``scale_input``: its columns are multiplied by ``vector``. ``fill``: it becomes ``vector``.
    """

    kind: Kind
    vector: Tensor | None = None
    start: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """What happens to each tensor of a model.

    Attributes:
        hidden: the rotation of the residual stream.
        head: that of each attention head's values; ``None`` if they stay.
        steps: by the name of the tensor in the model; tensors that are not named do not change.
        untied: the name of the head's weight, if it shared the embedding's, and the name of that. It must become a
            tensor of its own, made by ``transform`` from the embedding's numbers as they were.
    """

    hidden: Orthogonal
    head: Orthogonal | None
    steps: Mapping[str, tuple[Step, ...]]
    untied: Mapping[str, str]

    @torch.no_grad()
    def transform(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor ``name`` of the rotated model from that of the original (any float dtype, which is kept)."""
        steps = self.steps.get(name, ())
        if not steps:
            return tensor
        if tensor.dim() < 2 or any(step.kind not in BY_ROW for step in steps):
            return self._apply_all(steps, tensor)
        result = torch.empty_like(tensor)
        rows = max(1, PIECE // tensor.shape[1])
        for start in range(0, tensor.shape[0], rows):  # embeddings in float64 would be the largest thing of the run
            result[start : start + rows] = self._apply_all(steps, tensor[start : start + rows])
        return result

    def _apply_all(self, steps: tuple[Step, ...], tensor: Tensor) -> Tensor:
        result = tensor
        for step in steps:
            result = self._apply(step, result.to(torch.float64))
        return result.to(tensor.dtype)

    def _apply(self, step: Step, tensor: Tensor) -> Tensor:
        if step.kind == "rotate_input":
            return self.hidden.rotate(tensor)
        if step.kind == "rotate_output":
            return self.hidden.rotate(tensor.t()).t() if tensor.dim() == 2 else self.hidden.rotate(tensor)
        if step.vector is not None:
            vector = step.vector.to(tensor)
            return tensor * vector if step.kind == "scale_input" else vector.expand_as(tensor)
        assert self.head is not None
        size = self.head.size
        if step.kind == "rotate_heads":
            return self.head.rotate(tensor.reshape(tensor.shape[0], -1, size)).reshape(tensor.shape)
        values = tensor[step.start :]
        heads = values.reshape(-1, size, *tensor.shape[1:]).movedim(1, -1)
        rotated = self.head.rotate(heads).movedim(-1, 1).reshape(values.shape)
        return torch.cat([tensor[: step.start], rotated])


def refuse_rotation(model: nn.Module) -> str | None:
    """Why no rotation can be folded into the model, naming what stands in the way; ``None`` if one can."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        called = f"models of type {kind!r}" if isinstance(kind, str) else type(model).__name__
        return f"rotations are known for {', '.join(FAMILIES)}, not for {called}"
    blocks = find_blocks(model)
    if not isinstance(embedding := _embedding(model)[1], nn.Embedding) or output_head(model) is None:
        return f"{type(model).__name__} has no embedding and output head that are plain matrices"
    for name, block in zip(blocks.names(), blocks.modules, strict=True):
        for layer in linears(block, name):
            if layer.removeprefix(name + ".") not in {*READS, *WRITES}:
                return f"{layer} is no layer of a dense pre-norm block"
    for name, norm in _stream_norms(model, blocks):
        if (reason := _refuse_norm(norm, embedding.embedding_dim)) is not None:
            return f"{name} {reason}"
    return None


def plan_rotation(model: nn.Module, read: Callable[[str], Tensor], *, seed: int = 0, heads: bool = True) -> Rotation:
    """Plan how ``model`` (which may be on the meta device) is rotated.

    ``read`` gives a tensor by its name in the model; only the weights of norms are asked for. ``heads``: rotate the
    values of each attention head, too.

    Raises:
        BitwrightError: BW201 saying why the model cannot be rotated.
    """
    reason = refuse_rotation(model)
    if reason is not None:
        suggestion = "an algorithm without rotation, such as gptq"
        raise BitwrightError("BW201", f"the model cannot be rotated: {reason}", suggestion=suggestion)
    blocks, head = find_blocks(model), output_head(model)
    assert head is not None
    embedding, module = _embedding(model)
    gains = {name: _gain(norm, read(f"{name}.weight")) for name, norm in _stream_norms(model, blocks)}
    steps: dict[str, tuple[Step, ...]] = {f"{embedding}.weight": (Step(kind="rotate_input"),)}
    final = next(name for name in gains if not name.startswith(blocks.name + "."))
    steps[f"{head[0]}.weight"] = (Step(kind="scale_input", vector=gains[final]), Step(kind="rotate_input"))
    for name, norm in _stream_norms(model, blocks):
        neutral = 1.0 - _offset(norm)
        steps[f"{name}.weight"] = (Step(kind="fill", vector=torch.tensor(neutral, dtype=torch.float64)),)
    head_width = _head_width(blocks.modules[0]) if heads else None
    for name, block in zip(blocks.names(), blocks.modules, strict=True):
        steps |= _block_steps(name, block, gains, head_width)
    tied = head[1].weight is module.weight
    assert isinstance(module, nn.Embedding)
    return Rotation(
        hidden=make_orthogonal(module.embedding_dim, seed),
        head=None if head_width is None else make_orthogonal(head_width, seed + 1),
        steps=steps,
        untied={f"{head[0]}.weight": f"{embedding}.weight"} if tied else {},
    )


@torch.no_grad()
def rotate_model(model: nn.Module, rotation: Rotation) -> None:
    """Rotate a model in memory, in place; a tied output head gets a weight of its own."""
    untie_head(model, rotation)
    for name, parameter in model.named_parameters():
        if name in rotation.steps:
            parameter.copy_(rotation.transform(name, parameter))


@torch.no_grad()
def untie_head(model: nn.Module, rotation: Rotation) -> None:
    """Give a tied output head a copy of the embedding's weight, and say so in the model's configuration."""
    for name, source in rotation.untied.items():
        holder = model.get_submodule(name.rpartition(".")[0])
        shared = model.get_parameter(source)
        holder.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        config = getattr(model, "config", None)
        if config is not None:
            config.tie_word_embeddings = False


def _block_steps(
    name: str, block: nn.Module, gains: Mapping[str, Tensor], head_width: int | None
) -> Iterator[tuple[str, tuple[Step, ...]]]:
    for path, layer in linears(block, name).items():
        role = path.removeprefix(name + ".")
        has_bias = getattr(layer, "bias", None) is not None
        weight: list[Step] = []
        bias: list[Step] = []
        if role in READS:
            weight += [Step(kind="scale_input", vector=gains[f"{name}.{READS[role]}"]), Step(kind="rotate_input")]
        else:
            weight.append(Step(kind="rotate_output"))
            bias.append(Step(kind="rotate_output"))
        if head_width is not None and role in VALUES:
            values = Step(kind="rotate_values", start=_value_start(block, layer))
            weight.append(values)
            bias.append(values)
        if head_width is not None and role == "self_attn.o_proj":
            weight.append(Step(kind="rotate_heads"))
        yield f"{path}.weight", tuple(weight)
        if has_bias and bias:
            yield f"{path}.bias", tuple(bias)


def _value_start(block: nn.Module, layer: nn.Module) -> int:
    """The first row of the values: in a packed layer, those follow queries (as many as the output reads) and keys."""
    out, width = _shape(layer)[0], _shape(block.get_submodule("self_attn.o_proj"))[1]
    packed = hasattr(block.get_submodule("self_attn"), "qkv_proj")
    return width + (out - width) // 2 if packed else 0


def _shape(layer: nn.Module) -> tuple[int, int]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def _head_width(block: nn.Module) -> int:
    width = block.get_submodule("self_attn").head_dim
    assert isinstance(width, int)
    return width


def _embedding(model: nn.Module) -> tuple[str, nn.Module]:
    get = getattr(model, "get_input_embeddings", None)
    module: object = get() if callable(get) else None
    for name, candidate in model.named_modules():
        if candidate is module and isinstance(module, nn.Module):
            return name, module
    return "", nn.Identity()


def _stream_norms(model: nn.Module, blocks: Blocks) -> Iterator[tuple[str, nn.Module]]:
    """The norms of the residual stream: those of the blocks, and the one before the head. Norms of heads are not."""
    for name, block in zip(blocks.names(), blocks.modules, strict=True):
        for path, module in block.named_children():
            if is_norm(module):
                yield f"{name}.{path}", module
    parent = model.get_submodule(blocks.name.rpartition(".")[0])
    for path, module in parent.named_children():
        if is_norm(module):
            yield f"{blocks.name.rpartition('.')[0]}.{path}".removeprefix("."), module


def _refuse_norm(norm: nn.Module, width: int) -> str | None:
    """Whether the norm commutes with rotations once its weight is out of it, tried on a copy of it in memory."""
    if getattr(norm, "bias", None) is not None:
        return "has a bias, which does not pass through a rotation"
    tried = copy.deepcopy(norm).to_empty(device="cpu").to(torch.float32)
    tried.weight.data.fill_(1.0)  # type: ignore[operator]
    offset = norm_offset(tried, torch.randn(4, width, generator=torch.Generator().manual_seed(0)))
    if offset is None:
        return "is not proportional to its weight"
    tried.weight.data.fill_(1.0 - offset)  # type: ignore[operator]
    sample = torch.randn(4, width, generator=torch.Generator().manual_seed(1)) + 0.5
    rotation = make_orthogonal(width, 2)
    with torch.no_grad():
        apart = (tried(rotation.rotate(sample)) - rotation.rotate(tried(sample))).abs().max()
    return None if float(apart) < 1e-3 else "does more than divide by the root mean square"


def _offset(norm: nn.Module) -> int:
    tried = copy.deepcopy(norm).to_empty(device="cpu").to(torch.float32)
    weight = tried.weight
    assert isinstance(weight, Tensor)
    weight.data.fill_(1.0)
    return norm_offset(tried, torch.randn(4, weight.numel(), generator=torch.Generator().manual_seed(0))) or 0


def _gain(norm: nn.Module, weight: Tensor) -> Tensor:
    """What the norm multiplies by: its weight, or one more."""
    return weight.detach().to("cpu", torch.float64) + _offset(norm)
