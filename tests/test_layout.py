"""The wall that imports are elsewhere: the map, the reading order, the size of functions, the imports."""
import ast
import bisect
import collections
import functools
import io
import re
import statistics
import symtable
import sys
import tokenize

import pytest

from harness import MODULE, ROOT, TESTS

pytestmark = pytest.mark.slow  # not for its time: it says the same on every Python

parsed = functools.lru_cache(None)(ast.parse)


@functools.lru_cache(None)
def nodes_of(source):
    """Return all nodes of a source's tree."""
    return list(ast.walk(parsed(source)))


SOURCE = MODULE.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = parsed(SOURCE)
COMFORTS = (ROOT / "labtasker_cli.py").read_text(encoding="utf-8")
COMFORTS_TREE = parsed(COMFORTS)
BANNER = re.compile(r"# (\d+)\. (\w[\w ]*?) #+$")
AT_MODULE_LEVEL = {"collections", "datetime", "errno", "fcntl", "functools", "gc", "heapq", "itertools", "json", "math", "operator",
                   "os", "re", "sys", "threading", "time", "zlib"}
IF_THERE = {"tomllib", "annotationlib", "typing_extensions"}  # newer than the oldest Python, or not part of it: used where they are


@functools.lru_cache(None)
def banners():
    """Return [(line number, section number, name)] in the file's order."""
    found = [(number, BANNER.match(line)) for number, line in enumerate(LINES, 1)]
    return [(number, int(match.group(1)), match.group(2)) for number, match in found if match]


def section_of(line):
    """Return the number of the section that a line is in; 0 for the head."""
    return max([number for begin, number, _ in banners() if begin <= line], default=0)


