"""python -m hf_ext.run: a script sees, and its caller sees, what Python itself would have shown them.

Where Python's own behaviour is the expectation, both are run and compared; no expectation is written down twice.
"""

import json

import pytest
from processes import answer, build_house, run, write

OURS = ("-m", "hf_ext.run")

FACTS = """
# Every line is printed alike by a script that Python itself started.
import os, pickle, sys
import __main__, neighbour

class Item:
    def __eq__(self, other):
        return type(other) is Item

def function():
    return 1

print(sys.argv, sys.path, sep="\\n")
print(__name__, __file__, __package__, __doc__, __spec__ and __spec__.name)
print(sys.modules["__main__"] is __main__, vars(__main__) is globals(), __main__.Item is Item, __builtins__)
print(pickle.loads(pickle.dumps(Item())) == Item(), pickle.dumps(Item()), Item.__module__)
import inspect
print(inspect.getsource(function), [thread.name for thread in __import__("threading").enumerate()])
print(sorted(name for name in globals() if not name.startswith("_")), os.getcwd())
"""

ENDINGS = {
    "falls_off": "print('done')",
    "exit_0": "import sys; sys.exit()",
    "exit_7": "import sys; sys.exit(7)",
    "exit_text": "raise SystemExit('said at the end')",
    "os_exit": "import os; os._exit(3)",
    "exception": "def inner():\n    return 1 / 0\n\ninner()",
    "chained": "try:\n    {}['x']\nexcept KeyError as e:\n    raise ValueError('worse') from e",
    "in_context": "try:\n    {}['x']\nexcept KeyError:\n    raise ValueError('worse')",
    "group": "raise ExceptionGroup('several', [ValueError('a'), TypeError('b')])",
    "in_library": "import json\njson.loads('{')",
    "syntax_error": "x = (\ny = 1\n",
    "syntax_error_in_import": "import broken",
    "missing_import": "import nowhere_to_be_found",
    "assertion": "assert False, 'no'",
    "own_hook": "import sys\nsys.excepthook = lambda kind, *_: print('hook', kind, file=sys.stderr)\n1 / 0",
    "interrupt": "raise KeyboardInterrupt",
    "base_exception": "class Stop(BaseException): pass\nraise Stop('end')",
    "at_exit": "import atexit; atexit.register(print, 'last'); raise SystemExit(4)",
    "latin_1": "# -*- coding: latin-1 -*-\nprint(ascii('h\u00e9'))",
    "future": "from __future__ import annotations\ndef f(x: Nowhere): ...\nprint(f.__annotations__)",
    "no_future": "def f(x: 'a' 'b'): ...\nprint(f.__annotations__)",
}


@pytest.fixture
def folder(tmp_path):
    """Scripts in a folder that is not the working directory, with a blank in its name."""
    write(
        tmp_path,
        {
            "my scripts/script.py": FACTS,
            "my scripts/neighbour.py": "",
            "my scripts/broken.py": "def nothing(:\n",
            "neighbour.py": "",
            "module.py": FACTS,
            "package/__init__.py": "",
            "package/__main__.py": FACTS,
            "package/inner.py": FACTS,
            "bare/__init__.py": "",
            "failing/__init__.py": "1 / 0",
            "failing/__main__.py": "",
        },
    )
    return tmp_path


def both(folder, *arguments, flags=(), **where):
    """The same command line, run by Python itself and by us."""
    return run(*flags, *arguments, cwd=folder, **where), run(*flags, *OURS, *arguments, cwd=folder, **where)


def outcome(process):
    return process.returncode, process.stdout, process.stderr


# --- what the script sees


@pytest.mark.smoke
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--flag", "-m", "--", "-h", "--help", "-c"],
        ["two words", "", "  ", "tab\there", "new\nline", '"quoted"', "$HOME", "*"],
        ["größe=∞", "日本語", "🤗"],
        ["--attn_implementation", "anchor", "--lr=1e-3"],
    ],
    ids=["none", "our_own_flags", "blanks", "unicode", "usual"],
)
def test_script_sees_what_python_would_show_it(folder, arguments):
    theirs, ours = both(folder, "my scripts/script.py", *arguments)
    assert outcome(ours) == outcome(theirs)
    assert theirs.returncode == 0


