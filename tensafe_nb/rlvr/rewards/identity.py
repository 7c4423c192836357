"""The identity of a reward: its code and all that its code uses, as a digest.

A function is its bytecode, its defaults, what it closes over, and the globals, helpers, classes and modules it names,
and so on from there, as they are in memory now: the text of a file may have been edited since. The walk ends at the
standard library (that is Python's version) and at installed packages, which are noted by their version. What it
cannot look into is named in `beyond`.
"""

import builtins
import dis
import enum
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import marshal
import operator
import re
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple, TypeAlias

Place: TypeAlias = Literal["local", "ours", "library", "stdlib"]

PACKAGE = Path(__file__).parents[2]
_BUILTIN_MODULES = ("answers", "parsed", "shaping", "code", "math", "numerals")
_OURS = {f"tensafe_nb.rlvr.rewards.builtin.{name}" for name in _BUILTIN_MODULES}
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_WRITTEN = {
    "Decimal",
    "Fraction",
    "datetime",
    "date",
    "time",
    "timedelta",
    "UUID",
    "range",
    "slice",
    "bytearray",
}
_DYNAMIC = {"eval", "exec", "compile", "open", "__import__", "globals", "locals", "vars", "input"}
_DESCRIPTORS = (
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
)
_SAID_BY_REPR = ("typing", "types", "_collections")  # annotations; fields of a NamedTuple
_OUTSIDE = {  # parts of the standard library that read what is outside the program
    "os", "subprocess", "random", "secrets", "time", "socket", "ssl", "urllib", "http", "pathlib", "importlib",
    "sqlite3", "io", "tempfile", "shutil", "glob",
}  # fmt: skip
_WITHOUT_BEARING = ("threading", "_thread", "asyncio", "logging")  # whose objects decide when, not what
_MANY = 1000  # items above which a container of plain data is hashed in one go
_LARGE = 64 << 20  # bytes of arrays above which the shapes of further ones have to do
_DEEP = 100  # things within things, or functions called by functions
_EMPTY = types.CellType()
_METHODS = (types.FunctionType, classmethod, staticmethod, property)


@dataclass(frozen=True, slots=True)
class Identity:
    """What something depends on.

    Attributes:
        digest: Equal digests mean equal scores, as far as `beyond` allows.
        code: The same without values: what a function cannot change by being called.
        beyond: What could not be looked into: packages, files, objects of theirs.
        modules: The modules of the user's it reaches, with the names it uses of each; None for all.
    """

    digest: str
    code: str
    beyond: tuple[str, ...] = ()
    modules: "Mapping[str, frozenset[str] | None]" = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Twelve digits, and the word partial where something lies beyond."""
        return self.digest[:12] + ("-partial" if self.beyond else "")


def identity_of(thing: Any) -> Identity:
    """Return the identity of a function, or of anything made of functions and values."""
    walk = IdentityWalk()
    walk.visit(thing)
    return walk.identity()


def place_of(name: str) -> Place:
    """Return where a module is from: the user's own, a reward module of ours, a package, or Python."""
    top = name.partition(".")[0]
    if name in _OURS:
        return "ours"
    if name == "__main__":  # a notebook, or a script
        return "local"
    if top == "tensafe_nb":
        return "library"
    if top in sys.stdlib_module_names or top == "builtins":
        return "stdlib"
    # Of packages the top is asked, and imports nothing.
    if top != name and (place := place_of(top)) != "local":
        return place
    module = sys.modules.get(name)
    if module is None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, AttributeError, ValueError):  # its parent is missing, or is no package
            spec = None
        return _place_of_file(None if spec is None else spec.origin)
    return _place_of_file(getattr(module, "__file__", None))


def local_modules() -> list[types.ModuleType]:
    """Return the modules of the user's that are imported, but for the notebook itself."""
    modules = [sys.modules.get(name) for name in local_names(tuple(sys.modules))]
    return [module for module in modules if isinstance(module, types.ModuleType)]


