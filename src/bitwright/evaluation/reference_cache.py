"""The reference's logits, computed once: kept on disk as they are, to the last bit, and within a budget.

Divergences at eight bits are about 1e-5 nats. Logits rounded to sixteen bits would add as much, and a model would not
agree with itself; so nothing is rounded, and what does not fit is computed again instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.evaluation.perplexity import read_windows
from bitwright.evaluation.windows import TokenWindows
from bitwright.formats.safetensors_file import read_tensor, serialize
from bitwright.formats.safetensors_index import read_index
from bitwright.formats.storage import file_sha256, make_directory, remove_tree, renew_time, write_file
from bitwright.kernels import native_library
from bitwright.models.hf import VERSION

__all__ = ["BUDGET", "CachedLogits", "LogitCache", "model_fingerprint", "open_cache"]

BUDGET = 2 << 30  # bytes of one text's logits; two such texts are kept
TENSOR, CHECKSUM = "logits", "sha256"
SAFETY = 1.1  # of free disk space over what is needed


class LogitCache:
    """Logits by window, one file each with a checksum, in a directory of their own; a damaged file counts as absent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, number: int, length: int) -> Tensor | None:
        """The logits of window ``number``, ``[length, vocabulary]``, if they are there."""
        try:
            path = self._path(number)
            index = read_index(path)
            logits = read_tensor(path, index.tensors[TENSOR])
        except (BitwrightError, KeyError, OSError):
            return None
        is_whole = index.metadata.get(CHECKSUM) == _sha256(logits)
        return logits if is_whole and logits.dim() == 2 and len(logits) == length else None

    def write(self, number: int, logits: Tensor) -> None:
        """Keep the logits of window ``number``.

        Raises:
            BitwrightError: BW501 if they cannot be written.
        """
        make_directory(self.directory)
        logits = logits.detach().cpu().contiguous()
        write_file(self._path(number), serialize({TENSOR: logits}, {CHECKSUM: _sha256(logits)}))

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:06d}.safetensors"


class CachedLogits:
    """The logits of the reference: from the cache where they are there, else from the model, which is then loaded.

    A :data:`bitwright.evaluation.measurement.LogitSource`. Without a cache every call computes them.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        text: TokenWindows,
        cache: LogitCache | None,
        on_failure: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.load, self.text, self.cache, self.on_failure = load, text, cache, on_failure
        self.computed = 0  # windows

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        windows = [self.text.windows[number] for number in numbers]
        if self.cache is not None:
            kept = [self.cache.read(number, len(window) - 1) for number, window in zip(numbers, windows, strict=True)]
            found = [logits for logits in kept if logits is not None]
            if len(found) == len(numbers) and len({logits.shape for logits in found}) == 1:
                return torch.stack(found)
        logits = read_windows(self.load(), windows)
        self.computed += len(numbers)
        for number, part in zip(numbers, logits, strict=True):
            self._keep(number, part)
        return logits

    def _keep(self, number: int, logits: Tensor) -> None:
        """Write to the cache; if that fails, do without it from then on."""
        if self.cache is None:
            return
        try:
            self.cache.write(number, logits)
        except BitwrightError as error:
            self.cache = None
            self.on_failure(f"the reference's logits are not kept ({error.what}); they are computed for each model")


def model_fingerprint(directory: Path, files: Sequence[str]) -> str:
    """A hash of a model's configuration and weight files."""
    digest = hashlib.sha256()
    for name in ("config.json", *sorted(files)):
        digest.update(f"{name} {file_sha256(directory / name)}\n".encode())
    return digest.hexdigest()


def open_cache(
    root: Path,
    *,
    model: str,
    text: TokenWindows,
    vocabulary: int,
    dtype: torch.dtype,
    batch: int,
    budget: int | None = None,
) -> LogitCache | None:
    """The cache of one model's logits on one text, or ``None`` if they are more than the budget or the disk holds.

    The entries that were opened longest ago are removed so that all together stay within twice the budget.

    Args:
        root: where caches are kept.
        model: the model's fingerprint.
        budget: bytes; ``BUDGET`` unless given.
    """
    budget = BUDGET if budget is None else budget
    size = text.predicted * vocabulary * dtype.itemsize
    key = _key(
        {
            "model": model,
            "tokens": hashlib.sha256(b"".join(window.numpy().tobytes() for window in text.windows)).hexdigest(),
            "seqlen": text.seqlen,
            "dtype": str(dtype),
            # Sums of another shape, divided among other threads, or of other instructions may end in other last bits.
            "batch": batch,
            "threads": torch.get_num_threads(),
            "instructions": [torch.backends.cpu.get_cpu_capability(), native_library.instruction_set()],
            "versions": [torch.__version__, VERSION],
        }
    )
    directory = root / "reference" / key
    if size > budget:
        return None
    if directory.is_dir():
        with contextlib.suppress(BitwrightError):  # whoever may only read can use it all the same
            renew_time(directory)
        return LogitCache(directory)
    try:
        make_directory(directory)
        _make_room(directory.parent, keep=directory, allowed=2 * budget - size)
        return LogitCache(directory) if shutil.disk_usage(directory).free > SAFETY * size else None
    except (BitwrightError, OSError):
        return None


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _key(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _make_room(folder: Path, *, keep: Path, allowed: int) -> None:
    """Remove the oldest entries of ``folder`` until the others hold at most ``allowed`` bytes."""
    entries = [entry for entry in folder.iterdir() if entry.is_dir() and entry != keep]
    entries.sort(key=lambda entry: entry.stat().st_mtime)
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
    for entry in entries:
        if sum(sizes.values()) <= allowed:
            return
        remove_tree(entry)
        del sizes[entry]
