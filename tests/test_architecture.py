"""The rules of the house, read off its source: who imports whom, what is forbidden where, and what has to be said."""

import ast
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from processes import run_python

import hf_ext
from hf_ext import compat

ROOT = Path(hf_ext.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

TOP = {"__init__", "_autoload", "registry", "run", "cli", "doctor", "doctor_model", "checks", "modes"}
SHARED = {"checks", "modes"}  # what every method needs: they lean on nothing of ours
METHODS = {"anchor_attention", "bone_adapter", "ofq_quantizer", "mcq_bias", "importance_weights"}
OTHER_PACKAGES = {"bench", "compat", "demo"}
PRESENT = sorted(method for method in METHODS if (ROOT / method).is_dir())

HOSTS = {"transformers", "peft", "timm", "evaluate", "datasets", "accelerate", "torchvision"}
HEAVY = {"torch", "numpy", "numba", "rich", "typer", *HOSTS}
# Files that know tensors but no host.
PURE = {
    *("reference", "ops", "kernels", "segments", "engines"),
    *("sdpa", "dense", "varlen", "flex", "options", "kernel", "choice", "frame", "positions", "models"),
    *("bounds", "lanes", "list_kernels", "lookup_kernels", "tensors", "vote_kernels"),
    *("affine", "attention_kernels", "attention_ops", "integer_graph", "integer_kernels"),
    *("integer_products", "loops", "packing", "quantizer_ops"),
}


def files(*patterns):
    """Files of the package that match, as parameters; a pattern without a file yet gives none."""
    return [name for name in FILES if any(re.fullmatch(pattern, name) for pattern in patterns)]


METHOD_FILES = files(*(f"{method}/.*" for method in METHODS))
COMPAT_FILES = files("compat/.*")
PURE_FILES = files(*(f"({'|'.join(METHODS)})/{stem}.py" for stem in PURE))


@cache
def tree(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def imports(name, *, everywhere=True):
    """Absolute names of what file `name` imports: `a.b` and, for `from a import b`, both `a` and `a.b`.

    everywhere=False: only what is executed when the file itself is imported.
    """
    nodes = ast.walk(tree(name)) if everywhere else _executed_on_import(tree(name).body)
    return {target for node in nodes for target in _targets(node, name)}


def _executed_on_import(statements):
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        for block in ("body", "orelse", "finalbody", "handlers"):
            yield from _executed_on_import(getattr(node, block, []))


def _targets(node, name):
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        package = ["hf_ext", *name.split("/")[:-1]]
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        base = base if node.level else node.module
        return {base} | {f"{base}.{alias.name}" for alias in node.names}
    return set()


def tops(names):
    return {name.partition(".")[0] for name in names}


def own(names):
    """The modules and packages directly under hf_ext among `names`."""
    return {name.split(".")[1] for name in names if name.startswith("hf_ext.")}


def functions(name):
    return [node for node in ast.walk(tree(name)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def calls(name):
    """Dotted names of everything that file `name` calls."""
    return {ast.unparse(node.func) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)}


# --- who imports whom


def test_house_is_as_these_rules_know_it():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == METHODS | OTHER_PACKAGES
    assert {path.stem for path in ROOT.glob("*.py")} == TOP
    assert {Path(name).stem for name in PURE_FILES} == PURE


def test_method_has_its_specification_its_registration_and_its_tests():
    for method in METHODS:
        assert {f"{method}/reference.py", f"{method}/__init__.py"} <= set(FILES)
        short = method.split("_")[0]
        assert [path for path in TESTS.glob(f"test_{short}_*.py") if "reference" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", [f"{name}.py" for name in sorted(SHARED)])
def test_shared_module_leans_on_nothing_of_ours_and_on_no_host(name):
    assert not own(imports(name))
    assert tops(imports(name)) <= set(sys.stdlib_module_names) | ({"torch"} if name == "modes.py" else set())


@pytest.mark.parametrize("name", METHOD_FILES)
def test_method_imports_neither_another_method_nor_the_registration(name):
    method = name.split("/")[0]
    assert own(imports(name)) <= {method, "compat", *SHARED}


@pytest.mark.parametrize("name", METHOD_FILES)
def test_method_names_no_module_of_another_in_a_string(name):
    """As import_module("hf_ext.other.module") would have it."""
    strings = {node.value for node in ast.walk(tree(name)) if isinstance(node, ast.Constant)}
    dotted = {text for text in strings if isinstance(text, str) and re.fullmatch(r"hf_ext(\.\w+)+(:\w+)?", text)}
    assert own(dotted) <= {name.split("/")[0], "compat"}


@pytest.mark.parametrize("name", PURE_FILES)
def test_pure_file_imports_no_host_library(name):
    assert not tops(imports(name)) & HOSTS


@pytest.mark.parametrize("name", PURE_FILES)
def test_pure_file_leans_on_pure_files_only(name):
    """Else a host would come in through the back door."""
    method = name.split("/")[0]
    inner = {target.split(".")[2] for target in imports(name) if target.startswith(f"hf_ext.{method}.")}
    assert inner <= PURE | {"support"}


@pytest.mark.parametrize("method", PRESENT)
def test_reference_leans_on_nothing_of_ours(method):
    assert not own(imports(f"{method}/reference.py"))


@pytest.mark.parametrize("name", COMPAT_FILES)
def test_compat_imports_nothing_else_of_ours_and_hosts_in_functions_only(name):
    assert own(imports(name)) <= {"compat"}
    assert "hf_ext" not in imports(name)
    assert not tops(imports(name, everywhere=False)) & HEAVY


def test_autoload_imports_only_a_few_modules_of_the_standard_library():
    allowed = {"__future__", "os", "sys", "time", "_thread", "types", "typing"}
    assert tops(imports("_autoload.py", everywhere=False)) <= allowed
    assert tops(imports("_autoload.py")) <= set(sys.stdlib_module_names) | {"hf_ext"}


def test_autoload_imports_the_registry_in_functions_only():
    assert not own(imports("_autoload.py", everywhere=False))
    assert own(imports("_autoload.py")) == {"registry"}


def test_init_imports_only_autoload_of_ours():
    assert own(imports("__init__.py", everywhere=False)) == {"_autoload"}
    assert tops(imports("__init__.py", everywhere=False)) <= {"__future__", "sys", "typing", "hf_ext"}


def test_registry_imports_no_method_and_no_heavy_library():
    """It names its functions in strings, so that a broken method costs nobody else's names."""
    assert not own(imports("registry.py")) & METHODS
    assert not tops(imports("registry.py")) & HEAVY
    assert not own(imports("run.py")) & METHODS


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("__init__.py", "registry.py")])
def test_nobody_imports_a_register_module(name):
    """Else names would be added, or not, behind the registry's back."""
    assert not [target for target in imports(name) if re.match(r"hf_ext\.\w+\.register\b", target)]


# --- what is forbidden

VERSION_HELPERS = r"packaging\b.*|importlib\.metadata\.version|.*\bis_\w*(version|greater_or_equal)\w*"
VERSIONS = r"__version__|version_info|metadata\.version|torch\.version"


@pytest.mark.parametrize("name", [name for name in FILES if name not in COMPAT_FILES])
def test_version_checks_are_in_compat_only(name):
    assert not [target for target in imports(name) if re.fullmatch(VERSION_HELPERS, target)]
    decisions = (ast.Compare, ast.If, ast.IfExp, ast.BoolOp)
    tests = [getattr(node, "test", node) for node in ast.walk(tree(name)) if isinstance(node, decisions)]
    assert not [text for text in map(ast.unparse, tests) if re.search(VERSIONS, text)]


@pytest.mark.parametrize("name", [name for name in FILES if name not in COMPAT_FILES and not name.startswith("bench/")])
def test_versions_are_read_in_compat_only(name):
    """Benchmarks may, since they write down what they ran on."""
    assert not [call for call in calls(name) if re.search(r"metadata\.version$|parse_version$", call)]


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_pickled(name):
    forbidden = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not tops(imports(name)) & forbidden
    assert not calls(name) & {"torch.load", "torch.save"}
    assert not imports(name) & {"torch.load", "torch.save"}


@pytest.mark.parametrize("name", FILES)
def test_file_is_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 400


def test_no_module_is_called_utils():
    assert not [name for name in FILES if Path(name).stem in ("utils", "helpers", "misc", "common")]
    assert not [name for name in FILES if {"utils", "helpers", "misc", "common"} & set(Path(name).parts)]


@pytest.mark.parametrize("name", files("demo/train.*", "demo/answer.py", "demo/ask.py"))
def test_script_of_the_demo_never_imports_us(name):
    assert "hf_ext" not in tops(imports(name))
    assert "import_module" not in " ".join(calls(name))


@pytest.mark.parametrize("folder", [ROOT / "demo", TESTS], ids=["demo", "tests"])
def test_nothing_beside_a_script_is_called_like_a_library(folder):
    """A script's folder comes first on the path: such a file or folder would be imported in the library's place."""
    names = {path.stem for path in folder.rglob("*") if path.is_dir() or path.suffix == ".py"}
    assert not names & (HEAVY | set(sys.stdlib_module_names))


@pytest.mark.parametrize("name", [name for name in FILES if name != "checks.py"])
def test_what_was_probably_meant_is_found_in_one_place(name):
    assert "difflib" not in tops(imports(name))


@pytest.mark.parametrize("name", FILES)
def test_function_is_short(name):
    """Lines without the docstring. A kernel that keeps its state in registers cannot be cut."""
    limit = 65 if name.endswith("kernels.py") else 50
    for function in functions(name):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        assert not body or body[-1].end_lineno - body[0].lineno < limit, function.name


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_left_to_be_written(name):
    raised = {ast.unparse(node.exc) for node in ast.walk(tree(name)) if isinstance(node, ast.Raise) and node.exc}
    assert not [error for error in raised if error.startswith("NotImplementedError")]
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", (ROOT / name).read_text(encoding="utf-8"))


TERMINAL = {"cli.py", "run.py", "demo/report.py", "compat/__init__.py"}


@pytest.mark.parametrize("name", [name for name in FILES if name not in TERMINAL])
def test_nothing_is_printed_beside_the_command_line(name):
    assert "print" not in calls(name)


# Where somebody else's code runs, and whatever it raises is reported instead: hosts, models, engines.
FOREIGN_CODE = {
    *("_autoload.py", "doctor.py", "bone_adapter/convert.py"),
    *(f"anchor_attention/{stem}.py" for stem in ("check", "choice", "rope", "varlen")),
}


@pytest.mark.parametrize("name", [name for name in FILES if name not in FOREIGN_CODE])
def test_no_error_is_swallowed_unnamed(name):
    handlers = [node for node in ast.walk(tree(name)) if isinstance(node, ast.ExceptHandler)]
    blind = [node for node in handlers if node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")]
    assert all(any(isinstance(inner, ast.Raise) for inner in ast.walk(node)) for node in blind)


@pytest.mark.parametrize("name", FILES)
def test_user_errors_are_no_asserts(name):
    assert not [node for node in ast.walk(tree(name)) if isinstance(node, ast.Assert)]


# --- what has to be said


def public_names():
    """(module, name) of everything in an `__all__`."""
    for name in FILES:
        for node in tree(name).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                module = ".".join(["hf_ext", *Path(name).with_suffix("").parts]).removesuffix(".__init__")
                yield from ((module, public) for public in ast.literal_eval(node.value))


@pytest.mark.parametrize("package", ["__init__.py", *(f"{method}/__init__.py" for method in PRESENT)])
def test_package_says_what_it_offers(package):
    assert ast.get_docstring(tree(package))
    assert "__all__" in {ast.unparse(target) for node in tree(package).body for target in getattr(node, "targets", [])}


def written_docstring(thing):
    """The docstring in the source: dataclasses and named tuples make one up where there is none."""
    if not hasattr(thing, "__file__"):
        source = tree(Path(sys.modules[thing.__module__].__file__).relative_to(ROOT).as_posix())
        definitions = [node for node in source.body if getattr(node, "name", None) == thing.__name__]
        return ast.get_docstring(definitions[0])
    return thing.__doc__


@pytest.mark.parametrize(("module", "public"), sorted(set(public_names())))
def test_public_name_is_documented(module, public):
    thing = getattr(import_module(module), public)
    if compat.has_native_bone() and getattr(thing, "__module__", "").startswith("peft.tuners.bone."):
        pytest.skip("this peft has Bone itself, and documents it")
    if callable(thing) or hasattr(thing, "__file__"):
        assert written_docstring(thing)


@pytest.mark.parametrize("method", PRESENT)
def test_specification_explains_each_of_its_functions(method):
    equations = [node for node in tree(f"{method}/reference.py").body if isinstance(node, ast.FunctionDef)]
    assert equations
    assert not [equation.name for equation in equations if not ast.get_docstring(equation)]


@pytest.mark.parametrize("name", FILES)
def test_module_says_what_it_is_for(name):
    assert ast.get_docstring(tree(name)) or not tree(name).body


# --- what an import costs


@pytest.mark.smoke
@pytest.mark.parametrize("module", ["hf_ext", "hf_ext.registry", "hf_ext.compat", "hf_ext.run", "hf_ext.cli"])
def test_import_loads_nothing_heavy(module):
    heavy = HEAVY - {"rich", "typer"} if module == "hf_ext.cli" else HEAVY
    process = run_python(f"import sys, {module}\nprint(sorted({heavy!r} & set(sys.modules)))")
    assert process.stdout.strip() == "[]", process.stderr
