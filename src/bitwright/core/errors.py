"""Every error a user can see, in one table: code, exit status, what it means, what to do.

The hundreds digit of a code is the exit status of the command: 2 usage, 3 model, 4 data, 5 resources, 6 numeric.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CATALOGUE", "ArgumentError", "BitwrightError", "Entry", "Notice", "explain"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the catalogue: a title, and the longer text that ``bitwright explain`` prints."""

    title: str
    text: str


CATALOGUE: dict[str, Entry] = {
    "BW201": Entry(
        "invalid argument",
        "An option has a value that bitwright does not accept. The message names the option, the value and what is "
        "accepted instead. Nothing was read or written.",
    ),
    "BW202": Entry(
        "invalid quantization scheme",
        "A scheme says which numbers are stored: w4g128 (4-bit symmetric, groups of 128), w4g128-asym, w8 (per output "
        "channel), nf4g64, w8a8 (8-bit weights, 8-bit dynamic activations), w4g32-a8g32 (a scale for each group of "
        "those), A16W4 (instant quantization). The message says which part could not be understood or which "
        "combination does not exist.",
    ),
    "BW203": Entry(
        "output already exists",
        "The output directory holds files already. bitwright never overwrites silently: choose another directory, "
        "give --overwrite to replace a finished checkpoint, or --restart to drop an unfinished one. The source model "
        "itself is never overwritten.",
    ),
    "BW204": Entry(
        "group size does not divide the input features",
        "Some layers have an input dimension that the group size does not divide, and the chosen format cannot store "
        "the shorter last group. The message lists the layers and the group sizes that do divide. Choose one of them, "
        "exclude the layers with --override NAME=float, use --group-fallback, or choose --format native.",
    ),
    "BW205": Entry(
        "the format cannot express the scheme",
        "The checkpoint format has no way to store these numbers. The message says why and which format can; the "
        "native format stores every scheme.",
    ),
    "BW206": Entry(
        "no kernel can run the scheme",
        "No kernel of this machine accepts the scheme. The message lists what can run here.",
    ),
    "BW207": Entry(
        "unfinished run with other settings",
        "The output directory holds an unfinished run whose model, recipe, calibration tokens, thread count or "
        "versions differ from this command. Resuming would mix the two. Run the original command to resume, or give "
        "--restart to discard the unfinished work.",
    ),
    "BW208": Entry(
        "override matches nothing",
        "A per-layer override names no layer of the model. The message lists layers whose names are near.",
    ),
    "BW209": Entry(
        "the engine is closed",
        "A request was made to an engine that is closed, or was still waiting for its answer when it was closed. What "
        "had come of the answer until then can still be read.",
    ),
    "BW301": Entry(
        "not a model directory",
        "The path is not a directory with a config.json and safetensors weights, and not the id of a model on the hub.",
    ),
    "BW302": Entry(
        "not a valid safetensors file",
        "A weight file breaks a rule of the safetensors format: the message names the file, the rule and the byte. The "
        "file is damaged or was cut off while being copied: fetch it again.",
    ),
    "BW303": Entry(
        "weights are missing or unexpected",
        "The tensors that the configuration calls for and those in the files differ: the message lists the first five "
        "names and the count. A shard may be missing, or config.json may belong to another model.",
    ),
    "BW304": Entry(
        "wrong dtype or shape",
        "A tensor has another dtype or shape than the configuration calls for: the message names both and the field.",
    ),
    "BW305": Entry(
        "pickle weights are refused",
        "The directory holds .bin, .pt or .pth weights. Such files can run code when they are read, so bitwright does "
        "not open them. Convert them where you trust them: load the model with transformers and call "
        "save_pretrained(..., safe_serialization=True).",
    ),
    "BW306": Entry(
        "unknown architecture",
        "config.json names an architecture that the installed transformers does not know. Code shipped inside a model "
        "directory (auto_map) is never run. The message names the nearest known model types.",
    ),
    "BW307": Entry(
        "invalid model configuration",
        "config.json contradicts itself or is not valid JSON: the message goes field by field.",
    ),
    "BW308": Entry(
        "unfinished checkpoint",
        "The directory is the output of a quantization run that has not ended. Run the command that the message prints "
        "to resume it.",
    ),
    "BW309": Entry(
        "non-finite weights",
        "A weight holds NaN or infinity. Quantizing it would spread the damage, so the run stops before it starts: the "
        "message names the tensors and the counts. The model itself is broken; fetch it again.",
    ),
    "BW310": Entry(
        "unsafe file name",
        "A file of the model points outside its directory (an absolute path, '..', or a symbolic link that escapes).",
    ),
    "BW311": Entry(
        "unreadable quantization record",
        "The quantization_config of the checkpoint is of a kind or version that this bitwright does not read, or it "
        "contradicts the tensors in the files.",
    ),
    "BW312": Entry(
        "tokenizer missing or unfit",
        "The tokenizer cannot be read, has more tokens than the model has embedding rows, or is not the one that the "
        "reference model uses: token ids would then mean different text. Or its chat template fails, or passes a "
        "bound: it runs for 10 seconds at most.",
    ),
    "BW313": Entry(
        "nothing to quantize",
        "The model has no repeated blocks of Linear or Conv1D layers that bitwright can find, or every layer was "
        "excluded by overrides; or it does something with them that quantizing block by block, layer by layer would "
        "lose: blocks that share layers, work between blocks, layers that do more than multiply.",
    ),
    "BW314": Entry(
        "checksum mismatch",
        "A file of the checkpoint is not what was written: the message names the file and both hashes. Copy it again.",
    ),
    "BW401": Entry(
        "no usable calibration text",
        "Calibration or evaluation text is empty, missing, or too short for even one sample of the asked length. The "
        "message has the counts before and after filtering and the smallest length needed.",
    ),
    "BW402": Entry(
        "unknown data set",
        "The name is neither a file nor a data set known by name. Offline, give a local text file.",
    ),
    "BW403": Entry(
        "prompt does not fit the context",
        "The prompt and the tokens to generate are longer together than the model's context. Nothing is truncated "
        "silently: shorten the prompt or ask for fewer tokens.",
    ),
    "BW404": Entry(
        "no calibrated cache ranges",
        "The cache scheme stores keys and values with scales that come from calibration, and the model directory has "
        "none, or has those of other weights. Run bitwright calibrate on the directory, after its weights were "
        "quantized, or choose a scheme that needs no calibration: int8, int4-rotated.",
    ),
    "BW501": Entry(
        "disk full or not writable",
        "There is not enough room for the output, or a write failed. Finished blocks are kept: make room and run the "
        "same command again.",
    ),
    "BW502": Entry(
        "output is locked",
        "Another process is writing to the output directory: the message names it. Wait for it, or stop it.",
    ),
    "BW503": Entry(
        "out of memory",
        "The work does not fit in memory. The message names the levers: fewer samples, a shorter sequence length, a "
        "smaller batch.",
    ),
    "BW504": Entry("no network", "The hub cannot be reached and the model is not in the local cache."),
    "BW505": Entry(
        "the engine has failed",
        "Something went wrong in the engine that is not about one request. All requests end with this error, and the "
        "engine takes no more. The message has the cause: make another engine, and report it.",
    ),
    "BW601": Entry(
        "non-finite activations",
        "A calibration sample made NaN or infinity inside the model: the message names the sample, the block and the "
        "module. Quantizing on such statistics would be quiet damage.",
    ),
    "BW602": Entry(
        "numbers cannot be quantized",
        "The values to be quantized are not finite, so no scale exists.",
    ),
    "BW603": Entry(
        "quality collapsed",
        "The quantized model is far worse than the reference (perplexity ratio above 1.5). The message names the worst "
        "modules: give them more bits with --override, a smaller group, or another algorithm.",
    ),
    "BW604": Entry(
        "a Hessian cannot be factored",
        "A second-order algorithm could not factor the Hessian of a layer's inputs, with any damping: the inputs were "
        "zero in every calibration token, or far too large. Without strict the layer is rounded to nearest, and the "
        "report says so.",
    ),
}


