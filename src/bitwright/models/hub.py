"""Repositories on the Hugging Face hub, and what can be wrong with them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from bitwright.core.errors import BitwrightError
from bitwright.models.location import near_names

__all__ = ["HUB_FILES", "fetch_model"]

# Pickled weights are never fetched, nor are second copies of the weights in other layouts.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
HUB_SKIPPED = ("original/*", "onnx/*", "consolidated*.safetensors")


def fetch_model(repository: str) -> Path:
    """Fetch a repository, or find it in the cache: the directory where it is.

    Raises:
        BitwrightError: BW301 if there is none that is open to the user, BW501 if it cannot be stored, BW504 if the hub
            cannot be reached.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_SKIPPED)))
    except GatedRepoError:
        advice = "ask for access on its page, then log in with `hf auth login`"
        raise BitwrightError("BW301", f"{repository} is on the hub, but closed to you", suggestion=advice) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        why = "neither a directory here nor a public repository on the hub has that name"
        near = near_names(Path(repository))
        raise BitwrightError("BW301", f"there is no model {repository!r}", why=why, suggestion=near) from None
    except Exception as error:  # of the disk, the network, or the client's HTTP library, which has changed before
        raise _failed_download(repository, error) from None


def _failed_download(repository: str, error: Exception) -> BitwrightError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    # Its compiled part tells of a full disk in words alone.
    if (isinstance(error, OSError) and error.errno in DISK_FAILURES) or os.strerror(errno.ENOSPC) in reason:
        what = f"{repository!r} could not be stored{_free_space()}"
        advice = "free disk space and run the same command again (what is there is not fetched again), or set HF_HOME"
        return BitwrightError("BW501", what, where=HF_HUB_CACHE, why=reason, suggestion=advice)
    return BitwrightError(
        "BW504",
        f"{repository!r} is not a directory here, and could not be fetched from the hub",
        why=reason,
        suggestion="connect to the network, give the path of a local directory, or use demo:",
    )


def _free_space() -> str:
    try:
        return f": {shutil.disk_usage(HF_HUB_CACHE).free} bytes are free"
    except OSError:
        return ""
