"""Compiles a snippet, with `return` and `await` allowed at its top level.

The code keeps module semantics: what it binds are globals, `locals()` is
`globals()`, qualified names and line numbers are those of a plain module. This
module only compiles; nothing of the snippet's runs here but its `__future__`
imports.

`await` is the compiler's own top-level await. The compiler has no top-level
`return`; code that uses one is put into a function whose every name is declared
global, and the flags that make a code object a function's are then taken off it.
What a function can't contain, or treats differently, is rewritten: annotated globals, star
imports and lazy ones.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ast
    import warnings
    from collections.abc import Callable, Iterator
    from types import CodeType
    from typing import Any

ALLOW_TOP_LEVEL_AWAIT = 0x2000
DEEP = 30_000  # calls: more than the compiler lets any source take
CO_OPTIMIZED = 0x1
CO_NEWLOCALS = 0x2
CO_COROUTINE = 0x80
CO_FUTURE_ANNOTATIONS = 0x1000000

_CONDITIONAL = "__conditional_annotations__"
_MODULE = "<module>"
_LOCAL_PREFIX = _MODULE + ".<locals>."


def prepare(
    source: str | bytes, filename: str, namespace: dict[str, Any]
) -> tuple[CodeType, CodeType | None]:
    """Compile `source` for `namespace`: the code, and its last `return` expression.

    The expression is there only if it is made of names, constants and literals of
    lists, dicts and tuples. Raises what `compile` raises.
    """
    try:
        return _compile(source, filename), None
    except SyntaxError as error:
        if error.msg != "'return' outside function":
            raise
    global ast, warnings  # they cost what needs no tree some milliseconds
    import ast
    import warnings

    # The compiler goes many times as deep; what makes a tree of nodes, and walks it, does not.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, DEEP))
    try:
        return _with_top_level_return(source, filename, namespace)
    finally:
        sys.setrecursionlimit(limit)


def _compile(source: Any, filename: str, flags: int = 0) -> Any:
    flags |= ALLOW_TOP_LEVEL_AWAIT
    return compile(source, filename, "exec", flags=flags, dont_inherit=True)


def _with_top_level_return(
    source: str | bytes, filename: str, namespace: dict[str, Any]
) -> tuple[CodeType, CodeType | None]:
    def parse() -> Any:
        return _compile(source, filename, ast.PyCF_ONLY_AST)

    # The same code less its returns is a plain module. It shows every other syntax
    # error as the compiler words it, which names are bound, and whether it awaits.
    returns: list[ast.Return] = []

    def without_return(node: ast.stmt) -> list[ast.stmt] | None:
        if not isinstance(node, ast.Return):
            return None
        returns.append(node)
        if node.value is None or isinstance(node.value, ast.Constant):
            return [ast.copy_location(ast.Pass(), node)]  # a constant could be a docstring
        return [ast.copy_location(ast.Expr(node.value), node)]

    with warnings.catch_warnings(record=True) as told:
        plain: CodeType = _compile(_rewrite(parse(), without_return), filename)
    if told:
        _warn_of_the_rest(told, parse, filename)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _as_function(parse(), source, filename, namespace, plain, returns)


def _warn_of_the_rest(told: list[Any], parse: Callable[[], Any], filename: str) -> None:
    """Warn of what the first attempt to compile did not reach: it ended at the first `return`."""
    with warnings.catch_warnings(record=True) as given:
        try:
            _compile(parse(), filename)
        except SyntaxError:
            pass
    before = [(each.lineno, str(each.message)) for each in given]
    for each in told:
        if (each.lineno, str(each.message)) in before:
            before.remove((each.lineno, str(each.message)))
        else:
            warnings.warn_explicit(each.message, each.category, filename, each.lineno)


def _as_function(
    tree: ast.Module,
    source: str | bytes,
    filename: str,
    namespace: dict[str, Any],
    plain: CodeType,
    returns: list[ast.Return],
) -> tuple[CodeType, CodeType | None]:
    namespace["__doc__"] = ast.get_docstring(tree, clean=False)
    prelude: list[ast.stmt] = []
    while tree.body and _is_prelude(tree.body[0]):
        prelude.append(tree.body.pop(0))
    statements = _Statements(prelude, namespace)
    body = _rewrite(tree, statements.for_function).body
    statements.prepare_annotations(plain)

    header = "async def" if plain.co_flags & CO_COROUTINE else "def"
    shell = ast.parse(f"{header} f(): pass")
    function = shell.body[0]
    assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    function.name = _MODULE
    names = [*plain.co_names, *_walruses(source, tree)]
    function.body = [ast.Global(names), *body] if names else body
    shell.body = [*prelude, function]
    exec(_compile(ast.fix_missing_locations(shell), filename), namespace)
    code = statements.as_module(namespace.pop(_MODULE).__code__)
    if sys.version_info >= (3, 15):
        code = _with_imports_of(plain, code)

    last = max(returns, key=lambda node: (node.lineno, node.col_offset)).value
    partial = None
    displays = (ast.Name, ast.Constant, ast.Dict, ast.List, ast.Tuple)
    kinds = (*displays, ast.UnaryOp, ast.USub, ast.expr_context)
    if last is not None and all(isinstance(node, kinds) for node in ast.walk(last)):
        expression = ast.Expression(last)
        partial = compile(expression, filename, "eval", dont_inherit=True)
    return code, partial


def _walruses(source: str | bytes, tree: ast.Module) -> list[str]:
    """The names that `:=` binds; one in a comprehension is only in that one's code object."""
    if b":=" not in source if isinstance(source, bytes) else ":=" not in source:
        return []  # a walk takes its time
    return [node.target.id for node in ast.walk(tree) if isinstance(node, ast.NamedExpr)]


