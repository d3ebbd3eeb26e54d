"""The commands and their options, declared once. Each calls the Python function of its name and shows the outcome."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from bitwright import __version__
from bitwright.cli import cache_commands
from bitwright.cli.failures import notices_as_lines, report_failure
from bitwright.cli.options import MODEL_HELP, Json, KVCache, KVSafety, Model, Plain, Seed, Threads
from bitwright.cli.terminal import printable
from bitwright.core.settings import read_settings, wait_passively

__all__ = [
    "ALGORITHM_NAMES",
    "app",
    "common",
    "demo",
    "doctor",
    "evaluate",
    "explain",
    "generate",
    "inspect",
    "quantize",
    "run",
]

# Plain help: the rich one takes longer to import than everything else together.
app = typer.Typer(name="bitwright", rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)

# The names in the table of algorithms, which is not imported here: help has to answer at once.
ALGORITHM_NAMES = (
    "rtn", "hqq", "gptq", "gptq+learned", "autoround", "autoround+logits", "gptq+logits", "best", "choice", "awq",
    "teq", "awq+gptq", "rotation+gptq", "teq+gptq",
)  # fmt: skip


def run(arguments: list[str]) -> int:
    """Run one command line; every outcome, failures too, is an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal that knows no letter of a text still gets the rest
    wait_passively()
    debug, arguments = _take_debug(arguments)
    name, command = "bitwright", typer.main.get_command(app)
    if "--help" in arguments and arguments[0] in (commands := getattr(command, "commands", {})):
        # Straight to the command's own help: reading the values of options before it would import pydantic.
        name, command, arguments = f"bitwright {arguments[0]}", commands[arguments[0]], ["--help"]
    with notices_as_lines(debug=debug):
        try:
            # Not command.main(): that would end the process, and turn Ctrl-C and errors into its own messages.
            with command.make_context(name, list(arguments) or ["--help"], obj=arguments) as context:
                command.invoke(context)
            sys.stdout.flush()  # a full disk is told like any other failure
        except typer.Exit as ended:
            return ended.exit_code
        except SystemExit:
            raise
        except BaseException as failure:
            return report_failure(failure, arguments, debug=debug)
    return 0


def _take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """``--debug`` counts wherever it stands before ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [text for text in arguments[:end] if text != "--debug"]
    return len(options) < end or read_settings().debug, options + arguments[end:]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"bitwright {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and other libraries' warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Quantize language models, prove the result, run it.

    Start with: bitwright demo
    """