@functools.lru_cache(maxsize=2)
def local_names(names: tuple[str, ...]) -> list[str]:
    """Return which of the imported modules are the user's; asked for often, and changes seldom."""
    return [
        name
        for name in names
        if name != "__main__"
        and getattr(sys.modules.get(name), "__name__", None) == name
        and place_of(name) == "local"
    ]


@functools.lru_cache(maxsize=8192)
def _place_of_file(file: str | None) -> Place:
    if file in ("built-in", "frozen"):
        return "stdlib"
    if file is None or file.startswith("<"):  # of a notebook, or made by hand, or a folder of modules
        return "local"
    path = Path(file)
    if {"site-packages", "dist-packages"} & set(path.parts) or file.endswith(
        tuple(importlib.machinery.EXTENSION_SUFFIXES)
    ):
        return "library"
    return "stdlib" if path.is_relative_to(sysconfig.get_path("stdlib")) else "local"


class Import(NamedTuple):
    name: str
    level: int
    wanted: tuple[str, ...]


class _Uses(NamedTuple):
    """What the code of a function, with that of functions inside it, names."""

    names: frozenset[str]  # globals and built-ins
    attributes: frozenset[str]
    imports: tuple[Import, ...]


@functools.lru_cache(maxsize=4096)
def _uses_of(code: types.CodeType) -> _Uses:
    names: set[str] = set()
    attributes: set[str] = set()
    imports: list[Import] = []
    before: list[Any] = [None, None]
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            names.add(step.argval)
        elif step.opname == "IMPORT_NAME":
            level, wanted = before
            imports.append(Import(step.argval, int(level or 0), tuple(wanted or ())))
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM", "LOAD_SUPER_ATTR"):
            attributes.add(step.argval)
        before = [before[1], step.argval]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _uses_of(constant)
            names |= inner.names
            attributes |= inner.attributes
            imports += inner.imports
    return _Uses(frozenset(names), frozenset(attributes), tuple(imports))


@functools.lru_cache(maxsize=512)
def _release_of(top: str) -> str:
    """Return a package with its version."""
    try:
        return f"{top} {importlib.metadata.version(top.replace('_', '-'))}"
    except importlib.metadata.PackageNotFoundError:
        return f"{top} {getattr(sys.modules.get(top), '__version__', '?')}"


