"""Decoding and prefill of whole models beside the floor and the peers, in one run: ratios, because bandwidth moves.

    python -m benchmarks.decode_peers.setup --work-dir PEERS
    python -m benchmarks.decode --work-dir WORK --peers-dir PEERS --json benchmarks/results/decode.json

Checkpoints of random weights are made in WORK, once, and written for every engine from the same numbers. Engines run as
processes of their own and take turns, so that all see the same machine; figures are medians of the rounds. The floor
is a program that does the same matrix-vector products over as many bytes, and nothing else (floor.cpp). A peer that is
not there, or fails, is a row with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.command import told_command
from benchmarks.shapes import SHAPES, Shape, make_checkpoint

HERE = Path(__file__).resolve().parent
DRIVERS = HERE / "decode_peers"
BATCHES = (1, 4, 16)
PROMPT = 512
STEPS = {1: 24, 4: 12, 16: 8}
TURNS = 200_000  # of a word between two cores: where they lie changes what they share
# Our scheme: that of llama.cpp and OpenVINO, and the floor's. "a8": activations of 8 bits, as all of those round them.
SCHEMES = {
    "w4g32-a8": ("q4_0", "int4", "w4g32"),
    "w4g32-a8g32": ("q4_0", "int4", "w4g32"),  # a scale for 32 numbers of a token, as llama.cpp has
    "w4g32": ("q4_0", "int4", "w4g32"),
    "w4g128-a8": ("q4_0", "int4", "w4g128"),
    "w8a8": ("q8_0", "int8", "w8"),
    "w8": ("q8_0", "int8", "w8"),
}
PEERS = ("llama-cpp", "openvino", "onnxruntime-genai", "transformers")
HEADS = {scheme: "w8a8" if "a8" in scheme else "w8" for scheme in SCHEMES}


@dataclass(kw_only=True)
class Engine:
    """A process that answers lines with seconds, and what it has answered: ``{line: [seconds]}``.

    It is stopped while it has nothing to answer: some engines' threads spin then, and would take the others' cores.
    """

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)
    memory: tuple[float, ...] = ()  # GiB: the peak, and at the end resident, proportional, private
    problem: str = ""
    process: subprocess.Popen[str] | None = None
    says_ready: bool = True

    def open(self) -> None:
        pipe, settings = subprocess.PIPE, {**os.environ, **self.environment}
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=settings)
        if self.says_ready:
            self.starts.append(float((self._read() or "ready 0").split()[1]))
        else:
            self.process.send_signal(signal.SIGSTOP)

    def ask(self, line: str) -> str:
        if self.process is None or self.problem:
            return ""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._read()

    def _read(self) -> str:
        assert self.process is not None and self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer:
            assert self.process.stderr is not None
            self.process.stdin.close() if self.process.stdin else None
            self.problem = (self.process.stderr.read().strip().splitlines() or ["it ended without a word"])[-1]
        else:
            self.process.send_signal(signal.SIGSTOP)
        return answer

    def measure(self, line: str) -> None:
        answer = self.ask(line)
        if answer:
            self.seconds.setdefault(line, []).append(float(answer.split()[0]))

    def close(self) -> None:
        if self.process is not None:
            if self.says_ready:
                self.memory = tuple(int(size) / (1 << 30) for size in self.ask("memory").split())
            self.process.kill()
            self.process.wait()
            self.process = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine on one model: tokens a second (totals over the batch), seconds, GiB.

    ``start_seconds``: from the start of the process to the first token, with the files in the system's cache.
    ``held_gib``: what the process holds at the end, of shared pages its share; ``private_gib``: what it alone holds.
    """

    shape: str
    scheme: str
    threads: int
    engine: str
    decode: dict[int, float]
    prefill: float
    share_of_floor: float
    start_seconds: float
    peak_gib: float
    held_gib: float
    private_gib: float
    rounds: int
    problem: str


