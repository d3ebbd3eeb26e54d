"""Sites: what reads one activation in every architecture, and what can take in its scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitwright.models.blocks import find_blocks, linears
from bitwright.models.sites import Site, enclosing, find_sites
from bitwright.quantization.capture import capture, run_block
from tests.models.architectures import ARCHITECTURES, MIXTURE, build, sample_ids

ROTARY = [
    ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn", "input_layernorm"),
    ("self_attn.o_proj", "self_attn.o_proj", "self_attn.v_proj"),
    ("mlp.gate_proj mlp.up_proj", "mlp", "post_attention_layernorm"),
    ("mlp.down_proj", "mlp.down_proj", "mlp.up_proj"),
]
NEOX = [
    ("attention.query_key_value", "attention.query_key_value", "input_layernorm"),
    ("attention.dense", "attention.dense", "attention.query_key_value"),
    ("mlp.dense_h_to_4h", "mlp.dense_h_to_4h", "post_attention_layernorm"),
    ("mlp.dense_4h_to_h", "mlp.dense_4h_to_h", None),  # GELU does not commute with a scale
]
# By architecture: the layers of each site, its scope, and the layer that can take in a scale of it.
EXPECTED: dict[str, list[tuple[str, str, str | None]]] = {
    **dict.fromkeys(("llama", "llama48", "qwen2", "qwen3", "mistral", "gemma"), ROTARY),
    "gemma2": [*ROTARY[:2], (ROTARY[2][0], "mlp", "pre_feedforward_layernorm"), ROTARY[3]],
    "gpt_neox": NEOX,
    "gpt_neox_sequential": NEOX,
    "phi": [
        ("self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1", "", "input_layernorm"),
        ("self_attn.dense", "self_attn.dense", "self_attn.v_proj"),
        ("mlp.fc2", "mlp.fc2", None),
    ],
    "phi3": [
        ("self_attn.qkv_proj", "self_attn.qkv_proj", "input_layernorm"),
        ("self_attn.o_proj", "self_attn.o_proj", "self_attn.qkv_proj"),
        ("mlp.gate_up_proj", "mlp.gate_up_proj", "post_attention_layernorm"),
        ("mlp.down_proj", "mlp.down_proj", "mlp.gate_up_proj"),
    ],
    "gpt2": [
        ("attn.c_attn", "attn.c_attn", "ln_1"),
        ("attn.c_proj", "attn.c_proj", "attn.c_attn"),
        ("mlp.c_fc", "mlp.c_fc", "ln_2"),
        ("mlp.c_proj", "mlp.c_proj", None),
    ],
    "gptj": [
        ("attn.q_proj attn.k_proj attn.v_proj mlp.fc_in", "", "ln_1"),
        ("attn.out_proj", "attn.out_proj", "attn.v_proj"),
        ("mlp.fc_out", "mlp.fc_out", None),
    ],
    "opt": [
        ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn", "self_attn_layer_norm"),
        ("self_attn.out_proj", "self_attn.out_proj", "self_attn.v_proj"),
        ("fc1", "fc1", "final_layer_norm"),
        ("fc2", "fc2", "fc1"),  # ReLU commutes with positive scales
    ],
}


def sites_of(name: str, dtype: torch.dtype = torch.float32, without: str = "") -> tuple[str, nn.Module, list[Site]]:
    model = build(name, dtype=dtype)
    blocks = find_blocks(model)
    with torch.no_grad():
        captured = capture(model, blocks, [lambda: model(sample_ids(), use_cache=False)])
    prefix, block, call = blocks.names()[0], blocks.modules[0], captured.calls[0][0]
    layers = [each for each in linears(block, prefix) if not without or not each.endswith(without)]
    before = {key: value.clone() for key, value in block.state_dict().items()}
    sites = find_sites(block, prefix, layers, lambda: run_block(block, captured.inputs[0], call))
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    return prefix, block, list(sites)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != MIXTURE])
def test_the_sites_of_every_architecture_are_found_without_names(name: str, dtype: torch.dtype) -> None:
    prefix, _, sites = sites_of(name, dtype)
    found = []
    for site in sites:
        producer = None if site.fold is None else site.fold.producer.removeprefix(prefix + ".")
        layers = " ".join(layer.removeprefix(prefix + ".") for layer in site.layers)
        found.append((layers, site.scope.removeprefix(prefix).removeprefix("."), producer))
        assert site.readers == site.layers
        assert (site.refusal == "") == (producer is not None) and (not site.refusal or site.layers[0] in site.refusal)
        if site.fold is not None and site.fold.kind == "norm":
            assert site.fold.offset == (1 if name.startswith("gemma") else 0)
    assert found == EXPECTED[name]


def test_every_architecture_is_expected() -> None:
    assert EXPECTED.keys() | {MIXTURE} == ARCHITECTURES.keys()


def test_query_heads_share_the_rows_of_their_key_value_head() -> None:
    _, _, sites = sites_of("llama")  # 4 heads of 16 on 2 key-value heads
    fold = sites[1].fold
    assert fold is not None
    expected = [head // 2 * 16 + channel for head in range(4) for channel in range(16)]
    assert fold.rows.tolist() == expected


def test_values_in_packed_layers_are_found() -> None:
    packed = {"gpt2": list(range(128, 192)), "phi3": [96 + h // 2 * 16 + d for h in range(4) for d in range(16)]}
    packed["gpt_neox"] = [head * 48 + 32 + channel for head in range(4) for channel in range(16)]
    for name, rows in packed.items():
        fold = sites_of(name)[2][1].fold
        assert fold is not None and fold.rows.tolist() == rows, name


def test_a_router_and_its_experts_share_the_scale_of_their_norm() -> None:
    prefix, _, sites = sites_of(MIXTURE)
    shared = next(site for site in sites if f"{prefix}.mlp.gate" in site.layers)
    experts = [f"{prefix}.mlp.experts.{n}.{kind}_proj" for n in range(4) for kind in ("gate", "up")]
    assert set(shared.readers) == {f"{prefix}.mlp.gate", *experts}
    assert shared.fold is not None and shared.fold.producer == f"{prefix}.post_attention_layernorm"
    assert shared.scope == f"{prefix}.mlp"


def test_a_layer_that_stays_float_still_reads() -> None:
    prefix, _, sites = sites_of("llama", without="k_proj")
    assert sites[0].layers == (f"{prefix}.self_attn.q_proj", f"{prefix}.self_attn.v_proj")
    assert f"{prefix}.self_attn.k_proj" in sites[0].readers and sites[0].fold is not None


class OddNorm(nn.Module):
    """A norm under another name, which may add to what it makes."""

    def __init__(self, width: int, shift: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True) * self.weight + self.shift


class OddBlock(nn.Module):
    def __init__(self, shift: float, is_read_again: bool) -> None:
        super().__init__()
        self.norm = OddNorm(16, shift)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.is_read_again = is_read_again

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return (y if self.is_read_again else x) + self.down(torch.tanh(self.up(y)))


@pytest.mark.parametrize(
    ("shift", "is_read_again", "folds"), [(0.0, False, True), (0.3, False, False), (0.0, True, False)]
)
def test_a_norm_is_judged_by_what_it_does(shift: float, is_read_again: bool, folds: bool) -> None:
    torch.manual_seed(0)
    block, x = OddBlock(shift, is_read_again), torch.randn(1, 9, 16)
    up, down = find_sites(block, "b", ["b.up", "b.down"], lambda: block(x))
    assert (up.fold is not None) == folds
    assert down.fold is None and "b.down" in down.refusal
    if not folds:
        assert "b.up" in up.refusal


class GatedNorm(nn.LayerNorm):
    """A norm that also takes what its output is multiplied by."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * torch.sigmoid(gate)


@pytest.mark.parametrize("by_name", [True, False])
@torch.no_grad()
def test_a_norm_that_reads_more_than_one_tensor_takes_no_scale(by_name: bool) -> None:
    block = nn.Module()
    block.norm, block.up = GatedNorm(8), nn.Linear(8, 8)
    x = torch.randn(4, 8)

    def run() -> Tensor:
        made: Tensor = block.up(block.norm(x, gate=x) if by_name else block.norm(x, x))
        return made

    (site,) = find_sites(block, "b", ["b.up"], run)
    assert site.fold is None and "nothing before b.up" in site.refusal


def test_the_smallest_module_around_layers() -> None:
    assert enclosing(["a.b.c"]) == "a.b.c"
    assert enclosing(["a.b.c", "a.b.d"]) == "a.b"
    assert enclosing(["a.b.c", "a.bc.d"]) == "a"
