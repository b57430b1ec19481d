"""Writes labtasker-stubs/, what type checkers read where labtasker is installed: a single module can't say that it is typed.

`python3 tests/stubs.py` makes both files from the annotations in labtasker.py; test_types.py compares. Needs Python 3.9."""
import ast
import sys

from harness import MODULE, ROOT

sys.path.insert(0, str(ROOT))  # where this is run as a script
import labtasker  # noqa: E402

FOLDER = ROOT / "labtasker-stubs"
HEAD = "# Made from labtasker.py by tests/stubs.py.\n"
WIDTH = 120


class _Unquote(ast.NodeTransformer):
    """Replaces annotations that are text by what they say."""

    def visit_Constant(self, node):
        return self.visit(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else node

    def visit_Subscript(self, node):
        return node if isinstance(node.value, ast.Name) and node.value.id == "Literal" else self.generic_visit(node)


def unquoted(node):
    """Return an annotation as it stands in a stub."""
    return ast.unparse(_Unquote().visit(node))


def is_for_checkers(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def parameter(arg, default, stars=""):
    text = stars + arg.arg + (": " + unquoted(arg.annotation) if arg.annotation else "")
    return text if default is None else "%s = %s" % (text, ast.unparse(default) if isinstance(default, ast.Constant) else "...")


def parameters(function):
    """Return the parameters as they stand in a stub; raise ValueError for one without an annotation, but `self`."""
    given = function.args
    bare = [arg.arg for arg in given.args + given.kwonlyargs + [given.vararg, given.kwarg] if arg and not arg.annotation and arg.arg != "self"]
    if bare or not function.returns:
        raise ValueError("labtasker.py:%d: %s has no types for %s" % (function.lineno, function.name, bare or "its result"))
    assert not given.posonlyargs
    found = [parameter(arg, default) for arg, default in zip(given.args, [None] * (len(given.args) - len(given.defaults)) + given.defaults)]
    if given.vararg or given.kwonlyargs:
        found.append(parameter(given.vararg, None, "*") if given.vararg else "*")
    found += [parameter(arg, default) for arg, default in zip(given.kwonlyargs, given.kw_defaults)]
    return found + ([parameter(given.kwarg, None, "**")] if given.kwarg else [])


def function_stub(node):
    """Return the lines of a function's stub."""
    found, end = parameters(node), ") -> %s: ..." % unquoted(node.returns)
    lines = ["@" + ast.unparse(one) for one in node.decorator_list]
    whole = "def %s(%s%s" % (node.name, ", ".join(found), end)
    if len(whole) <= WIDTH - 4:
        return lines + [whole]
    return lines + ["def %s(" % node.name] + ["    %s," % one for one in found] + [end]


def member_stubs(node):
    """Yield the lines of a class member's stub: of methods that have types, of constants, and of what is for checkers."""
    if is_for_checkers(node):
        for item in node.body:
            yield from member_stubs(item)
    elif isinstance(node, ast.AnnAssign):
        yield "%s: %s" % (node.target.id, unquoted(node.annotation))
    elif isinstance(node, ast.FunctionDef) and (node.returns or not node.name.startswith("_")):
        yield from function_stub(node)
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.targets[0].id.islower():
        name, value = node.targets[0].id, node.value.value
        if name == "__hash__":
            yield "__hash__: ClassVar[None]  # type: ignore[assignment]"
        elif not name.startswith("_"):
            yield "%s: %s" % (name, type(value).__name__)


def class_stub(node):
    """Return the lines of a class's stub."""
    lines = [line for item in node.body for line in member_stubs(item)]
    given = [ast.unparse(base) for base in node.bases] + ["%s=%s" % (word.arg, ast.unparse(word.value)) for word in node.keywords]
    head = "class %s%s:" % (node.name, "(%s)" % ", ".join(given) if given else "")
    return [head] + ["    " + line for line in lines] if lines else [head + " ..."]


def declared():
    """Return {name: lines of its stub} of all functions, classes and aliases that have types, {name: import}."""
    stubs, imported = {}, {"ClassVar": "typing"}
    for top in ast.parse(MODULE.read_text(encoding="utf-8")).body:
        for node in top.body if is_for_checkers(top) else [top]:
            if isinstance(node, ast.ImportFrom):
                imported.update((alias.name, node.module) for alias in node.names)
            elif isinstance(node, ast.Import):
                imported.update((alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ClassDef):
                stubs[node.name] = lambda node=node: class_stub(node)
            elif isinstance(node, ast.FunctionDef):
                stubs[node.name] = lambda node=node: function_stub(node)
            elif is_for_checkers(top):
                stubs[node.targets[0].id] = lambda node=node: ["%s = %s" % (node.targets[0].id, unquoted(node.value))]
    return stubs, imported


def names_in(lines):
    return {node.id for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def import_lines(used, imported):
    """Return the import statements for the names that are used; those that are public are exported."""
    lines = ["import %s" % name for name in sorted(used) if imported.get(name, "") is None]
    for module in sorted({imported[name] for name in used if imported.get(name)}):
        names = [name + " as " + name if name in labtasker.__all__ else name for name in sorted(used) if imported.get(name) == module]
        lines.append("from %s import %s" % (module, ", ".join(names)))
    return lines


def stub_files():
    """Return {file name: text}."""
    (stubs, imported), found = declared(), {}
    models = sorted(name for name in vars(labtasker.api_models) if not name.startswith("_"))
    left = set(labtasker.__all__) - {"api_models"} | set(models)
    used = left & set(imported)
    while left:
        name = left.pop()
        if name in stubs and name not in found:
            found[name] = stubs[name]()
            left |= names_in(found[name])
            used |= names_in(found[name]) & set(imported)
    text = HEAD + "\n".join(import_lines(used, imported)) + "\n\nfrom . import api_models as api_models\n\n"
    text += "__version__: str\n__all__ = [%s\n]\n" % "".join("\n    %r," % name for name in labtasker.__all__).replace("'", '"')
    for name in stubs:
        if name in found:
            text += "\n" + "\n".join(found[name]) + "\n"
    return {"__init__.pyi": text, "api_models.pyi": HEAD + "from . import (%s\n)\n" % "".join(
        "\n    %s as %s," % (name, name) for name in models)}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in stub_files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
