"""The compiled module: integer addresses in, checked sizes, no conversion. See csrc/kernels.h."""

class Weight:
    def __init__(
        self,
        rows: int,
        columns: int,
        slots: int,
        group: int,
        bits: int,
        center: int,
        scale_dtype: int,
        codes: int,
        scale: int,
        zero: int,
        remainder: int,
        order: int,
        levels: int,
        /,
    ) -> None: ...

def linear(
    weight: Weight, x: int, dtype: int, tokens: int, bias: int, activation_bits: int, y: int, threads: int, /
) -> bool: ...
def pack_codes(
    codes: int, rows: int, columns: int, slots: int, bits: int, order: int, packed: int, threads: int, /
) -> None: ...
def unpack_codes(
    packed: int, rows: int, columns: int, slots: int, bits: int, order: int, codes: int, threads: int, /
) -> None: ...
def codes_bytes(rows: int, slots: int, bits: int, /) -> int: ...
def supported_isas() -> list[str]: ...
def select_isa(name: str, /) -> bool: ...
def selected_isa() -> str: ...
def read_memory(memory: int, bytes: int, threads: int, /) -> int: ...
def multiply(route: int, rounds: int, threads: int, /) -> int: ...
def rms_norm(
    x: int,
    residual: int,
    weight: int,
    sum: int,
    y: int,
    tokens: int,
    columns: int,
    dtype: int,
    epsilon: float,
    threads: int,
    /,
) -> None: ...
def silu_multiply(gate: int, up: int, dtype: int, count: int, y: int, threads: int, /) -> None: ...
def rotate(
    x: int,
    dtype: int,
    tokens: int,
    heads: int,
    dimension: int,
    cosine: int,
    sine: int,
    positions: int,
    position_count: int,
    threads: int,
    /,
) -> None: ...
