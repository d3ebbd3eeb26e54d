"""``bitwright demo``: the main job on the embedded model, offline: quantize, compare, draw, generate."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.cli.evaluation import render_comparison
from bitwright.cli.plots import Point, draw_png, draw_text
from bitwright.cli.tables import format_duration
from bitwright.cli.terminal import printable, side_by_side
from bitwright.core.errors import BitwrightError

if TYPE_CHECKING:
    from bitwright.evaluation.records import Comparison
    from bitwright.quantization.events import Event

__all__ = ["DEMO_SCHEMES", "Demonstration", "demo", "render_demo", "run_demo"]

DEMO = "demo:"
DEMO_SCHEMES = ("w8g128", "w4g128", "w3g128", "w2g128")
STORY_SCHEME = "w4g128"
ORIGINAL = "bf16"
PROMPT = "Once upon a time"
STORY_TOKENS = 120
TEXT_TOKENS = 20_480  # of the held-out text: enough for intervals of a few percent, in seconds
X_TITLE, Y_TITLE = "bits per weight", "KL divergence from bf16, nats per token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """What the demo made: directories by scheme, the comparison, a story by each of two models, the picture if any."""

    directory: Path
    models: Mapping[str, Path]
    comparison: Comparison
    stories: Mapping[str, str]
    picture: Path | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self) | {"comparison": self.comparison.to_dict()}
        record: dict[str, Any] = json.loads(json.dumps(facts, default=str))
        return record


def demo(output: str | Path | None = None, *, on_line: Callable[[str], None] = lambda line: None) -> Demonstration:
    """Quantize the embedded model at 8, 4, 3 and 2 bits, compare the results with it, draw them, write two stories.

    Args:
        output: a new directory for all that is made; without it, a temporary one, which is left for you to look at.
        on_line: told what is being done.

    Raises:
        BitwrightError: BW203 if ``output`` holds a checkpoint already, BW501 if it cannot be written.
    """
    from bitwright.evaluation.comparison import evaluate
    from bitwright.models.generation import generate
    from bitwright.quantization.api import quantize

    def listen(event: Event) -> None:
        if event.kind in ("unit", "notice"):
            on_line(event.message)

    started = time.perf_counter()
    directory = Path(output) if output is not None else _temporary_directory()
    models = {scheme: directory / scheme for scheme in DEMO_SCHEMES}
    for scheme, path in models.items():
        report = quantize(DEMO, path, scheme=scheme)
        on_line(f"quantized the embedded model to {scheme} in {format_duration(report.run['seconds'])}")
    on_line("measuring the original and the four quantized models on held-out text ...")
    found = evaluate(list(models.values()), reference=DEMO, max_tokens=TEXT_TOKENS, on_event=listen)
    names = [*DEMO_SCHEMES, ORIGINAL]
    rows = tuple(replace(row, name=name) for row, name in zip(found.rows, names, strict=True))
    comparison = replace(found, rows=rows, reference=ORIGINAL)
    on_line("writing a story with the original and with the 4-bit model ...")
    writers: dict[str, str | Path] = {ORIGINAL: DEMO, STORY_SCHEME: models[STORY_SCHEME]}
    stories = {name: PROMPT + generate(path, PROMPT, max_tokens=STORY_TOKENS) for name, path in writers.items()}
    result = Demonstration(
        directory=directory,
        models=models,
        comparison=comparison,
        stories=stories,
        picture=directory / "demo.png",
        seconds=time.perf_counter() - started,
    )
    title = "The embedded model, quantized"
    drawn = draw_png(_points(result), directory / "demo.png", title=title, x_title=X_TITLE, y_title=Y_TITLE)
    return result if drawn else replace(result, picture=None)


def _temporary_directory() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="bitwright-demo-"))
    except OSError as error:
        what = f"cannot make a temporary directory: {error.strerror}"
        advice = "name a directory with --output, or set TMPDIR to one on a disk with 20 MB of room"
        raise BitwrightError("BW501", what, where=str(error.filename or ""), suggestion=advice) from None


def run_demo(output: Path | None, *, as_json: bool) -> None:
    """Run the demo and print all of it."""
    result = demo(output, on_line=(lambda line: None) if as_json else lambda line: print(line, flush=True))
    print(json.dumps(result.to_dict(), indent=2) if as_json else printable(render_demo(result)))


def render_demo(result: Demonstration) -> str:
    """The table, the plot, and the two stories side by side."""
    stories = list(result.stories.items())
    parts = ["", render_comparison(result.comparison), "", draw_text(_points(result), x_title=X_TITLE, y_title=Y_TITLE)]
    parts += ["", side_by_side(stories[0], stories[1]), ""]
    picture = f"picture: {result.picture}" if result.picture else "picture: none, matplotlib is not installed"
    model = shlex.quote(str(result.models[STORY_SCHEME]))
    parts += [f"done in {format_duration(result.seconds)}; models: {result.directory}; {picture}", "next:"]
    parts += [f"  bitwright generate {model} 'The old king'", f"  bitwright inspect {model} --kernels"]
    return "\n".join(parts)


def _points(result: Demonstration) -> list[Point]:
    pairs = zip(result.models, result.comparison.rows, strict=False)  # the last row is the reference itself
    return [Point(row.bits_per_weight, row.kl_mean or 0.0, scheme) for scheme, row in pairs]
