"""The short names of schemes: ``w4g128``, ``nf4g64-dq``, ``w8a8``, ``A16W4``. ``parse`` reads them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from bitwright.core.errors import ArgumentError
from bitwright.core.scheme import CODEBOOK_BITS, DTYPE_TAGS, DYNAMIC_FP8, DYNAMIC_INT8, LayerScheme, QuantScheme

__all__ = ["DOUBLE_QUANT_PRESETS", "DYNAMIC_INT8", "NAMED_SCHEMES", "parse"]

# Double quantization: "bnb" as bitsandbytes nests NF4, "ggml" as GGML's 4-bit K-quants.
DOUBLE_QUANT_PRESETS: dict[str, QuantScheme] = {
    "bnb": QuantScheme(code="uint", bits=8, group=256, symmetric=False, scale_dtype=torch.float32),
    "ggml": QuantScheme(code="int", bits=6, group=8, scale_dtype=torch.float16),
}

# Instant quantization (asymmetric, float zero point, one scale per output channel), and the usual integer pairs.
NAMED_SCHEMES: dict[str, LayerScheme] = {
    "a16w8": LayerScheme(
        weight=QuantScheme(code="int", bits=8, group=None, symmetric=False, zero="float", scale_dtype=torch.float32)
    ),
    "a16w4": LayerScheme(
        weight=QuantScheme(code="uint", bits=4, group=None, symmetric=False, zero="float", scale_dtype=torch.float32)
    ),
    "a8w8": LayerScheme(
        weight=QuantScheme(code="int", bits=8, group=None, symmetric=False, zero="float", scale_dtype=torch.float32),
        activation=DYNAMIC_INT8,
    ),
    "a8w4": LayerScheme(
        weight=QuantScheme(code="uint", bits=4, group=None, symmetric=False, zero="float", scale_dtype=torch.float32),
        activation=DYNAMIC_INT8,
    ),
    "w8a8": LayerScheme(weight=QuantScheme(bits=8, group=None, scale_dtype=torch.float32), activation=DYNAMIC_INT8),
    "w4a8": LayerScheme(weight=QuantScheme(bits=4, group=None, scale_dtype=torch.float32), activation=DYNAMIC_INT8),
}

HEAD = re.compile(
    r"(?:w(?P<bits>[0-9]{1,18})|(?P<table>nf4|fp4e2m1|fp4bnb|fp4|fp8e4m3|fp8))(?:g(?P<group>[0-9]{1,18}))?"
)
INSTANT_GROUP = re.compile(r"(?P<base>a16w[48])g(?P<group>[0-9]{1,18})")
DOUBLE_QUANT = re.compile(r"-dq(?:\((?P<nested>[^()]*)\))?(?=-|$)")
TABLE_CODES = {code.replace("_", ""): code for code in CODEBOOK_BITS} | {"fp4": "fp4_bnb", "fp8": "fp8_e4m3"}
TAG_FIELDS: dict[str, dict[str, Any]] = {
    "asym": {"code": "uint", "symmetric": False},
    "sym": {"symmetric": True},
    "signed": {"code": "int"},  # after asym, whose code it replaces
    "fz": {"zero": "float"},
    "axis0": {"axis": 0},
    **{tag: {"scale_dtype": dtype} for dtype, tag in DTYPE_TAGS.items()},
}
ACTIVATION = re.compile(r"afp8|a8(?:g(?P<group>[0-9]{1,18}))?")
EXAMPLES = (
    "w4g128, w4g128-asym, w8, w3g32, nf4g64, nf4g64-dq, fp4g32, fp8, w8a8, w4a8, w4g32-a8g32, A16W8, A16W4, A8W8, A8W4"
)


def parse(text: str) -> LayerScheme:
    """Read the name of a scheme; the inverse of ``LayerScheme.name`` and, for weights, of ``QuantScheme.name``.

    Grammar: ``w<bits>`` or ``nf4|fp4|fp4e2m1|fp8``, then ``g<group>``, then any of ``-asym``, ``-signed`` (asymmetric
    codes centred on zero), ``-fz`` (float zero point), ``-axis0``, ``-sbf16``/``-sf32`` (dtype of the scales, float16
    unless said), ``-dq`` or ``-dq(<scheme>)`` (double quantization), ``-a8`` (8-bit activations, one scale a token),
    ``-a8g<group>`` (one for each group of a token's input features) or ``-afp8`` (e4m3 ones), in any order. Or one of
    ``NAMED_SCHEMES``. Case does not matter.

    Raises:
        ArgumentError: BW202, quoting the part that was not understood.
    """
    if not isinstance(text, str):
        raise ArgumentError("BW202", f"a scheme is a name, not {text!r}", suggestion=f"for example {EXAMPLES}")
    name = text.strip().lower()
    if name in NAMED_SCHEMES:
        return NAMED_SCHEMES[name]
    instant = INSTANT_GROUP.fullmatch(name)
    if instant is not None:
        base = NAMED_SCHEMES[instant["base"]].weight.name.replace("-", f"g{instant['group']}-", 1)
        return parse(base)
    nested, name = _double_quant(name, text)
    head, *tags = name.split("-")
    match = HEAD.fullmatch(head)
    if match is None:
        raise ArgumentError("BW202", f"cannot read {head!r} in scheme {text!r}", suggestion=f"for example {EXAMPLES}")
    fields: dict[str, Any] = {"scale_scheme": nested}
    if match["table"]:
        fields |= {"code": TABLE_CODES[match["table"]], "bits": CODEBOOK_BITS[TABLE_CODES[match["table"]]]}
    else:
        fields["bits"] = int(match["bits"])
    fields["group"] = int(match["group"]) if match["group"] else None
    _check_tags(tags, text, is_table=bool(match["table"]))
    for tag, values in TAG_FIELDS.items():
        fields |= values if tag in tags else {}
    return LayerScheme(weight=QuantScheme(**fields), activation=_activation(tags))


def _activation(tags: list[str]) -> QuantScheme | None:
    match = next((found for found in map(ACTIVATION.fullmatch, tags) if found is not None), None)
    if match is None:
        return None
    if match.group() == "afp8":
        return DYNAMIC_FP8
    return DYNAMIC_INT8 if match["group"] is None else replace(DYNAMIC_INT8, group=int(match["group"]))


def _check_tags(tags: list[str], text: str, *, is_table: bool) -> None:
    activations = {tag for tag in tags if ACTIVATION.fullmatch(tag)}
    for tag in tags:
        if tag not in activations and tag not in TAG_FIELDS:
            known = ", ".join([*TAG_FIELDS, "a8", "a8g32", "afp8", "dq"])
            raise ArgumentError("BW202", f"unknown part {tag!r} in scheme {text!r}", suggestion=f"known: {known}")
    for exclusive in ({"sym", "asym"}, {"sym", "signed"}, set(DTYPE_TAGS.values()), activations):
        if len(exclusive) > 1 and exclusive <= set(tags):
            what = f"{' and '.join(sorted(exclusive))} contradict each other in scheme {text!r}"
            raise ArgumentError("BW202", what, suggestion=f"keep one of {', '.join(sorted(exclusive))}")
    if is_table and not {"asym", "signed"}.isdisjoint(tags):
        what = f"a table of levels is neither asym nor signed: scheme {text!r}"
        raise ArgumentError("BW202", what, suggestion="drop -asym and -signed, or take a scheme of whole numbers: w4")


def _double_quant(name: str, text: str) -> tuple[QuantScheme | None, str]:
    """Take ``-dq`` or ``-dq(...)`` out of a name."""
    match = DOUBLE_QUANT.search(name)
    if match is None:
        return None, name
    inner, name = match["nested"] or "bnb", name[: match.start()] + name[match.end() :]
    if inner in DOUBLE_QUANT_PRESETS:
        return DOUBLE_QUANT_PRESETS[inner], name
    layer = parse(inner)
    if layer.activation is not None:
        what = f"scales have no activations: {inner!r} in scheme {text!r}"
        raise ArgumentError("BW202", what, suggestion="put -a8 outside the parentheses of -dq(...)")
    return layer.weight, name
