"""Streamed round-to-nearest of a 1.5-billion-parameter checkpoint: peak memory, and time against the floor.

The floor is what cannot be left out: the source read once in large pieces, each weight once through the arithmetic (a
bare loop over tiles in cache that fits, rounds and packs, on the threads of the run), and the same shards of output
bytes written and synchronized. The three are measured apart and added; since a run may read and write while it
computes, the longer of the disk's time and the arithmetic is given as well (``overlapped``). Every figure is of a whole
process; the import of torch and transformers is stated beside it. Resident memory counts the pages of mapped shards
that the system happens to keep; ``peak_anonymous_mb`` is without them, sampled.

    python -m benchmarks.stream --work-dir /some/large/disk --json benchmarks/results/stream.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

from benchmarks.checkpoints import make_checkpoint

CHUNK = 16 << 20


def read_all(directory: Path) -> float:
    """Seconds to read every weight file, from the disk and not from its cache."""
    drop_cache(directory)
    started = time.perf_counter()
    buffer = bytearray(CHUNK)
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def write_like(directory: Path, target: Path) -> float:
    """Seconds to write and synchronize files of the sizes of ``directory``'s shards."""
    target.mkdir()
    sizes = [path.stat().st_size for path in sorted(directory.glob("*.safetensors"))]
    piece = os.urandom(CHUNK)
    started = time.perf_counter()
    for number, size in enumerate(sizes):
        descriptor = os.open(target / str(number), os.O_WRONLY | os.O_CREAT)
        for start in range(0, size, CHUNK):
            os.write(descriptor, piece[: min(CHUNK, size - start)])
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def compute(weights: int, threads: int) -> float:
    """Seconds of bare arithmetic: absolute maximum, division, rounding, packing two codes a byte, tile by tile."""
    torch.set_num_threads(threads)
    tile = torch.randn(2048, 128).to(torch.bfloat16)
    floats, codes = torch.empty(2048, 128), torch.empty(2048, 128, dtype=torch.int8)
    repeats = 200
    started = time.perf_counter()
    for _ in range(repeats):
        floats.copy_(tile)
        scale = floats.abs().amax(1, keepdim=True).div_(7)
        codes.copy_(floats.div_(scale).round_().clamp_(-8, 7))
        pairs = codes.view(torch.int16)
        (pairs | (pairs >> 4)).to(torch.int8)
    return (time.perf_counter() - started) / repeats * weights / tile.numel()


def drop_cache(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(command: list[str]) -> tuple[float, int, int, float]:
    """Wall seconds, peak resident bytes, the anonymous ones among them, and processor seconds of a command."""
    started = time.perf_counter()
    process = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, 1, 0)])
    anonymous, ended = [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(process, anonymous, ended))
    watcher.start()
    _, status, usage = os.wait4(process, 0)
    wall = time.perf_counter() - started
    ended.set()
    watcher.join()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(command)}")
    return wall, usage.ru_maxrss * 1024, max(anonymous), usage.ru_utime + usage.ru_stime


def watch(process: int, seen: list[int], ended: threading.Event) -> None:
    """Append the anonymous resident bytes of a process, fifty times a second."""
    while not ended.wait(0.02):
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            return
        seen += [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]


def measure(work: Path, blocks: int, scheme: str, runs: int, threads: int) -> dict[str, object]:
    source, output = work / f"float-{blocks}", work / f"quantized-{blocks}"
    if not source.exists():
        make_checkpoint(source, "qwen2.5-1.5b", blocks=blocks)
    command = [sys.executable, "-m", "bitwright", "quantize", str(source), "-o", str(output), "--scheme", scheme]
    seconds, peaks, alone, busy, reads, writes = [], [], [], [], [], []
    for _ in range(runs):
        shutil.rmtree(output, ignore_errors=True)
        reads.append(read_all(source))
        drop_cache(source)
        wall, peak, anonymous, cpu = run([*command, "--threads", str(threads), "--plain", "--no-check"])
        seconds.append(wall), peaks.append(peak), alone.append(anonymous), busy.append(cpu)
        writes.append(write_like(output, work / "floor"))
    startup = statistics.median(
        run([sys.executable, "-c", "import bitwright.quantization.api"])[0] for _ in range(runs)
    )
    source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    weights = json.loads((output / "report.json").read_text())["quantized_parameters"]
    arithmetic = compute(weights, threads)
    disk = statistics.median(reads) + statistics.median(writes)
    floor, overlapped = disk + arithmetic, max(disk, arithmetic)
    wall = statistics.median(seconds)
    return {
        "blocks": blocks,
        "scheme": scheme,
        "source_gb": round(source_bytes / 1e9, 3),
        "output_gb": round(sum(path.stat().st_size for path in output.glob("*.safetensors")) / 1e9, 3),
        "peak_rss_mb": round(max(peaks) / 1e6),
        "peak_anonymous_mb": round(max(alone) / 1e6),
        "seconds": round(wall, 2),
        "seconds_of_imports": round(startup, 2),
        "processor_seconds": round(statistics.median(busy), 2),
        "floor_read": round(statistics.median(reads), 2),
        "floor_arithmetic": round(arithmetic, 2),
        "floor_write": round(statistics.median(writes), 2),
        "floor_share": round(floor / wall, 2),
        "floor_share_after_imports": round(floor / (wall - startup), 2),
        "overlapped_share": round(overlapped / wall, 2),
        "overlapped_share_after_imports": round(overlapped / (wall - startup), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[14, 28])
    parser.add_argument("--scheme", default="w4g128")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    rows = [
        measure(arguments.work_dir, blocks, arguments.scheme, arguments.runs, arguments.threads)
        for blocks in arguments.blocks
    ]
    for field in rows[0]:
        print(f"{field:>28}", *(f"{row[field]!s:>12}" for row in rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
