"""The commands about caches of keys and values, ``calibrate`` and ``chat``, and LMDeploy's names for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli.options import KV_HELP, MODEL_HELP, Json, KVSafety, Model, Plain, Seed, Threads

__all__ = ["add_to", "calibrate", "chat"]

Dataset = Annotated[
    str,
    typer.Option("--calib-dataset", "--dataset", help="Text file; calibration or heldout; ptb, wikitext2 or c4."),
]
Samples = Annotated[int, typer.Option("--calib-samples", "--samples", help="Calibration samples.")]
SequenceLength = Annotated[
    int | None,
    typer.Option("--calib-seqlen", "--seqlen", help="Tokens in each; 2048 or the model's context, the smaller."),
]
WorkDirectory = Annotated[
    Path | None, typer.Option("--work-dir", "--output", "-o", help="Where the files go; the model's own directory.")
]


def calibrate(
    context: typer.Context,
    model: Model,
    dataset: Dataset = "calibration",
    samples: Samples = 128,
    seqlen: SequenceLength = None,
    work_dir: WorkDirectory = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also measure in which layers few bits are unsafe, and recommend a scheme.")
    ] = False,
    export_lmdeploy: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write LMDeploy's past_kv_scale files.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks among which those files divide the heads.")] = 1,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Those files without zero points.")] = False,
    kv_cache_scheme: Annotated[
        str | None,
        typer.Option(metavar="fp8|int8", help="Also write k_scale and v_scale into the checkpoint; vLLM takes fp8."),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished calibration.")] = False,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """Measure ranges of keys and values, for static cache schemes.

    Block by block; interrupted, the same command resumes where it stopped.
    """
    from bitwright.cli.calibration import CalibrateRequest, run_calibrate

    options = {"dataset": dataset, "samples": samples, "seqlen": seqlen, "seed": seed, "threads": threads}
    request = CalibrateRequest(
        arguments=context.obj,
        model=model,
        output=work_dir,
        options=options | {"restart": restart, "kv_cache_scheme": kv_cache_scheme},
        check=check,
        lmdeploy=export_lmdeploy,
        ranks=tensor_parallel,
        symmetric=symmetric,
    )
    run_calibrate(request, as_json=json, plain=plain)


def chat(
    words: Annotated[
        list[str], typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} LMDeploy's 'turbomind MODEL' works, too.")
    ],
    system: Annotated[str | None, typer.Option(help="The message before the first question.")] = None,
    kv_cache: Annotated[str | None, typer.Option("--kv-cache", metavar="SCHEME", help=KV_HELP)] = None,
    kv_safety: KVSafety = "warn",
    quant_policy: Annotated[
        str | None, typer.Option(help="LMDeploy's number: 0 none, 4 int8-static (after calibrate), 8 int8.")
    ] = None,
    model_format: Annotated[str | None, typer.Option(help="hf, awq or gptq; the files say it anyway.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer, at most.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; higher: more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw only among the likeliest tokens of this total probability.")] = 1.0,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Talk with a model in the terminal.

    /help lists what can be typed besides questions.
    """
    from bitwright.cli.chat import ENGINES, ChatRequest, run_chat

    names = words[1:] if words[0] in ENGINES and len(words) > 1 else words
    if len(names) != 1:
        raise typer.BadParameter(f"one model, not {len(names)}: {' '.join(names)}")
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    run_chat(
        ChatRequest(
            model=names[0],
            system=system,
            kv_cache=kv_cache,
            kv_safety=kv_safety,
            policy=quant_policy,
            model_format=model_format,
            options=options,
            threads=threads,
        )
    )


def add_to(app: typer.Typer) -> None:
    """Declare the commands, and ``lite calibrate``."""
    app.command()(calibrate)
    app.command()(chat)
    lite = typer.Typer(help="LMDeploy's names: lite calibrate.", rich_markup_mode=None)
    lite.command("calibrate")(calibrate)
    app.add_typer(lite, name="lite")
