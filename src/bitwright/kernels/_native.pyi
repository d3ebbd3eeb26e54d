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
    weight: Weight,
    x: int,
    dtype: int,
    tokens: int,
    bias: int,
    activation_bits: int,
    activation_group: int,
    y: int,
    threads: int,
    /,
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
def norm_linear(
    x: int,
    residual: int,
    norm_weight: int,
    sum: int,
    epsilon: float,
    weight: Weight,
    tokens: int,
    bias: int,
    activation_bits: int,
    activation_group: int,
    y: int,
    threads: int,
    /,
) -> bool: ...
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

class Pages:
    def __init__(
        self,
        count: int,
        page: int,
        heads: int,
        dimension: int,
        key_code: int,
        value_code: int,
        key_rotated: int,
        value_rotated: int,
        keys: int,
        values: int,
        key_scale: int,
        value_scale: int,
        /,
    ) -> None: ...

class Batch:
    def __init__(
        self, tokens: int, sequences: int, most_pages: int, positions: int, starts: int, lengths: int, pages: int, /
    ) -> None: ...

class Dense:
    def __init__(
        self, weight: Weight, bias: int, input_scale: int, activation_bits: int, activation_group: int, /
    ) -> None: ...

class Layer:
    def __init__(
        self,
        attention_norm: int,
        mlp_norm: int,
        query_norm: int,
        key_norm: int,
        query: Dense,
        key: Dense,
        value: Dense,
        output: Dense,
        gate: Dense,
        up: Dense,
        down: Dense,
        window: int,
        /,
    ) -> None: ...

class Decoder:
    def __init__(self, layers: list[Layer], head: Dense, /) -> None: ...
    def set_sizes(
        self,
        hidden: int,
        intermediate: int,
        heads: int,
        kv_heads: int,
        dimension: int,
        vocabulary: int,
        epsilon: float,
        score_scale: float,
        are_halves: bool,
        /,
    ) -> None: ...
    def set_ends(self, embedding: Weight | None, rows: int, dtype: int, final_norm: int, /) -> None: ...
    def step(
        self,
        batch: Batch,
        ids: int,
        outputs: int,
        output_count: int,
        cosine: int,
        sine: int,
        position_count: int,
        pages: list[Pages],
        logits: int,
        threads: int,
        /,
    ) -> None: ...

def write_pages(pages: Pages, batch: Batch, keys: int, values: int, threads: int, /) -> None: ...
def attend(
    pages: Pages, batch: Batch, queries: int, heads: int, scale: float, window: int, output: int, threads: int, /
) -> None: ...
def pack_floats(
    numbers: int, dtype: int, rows: int, columns: int, slots: int, bits: int, packed: int, threads: int, /
) -> None: ...
def look_up(weight: Weight, ids: int, count: int, y: int, threads: int, /) -> None: ...
def sample(
    logits: int, count: int, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float, /
) -> int: ...
def find_ranges(
    numbers: int, dtype: int, rows: int, columns: int, group: int, low: int, high: int, threads: int, /
) -> bool: ...
def encode(
    numbers: int,
    dtype: int,
    rows: int,
    columns: int,
    group: int,
    scale: int,
    zero: int,
    offset: int,
    has_whole_zeros: bool,
    lowest: int,
    highest: int,
    codes: int,
    decoded: int,
    threads: int,
    /,
) -> None: ...
def step_offsets(
    numbers: int,
    dtype: int,
    rows: int,
    columns: int,
    group: int,
    scale: int,
    zero: int,
    offset: int,
    lowest: int,
    highest: int,
    gradient: int,
    step: float,
    by_scale: int,
    by_zero: int,
    threads: int,
    /,
) -> None: ...

SCALED_ROWS: int

def scale_weight(
    weight: int, dtype: int, rows: int, columns: int, scale: int, divisor: int, scaled: int, threads: int, /
) -> None: ...
def scaling_gradient(
    weight: int,
    dtype: int,
    rows: int,
    columns: int,
    group: int,
    range: int,
    scale: int,
    divisor: int,
    rounded: int,
    gradient: int,
    by_scale: int,
    by_divisor: int,
    threads: int,
    /,
) -> None: ...
def decode(
    codes: int,
    rows: int,
    columns: int,
    group: int,
    scale: int,
    zero: int,
    lowest: int,
    dtype: int,
    decoded: int,
    threads: int,
    /,
) -> None: ...