@pytest.mark.parametrize("how", ["absolute", "symlink"])
def test_script_finds_its_neighbours_however_it_is_named(folder, how):
    script = folder / "my scripts/script.py"
    (folder / "link.py").symlink_to(script)
    theirs, ours = both(folder, script if how == "absolute" else "link.py")
    assert outcome(ours) == outcome(theirs)


@pytest.mark.parametrize("flag", ["-P", "-I", "-E", "-s", "-O", "-B"])
def test_flags_of_python_keep_their_meaning(folder, flag):
    code = "import sys; print(sys.path, __file__, __debug__)"
    write(folder, {"my scripts/plain.py": code})
    theirs, ours = both(folder, "my scripts/plain.py", flags=[flag])
    assert outcome(ours) == outcome(theirs)


@pytest.mark.parametrize("name", ["module", "package", "package.inner"])
def test_module_sees_what_python_would_show_it(folder, name):
    theirs, ours = both(folder, "-m", name, "-m", "two words", "--")
    assert outcome(ours) == outcome(theirs)
    assert theirs.returncode == 0


@pytest.mark.parametrize("name", ["nowhere", "nowhere.at_all", "package.nowhere", "bare", "failing"])
def test_module_that_cannot_be_run_fails_as_under_python(folder, name):
    theirs, ours = both(folder, "-m", name)
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout) == (1, "")
    assert name.rpartition(".")[2] in ours.stderr


# --- how it ends


@pytest.mark.parametrize("ending", ENDINGS)
def test_exit_status_and_traceback_are_the_scripts_own(folder, ending):
    encoding = "latin-1" if ending == "latin_1" else "utf-8"
    script = folder / "my scripts/ending.py"
    script.write_text(ENDINGS[ending], encoding=encoding)
    theirs, ours = both(folder, script)
    assert outcome(ours) == outcome(theirs)
    assert "hf_ext" not in ours.stderr


@pytest.mark.smoke
@pytest.mark.parametrize("status", [0, 7])
def test_exit_status(folder, status):
    write(folder, {"ends.py": f"raise SystemExit({status})"})
    assert run(*OURS, "ends.py", cwd=folder).returncode == status


@pytest.mark.smoke
def test_exception_is_status_1_and_no_frame_of_ours(folder):
    write(folder, {"fails.py": ENDINGS["exception"]})
    process = run(*OURS, "fails.py", cwd=folder)
    assert process.returncode == 1
    assert process.stderr.count("Traceback") == 1
    assert process.stderr.count('File "') == 2
    assert "hf_ext" not in process.stderr
    assert process.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_module_with_an_exception_shows_no_frame_of_ours(folder):
    write(folder, {"fails.py": ENDINGS["exception"]})
    process = run(*OURS, "-m", "fails", cwd=folder)
    assert process.returncode == 1
    assert "hf_ext" not in process.stderr
    assert process.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("name", ["nowhere.py", "no/such/folder/script.py"])
def test_missing_script_is_status_2_and_names_it(folder, name):
    process = run(*OURS, name, "--flag", cwd=folder)
    assert (process.returncode, process.stdout) == (2, "")
    assert name in process.stderr
    assert "No such file" in process.stderr
    assert "Traceback" not in process.stderr


def test_no_arguments_is_status_2_and_the_usage():
    process = run(*OURS)
    assert process.returncode == 2
    assert "python -m hf_ext.run" in process.stdout + process.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_status_0_on_stdout(flag):
    process = run(*OURS, flag)
    assert (process.returncode, process.stderr) == (0, "")
    for words in ("python -m hf_ext.run", "-m MODULE", "accelerate launch", "torchrun"):
        assert words in process.stdout


