"""The laws of the house that a script can check, and the table by which it is measured.

    python .ci/laws.py           # every breach, by file; fails when there is one
    python .ci/laws.py record    # write down what is open (.ci/laws_open.txt); it may only become shorter
    python .ci/laws.py table     # lines, tokens, demonstrations, documented methods
"""
import ast, io, json, re, statistics, sys, tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPEN = ROOT / ".ci/laws_open.txt"
OPTIONAL = {"rdkit", "transformers", "esm", "cell_eval", "scperteval", "loompy", "mudata", "polars", "zarr"}
LAZY = {"cli", "__init__"}                # the shell must start fast
MODULES = sorted(p for p in (ROOT / "biojepa").glob("*.py") if p.name != "_modidx.py")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(x.startswith((".", "_")) for x in p.relative_to(ROOT).parts))
BOOK = [p for p in NOTEBOOKS if p.parent.name == "nbs" and p.name[0].isdigit()]


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def is_code(cell): return cell["cell_type"] == "code"
def exported(cell): return is_code(cell) and bool(re.search(r"^#\|\s*exports?\b", source(cell), re.M))


def parsed(text):
    "The tree of a cell, or None where it holds shell or magic lines."
    try: return ast.parse(text)
    except SyntaxError: return None


def only_imports(text):
    "Does this cell do nothing but import, or close the module?"
    tree = parsed(text)
    return tree is not None and all(isinstance(n, (ast.Import, ast.ImportFrom)) or ast.unparse(n) == "document(globals())" for n in tree.body)


def module_of(path):
    "The module that a notebook exports to, or None."
    found = [re.search(r"^#\|\s*default_exp (\w+)", source(c), re.M) for c in cells(path)]
    return next((m[1] for m in found if m), None)


def imports_run_down():
    "A notebook imports lower numbers only, in its demonstrations too."
    place = {module_of(p): p.stem for p in BOOK}
    for path in BOOK:
        for name in re.findall(r"^\s*from biojepa\.(\w+) import", "\n".join(source(c) for c in cells(path) if is_code(c)), re.M):
            if name not in place: yield f"{path.name} imports {name}, which no notebook exports"
            elif place[name] > path.stem: yield f"{path.name} imports {name}, which comes later ({place[name]})"


def imports_stand_at_the_top():
    "No import inside a function, except of an optional package and in the shell."
    for path in MODULES:
        if path.stem in LAZY or path.stem.startswith("cli_"): continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
            for n in ast.walk(function):
                names = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or ""] if isinstance(n, ast.ImportFrom) else []
                for name in names:
                    if name.split(".")[0] not in OPTIONAL: yield f"{path.name}:{n.lineno} imports {name} inside {function.name}"


def modules_are_small():
    "No module over 400 lines."
    for path in MODULES:
        n = len(path.read_text(encoding="utf-8").splitlines())
        if n > 400: yield f"{path.name} has {n} lines"


def lines_are_short():
    "At most 120 characters, at most 1 % over 100, in the library and in the code cells of its notebooks."
    texts = {p.name: re.sub(r"__all__ = \[.*?\]", "", p.read_text(encoding="utf-8"), flags=re.S).splitlines() for p in MODULES}
    texts |= {p.name: [l for c in cells(p) if is_code(c) for l in source(c).splitlines()] for p in NOTEBOOKS}
    for name, lines in texts.items():
        for l in lines:
            if len(l) > 120: yield f"{name}: {len(l)} characters: {l.strip()[:60]} ..."
    every = [l for p in MODULES for l in texts[p.name] if l.strip()]
    share = sum(len(l) > 100 for l in every) / len(every)
    if share > .01: yield f"{share:.1%} of the library's lines are over 100 characters"


def statements_are_plain():
    "No packed assignment of more than two names, no lambda with a name, no method attached by assignment."
    for path in MODULES:
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(n, ast.Assign): continue
            to = n.targets[0]
            if isinstance(to, ast.Tuple) and isinstance(n.value, ast.Tuple) and len(to.elts) > 2: yield f"{path.name}:{n.lineno} packs {len(to.elts)} assignments"
            if isinstance(to, ast.Name) and isinstance(n.value, ast.Lambda): yield f"{path.name}:{n.lineno} names a lambda {to.id}"
            if isinstance(to, ast.Attribute) and isinstance(to.value, ast.Name) and to.value.id[0].isupper(): yield f"{path.name}:{n.lineno} attaches {ast.unparse(to)}"


def runs(path):
    "Lengths of the runs of exported cells without a demonstration."
    out, now = [], 0
    for c in filter(is_code, cells(path)):
        if exported(c) and not only_imports(source(c)): now += 1
        elif not source(c).startswith("#| default_exp"):
            out.append(now)
            now = 0
    return [*out, now]


def imports_stand_alone():
    "A cell that imports does nothing else: the site runs such cells to document what they bring."
    for path in NOTEBOOKS:
        for c in filter(is_code, cells(path)):
            tree = parsed(source(c))
            kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body} if tree else set()
            if len(kinds) == 2: yield f"{path.name} imports within a cell that does more: {source(c).strip()[:40]!r}"


def cells_are_shown():
    "At most three exported cells in a row without a demonstration; no cell over 40 lines."
    for path in NOTEBOOKS:
        longest = max((len([l for l in source(c).splitlines() if l.strip()]) for c in cells(path) if is_code(c)), default=0)
        if longest > 40: yield f"{path.name} has a cell of {longest} lines"
        if path in BOOK and max(runs(path)) > 3: yield f"{path.name} has {max(runs(path))} exported cells in a row"