def floor_command(program: Path, shape: Shape, scheme: str, threads: int) -> list[str]:
    sizes = [str(size) for layer in shape.layers().values() for size in layer]
    numbers = (threads, shape.vocabulary, shape.hidden, shape.blocks)
    return [str(program), *map(str, numbers), SCHEMES[scheme][2], *sizes]


def build_floor(work: Path) -> Path:
    program = work / "floor"
    source = HERE / "floor.cpp"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        command = ["g++", "-std=c++20", "-O3", "-march=native", str(source), "-o", str(program), "-pthread"]
        subprocess.run(command, check=True)
    return program


def prepare(work: Path, peers: Path | None, wanted: list[str], name: str, scheme: str) -> dict[str, Path]:
    """The model for each engine; what cannot be made is not there."""
    source = work / name
    if not source.exists():
        make_checkpoint(source, SHAPES[name])
    files = {"transformers": source, "bitwright": work / f"{name}-{scheme}"}
    if not files["bitwright"].exists():
        command = [sys.executable, "-m", "bitwright", "quantize", str(source), "-o", str(files["bitwright"])]
        command += ["--scheme", scheme, "--algorithm", "rtn", "--no-check"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    gguf, openvino, _ = SCHEMES[scheme]
    made = (("llama-cpp", "gguf", gguf), ("openvino", "openvino", openvino), ("onnxruntime-genai", "onnx", openvino))
    for engine, writer_name, kind in made:
        target = work / f"{name}-{kind}.{writer_name}" if engine != "openvino" else work / f"{name}-{kind}"
        python = None if peers is None else peers / engine / "bin" / "python"
        writer = DRIVERS / f"{writer_name}_writer.py"
        if engine in wanted and not target.exists() and python is not None and python.exists():
            subprocess.run([str(python), str(writer), str(source), str(target), kind], check=False)
        files[engine] = target
    return files


def engines(args: argparse.Namespace, name: str, scheme: str, threads: int) -> list[Engine]:
    files = prepare(args.work_dir, args.peers_dir, args.peers, name, scheme)
    path = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    settings = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}  # how they wait for each other is theirs to choose
    ours = [sys.executable, str(DRIVERS / "bitwright_driver.py"), str(files["bitwright"]), str(threads), HEADS[scheme]]
    kept = [*ours, "--kept", str(args.work_dir / "kept")]
    found = [
        Engine(name="bitwright", command=ours, environment=settings),
        Engine(name="bitwright, packed before", command=kept, environment=settings),
    ]
    start_again(found[1], 1)  # so that it is
    found[1].starts.clear()
    for peer in args.peers:
        own = peer == "transformers"
        python = sys.executable if own else str(args.peers_dir / peer / "bin" / "python")
        driver = DRIVERS / f"{peer.replace('-', '_')}_driver.py"
        engine = Engine(name=peer, command=[python, str(driver), str(files[peer]), str(threads)], environment=settings)
        if not Path(python).exists() or not files[peer].exists():
            engine.problem = "not installed, or its model could not be made"
        found.append(engine)
    return found


def start_again(engine: Engine, times: int) -> None:
    """Start and end it so many times."""
    for _ in range(times):
        if not engine.problem:
            engine.open()
            engine.close()


