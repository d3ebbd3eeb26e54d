"""The rules of the house, each a function from one parsed file to what is wrong with it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

__all__ = ["RULES", "Rule", "SourceFile", "violations"]

FILE_LINES = 400
FUNCTION_LINES = 50
# path, or path::function, with the reason for which it may be longer
LONGER: dict[str, str] = {
    "src/bitwright/cli/app.py::quantize": "its options, one a line; the body is one call",
    "src/bitwright/quantization/api.py::quantize": "a public signature and its documentation; the body is short",
    "src/bitwright/evaluation/comparison.py::evaluate": "a public signature and its documentation; the body is short",
}

# Files whose errors need not say what to do next, with the reason.
WITHOUT_SUGGESTION: dict[str, str] = {}

# Imports go down only; packages of one number are siblings and do not import each other.
LAYERS = {
    "core": 0,
    "formats": 1,
    "kernels": 1,
    "models": 2,
    "quantization": 3,
    "engine": 3,
    "evaluation": 4,
    "cli": 5,
    "serve": 5,
    "compat": 5,
}
# Modules that load an optional dependency, inside a function, and which.
OPTIONAL_IMPORTS: dict[str, str] = {}
BANNED_MODULE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "handler", "misc"}
BANNED_IMPORTS = {"pickle", "cPickle", "_pickle", "marshal", "dill", "cloudpickle", "joblib", "shelve", "imp"}
BANNED_CALLS = {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "numpy.load", "np.load"}
STORAGE = "formats/storage.py"
WRITING_METHODS = {"write_text", "write_bytes", "mkdir", "unlink", "rmdir", "touch", "symlink_to", "hardlink_to"}
WRITING_CALLS = {
    *(f"os.{name}" for name in "rename replace remove unlink mkdir makedirs rmdir write link symlink".split()),
    *(f"shutil.{name}" for name in "copy copy2 copyfile copytree move rmtree".split()),
    "torch.save",
    "save_file",
}
# Each is put together here so that this file does not break its own rule.
MACHINE_PATHS = re.compile("|".join([r"(?<![\w.])/wo" + r"rk/", r"/ho" + r"me/\w", r"/ro" + r"ot/", r"/tmp" + r"/bw"]))


@dataclass(frozen=True)
class SourceFile:
    """One Python file of the repository, parsed. ``path`` is relative to the repository root, with slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def inside(self) -> str | None:
        """The path below ``src/bitwright/``; ``None`` for files outside the product."""
        prefix = "src/bitwright/"
        return self.path.removeprefix(prefix) if self.path.startswith(prefix) else None

    @property
    def package(self) -> str | None:
        """The package that the file belongs to; ``None`` at the top level of the product and outside it."""
        return self.inside.split("/")[0] if self.inside and "/" in self.inside else None

    @property
    def module(self) -> str:
        return ".".join(self.path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").split("/"))


Rule = Callable[[SourceFile], Iterator[str]]


def violations(root: Path, rule: Rule) -> list[str]:
    """Everything that ``rule`` finds below ``root``, one line each: path, line where known, what is wrong."""
    found: list[str] = []
    for folder in ("src", "tests", "scripts", "benchmarks", "examples"):
        for path in sorted((root / folder).rglob("*.py")):
            source = SourceFile(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
            found += [f"{source.path}: {problem}" for problem in rule(source)]
    return found


def _imports(source: SourceFile) -> Iterator[tuple[ast.AST, str]]:
    """Every module that is imported, in full: ``from bitwright.core import grid`` gives ``bitwright.core.grid``."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = source.module.split(".")
                base = ".".join([*parts[: len(parts) - node.level + source.path.endswith("__init__.py")], base])
            for alias in node.names:
                yield node, f"{base}.{alias.name}"


def _dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or attribute; the empty string for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _calls(source: SourceFile) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            yield node, _dotted(node.func)


def layering(source: SourceFile) -> Iterator[str]:
    """A file imports its own package or a lower number; siblings never import each other."""
    if source.package is None:
        return
    if source.package not in LAYERS:
        yield f"package {source.package!r} has no layer: add it to LAYERS"
        return
    for node, name in _imports(source):
        parts = name.split(".")
        if parts[0] != "bitwright" or name == "bitwright.__version__":
            continue
        target = parts[1] if len(parts) > 1 else ""
        if target == source.package:
            continue
        if target not in LAYERS or LAYERS[target] >= LAYERS[source.package]:
            yield f"{node.lineno}: {source.package} (layer {LAYERS[source.package]}) imports {name}"


def file_size(source: SourceFile) -> Iterator[str]:
    """At most 400 lines a file."""
    lines = source.text.count("\n")
    if lines > FILE_LINES and source.path not in LONGER:
        yield f"{lines} lines; at most {FILE_LINES}"


def function_size(source: SourceFile) -> Iterator[str]:
    """At most 50 lines a function, docstring and all."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES and f"{source.path}::{node.name}" not in LONGER:
                yield f"{node.lineno}: {node.name} has {lines} lines; at most {FUNCTION_LINES}"


def _defined(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names that a module defines: functions and classes, and then everything else bound at its top level."""
    definitions: set[str] = set()
    others: set[str] = set()
    statements = list(tree.body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.If | ast.Try):
            statements += node.body + node.orelse
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            definitions.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            others |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names = [name for target in _targets(node) for name in ast.walk(target)]
            others |= {name.id for name in names if isinstance(name, ast.Name)}
    return definitions, others


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def exports(source: SourceFile) -> Iterator[str]:
    """``__all__`` exists, names only what is there, once, and leaves out no public function or class."""
    if source.inside is None:
        return
    assignments = [node for node in source.tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    values = [node.value for node in assignments if "__all__" in map(_dotted, _targets(node))]
    if len(values) != 1 or values[0] is None:
        yield "no __all__"
        return
    names: list[str] = ast.literal_eval(values[0])
    definitions, others = _defined(source.tree)
    public = {name for name in definitions if not name.startswith("_")}
    for name in sorted(set(names) - definitions - others):
        yield f"__all__ names {name!r}, which does not exist"
    for name in sorted(public - set(names)):
        yield f"{name!r} is public but not in __all__"
    if len(names) != len(set(names)):
        yield "__all__ names something twice"


def environment(source: SourceFile) -> Iterator[str]:
    """Environment variables are read in core/settings.py alone."""
    if source.inside in (None, "core/settings.py"):
        return
    banned = {"os.environ", "os.getenv", "os.putenv", "os.environb", "os.getenvb"}
    for node, name in _imports(source):
        if name in banned:
            yield f"{node.lineno}: imports {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and _dotted(node) in banned:
            yield f"{node.lineno}: {_dotted(node)}"


def lazy_imports(source: SourceFile) -> Iterator[str]:
    """No imports inside functions, but in cli/ and in the modules that load an optional dependency."""
    if source.inside is None or source.package == "cli" or source.inside in OPTIONAL_IMPORTS:
        return
    for function in ast.walk(source.tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    yield f"{node.lineno}: import inside {function.name}"


def banned_calls(source: SourceFile) -> Iterator[str]:
    """Nothing that runs code found in data: pickle and its kin, eval, exec, shells, remote code."""
    if source.inside is None:
        return
    for node, name in _imports(source):
        if name.split(".")[0] in BANNED_IMPORTS or name in BANNED_CALLS:
            yield f"{node.lineno}: imports {name}"
    for call, name in _calls(source):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in BANNED_CALLS or name in {"eval", "exec", "compile", "__import__"}:
            yield f"{call.lineno}: {name}()"
        if name == "torch.load" and not _is_constant(keywords.get("weights_only"), True):
            yield f"{call.lineno}: torch.load without weights_only=True"
        for keyword in ("shell", "trust_remote_code", "allow_pickle"):
            if keyword in keywords and not _is_constant(keywords[keyword], False):
                yield f"{call.lineno}: {keyword}="


def _is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def printing(source: SourceFile) -> Iterator[str]:
    """``print`` is for cli/ alone."""
    if source.inside is None or source.package == "cli":
        return
    for call, name in _calls(source):
        if name in {"print", "sys.stdout.write", "sys.stderr.write"}:
            yield f"{call.lineno}: {name}()"


def transformers_once(source: SourceFile) -> Iterator[str]:
    """``transformers`` is imported in models/hf.py alone, ``compressed_tensors`` nowhere."""
    if source.inside is None:
        return
    for node, name in _imports(source):
        top = name.split(".")[0]
        if top == "compressed_tensors" or (top == "transformers" and source.inside != "models/hf.py"):
            yield f"{node.lineno}: imports {name}"


def storage_only(source: SourceFile) -> Iterator[str]:
    """Files are written, and directories changed, through formats/storage.py alone."""
    if source.inside in (None, STORAGE):
        return
    for call, name in _calls(source):
        if call.args and _dotted(call.args[0]) == "os.devnull":
            continue
        if name == "torch.save" and _is_memory(call.args[1:2]):
            continue
        last = call.func.attr if isinstance(call.func, ast.Attribute) else name
        if name in WRITING_CALLS or (isinstance(call.func, ast.Attribute) and last in WRITING_METHODS):
            yield f"{call.lineno}: {name or last}()"
        elif last in {"open", "fdopen"} and any(_is_writing_mode(mode) for mode in _modes(call, name)):
            yield f"{call.lineno}: {name or last}() for writing"


def _is_memory(arguments: list[ast.expr]) -> bool:
    """Whether what is written to is named in the very place as memory: ``torch.save(x, buffer := io.BytesIO())``."""
    values = [node.value for node in arguments if isinstance(node, ast.NamedExpr)]
    return any(isinstance(value, ast.Call) and _dotted(value.func) == "io.BytesIO" for value in values)


def _modes(call: ast.Call, name: str) -> list[ast.expr]:
    """The mode or flags argument of ``open(path, mode)``, ``os.open(path, flags)`` or ``path.open(mode)``."""
    position = 1 if name in {"open", "io.open", "os.open", "os.fdopen"} else 0
    named = [keyword.value for keyword in call.keywords if keyword.arg in {"mode", "flags"}]
    return [*call.args[position : position + 1], *named]


def _is_writing_mode(argument: ast.expr) -> bool:
    flags = {_dotted(node).rpartition(".")[2] for node in ast.walk(argument)}
    mode = argument.value if isinstance(argument, ast.Constant) else None
    return bool(flags & {"O_WRONLY", "O_RDWR", "O_CREAT"}) or (isinstance(mode, str) and bool(set(mode) & set("wxa+")))


def module_names(source: SourceFile) -> Iterator[str]:
    """No module called utils and the like: a name says what is inside."""
    words = {word for part in source.path.removesuffix(".py").split("/") for word in part.strip("_").split("_")}
    for word in sorted(words & BANNED_MODULE_NAMES):
        yield f"module name contains {word!r}"


def machine_paths(source: SourceFile) -> Iterator[str]:
    """No path of one particular machine."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if MACHINE_PATHS.search(line):
            yield f"{number}: {line.strip()}"


def suggestions(source: SourceFile) -> Iterator[str]:
    """Every error says what to do next: ``suggestion=`` is passed, and is not the empty text."""
    if source.inside is None:
        return
    for call, name in _calls(source):
        if name.rpartition(".")[2] not in {"BitwrightError", "ArgumentError"} or source.path in WITHOUT_SUGGESTION:
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if _is_constant(given.get("suggestion", ast.Constant("")), ""):
            yield f"{call.lineno}: {name} without a suggestion"


RULES: tuple[Rule, ...] = (
    layering,
    file_size,
    function_size,
    exports,
    environment,
    lazy_imports,
    banned_calls,
    printing,
    transformers_once,
    storage_only,
    module_names,
    machine_paths,
    suggestions,
)
