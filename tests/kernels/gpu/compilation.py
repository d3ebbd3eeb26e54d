"""Compile, without a GPU, exactly what the launching code would launch on one; and look at the machine code.

Run as ``python -m tests.kernels.gpu.compilation 90 CASE...`` in a process of its own: where Triton interprets, it does
not compile. Prints one JSON object a case.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitwright.kernels.gpu import library
from tests.kernels.gpu.cases import CASES, fitting
from tests.kernels.gpu.compilation_facts import GENERATIONS

__all__ = ["Recorder", "compile_launch", "facts_of", "record"]

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int8: "i8",
    torch.uint8: "u8", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


class Recorder:
    """Stands for a module of programs; ``launches`` keeps what would have been launched."""

    def __init__(self, module: Any, launches: list[Any]) -> None:
        self.module, self.launches = module, launches

    def __getattr__(self, name: str) -> Any:
        function, launches = getattr(self.module, name), self.launches
        launcher = SimpleNamespace()

        class Launcher:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *args, **kwargs: launches.append((function, grid, args, kwargs))

        launcher = Launcher()
        return launcher


def facts_of(capability: tuple[int, int]) -> library.GpuFacts:
    """Plausible facts of a GPU that is not here."""

    return GENERATIONS[capability[0] * 10 + capability[1]]


def record(capability: tuple[int, int], work: Any) -> list[Any]:
    """What ``work()`` would launch on such a GPU."""
    launches: list[Any] = []
    program, describe = library.program, library.describe
    library.program = lambda name: Recorder(program(name), launches)  # type: ignore[assignment]
    library.describe = lambda _device: facts_of(capability)
    try:
        work()
    finally:
        library.program, library.describe = program, describe
    return launches


def compile_launch(launch: Any, capability: tuple[int, int]) -> dict[str, Any]:
    """Compile one launch; sizes of its machine code, and counts of its instructions."""
    function, grid, args, kwargs = launch
    names = [parameter.name for parameter in function.params]
    values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    options = {name: value for name, value in kwargs.items() if name not in names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(function.params):
        value = values[parameter.name]
        is_special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_special and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if is_special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options=options)
    return {
        "program": function.__name__,
        "grid": list(grid),
        "shared": compiled.metadata.shared,
        **_look(compiled, target.arch),
    }


def _look(compiled: Any, target: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        listing = "" if target < 75 else _tool("cuobjdump", "-sass", str(path))  # it cannot read Volta's code any more
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\S+ )?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE))
    return {"registers": int(found[1]), "stack": int(found[2]), "opcodes": dict(opcodes.most_common())}


def _tool(name: str, *arguments: str) -> str:
    result = subprocess.run([str(BINARIES / name), *arguments], capture_output=True, text=True, check=True)
    return result.stdout


def main() -> None:
    capability = (int(sys.argv[1]) // 10, int(sys.argv[1]) % 10)
    for name in sys.argv[2:] or fitting(int(sys.argv[1])):
        for launch in record(capability, CASES[name]):
            facts = compile_launch(launch, capability)
            sys.stdout.write(json.dumps({"case": name, **facts}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
