"""What LMDeploy's ``--quant-policy`` numbers mean here: the document's meaning, said aloud."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.kv_scheme import KVScheme, parse_kv
from bitwright.models.kv_parameters import has_parameters

__all__ = ["Policy", "read_policy"]

ACCEPTED = "0 or none; 4 (8-bit static, after bitwright calibrate); 8 or int8; or the name of a scheme, such as int4"


@dataclass(frozen=True, slots=True)
class Policy:
    """A scheme, and the sentence that tells which meaning of the number was taken."""

    scheme: KVScheme
    meaning: str


def read_policy(policy: int | str, directory: Path) -> Policy:
    """The scheme that a policy number, or the name of a scheme, asks for, for the model in ``directory``.

    4 is what the document on KV cache INT8 means by it: 8-bit codes with calibrated scales. Today's LMDeploy means
    4-bit codes with scales of each token, which are called ``int4`` here.

    Raises:
        ArgumentError: BW201 for a number that is none of 0, 4, 8.
        BitwrightError: BW404 for 4 where the model was not calibrated.
    """
    text = str(policy).strip().lower()
    if text == "0":
        return Policy(parse_kv("none"), "quant policy 0: keys and values as computed (none)")
    if text == "8":
        return Policy(parse_kv("int8"), "quant policy 8: 8-bit codes with scales of each token and head (int8)")
    if text != "4":
        if text.lstrip("+-").isdigit():
            raise ArgumentError("BW201", f"quant policy is {policy!r}", suggestion=f"accepted: {ACCEPTED}")
        scheme = parse_kv(text)
        return Policy(scheme, f"cache scheme {scheme.name}")
    if not has_parameters(directory):
        raise BitwrightError(
            "BW404",
            "quant policy 4 means 8-bit codes with calibrated scales, and the model was not calibrated",
            where=str(directory),
            why="4 meant this in LMDeploy's document, and means online 4-bit codes in LMDeploy today",
            suggestion=f"bitwright calibrate {directory}; or --kv-cache int4 for today's meaning",
        )
    meaning = "quant policy 4: 8-bit codes with the calibrated scales of the model directory (int8-static), as in the"
    return Policy(parse_kv("int8-static"), f"{meaning} document; for 4-bit codes say int4")