def measure(args: argparse.Namespace, name: str, scheme: str, threads: int) -> list[Row]:
    command = floor_command(build_floor(args.work_dir), SHAPES[name], scheme, threads)
    floor = Engine(name="floor", command=command, says_ready=False)
    members = engines(args, name, scheme, threads)
    for engine in members:
        start_again(engine, args.starts - 1)
    for engine in (floor, *members):
        if not engine.problem:
            engine.open()
    for _ in range(args.rounds):
        floor.measure(f"tokens {STEPS[1]}")
        floor.measure("read 8")
        floor.measure(f"turns {TURNS}")
        for engine in members:
            for batch in BATCHES:
                engine.measure(f"decode {batch} {STEPS[batch]}")
        for engine in members:
            engine.measure(f"prefill {PROMPT}")
    size = float(floor.ask("read 1").split()[1])
    for engine in (floor, *members):
        engine.close()
    floor_rate = STEPS[1] / statistics.median(floor.seconds[f"tokens {STEPS[1]}"])
    read = 8 * size / statistics.median(floor.seconds["read 8"]) / 1e9
    apart = statistics.median(floor.seconds[f"turns {TURNS}"]) / (2 * TURNS) * 1e9
    told = f"floor ({size / 1e6:.0f} MB a token; read {read:.1f} GB/s; cores {apart:.0f} ns apart)"
    rows = [
        Row(
            shape=name, scheme=scheme, threads=threads, engine=told, decode={1: floor_rate}, prefill=0.0,
            share_of_floor=1.0, start_seconds=0.0, peak_gib=0.0, held_gib=0.0, private_gib=0.0, rounds=args.rounds,
            problem="",
        )
    ]  # fmt: skip
    return rows + [_row(engine, name, scheme, threads, floor_rate) for engine in members]


def _row(engine: Engine, name: str, scheme: str, threads: int, floor_rate: float) -> Row:
    decode = {}
    for batch in BATCHES:
        seconds = engine.seconds.get(f"decode {batch} {STEPS[batch]}")
        if seconds:
            decode[batch] = batch * STEPS[batch] / statistics.median(seconds)
    prefill = engine.seconds.get(f"prefill {PROMPT}")
    peak, _, held, private = engine.memory if len(engine.memory) == 4 else (0.0, 0.0, 0.0, 0.0)
    return Row(
        shape=name, scheme=scheme, threads=threads, engine=engine.name, decode=decode,
        prefill=PROMPT / statistics.median(prefill) if prefill else 0.0,
        share_of_floor=decode.get(1, 0.0) / floor_rate, start_seconds=statistics.median(engine.starts or [0.0]),
        peak_gib=peak, held_gib=held, private_gib=private,
        rounds=len(prefill or ()), problem=engine.problem,
    )  # fmt: skip


def render(rows: list[Row]) -> str:
    heads = ["shape", "scheme", "threads", "engine", "decode 1", "of floor", "4", "16", "prefill 512", "start s"]
    heads += ["peak GiB", "held", "private"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"{row.decode[batch]:.1f}" if batch in row.decode else "-" for batch in BATCHES]
        name = f"{row.engine}: {row.problem}" if row.problem else row.engine
        lines.append(
            f"| {row.shape} | {row.scheme} | {row.threads} | {name} | {cells[0]} | {row.share_of_floor:.0%} "
            f"| {cells[1]} | {cells[2]} | {row.prefill:.0f} | {row.start_seconds:.1f} | {row.peak_gib:.2f} "
            f"| {row.held_gib:.2f} | {row.private_gib:.2f} |"
        )
    return "\n".join(lines)


def remember(file: Path, rows: list[Row]) -> None:
    """Add a run to the record, in the place of an earlier one of the same model, threads and engines."""
    run = {
        "command": told_command("benchmarks.decode"),
        "processor": platform.processor() or platform.machine(),
        "load_average": os.getloadavg()[0],
        "rows": [asdict(row) for row in rows],
    }
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else []
    others = [each for each in runs if _what(each) != _what(run)]
    file.write_text(json.dumps({"runs": [*others, run]}, indent=1) + "\n", encoding="utf-8")


def _what(run: dict[str, Any]) -> list[Any]:
    first = run["rows"][0]
    return [first["shape"], first["scheme"], first["threads"], [row["engine"] for row in run["rows"][1:]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--peers-dir", type=Path)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--threads", nargs="*", type=int, default=[2, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3, help="of each engine, of which the median counts")
    parser.add_argument("--json", type=Path, help="a record that every run is added to")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for name in args.shapes:
        for scheme in args.schemes:
            for threads in args.threads:
                rows = measure(args, name, scheme, threads)
                print(render(rows), flush=True)
                if args.json:
                    remember(args.json, rows)


if __name__ == "__main__":
    main()