class _Statements:
    """Rewrites what a function can't contain, or treats differently from a module."""

    def __init__(self, prelude: list[ast.stmt], namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._annotated: list[tuple[ast.AnnAssign, ast.Constant]] = []
        self._has_text = any(  # annotations are kept as text, and at once
            alias.name == "annotations"
            for node in prelude
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        )
        self._is_lazy = sys.version_info >= (3, 14) and not self._has_text
        self._objects: dict[str, object] = {
            "\0update": namespace.update,
            "\0pairs": _public_pairs,
            "\0import": __import__,
            "\0scope": namespace,
        }

    def for_function(self, node: ast.stmt) -> list[ast.stmt] | None:
        if isinstance(node, ast.AnnAssign):
            made = self._annotation(node)
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            made = [self._star_import(node)]
        else:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                vars(node)["is_lazy"] = 0  # see `_with_imports_of`
            return None
        return [ast.fix_missing_locations(ast.copy_location(each, node)) for each in made]

    def _annotation(self, node: ast.AnnAssign) -> list[ast.stmt]:
        if not node.simple:
            # A module evaluated these before Python 3.14, though it kept them nowhere.
            is_skipped = self._has_text or self._is_lazy
            return [node] if is_skipped else [node, ast.Expr(node.annotation)]
        assert isinstance(node.target, ast.Name)
        made: list[ast.stmt] = []
        if node.value is not None:
            made.append(ast.Assign([node.target], node.value))
        key = ast.Constant(node.target.id)
        if self._is_lazy:
            key = ast.Constant(0)  # see `prepare_annotations`
            seen = ast.Name(_CONDITIONAL, ast.Load())
            made.append(ast.Expr(ast.Call(ast.Attribute(seen, "add", ast.Load()), [key], [])))
        else:
            text = ast.Constant(_text(node.annotation)) if self._has_text else None
            notes = ast.Name("__annotations__", ast.Load())
            slot = ast.Subscript(notes, key, ast.Store())
            made.append(ast.Assign([slot], text or node.annotation))
        self._annotated.append((node, key))
        return made

    def prepare_annotations(self, plain: CodeType) -> None:
        """Make what the module `plain` makes before its first statement.

        From Python 3.14 on that is `__annotate__`, and the set of the annotations that have
        been reached, by the compiler's numbers.
        """
        if self._annotated and not self._is_lazy:
            self._namespace.setdefault("__annotations__", {})
        elif self._annotated:
            from types import FunctionType

            numbers = _numbers_of_annotations(plain)
            for node, key in self._annotated:
                if node.lineno in numbers:  # else it is never reached
                    key.value = next(numbers[node.lineno], 0)
            codes = [each for each in plain.co_consts if isinstance(each, type(plain))]
            # The last: those of functions go before it, by the same name.
            annotate = [each for each in codes if each.co_name == "__annotate__"][-1]
            self._namespace["__annotate__"] = FunctionType(annotate, self._namespace)
        if _CONDITIONAL in plain.co_names:  # also where no annotation is kept
            self._namespace.setdefault(_CONDITIONAL, set())

    def _star_import(self, node: ast.ImportFrom) -> ast.stmt:
        """`update(pairs(__import__(...)))`, of the objects that `as_module` puts there.

        All that can fail is C code, so that no frame of ours stands in a traceback.
        """
        update, pairs, load, scope = (ast.Constant(mark) for mark in self._objects)
        origin = [ast.Constant(node.module or ""), scope, ast.Constant(None)]
        what = [ast.Tuple([ast.Constant("*")], ast.Load()), ast.Constant(node.level)]
        module = ast.Call(load, [*origin, *what], [])
        return ast.Expr(ast.Call(update, [ast.Call(pairs, [module], [])], []))

    def as_module(self, code: CodeType) -> CodeType:
        """Make the function's code run as a module's does, with the objects in their places."""
        code = _qualified(code)
        get = self._objects.get
        constants = (get(each, each) if type(each) is str else each for each in code.co_consts)
        flags = code.co_flags & ~(CO_OPTIMIZED | CO_NEWLOCALS)
        return code.replace(co_consts=tuple(constants), co_flags=flags)


def _rewrite(tree: ast.Module, replace: Callable[[ast.stmt], list[ast.stmt] | None]) -> ast.Module:
    """Replace statements of the module's own scope, however deep they stand in it."""
    pending: list[Any] = [tree]
    while pending:
        block = pending.pop()
        for field in {"body", "orelse", "finalbody"}.intersection(block._fields):
            statements: list[ast.stmt] = []
            for statement in getattr(block, field):
                replacement = replace(statement)
                statements += [statement] if replacement is None else replacement
                if replacement is None and type(statement).__name__ not in _SCOPES:
                    pending.append(statement)
            setattr(block, field, statements)
        for field in ("handlers", "cases"):
            pending += getattr(block, field, ())
    return tree


_SCOPES = ("FunctionDef", "AsyncFunctionDef", "ClassDef")


def _public_pairs(module: Any) -> Iterator[tuple[str, Any]]:
    """What a star import binds; read only as it is iterated over."""
    import itertools

    public = [each for each in vars(module) if not each.startswith("_")]
    names = list(getattr(module, "__all__", public))
    for each in names:
        if not isinstance(each, str):
            kind = type(each).__name__
            raise TypeError(f"Item in {module.__name__}.__all__ must be str, not {kind}")
    return zip(names, map(getattr, itertools.repeat(module), names))


def _numbers_of_annotations(plain: CodeType) -> dict[int, Iterator[int]]:
    """By line, in order. Of the two copies of a `finally`, the one without an error is first."""
    from dis import get_instructions

    found: dict[int, list[int]] = {}
    code: Any = list(get_instructions(plain))
    for name, number, add in zip(code, code[1:], code[2:]):
        if name.argval == _CONDITIONAL and add.opname == "SET_ADD":
            found.setdefault(name.positions.lineno, []).append(number.argval)
    return {line: iter(found[line]) for line in found}


def _text(annotation: ast.expr) -> str:
    """An annotation as the compiler writes it as text; `ast.unparse` may differ."""
    tree = ast.parse("note: 0")
    vars(tree.body[0])["annotation"] = annotation
    scope: dict[str, Any] = {}
    exec(compile(tree, "", "exec", flags=CO_FUTURE_ANNOTATIONS, dont_inherit=True), scope)
    text: str = scope["__annotations__"]["note"]
    return text


def _is_prelude(node: ast.stmt) -> bool:
    """Whether it is a docstring or a `__future__` import."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__" and not node.level
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _with_imports_of(plain: CodeType, code: CodeType) -> CodeType:
    """Make each import eager, lazy or as the default is, as in the module.

    In a function, all are eager. The two low bits of the operand say which.
    """
    was_loaded = "opcode" in sys.modules
    from opcode import opmap

    if not was_loaded:
        del sys.modules["opcode"]  # for a module of the user's with this name

    def imports(code: Any) -> Iterator[tuple[int, object]]:
        for number, position in enumerate(code.co_positions()):
            if code.co_code[2 * number] == opmap["IMPORT_NAME"]:
                yield 2 * number + 1, position

    ways = {position: plain.co_code[at] & 3 for at, position in imports(plain)}
    patched = bytearray(code.co_code)
    for at, position in imports(code):
        patched[at] = patched[at] & ~3 | ways.get(position, 2)
    return code.replace(co_code=bytes(patched))


def _qualified(part: Any) -> Any:
    """Take the function's name off the qualified names in a code object, and in its constants."""
    if isinstance(part, str):  # before 3.11, such a name is a constant beside its code object
        return part.removeprefix(_LOCAL_PREFIX)
    if hasattr(part, "co_consts"):
        part = part.replace(co_consts=tuple(map(_qualified, part.co_consts)))
        if hasattr(part, "co_qualname"):
            part = part.replace(co_qualname=_qualified(part.co_qualname))
    return part
