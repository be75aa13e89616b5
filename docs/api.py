"Pages of the API, of the installed package: signature, parameters with their comments, what is returned, docstring."
import ast
import importlib.util
import inspect
import re
from html import escape
from pathlib import Path

from fastcore.docments import docments


def plain(text):
    "One line of a docstring or comment as markdown that shows it literally, code spans kept."
    pieces = re.split(r"(`[^`\n]+`)", " ".join(text.split()))
    return "".join(p if i % 2 else re.sub(r"([*_|\[\]~])", r"\\\1", escape(p, quote=False)) for i, p in enumerate(pieces))


def definitions(module):
    "Exported name -> its statement in the module's file."
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else [node]
        for target in targets:
            for leaf in ast.walk(target) if isinstance(target, ast.expr) else [target]:
                if name := getattr(leaf, "name", None) or getattr(leaf, "id", None): found.setdefault(name, node)
    return {name: found[name] for name in module.__all__ if name in found}


def borrowed(module):
    "Exported name -> the module that it comes from, where that is another one."
    return {alias.asname or alias.name: importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)
            for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ImportFrom)
            for alias in node.names if (alias.asname or alias.name) in module.__all__}


def arguments(node):
    "Name, type and default, as written, of each parameter of a function."
    args, given = node.args, [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(given) - len(args.defaults)) + args.defaults
    rows = [*zip(given, defaults), *([(args.vararg, None)] if args.vararg else []),
            *zip(args.kwonlyargs, args.kw_defaults), *([(args.kwarg, None)] if args.kwarg else [])]
    star = {id(args.vararg): "*", id(args.kwarg): "**"}
    return [(star.get(id(arg), "") + arg.arg, *(ast.unparse(x) if x else "" for x in (arg.annotation, default)))
            for arg, default in rows if arg.arg not in ("self", "cls")]


def fields(node):
    "The same of the fields of a dataclass."
    return [(f.target.id, ast.unparse(f.annotation), ast.unparse(f.value) if f.value else "") for f in node.body if isinstance(f, ast.AnnAssign)]


def signature(name, rows, returns):
    "The call, on one line where it fits."
    words = [n + (f": {t}" if t else "") + (f" = {d}" if d and t else f"={d}" if d else "") for n, t, d in rows]
    line = f"{name}({', '.join(words)})" + (f" -> {returns}" if returns else "")
    broken = f"{name}(\n" + "".join(f"    {word},\n" for word in words) + ")" + (f" -> {returns}" if returns else "")
    return f"```python\n{line if len(line) <= 96 else broken}\n```"


def comments(thing):
    "Comments beside the parameters, by name."
    try: return {name.lstrip("*"): comment for name, comment in docments(thing, returns=True).items() if comment}
    except (TypeError, ValueError, OSError): return {}


def table(rows, said, returns):
    "Parameters and what is returned; nothing when there is nothing to say."
    code = lambda text: f"`{text}`".replace("|", "&#124;") if "|" not in text else "<code>" + text.replace("|", "&#124;").replace("<", "&lt;") + "</code>"
    lines = [f"| {code(n)} | {code(t) if t else ''} | {code(d) if d else ''} | {plain(said.get(n.lstrip('*'), ''))} |" for n, t, d in rows]
    if returns: lines.append(f"| *returns* | {code(returns)} | | {plain(said.get('return', ''))} |")
    return "\n".join(["| parameter | type | default | meaning |", "|---|---|---|---|", *lines]) if lines else ""


def docstring(node):
    return "\n\n".join(plain(part) for part in (ast.get_docstring(node) or "").split("\n\n"))


def function(node, thing, name):
    rows, returns = arguments(node), ast.unparse(node.returns) if node.returns else ""
    return [signature(name, rows, returns), docstring(node), table(rows, comments(thing), returns)]


def klass(node, thing):
    "A class: how it is made, then its public methods."
    methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
    rows = arguments(methods["__init__"]) if "__init__" in methods else fields(node)
    bases = ", ".join(map(ast.unparse, node.bases))
    yield from (signature(node.name, rows, ""), docstring(node), f"A subclass of `{bases}`." if bases else "", table(rows, comments(thing), ""))
    for name, method in methods.items():
        if not name.startswith("_") and (ast.get_docstring(method) or not bases):
            yield from (f"### {node.name}.{name} {{ #{node.name}.{name} }}", *function(method, inspect.unwrap(getattr(thing, name)), name))


def entry(name, node, thing, source):
    "One exported name."
    if isinstance(node, ast.ClassDef): body = klass(node, thing)
    elif isinstance(node, ast.FunctionDef): body = function(node, inspect.unwrap(thing), name)
    else: body = ["```python\n" + "\n".join(ast.unparse(node).splitlines()[:12])[:1200] + "\n```"]
    return [f"## {name} {{ #{name} }}", f"{source}, line {node.lineno}\n{{: .made }}", *body]


def page(name, notebook):
    "Markdown of the module's page; `notebook` is the link to the notebook that it is written in."
    module = importlib.import_module(name)
    file = Path("medkd", *name.split(".")[1:])
    file = file/"__init__.py" if hasattr(module, "__path__") else file.with_suffix(".py")
    parts = [f"# {plain(name)}", plain(module.__doc__ or ""), f"Written in [{Path(notebook).stem}]({notebook})."]
    for symbol, node in definitions(module).items():
        parts += entry(symbol, node, getattr(module, symbol), f"[source: {file}]({notebook}#def-{symbol})")
    if found := borrowed(module): parts.append("\n".join(["| name | defined in |", "|---|---|", *(f"| `{symbol}` | {origin} |" for symbol, origin in found.items())]))
    return "\n\n".join(part for part in parts if part) + "\n"