def test_m_without_a_module_is_an_error_in_one_line():
    process = run(*OURS, "-m")
    assert process.returncode != 0
    assert len(process.stderr.splitlines()) == 1


# --- registration

NAMES_ARE_THERE = """
import multiprocessing, sys

def missing(_=None):
    import house
    return house.problems()

if __name__ == "__main__":
    found = missing()
    if "spawn" in sys.argv:
        found += multiprocessing.get_context("spawn").Pool(1).map(missing, [0])[0]
    import json, os
    print(json.dumps([found, sys.modules["hf_ext._autoload"].CHANNEL, os.environ.get("HF_EXT_AUTOLOAD")]))
"""
OFF = {"HF_EXT_AUTOLOAD": "0"}


@pytest.fixture
def house(tmp_path):
    env = build_house(tmp_path)
    write(tmp_path, {"names.py": NAMES_ARE_THERE})
    return env


@pytest.mark.parametrize("target", [["names.py"], ["-m", "names"]], ids=["script", "module"])
@pytest.mark.parametrize("env", [{}, OFF, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}], ids=["on", "off", "torch_off"])
def test_names_are_there_whatever_the_switches(house, tmp_path, target, env):
    found, channel, _ = answer(run(*OURS, *target, cwd=tmp_path, env=house | env))
    assert found == []
    assert "run" in channel


@pytest.mark.parametrize("target", [["names.py"], ["-m", "names"]], ids=["script", "module"])
def test_switch_is_lifted_for_spawned_children(house, tmp_path, target):
    process = run(*OURS, *target, "spawn", cwd=tmp_path, env=house | OFF)
    found, _, switch = answer(process)
    assert (found, switch, process.stderr) == ([], "1", "")


def test_torchs_switch_cannot_be_lifted_and_we_say_so(house, tmp_path):
    env = house | OFF | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    process = run(*OURS, "names.py", cwd=tmp_path, env=env)
    assert answer(process)[2] == "0"
    assert len(process.stderr.splitlines()) == 1
    assert "import hf_ext" in process.stderr


def test_fault_of_registration_does_not_cost_the_script(house, tmp_path):
    write(tmp_path, {"hf_ext/registry.py": "def nothing(:\n", "uses.py": "import torch\nprint(torch.LATE)"})
    process = run(*OURS, "uses.py", cwd=tmp_path, env=house)
    assert (process.returncode, process.stdout) == (0, "True\n")


# --- launchers

LAUNCHED = """
import json, os, sys
with open(f"rank{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump([sys.argv, __name__, sys.modules["hf_ext._autoload"].CHANNEL], file)
"""
SUM = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
assert dist.get_world_size() == total.item() == 2
dist.destroy_process_group()
"""
ARGUMENTS = ["script.py", "two words", "--flag", "--", "-m"]


def assert_launched(process, folder, ranks):
    assert process.returncode == 0, process.stderr
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    for argv, name, channel in reports:
        assert (argv, name) == (ARGUMENTS, "__main__")
        assert "run" in channel


def test_torchrun_with_two_processes(tmp_path):
    write(tmp_path, {"script.py": SUM + LAUNCHED})
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    assert_launched(run(*launch, *OURS, *ARGUMENTS, cwd=tmp_path), tmp_path, ranks=2)


def test_accelerate_launch(tmp_path):
    write(tmp_path, {"script.py": "import torch\n" + LAUNCHED})
    options = ("--cpu", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no")
    launch = ("-m", "accelerate.commands.launch", *options)
    assert_launched(run(*launch, *OURS, *ARGUMENTS, cwd=tmp_path), tmp_path, ranks=1)


def test_a_package_that_misses_something_of_its_own_says_what(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("import nowhere_to_be_found")
    (tmp_path / "package/module.py").write_text("")
    done = run("-m", "hf_ext.run", "-m", "package.module", cwd=tmp_path)
    assert done.returncode == 1
    assert "No module named 'nowhere_to_be_found'" in done.stderr