@app.command()
def quantize(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write; it must not exist yet.")],
    scheme: Annotated[
        str, typer.Option(help="What numbers are stored: w4g128, w8, w3g32-asym, nf4g64-dq, w8a8, w4g32-a8g32 ...")
    ],
    algorithm: Annotated[str, typer.Option(help=f"How they are chosen: {', '.join(ALGORITHM_NAMES)}.")] = "rtn",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the algorithm; may be repeated."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="compressed-tensors, gptq, awq or native; the first that can store the scheme unless given."),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text file or data set (calibration, heldout) for algorithms that need one.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens in each calibration sample; 2048 or the model's context, the smaller.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SCHEME",
            help="Another SCHEME, SCHEME@ALGORITHM, SCHEME@ALGORITHM(OPTION=VALUE,...) or float for the layers whose "
            "whole name is NAME, or matches it as a regular expression; repeatable.",
        ),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    device: Annotated[
        str, typer.Option(help="Where blocks are worked on: cpu, or a GPU, one block of weights at a time: cuda.")
    ] = "cpu",
    group_fallback: Annotated[
        str, typer.Option(help="Where groups do not divide a layer: error, pad, per-channel or skip.")
    ] = "error",
    on_nonfinite: Annotated[
        str, typer.Option(help="For calibration samples that make NaN or infinity: stop or drop-sample.")
    ] = "stop",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished checkpoint in OUTPUT.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished run in OUTPUT.")] = False,
    check: Annotated[
        bool | None, typer.Option(help="Measure perplexity before and after; done for small models unless said.")
    ] = None,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """Quantize a model. Interrupted, the same command resumes where it stopped."""
    from bitwright.cli.quantization import QuantizeRequest, run_quantize
    from bitwright.core.recipe import parse_option_texts

    request = QuantizeRequest(
        arguments=context.obj,
        check=check,
        model=model,
        output=output,
        options={
            "scheme": scheme,
            "algorithm": algorithm,
            "options": parse_option_texts(option or ()),
            "format": format,
            "calibration": calibration,
            "samples": samples,
            "seqlen": seqlen,
            "overrides": tuple(override or ()),
            "seed": seed,
            "threads": threads,
            "device": device,
            "group_fallback": group_fallback,
            "on_nonfinite": on_nonfinite,
            "overwrite": overwrite,
            "restart": restart,
        },
    )
    run_quantize(request, as_json=json, plain=plain)


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    reference: Annotated[str | None, typer.Option(help="The model to compare with, before quantization.")] = None,
    text: Annotated[str | None, typer.Option(help="Text file or data set to read; heldout unless given.")] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens in each window; 512 or the model's context, the smaller.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read only so many tokens of the text.")] = None,
    probes: Annotated[bool, typer.Option(help="Also ask the embedded questions.")] = True,
    kv_cache: Annotated[
        str | None,
        typer.Option("--kv-cache", metavar="SCHEME,...", help="Measure each model with each of these cache schemes."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK,...", help="Also lm-eval's tasks (bitwright[harness]): mmlu,gsm8k ...")
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Tasks of your own, in lm-eval's format.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Only so many questions of each task.")] = None,
    threads: Threads = None,
    json: Json = False,
    plain: Plain = False,
) -> None:
    """Measure models, and compare them with a reference.

    Size, bits per weight, perplexity, KL divergence from the reference, top-1 agreement, embedded probes: one table.
    """
    from bitwright.cli.evaluation import run_eval

    options = {
        "reference": reference,
        "text": text,
        "seqlen": seqlen,
        "max_tokens": max_tokens,
        "probes": probes,
        "kv_cache": kv_cache.split(",") if kv_cache is not None else (),
        "tasks": tasks.split(",") if tasks is not None else (),
        "task_path": task_path,
        "task_limit": task_limit,
        "threads": threads,
    }
    run_eval(models, options, as_json=json, plain=plain)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue, or with --chat to answer.")],
    max_tokens: Annotated[
        int | None,
        typer.Option(help="At most this many new tokens; 128, or what is left of the context, unless given."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; higher: more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw only among the likeliest tokens of this total probability.")] = 1.0,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the model's chat template.")] = False,
    kv_cache: KVCache = "none",
    kv_safety: KVSafety = "warn",
    json: Json = False,
) -> None:
    """Continue a text, printed as it is written."""
    from bitwright.cli.generation import run_generate

    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "chat": chat}
    run_generate(model, prompt, options | {"kv_cache": kv_cache, "kv_safety": kv_safety}, as_json=json)


cache_commands.add_to(app)


@app.command()
def inspect(
    model: Model,
    kernels: Annotated[bool, typer.Option("--kernels", help="Also every kernel's answer, and why it refuses.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="First compare each file with its recorded sha256.")] = False,
    json: Json = False,
) -> None:
    """Show a checkpoint layer by layer.

    How each layer is stored, what it costs, which kernel runs it on this machine and why.
    """
    from bitwright.cli import inspection

    found = inspection.inspect(model, verify=verify)
    _show(found.to_dict() if json else inspection.render_inspection(found, kernels=kernels))


@app.command()
def doctor(json: Json = False) -> None:
    """Show what this machine offers and what is missing.

    Cores, instruction sets, GPU, memory, disk, and the kernels that will be used.
    """
    from bitwright.cli import doctor as machine

    found = machine.doctor()
    _show(found.to_dict() if json else machine.render_machine(found))


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the models and the picture in this directory.")
    ] = None,
    json: Json = False,
) -> None:
    """Try everything on the embedded model.

    Quantizes it at 8, 4, 3 and 2 bits, compares the results in a table and a picture, and lets the original and the
    4-bit model write a story each. Offline, in under a minute.
    """
    from bitwright.cli.demo import run_demo

    run_demo(output, as_json=json)


@app.command()
def explain(code: Annotated[str, typer.Argument(metavar="CODE", help="The code in an error message: BW203.")]) -> None:
    """Explain an error code."""
    from bitwright.core.errors import explain as explain_code

    print(explain_code(code))


def _show(result: str | dict[str, object]) -> None:
    print(printable(result) if isinstance(result, str) else json.dumps(result, indent=2))
