"""The reference's logits, computed once: kept on disk as they are, to the last bit, and within a limit.

Divergences at eight bits are about 1e-5 nats. Logits rounded to sixteen bits would add as much, and a model would not
agree with itself; so nothing is rounded, and what does not fit is computed again instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.core.settings import read_cache_limit
from bitwright.evaluation.perplexity import read_windows
from bitwright.evaluation.windows import TokenWindows
from bitwright.formats.kept import Hold, hold_directory
from bitwright.formats.safetensors_file import read_tensor, serialize
from bitwright.formats.safetensors_index import read_index
from bitwright.formats.storage import file_sha256, make_directory, write_file
from bitwright.kernels import native_library
from bitwright.models.hf import VERSION

__all__ = ["CachedLogits", "LogitCache", "model_fingerprint", "open_cache"]

TENSOR, CHECKSUM = "logits", "sha256"
HEADER = 512  # bytes of a file beside the numbers, or fewer


class LogitCache:
    """Logits by window, one file each with a checksum, in a directory of their own; a damaged file counts as absent.

    Args:
        hold: what keeps other processes from removing the directory.
    """

    def __init__(self, directory: Path, hold: Hold | None = None) -> None:
        self.directory, self._hold = directory, hold

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

    def discard(self) -> None:
        """Give the disk back, unless another process uses these files."""
        if self._hold is not None:
            self._hold.discard()

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
            self.cache.discard()
            self.cache = None
            self.on_failure(_said(error))


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
    limit: int | None = None,
    on_failure: Callable[[str], None] = lambda message: None,
) -> LogitCache | None:
    """The cache of one model's logits on one text, or ``None`` if the limit or the disk does not hold them.

    The entries that were used longest ago are removed so that all together stay within the limit; what a process uses
    stays for as long as it does.

    Args:
        root: where caches are kept.
        model: the model's fingerprint.
        limit: bytes of all such caches; :func:`bitwright.core.settings.read_cache_limit` unless given.
        on_failure: told why there is no cache.

    Raises:
        ArgumentError: BW201 if the limit that the environment gives is none.
    """
    limit = read_cache_limit() if limit is None else limit
    size = text.predicted * vocabulary * dtype.itemsize + len(text.windows) * HEADER
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
    try:
        hold = hold_directory(root / "reference", key, size=size, limit=limit)
    except (BitwrightError, OSError) as error:
        on_failure(_said(error))
        return None
    return LogitCache(hold.path, hold)


def _said(error: BitwrightError | OSError) -> str:
    reason = error.what if isinstance(error, BitwrightError) else error.strerror
    return f"the reference's logits are not kept ({reason}); they are computed for each model"


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _key(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