class BitwrightError(Exception):
    """The one exception of bitwright: a catalogue code, and what, where, why and what to try.

    ``exit_status`` is the hundreds digit of the code.
    """

    def __init__(self, code: str, what: str, *, where: str = "", why: str = "", suggestion: str = "") -> None:
        if code not in CATALOGUE:
            raise KeyError(f"{code} is not in the catalogue")
        self.code, self.what, self.where = code, _printable(what), _printable(where)
        self.why, self.suggestion = _printable(why), _printable(suggestion)
        super().__init__(self.render())

    @property
    def exit_status(self) -> int:
        return int(self.code[2])

    def render(self) -> str:
        """The block that the command line prints: one line each for what, where, why and try."""
        lines = [f"error[{self.code}]: {self.what}"]
        for label, text in (("where", self.where), ("why", self.why), ("try", self.suggestion)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


def _printable(text: str) -> str:
    """Names out of other people's files may hold what a terminal would obey, or no encoding can write."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


class ArgumentError(BitwrightError, ValueError):
    """A value that was refused when it was given (BW201, BW202): Python code may catch it as a ``ValueError`` too."""


class Notice(UserWarning):
    """Something the user should know that does not stop the work."""


def explain(code: str) -> str:
    """Return the catalogue text of ``code`` (``"BW203"``; case and the prefix are optional).

    Raises:
        ArgumentError: BW201 if no such code exists; the message lists them all.
    """
    digits = code.upper().removeprefix("BW")
    entry = CATALOGUE.get("BW" + digits)
    if entry is None:
        raise ArgumentError("BW201", f"there is no error code {code!r}", suggestion="one of " + ", ".join(CATALOGUE))
    return f"BW{digits}: {entry.title} (exit status {digits[0]})\n\n{entry.text}"