def public_functions():
    "(module, name, node) of every public function and method; not of properties."
    for path in MODULES:
        if path.stem in LAZY: continue
        for n in ast.parse(path.read_text(encoding="utf-8")).body:
            group = [(n.name + ".", m) for m in n.body] if isinstance(n, ast.ClassDef) and n.name[0] != "_" else [("", n)]
            for owner, f in group:
                if not isinstance(f, ast.FunctionDef) or f.name[0] == "_": continue
                how = [ast.unparse(d) for d in f.decorator_list]
                if any("property" in d or "as_prop" in d or "command" in d for d in how): continue
                yield path, owner + f.name, f


def arguments_are_explained():
    "Every public function and method has a docstring, and every argument of it a comment."
    sys.path.insert(0, str(ROOT))
    from biojepa.patching import comments
    for path, name, f in public_functions():
        if not ast.get_docstring(f): yield f"{path.name}: {name} has no docstring"
        known = comments(path.read_text(encoding="utf-8").splitlines(), f.lineno - 1)
        own = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
        lost = [a for a in own if a not in known]
        if lost: yield f"{path.name}: {name} does not explain {', '.join(lost)}"


def pages_are_short():
    "No page over 2,500 words; prose holds no typed numbers where it reads measured ones (the ladder)."
    for path in NOTEBOOKS:
        words = sum(len(source(c).split()) for c in cells(path) if c["cell_type"] == "markdown")
        if words > 2500: yield f"{path.name} has {words} words of prose"
    for path in NOTEBOOKS:
        if path.stem != "ladder": continue
        prose = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|\[[^\]]*\]", "", "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown"))
        typed = re.findall(r"(?<![\w.])[+-]?\d*\.\d+", prose)
        if typed: yield f"{path.name} types {len(typed)} measured numbers in prose: {', '.join(typed[:5])}"


def sidebar_is_whole():
    "Every page stands in the sidebar, once, and nothing else does."
    listed = re.findall(r"[\w/]+\.ipynb", (ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    here = [p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS]
    yield from (f"{p} is not in the sidebar" for p in sorted(set(here) - set(listed)))
    yield from (f"the sidebar lists {p}, which is not there" for p in sorted(set(listed) - set(here)))
    yield from (f"{p} stands twice in the sidebar" for p in sorted({p for p in listed if listed.count(p) > 1}))


LAWS = (imports_run_down, imports_stand_at_the_top, modules_are_small, lines_are_short, statements_are_plain, cells_are_shown, imports_stand_alone, arguments_are_explained, pages_are_short, sidebar_is_whole)


def tokens_by_line(text):
    "How many tokens each line of code has."
    count = {}
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING)
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        if t.type not in skip: count[t.start[0]] = count.get(t.start[0], 0) + 1
    return list(count.values())


def table():
    "The figures of the house, one a line."
    text = [p.read_text(encoding="utf-8") for p in MODULES]
    lines = [l for t in text for l in t.splitlines() if l.strip()]
    tokens = sorted(n for t in text for n in tokens_by_line(t))
    yield "lines over 120 characters", f"{100 * sum(len(l) > 120 for l in lines) / len(lines):.1f} %"
    yield "lines over 100 characters", f"{100 * sum(len(l) > 100 for l in lines) / len(lines):.1f} %"
    yield "tokens per line of code, mean / p90", f"{statistics.mean(tokens):.1f} / {tokens[int(.9 * len(tokens))]}"
    code = [[c for c in cells(p) if is_code(c) and not only_imports(source(c)) and not source(c).startswith("#| default_exp")] for p in BOOK]
    pairs = [(a, b) for page in code for a, b in zip(page, [*page[1:], None]) if exported(a)]
    yield "exported cells followed at once by a demonstration", f"{100 * sum(b is not None and not exported(b) for _, b in pairs) / len(pairs):.0f} %"
    yield "longest run of exported cells", str(max(max(runs(p)) for p in BOOK))
    functions = list(public_functions())
    bad = {x.split(" does not")[0].split(" has no")[0] for x in arguments_are_explained()}
    yield "public functions and methods explained whole", f"{len(functions) - len(bad)} of {len(functions)}"
    yield "lines of the library", str(len(lines))
    words = sum(len(source(c).split()) for p in NOTEBOOKS for c in cells(p) if c["cell_type"] == "markdown")
    loc = sum(len([l for l in source(c).splitlines() if l.strip()]) for p in NOTEBOOKS for c in cells(p) if is_code(c))
    yield "words of prose per line of code", f"{words / loc:.1f}"


def main():
    if sys.argv[1:] == ["table"]:
        for name, value in table(): print(f"| {name} | {value} |")
        return
    bad = [f"{law.__name__}: {x}" for law in LAWS for x in law()]
    known = set(OPEN.read_text(encoding="utf-8").splitlines()) if OPEN.exists() else set()
    new = [x for x in bad if re.sub(r":\d+ ", ": ", x) not in known]
    if sys.argv[1:] == ["record"]: OPEN.write_text("\n".join(sorted({re.sub(r":\d+ ", ": ", x) for x in bad})) + "\n")
    print(*new, f"{len(new)} new breaches of {len(LAWS)} laws, {len(bad) - len(new)} that are known and open", sep="\n")
    sys.exit(bool(new))


if __name__ == "__main__": main()
