"""How the keys and values of attention are stored while a model generates: the records, their names, their bytes.

Keys are those after the rotary embedding. A code is written once, when its token is appended, from numbers of that
token alone (``token_head``), from calibration (``static_*``), or from a finished group of tokens (``channel``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bitwright.core.errors import ArgumentError

__all__ = ["FLOAT", "NAMED_KV", "KVCode", "KVScheme", "code_bytes", "float_tokens", "kv_bytes", "parse_kv"]

Kind = Literal["float", "int", "fp8"]
Grain = Literal["token_head", "static_layer", "static_head", "channel"]
KINDS = ("float", "int", "fp8")
GRAINS = ("token_head", "static_layer", "static_head", "channel")
INT_BITS = (8, 4, 2)
PARAMETER_BYTES = 4  # scales and offsets are float32


def _check(name: str, value: object, is_valid: bool, accepted: str) -> None:
    if not is_valid:
        raise ArgumentError("BW202", f"cache scheme field {name} is {value!r}", suggestion=f"accepted: {accepted}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCode:
    """How keys, or values, are stored.

    Attributes:
        bits: 16 (as computed), 8, 4 or 2.
        kind: ``float`` (bits 16), ``int`` (unsigned codes, of static grains signed ones), ``fp8`` (e4m3, bits 8).
        grain: who shares a scale: ``token_head``: the numbers of one token and head; ``static_layer``,
            ``static_head``: all tokens, by calibration; ``channel``: one channel of ``group`` consecutive tokens.
        symmetric: no offset is stored.
        rotated: an orthonormal Hadamard matrix is applied along the head before coding (see ``kv_codes``).
        group: of ``channel``: how many tokens; of ``token_head``: how many channels, 0 for the whole head.

    Raises:
        ArgumentError: BW202, naming the field, its value and what is accepted.

    Example:
        >>> KVCode(bits=4, rotated=True).name
        'int4-rotated'
    """

    bits: int = 16
    kind: Kind = "int"
    grain: Grain = "token_head"
    symmetric: bool = False
    rotated: bool = False
    group: int = 0

    def __post_init__(self) -> None:
        _check("kind", self.kind, self.kind in KINDS, ", ".join(KINDS))
        _check("grain", self.grain, self.grain in GRAINS, ", ".join(GRAINS))
        _check("symmetric", self.symmetric, type(self.symmetric) is bool, "True or False")
        _check("rotated", self.rotated, type(self.rotated) is bool, "True or False")
        widths = {"float": (16,), "fp8": (8,), "int": INT_BITS}[self.kind]
        is_width = type(self.bits) is int and self.bits in widths
        _check("bits", self.bits, is_width, f"{' or '.join(map(str, widths))} for {self.kind}")
        is_group = type(self.group) is int and 0 <= self.group <= 1 << 16
        _check("group", self.group, is_group, "a whole number, 0 or more")
        if self.kind == "float":
            plain = (self.grain, self.symmetric, self.rotated, self.group) == ("token_head", False, False, 0)
            _check("kind", self.kind, plain, "no grain, symmetry, rotation or group beside it")
        if self.kind == "fp8":
            _check("symmetric", self.symmetric, self.symmetric, "True for fp8")
        if self.is_static:
            _check("bits", self.bits, self.bits == 8, "8 with a calibrated scale; fewer need one of each token")
            _check("rotated", self.rotated, not self.rotated, "False: calibration measures what is not rotated")
            _check("group", self.group, self.group == 0, "0 with a calibrated scale")
        if self.grain == "channel":
            _check("group", self.group, self.group >= 1, "how many tokens share a scale, at least 1")

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_static(self) -> bool:
        """Whether the scale comes from calibration."""
        return self.grain in ("static_layer", "static_head")

    @property
    def code_max(self) -> int:
        return (1 << self.bits) - 1

    @property
    def name(self) -> str:
        """For instance ``int4-rotated``, ``int8-static-head-sym``, ``int2-channel32``; ``float``."""
        if self.is_float:
            return "float"
        parts = ["fp8" if self.kind == "fp8" else f"int{self.bits}"]
        parts += ["static"] if self.is_static else []
        parts += ["head"] if self.grain == "static_head" else []
        parts += ["sym"] if self.symmetric and self.kind == "int" else []
        if self.group:
            parts.append(f"{'channel' if self.grain == 'channel' else 'g'}{self.group}")
        parts += ["rotated"] if self.rotated else []
        return "-".join(parts)


FLOAT = KVCode(bits=16, kind="float")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVScheme:
    """How a model's cache of keys and values is stored.

    Attributes:
        key, value: of every layer.
        window: so many of the newest tokens stay float (with groups of tokens, up to a group more).
        sinks: so many of the first tokens stay float for ever.
        overrides: other schemes for single layers (number -> scheme); those have no overrides of their own.

    Raises:
        ArgumentError: BW202, naming the field, its value and what is accepted.

    Example:
        >>> parse_kv("k8v4").key.bits
        8
    """

    key: KVCode = FLOAT
    value: KVCode = FLOAT
    window: int = 0
    sinks: int = 0
    overrides: Mapping[int, KVScheme] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, code in (("key", self.key), ("value", self.value)):
            _check(name, code, isinstance(code, KVCode), "a KVCode")
        for name, count in (("window", self.window), ("sinks", self.sinks)):
            _check(name, count, type(count) is int and 0 <= count < 1 << 31, "a whole number, 0 or more")
        if self.key.is_float and self.value.is_float:
            _check("window", self.window, self.window == self.sinks == 0, "0, where all tokens are float")
        for layer, scheme in self.overrides.items():
            _check("overrides", layer, type(layer) is int and layer >= 0, "numbers of layers")
            is_plain = isinstance(scheme, KVScheme) and not scheme.overrides
            _check("overrides", scheme, is_plain, "schemes without overrides of their own")

    def __hash__(self) -> int:
        return hash((self.key, self.value, self.window, self.sinks, tuple(sorted(self.overrides))))

    def at(self, layer: int) -> KVScheme:
        """The scheme of one layer, without overrides."""
        return self.overrides.get(layer) or (replace(self, overrides={}) if self.overrides else self)

    @property
    def is_float(self) -> bool:
        """Whether nothing is coded in any layer."""
        own = self.key.is_float and self.value.is_float
        return own and all(scheme.is_float for scheme in self.overrides.values())

    @property
    def is_static(self) -> bool:
        """Whether some layer needs calibrated parameters."""
        return any(each.key.is_static or each.value.is_static for each in (self, *self.overrides.values()))

    @property
    def step(self) -> int:
        """How many tokens are coded at a time: whole groups of per-channel codes, of keys and of values, else 1."""
        return math.lcm(*(code.group for code in (self.key, self.value) if code.grain == "channel"))

    @property
    def name(self) -> str:
        """The short name that :func:`parse_kv` reads back to an equal scheme."""
        own = replace(self, overrides={})
        name = next((known for known, scheme in NAMED_KV.items() if scheme == own), None) or _compose(own)
        return "/".join([name, *(f"{layer}:{self.overrides[layer].name}" for layer in sorted(self.overrides))])


def _compose(scheme: KVScheme) -> str:
    both = f"k({scheme.key.name})v({scheme.value.name})"
    name = scheme.key.name if scheme.key == scheme.value else both
    name = "none" if name == "float" else name
    name += f"-w{scheme.window}" if scheme.window else ""
    return name + (f"-s{scheme.sinks}" if scheme.sinks else "")


def _pair(key: KVCode, value: KVCode | None = None, **rest: Any) -> KVScheme:
    return KVScheme(key=key, value=value or key, **rest)


# The schemes with names of their own; the first name of equal ones is the one that is told.
NAMED_KV: dict[str, KVScheme] = {
    "none": KVScheme(),
    "int8": _pair(KVCode(bits=8)),
    "int4": _pair(KVCode(bits=4)),
    "int8-rotated": _pair(KVCode(bits=8, rotated=True)),
    "int4-rotated": _pair(KVCode(bits=4, rotated=True)),
    "int8-static": _pair(KVCode(bits=8, grain="static_layer")),
    "int8-static-sym": _pair(KVCode(bits=8, grain="static_layer", symmetric=True)),
    "int8-static-head": _pair(KVCode(bits=8, grain="static_head")),
    "int8-static-head-sym": _pair(KVCode(bits=8, grain="static_head", symmetric=True)),
    # KIVI (Liu et al. 2024), section 4: keys per channel, values per token, groups of 32, the newest 128 in float.
    "int2": _pair(KVCode(bits=2, grain="channel", group=32), KVCode(bits=2, group=32), window=128, sinks=4),
    "k8v4": _pair(KVCode(bits=8), KVCode(bits=4)),
    "k8v4-rotated": _pair(KVCode(bits=8, rotated=True), KVCode(bits=4, rotated=True)),
    "fp8": _pair(KVCode(bits=8, kind="fp8", symmetric=True)),
    "fp8-static": _pair(KVCode(bits=8, kind="fp8", grain="static_layer", symmetric=True)),
}
ALIASES = {"0": "none", "float": "none", "bf16": "none", "fp16": "none", "8": "int8", "4": "int4", "2": "int2"}
CODE_NAME = re.compile(
    r"(?:int(?P<bits>[0-9]{1,3})|(?P<fp8>fp8)|(?P<float>float))"
    r"(?P<static>-static)?(?P<head>-head)?(?P<symmetric>-sym)?"
    r"(?:-channel(?P<channel>[0-9]{1,5})|-g(?P<group>[0-9]{1,5}))?(?P<rotated>-rotated)?"
)
SCHEME_NAME = re.compile(
    r"(?:k\((?P<key>[^()]*)\)v\((?P<value>[^()]*)\)|(?P<both>.*?))(?:-w(?P<window>[0-9]{1,9}))?(?:-s(?P<sinks>[0-9]{1,9}))?"
)


def parse_kv(text: str | int) -> KVScheme:
    """Read the name of a scheme; the inverse of ``KVScheme.name``.

    A name is one of ``NAMED_KV``; or a code (``int8|int4|int2|fp8``, then ``-static``, ``-static-head``, ``-sym``,
    ``-channel<tokens>``, ``-g<channels>``, ``-rotated``) for both; or ``k(CODE)v(CODE)``; then ``-w<tokens>`` of the
    window, ``-s<tokens>`` of the sinks; then ``/LAYER:NAME`` for each layer that differs. 0, 8, 4 and 2 are numbers
    of bits (``none``, ``int8``, ...). Case does not matter.

    Raises:
        ArgumentError: BW202, quoting the part that was not understood and naming what there is.

    Example:
        >>> parse_kv("int4-rotated/0:k8v4").at(0).key.bits
        8
    """
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise ArgumentError("BW202", f"a cache scheme is a name, not {text!r}", suggestion=_accepted())
    name, *layers = str(text).strip().lower().split("/")
    scheme = _parse_one(name, str(text))
    overrides: dict[int, KVScheme] = {}
    for part in layers:
        number, colon, other = part.partition(":")
        if not (colon and number.isascii() and number.isdigit() and len(number) < 6) or int(number) in overrides:
            what = f"cannot read {part!r} in cache scheme {str(text)!r}"
            raise ArgumentError("BW202", what, suggestion="LAYER:NAME, each layer once, as in int4-rotated/0:int8")
        overrides[int(number)] = _parse_one(other, str(text))
    return replace(scheme, overrides=overrides) if overrides else scheme


def _parse_one(name: str, text: str) -> KVScheme:
    name = ALIASES.get(name, name)
    if name in NAMED_KV:
        return NAMED_KV[name]
    match = SCHEME_NAME.fullmatch(name)
    assert match is not None  # whatever is left is taken by "both"
    extent: Mapping[str, Any] = {each: int(match[each] or 0) for each in ("window", "sinks")}
    if match["both"] is None:
        return _pair(_parse_code(match["key"], text), _parse_code(match["value"], text), **extent)
    named = NAMED_KV.get(match["both"])
    if named is not None and any(extent.values()):
        given: Mapping[str, Any] = {each: count for each, count in extent.items() if match[each]}
        return replace(named, **given)
    return _pair(_parse_code(match["both"], text), **extent)


def _parse_code(name: str, text: str) -> KVCode:
    match = CODE_NAME.fullmatch(name)
    is_known = match is not None and (match["bits"] is None or int(match["bits"]) in INT_BITS)
    if match is None or not is_known or (match["head"] and not match["static"]):
        raise ArgumentError("BW202", f"there is no cache scheme {text!r}", suggestion=_accepted())
    if match["float"]:
        return FLOAT if name == "float" else KVCode(bits=16, kind="float", symmetric=True)  # the latter is refused
    grain: Grain = "token_head"
    if match["static"]:
        grain = "static_head" if match["head"] else "static_layer"
    elif match["channel"]:
        grain = "channel"
    return KVCode(
        bits=int(match["bits"] or 8),
        kind="fp8" if match["fp8"] else "int",
        grain=grain,
        symmetric=bool(match["symmetric"] or match["fp8"]),
        rotated=bool(match["rotated"]),
        group=int(match["channel"] or match["group"] or 0),
    )


def _accepted() -> str:
    return "one of " + ", ".join(NAMED_KV) + "; or 0, 8, 4, 2 (bits)"


def float_tokens(scheme: KVScheme, tokens: int) -> int:
    """How many of ``tokens`` stay float in a layer of ``scheme``: sinks, window, and what fills no group yet."""
    coded = max(0, tokens - scheme.sinks - scheme.window) // scheme.step * scheme.step
    return tokens - coded


def code_bytes(code: KVCode, *, tokens: int, heads: int, head_dim: int, float_bytes: int = 2) -> int:
    """Bytes of the keys, or the values, of ``tokens`` coded tokens in one layer, with their scales and offsets.

    Example:
        >>> code_bytes(KVCode(bits=4), tokens=128, heads=8, head_dim=128)
        73728
    """
    if code.is_float:
        return tokens * heads * head_dim * float_bytes
    numbers = PARAMETER_BYTES * (1 if code.symmetric else 2)
    codes = tokens * heads * -(-head_dim * code.bits // 8)
    if code.is_static:
        return codes + numbers * (heads if code.grain == "static_head" else 1)
    if code.grain == "channel":
        return codes + numbers * (tokens // code.group) * heads * head_dim
    return codes + numbers * tokens * heads * (-(-head_dim // code.group) if code.group else 1)


def kv_bytes(
    scheme: KVScheme, *, layers: int, kv_heads: int, head_dim: int, tokens: int, batch: int = 1, float_bytes: int = 2
) -> int:
    """Bytes of a whole cache: ``batch`` sequences of ``tokens`` each, in all layers.

    Static parameters are counted once, whatever the batch.

    Example:
        >>> kv_bytes(parse_kv("int8-static"), layers=32, kv_heads=32, head_dim=128, tokens=2048) >> 20
        512
    """
    total = 0
    for layer in range(layers):
        own = scheme.at(layer)
        plain = 0 if own.key.is_float and own.value.is_float else float_tokens(own, tokens)
        for code in (own.key, own.value):
            parameters = code_bytes(code, tokens=0, heads=kv_heads, head_dim=head_dim)
            coded = code_bytes(code, tokens=tokens - plain, heads=kv_heads, head_dim=head_dim, float_bytes=float_bytes)
            total += parameters + batch * (coded - parameters + plain * kv_heads * head_dim * float_bytes)
    return total
