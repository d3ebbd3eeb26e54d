"""``bitwright chat``: a conversation in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.cli.tables import format_size
from bitwright.cli.terminal import printable
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.memory import no_collections

if TYPE_CHECKING:
    from bitwright.models.conversation import Conversation

__all__ = ["ChatRequest", "run_chat"]

HELP = """\
/help                 this
/system TEXT          another system message, and a new conversation
/set NAME VALUE       temperature, top_p, seed or max_tokens; without a name, what they are
/stats                tokens, speed and memory so far
/clear                a new conversation
/save FILE            write the conversation as JSON
/exit                 leave (as Ctrl-D does); Ctrl-C stops an answer"""
MODEL_FORMATS = ("hf", "awq", "gptq")
ENGINES = ("turbomind", "pytorch")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What was asked: ``kv_cache`` is the name of a scheme, ``policy`` LMDeploy's number; at most one is given."""

    model: str
    system: str | None
    kv_cache: str | None
    kv_safety: str
    policy: str | None
    model_format: str | None
    options: Mapping[str, Any]
    threads: int | None


def run_chat(request: ChatRequest) -> None:
    """Talk until the user leaves.

    Raises:
        BitwrightError: whatever is wrong before the first answer; later ones are shown and the conversation goes on.
    """
    with no_collections():
        from bitwright.core.kv_scheme import parse_kv
        from bitwright.models.conversation import Conversation
        from bitwright.models.kv_policy import Policy, read_policy
        from bitwright.models.loading import load_with_tokenizer
        from bitwright.models.location import resolve_model

    if request.kv_cache is not None and request.policy is not None:
        raise ArgumentError("BW201", "--kv-cache and --quant-policy are both given", suggestion="give one of them")
    if request.model_format is not None and request.model_format not in MODEL_FORMATS:
        what = f"--model-format is {request.model_format!r}"
        raise ArgumentError("BW201", what, suggestion=f"one of {', '.join(MODEL_FORMATS)} (the files say it anyway)")
    directory = resolve_model(request.model)
    if request.policy is not None:
        policy = read_policy(request.policy, directory)
    else:
        scheme = parse_kv(request.kv_cache or "none")
        policy = Policy(scheme, f"cache scheme {scheme.name}")
    model, tokenizer = load_with_tokenizer(directory, threads=request.threads)
    _check_format(request.model_format, model)
    conversation = Conversation(model, tokenizer, policy.scheme, system=request.system, kv_safety=request.kv_safety)
    for name, value in request.options.items():
        _set(conversation, name, value)
    used = "" if conversation.scheme == policy.scheme else f"; in use: {conversation.scheme.name}"
    print(f"{printable(request.model)}; {policy.meaning}{used}")
    if not tokenizer.chat_template:
        print("the model was taught no roles: it continues what you write")
    print("/help lists the commands")
    _Terminal(conversation).run()


class _Terminal:
    """Reads lines, runs commands, prints answers."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: print(HELP),
            "system": self._system,
            "set": self._settings,
            "stats": self._stats,
            "clear": self._clear,
            "save": self._save,
        }

    def run(self) -> None:
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(/exit leaves)")
                continue
            if line in ("/exit", "/quit"):
                return
            try:
                self._handle(line)
            except BitwrightError as error:
                print(error.render())
            except KeyboardInterrupt:
                print("\n(stopped)")

    def _handle(self, line: str) -> None:
        if not line.startswith("/"):
            if line:
                self._answer(line)
            return
        name, _, rest = line[1:].partition(" ")
        if name not in self.commands:
            print(f"there is no command /{printable(name)}\n{HELP}")
            return
        self.commands[name](rest.strip())

    def _answer(self, question: str) -> None:
        pieces = self.conversation.answer(question)
        stopped = False
        try:
            for piece in pieces:
                print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            stopped = True
            pieces.close()  # type: ignore[attr-defined]
        print(" (stopped)" if stopped else "")
        if self.conversation.turns:
            print(self._footer())

    def _footer(self) -> str:
        turn = self.conversation.turns[-1]
        scheme = self.conversation.scheme.name
        kept = f" ({turn.kept} kept)" if turn.kept else ""
        facts = f"{turn.written} tokens, {turn.speed:.1f} tokens/s; {turn.read} read{kept}"
        return f"[{facts}; cache {format_size(turn.cache_bytes)} {scheme}; memory {format_size(_resident())}]"

    def _system(self, text: str) -> None:
        self.conversation.system = text or None
        self.conversation.forget()
        print("system message set; a new conversation" if text else "no system message; a new conversation")

    def _clear(self, _: str) -> None:
        self.conversation.forget()
        print("a new conversation")

    def _settings(self, text: str) -> None:
        if text:
            name, _, value = text.partition(" ")
            _set(self.conversation, name, _number(value.strip()))
        sampling = self.conversation.sampling
        print(
            f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, seed {sampling.seed}, "
            f"max_tokens {self.conversation.max_tokens or 'as the context allows, at most 128'}"
        )

    def _stats(self, _: str) -> None:
        turns = self.conversation.turns
        written, seconds = sum(turn.written for turn in turns), sum(turn.seconds for turn in turns)
        speed = written / seconds if seconds else 0.0
        print(
            f"{len(turns)} answers, {written} tokens written at {speed:.1f} tokens/s, "
            f"{sum(turn.read for turn in turns)} read, {sum(turn.kept for turn in turns)} kept in the cache\n"
            f"cache {format_size(self.conversation.cache_bytes)} {self.conversation.scheme.name}; "
            f"memory {format_size(_resident())}"
        )

    def _save(self, name: str) -> None:
        from bitwright.formats.storage import write_file

        if not name:
            raise ArgumentError("BW201", "/save needs the name of a file", suggestion="/save conversation.json")
        path = Path(name).expanduser()
        if path.exists():
            raise ArgumentError("BW203", f"{path} exists", suggestion="another name")
        system = [("system", self.conversation.system)] if self.conversation.system is not None else []
        messages = [{"role": role, "content": text} for role, text in [*system, *self.conversation.messages]]
        write_file(path, [(json.dumps({"messages": messages}, indent=2, ensure_ascii=False) + "\n").encode()])
        print(f"wrote {path}")


def _set(conversation: Conversation, name: str, value: Any) -> None:
    if name == "max_tokens":
        if value is not None and (type(value) is not int or value < 1):
            raise ArgumentError("BW201", f"max_tokens is {value!r}", suggestion="a whole number, at least 1")
        conversation.max_tokens = value
    elif name in ("temperature", "top_p", "seed"):
        conversation.sampling = replace(conversation.sampling, **{name: value})
    else:
        what = f"there is no setting {name!r}"
        raise ArgumentError("BW201", what, suggestion="temperature, top_p, seed or max_tokens")


def _number(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | float) else text


def _check_format(asked: str | None, model: Any) -> None:
    """``--model-format`` says nothing that the files do not; where it contradicts them, that is a mistake."""
    from bitwright.formats.checkpoint import open_checkpoint

    record = open_checkpoint(Path(model.name_or_path)).quantization
    found = "hf" if record is None else str(record.get("quant_method", ""))
    known = {"hf": ("hf",), "awq": ("awq", "compressed-tensors", "bitwright"), "gptq": ("gptq",)}
    if asked is not None and found not in known[asked]:
        what = f"--model-format is {asked}, and the weights are {'float' if found == 'hf' else found}"
        raise ArgumentError("BW201", what, suggestion="leave the option out: the files say what they are")


def _resident() -> int:
    from bitwright.quantization.report import peak_resident_bytes

    return peak_resident_bytes()
