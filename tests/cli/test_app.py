"""The command line as a whole: commands, help, usage errors, what is imported when."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

import bitwright
from bitwright.cli import main
from bitwright.cli.app import ALGORITHM_NAMES
from bitwright.quantization.algorithms import ALGORITHMS

COMMANDS = ["quantize", "eval", "generate", "inspect", "doctor", "demo", "explain"]
HELP_SECONDS = 0.2


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bitwright", *arguments], capture_output=True, text=True, timeout=120)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in out] == []
    assert "..." not in out.split("Commands:")[1], "a summary is too long for the list"


def test_no_arguments_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Usage: bitwright {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["quantize"]])
def test_help_answers_at_once(command: list[str]) -> None:
    """As a whole process; in time of the processor, and the best of several, because other work shares the machine."""
    seconds = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_process(*command, "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if seconds[-1] < HELP_SECONDS:
            return
    pytest.fail(f"--help took {min(seconds):.3f} s at best")


def test_the_help_of_quantize_names_every_algorithm() -> None:
    assert tuple(ALGORITHMS) == ALGORITHM_NAMES


def test_help_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "numpy", "rich", "pydantic", "matplotlib", "huggingface_hub"]
    code = (
        "import sys; from bitwright.cli import main; status = main(['quantize', '--help']); "
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bitwright {bitwright.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["quantise"], "quantise"),
        (["quantize"], "MODEL"),
        (["quantize", "demo:", "-o", "x"], "--scheme"),
        (["quantize", "demo:", "-o", "x", "--scheme", "w4", "--threads", "many"], "--threads"),
        (["generate", "demo:", "x", "--no-such-option"], "--no-such-option"),
        (["explain", "BW999"], "BW999"),
    ],
)
def test_usage_errors(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error[BW201]: ")
    assert named in captured.err
    assert "  try: " in captured.err


def test_module_runs_as_a_process() -> None:
    done = run_process("explain", "bw203")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("BW203: output already exists (exit status 2)")


def test_exit_status_leaves_the_process() -> None:
    assert run_process("explain", "BW999").returncode == 2


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "bitwright", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (141, b"")


def test_a_terminal_that_knows_few_letters() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    code = "import sys; from bitwright.cli.app import run; status = run(['--version']); print('±'); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, rb"\xb1")


@pytest.mark.parametrize(("given", "used"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_idle_threads_sleep_unless_asked_otherwise(given: dict[str, str], used: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    code = "import os; from bitwright.cli import main; main(['--version']); print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == used


def test_every_public_name_loads() -> None:
    for name in bitwright.__all__:
        assert getattr(bitwright, name) is not None
    assert set(bitwright.__all__) <= set(dir(bitwright))
    with pytest.raises(AttributeError, match="no_such_name"):
        bitwright.no_such_name  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, bitwright; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