def functions():
    found = [node for source in (SOURCE, COMFORTS) for node in nodes_of(source)
             if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert len(found) > 100
    return found


def length(node):
    return node.end_lineno - node.lineno + 1


def test_map_in_the_docstring_is_the_banners_in_the_file():
    in_map = re.findall(r"^ +(\d+)\. (\S+(?: \S+)*?)  +\S", ast.get_docstring(TREE, clean=False), re.M)
    in_file = [(str(number), name) for _, number, name in banners()]
    assert in_file == in_map
    assert [int(number) for number, _ in in_map] == list(range(1, 19))


def test_no_name_of_the_module_is_given_twice():
    """In one file a second function or constant of the same name silently replaces the first."""
    names = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names += [name.id for node in TREE.body if isinstance(node, ast.Assign) for target in node.targets for name in ast.walk(target)
              if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]  # `a, b = ...` too
    assert len(names) > 500 and sorted(names) == sorted(set(names))


def test_no_test_is_hidden_by_a_later_one_of_its_name():
    names = [(path.name, node.name) for path in sorted(TESTS.glob("test_*.py")) for node in parsed(path.read_text(encoding="utf-8")).body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(names) > 1000 and not [name for name, count in collections.Counter(names).items() if count > 1]


@pytest.mark.parametrize("line", [line for line, _, _ in banners()])
def test_banner_reaches_column_79_and_says_what_the_section_is_for(line):
    assert len(LINES[line - 1]) == 79
    assert LINES[line] == "#"
    comment = []
    for text in LINES[line + 1:]:
        if not text.startswith("# "):
            break
        comment.append(text[2:])
    assert 1 <= len(comment) <= 10
    tests = re.findall(r"test_\w+\.py", " ".join(comment))
    assert tests, "the banner names its tests"
    assert not [name for name in tests if not (TESTS / name).exists()]


def module_names():
    """Return {name: line where the module first defines it}."""
    lines = {}
    stack = list(TREE.body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [(alias.asname or alias.name).split(".")[0] for alias in node.names]
        else:
            names = [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
            stack.extend(ast.iter_child_nodes(node))
        for name in names:
            lines[name] = min(node.lineno, lines.get(name, node.lineno))
    return lines


def scopes(table):
    """Yield every function and class body, lambdas and comprehensions too."""
    for child in table.get_children():
        yield child
        yield from scopes(child)


def test_no_section_uses_a_name_that_a_later_one_defines():
    defined = {name: section_of(line) for name, line in module_names().items()}
    uses, backward = 0, []
    for scope in scopes(symtable.symtable(SOURCE, str(MODULE), "exec")):
        here = section_of(scope.get_lineno())
        for symbol in scope.get_symbols():
            name = symbol.get_name()
            if symbol.is_global() and symbol.is_referenced() and name in defined:
                uses += 1
                if defined[name] > here:
                    backward.append("%s (line %d, section %d) uses %s of section %d" % (
                        scope.get_name(), scope.get_lineno(), here, name, defined[name]))
    assert uses > 500
    assert not backward, "\n".join(backward)


def named_outside():
    """Return the names that labtasker_cli.py and the tests use of labtasker, also in programs and as texts."""
    found = set()
    for path in [ROOT / "labtasker_cli.py"] + sorted(TESTS.rglob("*.py")):
        for node in nodes_of(path.read_text(encoding="utf-8")):
            if isinstance(node, ast.ImportFrom) and node.module == "labtasker":
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update([node.value] if node.value.isidentifier() else re.findall(r"\b(?:L|labtasker)\.(\w+)", node.value))
    return found


def underscores(source, exempt):
    """Return (functions, classes and tables that lack an underscore though only their own section uses them, names that
    have one though another section uses them)."""
    lines, tree = source.splitlines(), parsed(source)
    starts = [(at, int(BANNER.match(line).group(1))) for at, line in enumerate(lines, 1) if BANNER.match(line)]

    def section(line):
        place = bisect.bisect_right(starts, (line, 99))
        return starts[place - 1][1] if place else 0
    defined = {node.name: section(node.lineno) for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    tables = {node.id: section(node.lineno) for item in tree.body if isinstance(item, ast.Assign) for node in ast.walk(item)
              if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    uses, texts = collections.defaultdict(set), {node.value for node in nodes_of(source) if isinstance(node, ast.Constant)}
    for node in nodes_of(source):
        if isinstance(node, ast.Name):
            uses[node.id].add(section(node.lineno))
    lacking = ["%s (section %d): name it _%s" % (name, here, name) for name, here in dict(tables, **defined).items()
               if not name.startswith(("_", "do_")) and uses[name] <= {here} and name not in exempt | texts]
    crossing = ["%s of section %d is used in %s: no underscore" % (name, here, sorted(uses[name] - {here}))
                for name, here in dict(tables, **defined).items() if re.match(r"_[^_]", name) and uses[name] - {here}]
    return lacking, crossing


def test_an_underscore_marks_what_a_section_keeps_to_itself():
    """Those without one are public, cross sections, or are used by the other file or a test; a command is do_..."""
    import labtasker
    text = "# 1. One %s\ndef f(): pass\nclass A: pass\ndef _g(): f()\n# 2. Two %s\ndef h(): return _g()\n" % ("#" * 68, "#" * 68)
    assert underscores(text, {"A"}) == (["f (section 1): name it _f", "h (section 2): name it _h"],
                                        ["_g of section 1 is used in [2]: no underscore"])
    exempt = named_outside() | set(labtasker.__all__) | set(vars(labtasker.api_models))
    assert len(exempt) > 500
    lacking, crossing = underscores(SOURCE, exempt)
    assert not lacking, "\n".join(lacking)
    assert not crossing, "\n".join(crossing)


def own_names(cls):
    """Return what a class itself defines: methods, class attributes, slots, and what it assigns to on self."""
    found = set()
    for node in cls.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            found.update(n.id for n in ast.walk(target) if isinstance(n, ast.Name)) if target is not None else None
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__slots__":
            found.update(word for n in ast.walk(node.value) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                         for word in n.value.split())
    found.update(n.attr for n in ast.walk(cls) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and is_self(n))
    return found


def is_self(node):
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def upward_attributes(source):
    """Return "Class.attribute" of what a class uses of itself but only a class that inherits it defines."""
    classes = {node.name: node for node in nodes_of(source) if isinstance(node, ast.ClassDef)}
    own = {name: own_names(node) for name, node in classes.items()}
    bases = {name: [b.id for b in node.bases if isinstance(b, ast.Name)] for name, node in classes.items()}

    def lineage(name):
        return {name}.union(*map(lineage, bases[name])) if name in classes else set()
    found = []
    for name, node in classes.items():
        mine = set().union(*(own[one] for one in lineage(name)))
        below = set().union(*(own[one] for one in classes if name in lineage(one)))
        used = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and is_self(n)}
        found += ["%s.%s" % (name, attr) for attr in sorted((used & below) - mine)]
    return found


def test_no_class_uses_what_only_its_heirs_define():
    """A class that reads upward through self is a slice of another; objects that hold each other are not."""
    sliced = "class A:\n  def f(self): return self.g()\nclass B(A):\n  def g(self): return 1\n"
    assert upward_attributes(sliced) == ["A.g"]
    assert upward_attributes(SOURCE) == []
    assert upward_attributes(COMFORTS) == []


def upward_strings(source, others=()):
    """Return (line, text) of text constants of a section that name a function of a later one, or of `others`."""
    lines, tree = source.splitlines(), parsed(source)
    starts = [(at, int(BANNER.match(line).group(1))) for at, line in enumerate(lines, 1) if BANNER.match(line)]

    def section(line):
        place = bisect.bisect_right(starts, (line, 99))
        return starts[place - 1][1] if place else 0
    defined = dict(dict.fromkeys(others, 99), **{n.name: section(n.lineno) for n in tree.body if isinstance(n, ast.FunctionDef)})
    return [(node.lineno, node.value) for node in nodes_of(source)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "_" in node.value
            and defined.get(node.value, 0) > section(node.lineno)]


def test_no_section_names_by_text_what_a_later_one_defines():
    """An operation that is named by text is a use as well; the other file's functions are later than all."""
    text = "# 1. One %s\nX = 'do_it'\n# 2. Two %s\ndef do_it():\n    pass\n" % ("#" * 68, "#" * 68)
    assert upward_strings(text) == [(2, "do_it")]
    others = [node.name for node in COMFORTS_TREE.body if isinstance(node, ast.FunctionDef)]
    assert len(others) > 30
    assert upward_strings(SOURCE, others) == []


def test_only_the_commands_load_the_other_file():
    """The engine works without labtasker_cli: who knows its name is the command line."""
    uses = [node for node in nodes_of(SOURCE) if isinstance(node, ast.Constant) and node.value in ("labtasker_cli", "labtasker_cli.py")]
    assert uses and not [node.lineno for node in uses if 0 < section_of(node.lineno) < banners()[-2][1]]


def test_no_section_but_the_api_runs_a_route():
    """One way through: who is above the API calls its functions, and reads no row's operation, prepare or run."""
    uses = [node for node in nodes_of(SOURCE) if isinstance(node, ast.Attribute) and node.attr in ("operation", "prepare")]
    assert uses and not [node.lineno for node in uses if section_of(node.lineno) != 8]


def test_the_server_knows_no_field_of_a_request():
    """Which requests wait, and for what, stands in ROUTES: the server reads no body."""
    fields = fields_of_routes() - {"reason", "status"}
    assert fields > {"eta_max", "required_fields"}
    named = [(node.lineno, node.value) for node in nodes_of(SOURCE) if isinstance(node, ast.Constant)
             and isinstance(node.value, str) and node.value in fields and section_of(node.lineno) == 9]
    assert named == []


def fields_of_routes():
    import labtasker
    return {name for route in labtasker.ROUTES.values() for fields in (route.fields, route.query) for name in fields}


def test_no_section_has_more_than_2100_lines():
    starts = [line for line, _, _ in banners()] + [len(LINES) + 1]
    assert not [LINES[a - 1] for a, b in zip(starts, starts[1:]) if b - a > 2100]


def test_no_function_is_longer_than_60_lines():
    assert not ["%s: %d" % (f.name, length(f)) for f in functions() if length(f) > 60]


def test_half_of_the_functions_have_seven_lines_or_fewer():
    assert statistics.median(length(f) for f in functions()) <= 7


def test_no_class_has_300_lines():
    classes = [node for source in (SOURCE, COMFORTS) for node in nodes_of(source) if isinstance(node, ast.ClassDef)]
    assert len(classes) > 10
    assert not ["%s: %d" % (c.name, length(c)) for c in classes if length(c) > 300]


def test_every_public_function_has_a_docstring():
    """A command's function, do_..., has the words beside it in the table COMMANDS instead."""
    public = [n for n in TREE.body + COMFORTS_TREE.body
              if isinstance(n, ast.FunctionDef) and not n.name.startswith(("_", "do_"))]
    assert len(public) > 50
    assert not [f.name for f in public if not ast.get_docstring(f)]


def test_no_line_is_longer_than_120():
    assert not [number for number, line in enumerate(LINES + COMFORTS.splitlines(), 1) if len(line) > 120]


MEASURED = re.compile(r"\d\s?(?:ms|us|µs|ns|%|percent|per cent)(?![\w(])|\b(?:half|twice|\d+ times) (?:as|the) (?:fast|slow|speed)")


def remarks(source):
    """Yield (line, text) of the comments and docstrings."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in nodes_of(source):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, ast.get_docstring(node) or ""


def test_no_comment_tells_what_was_measured():
    """A comment gives the reason; a figure rots, and belongs into the bench. A limit or a default is none."""
    for text in ("# takes 25 us", "# costs 7ms", "# in 40 % of the time", "# is twice as fast"):
        assert MEASURED.search(text)
    assert not MEASURED.search("# in 10 s, '%(lr)' of 100 items; a path is 5 ms_paths")
    found = [remark for text in (SOURCE, COMFORTS) for remark in remarks(text)]
    assert len(found) > 1000 and not [remark for remark in found if MEASURED.search(remark[1])]


def test_tests_sleep_in_wait_until_alone():
    """A test waits for what it is about, or says by pass_time() that nothing must happen; programs in texts may sleep."""
    sleepers, counted = [], 0
    for path in sorted(TESTS.glob("*.py")):
        for item in parsed(path.read_text(encoding="utf-8")).body:
            calls = [ast.unparse(node.func) if hasattr(ast, "unparse") else getattr(node.func, "attr", "") for node in ast.walk(item)
                     if isinstance(node, ast.Call)]
            counted += len(calls)
            if {"time.sleep", "sleep"} & set(calls) and (path.name, getattr(item, "name", "")) != ("harness.py", "wait_until"):
                sleepers.append((path.name, item.lineno))
    assert counted > 1000 and [name for name, _ in sleepers] == ["smoke.py"]  # which stands alone


SOURCES = [path for path in (MODULE, ROOT / "labtasker_cli.py", TESTS / "smoke.py") if path.exists()]


def imports(tree, nodes):
    """Return the top-level packages that these nodes import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_syntax_is_that_of_the_oldest_python(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.skipif(sys.version_info < (3, 10), reason="the list of the standard library is there from 3.10")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports_are_of_the_standard_library(path):
    source = path.read_text(encoding="utf-8")
    found = imports(parsed(source), nodes_of(source))
    assert found
    assert not found - sys.stdlib_module_names - IF_THERE - {"labtasker", "labtasker_cli"}


def test_importing_it_imports_little():
    """What every command would wait for; the rest is imported where it is used."""
    top, stack = set(), list(TREE.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            stack.extend(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            top |= imports(TREE, [node])
            stack.extend(ast.iter_child_nodes(node))
    assert top == AT_MODULE_LEVEL


# ---- The spine, and the public names

SPINE = re.findall(r"^ +([A-Za-z_.]+) \((\d+)\)  +\S", ast.get_docstring(TREE, clean=False), re.M)


def test_the_spine_names_functions_of_the_sections_that_it_tells():
    found = {node.name: node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    methods = {"%s.%s" % (node.name, item.name): item for node in found.values() for item in node.body
               if isinstance(item, ast.FunctionDef)}
    assert len(SPINE) > 9
    assert [(name, str(section_of(dict(found, **methods)[name].lineno))) for name, _ in SPINE] == SPINE


def test_a_submission_calls_the_functions_in_the_order_of_the_spine(tmp_path, monkeypatch):
    import labtasker
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LABTASKER_URL", raising=False)
    monkeypatch.setenv("LABTASKER_ROOT", str(tmp_path / ".labtasker"))
    names = [name.rpartition(".")[2] for name, _ in SPINE]
    names, called = names[:names.index("fetch_task")], []

    def note(frame, event, _):
        called.append(frame.f_code.co_name) if event == "call" and frame.f_code.co_filename == labtasker.__file__ else None
    labtasker.use_client(None)
    sys.setprofile(note)
    try:
        labtasker.main(["task", "submit", "-q", "--", "--lr=0.1"])
    finally:
        sys.setprofile(None)
        labtasker.use_client(None)
    called = iter(called[called.index("do_task_submit"):])
    missing = [name for name in names if name not in called]
    assert not missing


DOCUMENTED = """
    loop Required Annotated finish task_info current_task_id current_worker_id is_enabled get_labtasker_log_dir set_prompt_on_task_failure
    set_loop_internal_error_handler health_check create_queue get_queue update_queue delete_queue submit_task fetch_task
    report_task_status refresh_task_heartbeat ls_tasks update_tasks delete_task create_worker ls_workers report_worker_status
    delete_worker connect_events EventListener TaskUpdateRequest LabtaskerError LabtaskerRuntimeError LabtaskerValueError
    LabtaskerTypeError LabtaskerNetworkError LabtaskerHTTPStatusError LabtaskerConnectError WorkerSuspended TaskCancelled
    submit_tasks submit_grid submit_sample as_completed get_task time_left preempted report task_dir should_stop get_history table
    TransientError TaskError FatalWorkerError
""".split()  # in the pages of the Python API, and in the README


def test_all_is_the_documented_api_and_what_tab_shows():
    import labtasker
    assert set(labtasker.__all__) == set(DOCUMENTED) | {"Task", "Worker", "Queue", "api_models"}
    assert len(set(labtasker.__all__)) == len(labtasker.__all__) and all(hasattr(labtasker, name) for name in labtasker.__all__)
    if sys.version_info >= (3, 7):
        assert [name for name in dir(labtasker) if name[0] != "_"] == sorted(labtasker.__all__)
