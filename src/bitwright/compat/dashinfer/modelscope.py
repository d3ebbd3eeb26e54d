"""Where DashInfer's examples get a model from: here a directory, or an id on the hub, as everywhere in bitwright."""

from __future__ import annotations

from bitwright.models.location import resolve_model

__all__ = ["DEFAULT_MODEL_REVISION", "snapshot_download"]

DEFAULT_MODEL_REVISION = "master"


def snapshot_download(model_id: str, revision: str = DEFAULT_MODEL_REVISION) -> str:
    """The directory of a model; ``revision`` is taken and not used.

    Raises:
        BitwrightError: BW301, BW504 if there is no such model.
    """
    return str(resolve_model(model_id))
