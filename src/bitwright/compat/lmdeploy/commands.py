"""LMDeploy's calls, over bitwright's own."""

from __future__ import annotations

import warnings
from pathlib import Path

from bitwright.core.errors import ArgumentError, Notice
from bitwright.models.kv_policy import read_policy
from bitwright.models.location import resolve_model
from bitwright.quantization.kv_calibration import Calibrated
from bitwright.quantization.kv_calibration import calibrate as calibrate_ranges

__all__ = ["calibrate", "kv_scheme"]


def calibrate(
    model: str | Path,
    calib_dataset: str | Path = "calibration",
    calib_samples: int = 128,
    calib_seqlen: int = 2048,
    work_dir: str | Path | None = None,
    device: str = "cpu",
) -> Calibrated:
    """Measure the ranges of keys and values, and save them in ``work_dir``: the model's own directory unless given.

    The document's data set, ``ptb``, needs a network or a local copy; unless one is named, the text that ships with
    bitwright is read. A ``calib_seqlen`` beyond the model's context is shortened to it, with a notice.

    Raises:
        BitwrightError: as :func:`bitwright.calibrate`; BW201 for a device that is not the CPU.
    """
    if device not in ("cpu", "auto"):
        raise ArgumentError("BW201", f"device is {device!r}", suggestion="cpu")
    seqlen: int | None = calib_seqlen
    if calib_seqlen == 2048:  # as LMDeploy has it unless asked otherwise
        seqlen = None
    made = calibrate_ranges(model, work_dir, dataset=calib_dataset, samples=calib_samples, seqlen=seqlen)
    if made.seqlen != calib_seqlen:
        message = f"calib_seqlen {calib_seqlen} is more than the model's context or the text; {made.seqlen} was taken"
        warnings.warn(message, Notice, stacklevel=2)
    return made


def kv_scheme(model: str | Path, quant_policy: int) -> str:
    """The name of the cache scheme that a ``quant_policy`` of the document means for a model; the meaning is told.

    Raises:
        BitwrightError: BW201 for another number, BW404 for 4 where the model was not calibrated.

    Example:
        >>> kv_scheme("demo:", 0)
        'none'
    """
    policy = read_policy(quant_policy, resolve_model(model))
    warnings.warn(policy.meaning, Notice, stacklevel=2)
    return policy.scheme.name