class IdentityWalk:
    """One pass over all that something depends on; everything is written down once."""

    def __init__(self) -> None:
        self._all, self._code = hashlib.sha256(), hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # an id stands for an object only while that lives
        self._beyond: set[str] = set()
        self._depth = self._bytes = 0
        self._modules: dict[str, set[str] | None] = {}

    def identity(self) -> Identity:
        modules = {name: None if used is None else frozenset(used) for name, used in self._modules.items()}
        return Identity(self._all.hexdigest(), self._code.hexdigest(), tuple(sorted(self._beyond)), modules)

    def visit(self, thing: Any) -> None:
        if isinstance(thing, _ATOMS) and not _is_of_user(thing):
            self._write(type(thing).__name__, repr(thing))
        elif id(thing) in self._seen:
            self._write("again", self._seen[id(thing)])
        else:
            self._seen[id(thing)] = len(self._seen)
            self._kept.append(thing)
            self._depth += 1
            if self._depth <= _DEEP:
                self.visit_compound(thing)
            else:
                self._write("deep", type(thing).__name__)
                self._beyond.add(f"what lies {_DEEP} levels deep")
            self._depth -= 1

    def _write(self, *words: object, code: bool = False) -> None:
        text = ("\x1f".join(map(str, words)) + "\x1e").encode(errors="surrogatepass")
        self._all.update(text)
        if code:
            self._code.update(text)

    def visit_compound(self, thing: Any) -> None:
        if isinstance(thing, _ATOMS) and not isinstance(
            thing, enum.Enum
        ):  # of a class of the user's, as below
            self._write(type(thing).__name__, repr(thing))
        elif isinstance(thing, Mapping | set | frozenset | list | tuple | deque) and _is_of_user(thing):
            self._each("object", type(thing), dict(_attributes_of(thing)))
        match thing:
            case types.FunctionType():
                self.visit_function(thing)
            case types.MethodType():
                self._each("method", thing.__func__, thing.__self__)
            case type():
                self.visit_class(thing)
            case types.ModuleType():
                self.visit_module(thing, None)
            case functools.partial():
                self._each("partial", thing.func, thing.args, thing.keywords)
            case property():
                self._each("property", thing.fget, thing.fset, thing.fdel)
            case staticmethod() | classmethod():
                self._each(type(thing).__name__, thing.__func__)
            case functools.cached_property():
                self._each("property", thing.func)
            case re.Pattern():
                self._write("pattern", repr(thing.pattern), thing.flags)
            case _ if isinstance(thing, _DESCRIPTORS) or type(thing).__module__ in _SAID_BY_REPR:
                self._write(type(thing).__name__, re.sub(" at 0x[0-9a-f]+", "", repr(thing)))
            case types.BuiltinFunctionType() | types.MethodWrapperType():
                self.visit_builtin(thing)
            case enum.Enum():
                self._write("member", thing.name)
                self._each("of", type(thing), thing.value)
            case Mapping():
                self.visit_mapping(thing)
            case set() | frozenset():
                self._each("set", *sorted(thing, key=rank))
            case list() | tuple() | deque():
                self.visit_sequence(thing)
            case _:
                self.visit_object(thing)

    def _each(self, kind: str, *things: Any) -> None:
        self._write(kind, len(things))
        for thing in things:
            self.visit(thing)

    def visit_function(self, function: types.FunctionType) -> None:
        module = function.__globals__.get("__name__", "?")
        if self._outside(module, f"{module}.{function.__qualname__}"):
            cells = [cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY]
            self._users([*vars(function).values(), *cells])
            return
        self.write_bytecode(function.__code__)
        self._each("defaults", function.__defaults__, function.__kwdefaults__)
        own = {name: value for name, value in vars(function).items() if not name.startswith("__")}
        self._each("attributes", own)
        uses = _uses_of(function.__code__)
        for cell in function.__closure__ or ():
            try:
                self._value("cell", cell.cell_contents, uses)
            except ValueError:  # a cell that is still empty
                self._write("empty")
        for name in sorted(uses.names):
            if name in function.__globals__:
                self._value(name, function.__globals__[name], uses)
            elif hasattr(builtins, name):
                self._write("built-in", name)
                if name in _DYNAMIC:
                    self._beyond.add(f"{name}()")
        for wanted in uses.imports:
            self.visit_import(wanted, function.__globals__, uses)

    def _users(self, held: Iterable[Any]) -> None:
        """Look at the user's functions among what a thing of a package holds: a decorator holds what it was put on."""
        for one in held:
            for thing in list(one.values()) if isinstance(one, Mapping) else [one]:
                module = getattr(thing, "__module__", None)
                if callable(thing) and isinstance(module, str) and place_of(module) in ("local", "ours"):
                    self.visit(thing)

    def _value(self, name: str, value: Any, uses: _Uses) -> None:
        self._write("name", name)
        if isinstance(value, types.ModuleType):
            self.visit_module(value, None if "getattr" in uses.names else uses.attributes)
        else:
            self.visit(value)

    def write_bytecode(self, code: types.CodeType) -> None:
        """Write down what code does, not where it stands."""
        self._write("code", code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, code=True)
        self._write(code.co_argcount, code.co_kwonlyargcount, code.co_flags, code=True)
        documentation = code.co_consts[0] if code.co_consts and isinstance(code.co_consts[0], str) else None
        for place, constant in enumerate(code.co_consts):
            if isinstance(constant, types.CodeType):
                self.write_bytecode(constant)
            elif isinstance(constant, frozenset):
                self._write("set", *map(repr, sorted(constant, key=rank)), code=True)
            elif place or constant is not documentation or reads_first_constant(code):
                self._write(type(constant).__name__, repr(constant), code=True)

    def visit_import(self, wanted: Import, namespace: Mapping[str, Any], uses: _Uses) -> None:
        """Follow an import inside a function; what it would import when it is called, it imports now.

        Every scoring process is then given the module that the notebook has, whatever happens to the file.
        """
        name = wanted.name
        if wanted.level:
            package = namespace.get("__package__") or namespace.get("__name__", "").rpartition(".")[0]
            try:
                name = importlib.util.resolve_name("." * wanted.level + name, package)
            except ImportError:
                self._beyond.add(f"import {'.' * wanted.level}{name}")
                return
        if place_of(name) == "local" and name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001  # a module of the user's may raise anything: the call will show it
                self._beyond.add(f"import {name}")
                return
        self._write("import", name)
        used = frozenset({*uses.attributes, *wanted.wanted})
        for part in wanted.wanted:
            if f"{name}.{part}" in sys.modules and place_of(f"{name}.{part}") == "local":
                self.visit_module(sys.modules[f"{name}.{part}"], uses.attributes)
        if name in sys.modules:
            self.visit_module(sys.modules[name], used)
        else:
            self._outside(name, name)

    def visit_module(self, module: types.ModuleType, used: frozenset[str] | None) -> None:
        """Look at the names that are used of a module; at all of them, where that cannot be known."""
        name = module.__name__
        if self._outside(name, name):
            return
        known = self._modules.get(name, set())
        named = [part for part in list(vars(module)) if not part.startswith("__")]
        wanted = named if used is None else [part for part in named if part in used]
        self._modules[name] = None if used is None or known is None else known | set(wanted)
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            self.visit_module(sys.modules[parent], frozenset({child}))
        for part in sorted(set(wanted) - (known or set())):
            self._write("of", name, part)
            value = vars(module)[part]
            if isinstance(value, types.ModuleType):
                if value.__name__ != name:
                    self.visit_module(value, used)
            else:
                self.visit(value)

    def visit_class(self, cls: type) -> None:
        if self._outside(cls.__module__, f"{cls.__module__}.{cls.__qualname__}"):
            return
        self._write("class", cls.__qualname__, code=True)
        self._each("bases", *cls.__bases__)
        for name, value in sorted(vars(cls).items()):
            bookkeeping = name.startswith(("__", "_abc_")) and not isinstance(value, _METHODS)
            if not bookkeeping:
                self._write("attribute", name, code=True)
                self.visit(value)

    def visit_builtin(self, function: Any) -> None:
        owner = getattr(function, "__self__", None)
        module = getattr(function, "__module__", None) or ""
        self._write("built-in", module, function.__qualname__)
        if owner is not None and not isinstance(owner, types.ModuleType):
            self.visit(owner)
        elif module:
            self._outside(module, f"{module}.{function.__qualname__}")

    def visit_mapping(self, mapping: Mapping[Any, Any]) -> None:
        items = list(mapping.items())  # at once: another thread may change it
        self._write("mapping", type(mapping).__name__, len(items))
        if not self._plain(items):
            for key, value in sorted(items, key=lambda item: rank(item[0])):
                self.visit(key)
                self.visit(value)

    def visit_sequence(self, items: "list[Any] | tuple[Any, ...] | deque[Any]") -> None:
        self._write("sequence", type(items).__name__, len(items))
        items = list(items)
        if not self._plain(items):
            for item in items:
                self.visit(item)

    def _plain(self, items: list[Any]) -> bool:
        """Write down many items of plain data at once, without looking at each."""
        if len(items) < _MANY:
            return False
        try:
            self._write(hashlib.sha256(marshal.dumps(items, 2)).hexdigest())
        except ValueError:  # it holds other things
            return False
        return True

    def visit_object(self, thing: Any) -> None:
        cls = type(thing)
        if hasattr(cls, "identified"):  # a reward, a part of one, or a judge
            self.visit(thing.identified())
            self._beyond.update(getattr(thing, "beyond", ()))
        elif cls.__name__ in _WRITTEN:
            self._write(cls.__name__, repr(thing))
        elif isinstance(thing, PurePath):
            self.visit_path(thing)
        elif cls.__module__.partition(".")[0] in ("numpy", "torch", "pandas") and self.visit_array(thing):
            return
        elif "__wrapped__" in getattr(thing, "__dict__", ()):  # functools.lru_cache
            self._each("wrapped", thing.__wrapped__)
        elif place_of(cls.__module__) in ("local", "ours"):
            self._each("object", cls, dict(_attributes_of(thing)))
        else:
            self.visit_foreign(thing)

    def visit_foreign(self, thing: Any) -> None:
        """Note an object of a package or of Python by its class; what it holds may change all the time."""
        cls = type(thing)
        name = f"{cls.__module__}.{cls.__qualname__}"
        self._write("object of", name)
        if cls.__module__.partition(".")[0] in _WITHOUT_BEARING:
            return
        self._outside(cls.__module__, name)
        if (
            place_of(cls.__module__) == "stdlib"
            and not hasattr(thing, "__next__")
            and not callable(thing)
            and not dict(_attributes_of(thing))
        ):
            return  # a sentinel
        self._beyond.add(f"an object of {name}")
        self._users(value for _, value in _attributes_of(thing))
        if not hasattr(cls, "score_answer"):
            return
        for key, value in sorted(
            _attributes_of(thing), key=operator.itemgetter(0)
        ):  # a data set: its configuration
            if isinstance(value, _ATOMS) or is_dataclass(value):
                self._write(key, re.sub(" at 0x[0-9a-f]+", "", repr(value)))

    def visit_path(self, path: PurePath) -> None:
        if path.is_relative_to(PACKAGE):
            file = Path(path)
            self._write(
                "file", path.name, hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
            )
        else:
            self._write("path", path)

    def visit_array(self, thing: Any) -> bool:
        """Write down what an array, a tensor or a frame holds."""
        size = getattr(thing, "nbytes", None)
        if callable(getattr(thing, "detach", None)):  # torch's
            thing = thing.detach().cpu()
            size = thing.numel() * thing.element_size()
        elif hasattr(thing, "memory_usage"):  # pandas'
            usage = thing.memory_usage(deep=True)
            size = int(usage.sum()) if hasattr(usage, "sum") else int(usage)
        if not isinstance(size, int):
            return False
        self._write(type(thing).__name__, getattr(thing, "dtype", ""), tuple(thing.shape))
        self._bytes += size
        if self._bytes > _LARGE:
            self._beyond.add(f"arrays beyond {_LARGE >> 20} MiB")
        elif hasattr(thing, "memory_usage"):
            self._write(hashlib.sha256(thing.to_csv().encode()).hexdigest())
        elif getattr(getattr(thing, "dtype", None), "hasobject", False):
            self.visit(thing.tolist())
        else:
            if hasattr(thing, "numel"):  # torch's, of whatever dtype
                thing = thing.contiguous().reshape(-1).view(sys.modules["torch"].uint8).numpy()
            self._write(hashlib.sha256(thing.tobytes()).hexdigest())
        return True

    def _outside(self, module: str, name: str) -> bool:
        """Write down what is not the user's, and say so; packages by their version."""
        place = place_of(module)
        if place in ("local", "ours"):
            return False
        top = module.partition(".")[0]
        self._write("outside", name)
        if place == "library":
            self._write(_release_of(top))
            if top != "tensafe_nb":
                self._beyond.add(_release_of(top))
        elif top in _OUTSIDE:
            self._beyond.add(top)
        return True


def _is_of_user(thing: Any) -> bool:
    return place_of(type(thing).__module__) in ("local", "ours")


def reads_first_constant(code: types.CodeType) -> bool:
    """Whether a text that may be a function's documentation is also used by its code."""
    return any(
        step.opname.startswith(("LOAD_CONST", "RETURN_CONST", "KW_NAMES")) and step.arg == 0
        for step in dis.get_instructions(code)
    )


def _attributes_of(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield an object's attributes."""
    yield from list(getattr(thing, "__dict__", {}).items())
    for cls in type(thing).__mro__:
        slots: str | Iterable[str] = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(thing, name):
                yield name, getattr(thing, name)


def rank(key: Any) -> tuple[str, str]:
    return type(key).__name__, repr(key) if isinstance(key, _ATOMS) else str(getattr(key, "__qualname__", ""))
