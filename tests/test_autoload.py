"""The hook: in whatever order things are imported, and whatever goes wrong.

Most tests live in a house of stand-ins (see processes.py), where a process takes milliseconds. Each real process
spends seconds on importing torch and transformers, so these come last, two at a time.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
from processes import TRACES, answer, append, build_house, copy_package, edit_host, run, run_python, write

from hf_ext import _autoload
from hf_ext.registry import TABLE

HOST = "transformers.modeling_utils"
OFF = {"our_switch": {"HF_EXT_AUTOLOAD": "0"}, "torch_switch": {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}}

AFTER = [row.module for row in TABLE if row.when == "after"]
# A module with a hook before it is imported by its package, never by a person.
LIBRARIES = list(dict.fromkeys(["torch", *AFTER, *(row.host for row in TABLE if row.when == "before")]))
BEFORE_AND_AFTER_US = [pair for name in ("torch", *AFTER) for pair in permutations((name, "hf_ext"))]
CHECK_HOUSE = "import house; house.check()"


@pytest.fixture
def house(tmp_path):
    return build_house(tmp_path)


def sound(process):
    """Nobody had anything to complain about: neither the check nor, on stderr, Python."""
    return answer(process) == [] and process.stderr == ""


def test_hooks_and_table_hold_the_same_rows():
    assert {(module, when, host) for module, (when, host) in _autoload.HOOKS.items()} == {
        (row.module, row.when, row.host) for row in TABLE
    }


# --- orders


@pytest.mark.smoke
@pytest.mark.parametrize("order", list(permutations(LIBRARIES, 2)), ids="_then_".join)
def test_names_are_there_in_any_order_of_imports(house, order):
    code = f"import sys, {', '.join(order)}\nassert 'hf_ext' in sys.modules\n{CHECK_HOUSE}"
    assert sound(run_python(code, env=house))


@pytest.mark.parametrize("switch", OFF)
@pytest.mark.parametrize("order", BEFORE_AND_AFTER_US, ids="_then_".join)
def test_import_hf_ext_cures_autoload_off(house, order, switch):
    assert sound(run_python(f"import {', '.join(order)}\n{CHECK_HOUSE}", env=house | OFF[switch]))


@pytest.mark.parametrize("value", ["0", "false", "OFF", "no"])
def test_switched_off_leaves_no_trace(house, value):
    code = f"""
        import sys
        finders = list(sys.meta_path)
        import torch, {HOST} as host
        assert sys.meta_path == finders
        assert not [name for name in sys.modules if name.split(".")[0] == "hf_ext"]
        assert host.NAMES == {{"own": "the host's"}}
        """
    process = run_python(code, env=house | {"HF_EXT_AUTOLOAD": value})
    assert (process.returncode, process.stderr) == (0, "")


def test_a_hook_in_time_leaves_the_class_alone(house):
    """The host imports torch while the finder's loader executes it: two ways to it at once."""
    code = f"import hf_ext, sys, {HOST}; print(type(sys.modules['{HOST}']))"
    assert run_python(code, env=house).stdout.strip() == "<class 'module'>"


def test_half_imported_host_can_use_its_own_module(house, tmp_path):
    edit_host(
        tmp_path,
        HOST,
        """
        import sys
        import torch
        NAMES = {}
        me = sys.modules[__name__]
        assert me.NAMES is NAMES and not NAMES, "fired too early"
        me.late = 1
        assert late == 1
        """,
    )
    assert sound(run_python(f"import {HOST}\n{CHECK_HOUSE}", env=house))


@pytest.mark.parametrize("first", ["torch", HOST], ids=["finder", "half_imported"])
def test_failed_host_import_is_the_hosts_own_error_and_can_be_repeated(house, tmp_path, first):
    edit_host(
        tmp_path,
        HOST,
        """
        import builtins
        import torch
        NAMES = {}
        if not hasattr(builtins, "ready"):
            raise ImportError("the host's own")
        """,
    )
    code = f"""
        import builtins, importlib
        for name in ("{first}", "{HOST}"):
            try:
                importlib.import_module(name)
            except ImportError as error:
                assert str(error) == "the host's own", error
        builtins.ready = True
        {CHECK_HOUSE}
        """
    assert sound(run_python(code, env=house))


@pytest.mark.parametrize("first", ["torch", HOST], ids=["finder", "half_imported"])
def test_a_host_can_be_reloaded(house, first):
    code = f"""
        import importlib, json, sys, {first}, {HOST} as host
        from house import traces
        host.NAMES
        assert importlib.reload(host) is host is sys.modules["{HOST}"]
        print(json.dumps(traces("{HOST}")))
        """
    assert sound(run_python(code, env=house))


def test_looking_for_a_host_is_not_importing_it(house):
    code = f"""
        import torch
        from importlib.util import find_spec
        spec = find_spec("{HOST}")
        assert "NAMES" in spec.loader.get_source("{HOST}") and spec.loader.is_package("{HOST}")
        from hf_ext import status
        assert {{row["state"] for row in status().values()}} == {{"waiting"}}
        {CHECK_HOUSE}
        """
    assert sound(run_python(code, env=house))


@pytest.mark.parametrize("blocked", AFTER)
def test_a_blocked_host_does_not_cost_the_others_their_names(house, blocked):
    """`sys.modules[name] = None` is how people, and their tests, forbid an import."""
    code = f"""
        import sys
        sys.modules["{blocked}"] = None
        import torch, house
        house.ROWS = [row for row in house.ROWS if row[0] != "{blocked}"]
        house.check()
        """
    assert sound(run_python(code, env=house))


def test_host_whose_import_has_only_just_begun(house):
    """Another thread was past the finders before ours was there, and has no module in sys.modules yet."""
    code = f"""
        import sys, threading, time
        from importlib.machinery import PathFinder, SourceFileLoader

        class Slow(SourceFileLoader):
            def create_module(self, spec):
                time.sleep(0.3)

        class Finder:
            def find_spec(self, name, path=None, target=None):
                spec = PathFinder.find_spec(name, path, target) if name == "{HOST}" else None
                if spec:
                    spec.loader = Slow(name, spec.origin)
                return spec

        sys.meta_path.insert(0, Finder())
        thread = threading.Thread(target=__import__, args=["{HOST}"])
        thread.start()
        time.sleep(0.1)
        import torch
        thread.join()
        {CHECK_HOUSE}
        """
    assert sound(run_python(code, env=house))


def test_package_imported_afresh_takes_over(house):
    """Test tools purge sys.modules; two finders of ours would ask each other for ever."""
    code = f"""
        import sys, torch
        for name in [name for name in sys.modules if name.partition(".")[0] == "hf_ext"]:
            del sys.modules[name]
        import hf_ext
        assert [type(finder).__module__ for finder in sys.meta_path].count("hf_ext._autoload") == 1
        {CHECK_HOUSE}
        """
    assert sound(run_python(code, env=house))


# --- modules of ours that import a host themselves


@pytest.mark.parametrize("lead", ["import sys", "import torch"], ids=["first", "after_torch"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_own_module_may_import_a_host(house, tmp_path, library, lead):
    """Also where the hook runs before the host: then it cannot wait for the end of our module."""
    write(tmp_path, {"hf_ext/method.py": f"import {library}\n"})
    assert sound(run_python(f"{lead}\nimport hf_ext.method\n{CHECK_HOUSE}", env=house))


@pytest.mark.parametrize("lead", ["import sys", "import torch"], ids=["first", "after_torch"])
@pytest.mark.parametrize("module", AFTER)
def test_registration_waits_for_the_half_loaded_module_that_it_needs(house, tmp_path, module, lead):
    write(tmp_path, {"hf_ext/method.py": f"import {module}\nREADY = True\n"})
    before_add(tmp_path, f"if module == '{module}': from hf_ext.method import READY")
    assert sound(run_python(f"{lead}\nimport hf_ext.method\n{CHECK_HOUSE}", env=house))


def test_own_module_and_host_in_two_threads_do_not_lock_each_other_out(house, tmp_path):
    """One thread holds the import lock of our module and wants the host; the other registers and wants our module."""
    write(tmp_path, {"hf_ext/method.py": f"import time; time.sleep(0.4)\nfrom {HOST} import NAMES\n"})
    before_add(tmp_path, "import hf_ext.method")
    code = f"""
        import {HOST}, os, sys, threading, time
        threads = [
            threading.Thread(target=__import__, args=["hf_ext.method"], daemon=True),
            threading.Thread(target=lambda: time.sleep(0.1) or sys.modules["{HOST}"].NAMES, daemon=True),
        ]
        for thread in threads: thread.start()
        for thread in threads: thread.join(3)
        if any(thread.is_alive() for thread in threads):
            print('["deadlock"]', flush=True)
            os._exit(0)
        {CHECK_HOUSE}
        """
    assert sound(run_python(code, env=house))


def test_slow_import_of_ours_in_another_thread_delays_no_name(house, tmp_path):
    write(tmp_path, {"hf_ext/slow.py": "import time; time.sleep(1)\n", "hf_ext/method.py": f"import {HOST}\n"})
    code = f"""
        import torch, threading, time
        threading.Thread(target=__import__, args=["hf_ext.slow"]).start()
        time.sleep(0.2)
        import hf_ext.method
        {CHECK_HOUSE}
        """
    assert sound(run_python(code, env=house))


# --- threads

THREADS = """
import sys, threading
sys.setswitchinterval(1e-5)
start, found = threading.Barrier(24), []

def work(number):
    start.wait()
    try:
        found.extend(one(number))
    except BaseException as error:
        found.append(f"{type(error).__name__}: {error}")

threads = [threading.Thread(target=work, args=[number]) for number in range(24)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.mark.parametrize("first", ["sys", *LIBRARIES, "hf_ext"])
@pytest.mark.parametrize("turn", range(3))
def test_24_threads_each_find_the_names(house, tmp_path, first, turn):
    """Registration takes its time, so that a thread let through too early does see a host without our name.

    So does torch, as the real one: nobody is to be just before the first line of a host when the hooks are armed.
    """
    fake = tmp_path / "torch/__init__.py"
    fake.write_text(f"import time; time.sleep(0.05)\n{fake.read_text()}")
    before_add(tmp_path, "rest[0] == 'after' and import_module(module).NAMES; import time; time.sleep(0.02)")
    code = f"""
import {first}

def one(number):
    __import__({LIBRARIES!r}[number % {len(LIBRARIES)}])
    from {HOST} import NAMES
    return [] if "anchor" in NAMES else ["no name"]
{THREADS}
import json, house
print(json.dumps(found + house.problems()))
"""
    assert sound(run("-c", code, env=house))


# --- planted faults

FAULTS = {
    "raises": ("raise ValueError('the real cause')", "ValueError: the real cause"),
    "exits": ("raise SystemExit('the real cause')", "SystemExit: the real cause"),
    "unknown_host_api": (f"import_module('{HOST}').vanished()", "has no attribute 'vanished'"),
    "missing_library": ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    "broken_module": ("import hf_ext.broken", "SyntaxError: "),
}
LEADS = {"finder": "import torch", "half_imported": f"import {HOST}"}
USE = f"import torch, {HOST} as host, hf_ext, torchvision; assert torch.LATE and host.NAMES['own']"


def before_add(folder, code):
    """Have the stand-in for the register functions, add(module, *rest), begin with one line of `code`."""
    append(
        folder / "hf_ext/stand_in.py", f"\n_add = add\ndef add(module, *rest):\n    {code}\n    _add(module, *rest)\n"
    )


def plant(folder, fault):
    write(folder, {"hf_ext/broken.py": "def nothing(:\n"})
    before_add(folder, f"module == '{HOST}' and fault()")
    append(folder / "hf_ext/stand_in.py", f"\ndef fault():\n    {fault}\n")


def told_once(stderr, cause):
    return stderr.count("RuntimeWarning") == 1 and cause in stderr and "hf-ext doctor" in stderr


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_warning_with_its_cause(house, tmp_path, fault, lead):
    code, cause = FAULTS[fault]
    plant(tmp_path, code)
    process = run("-W", "always", "-c", f"{LEADS[lead]}\n{USE}", env=house)
    assert process.returncode == 0, process.stderr
    assert told_once(process.stderr, cause), process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("module", ["registry", "compat/__init__", "compat/peft"])
def test_foundation_that_does_not_compile_is_one_warning(house, tmp_path, module):
    append(tmp_path / f"hf_ext/{module}.py", "\ndef nothing(:\n")
    edit_host(tmp_path, "torchvision._meta_registrations", "import torch\n")
    process = run("-W", "always", "-c", USE, env=house)
    assert process.returncode == 0, process.stderr
    assert told_once(process.stderr, "SyntaxError"), process.stderr


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_survives_warnings_as_errors(house, tmp_path, fault, lead):
    plant(tmp_path, FAULTS[fault][0])
    process = run("-W", "error", "-c", f"{LEADS[lead]}\n{USE}", env=house)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.smoke
def test_fault_of_one_host_leaves_the_others_untouched(house, tmp_path):
    plant(tmp_path, "raise ValueError('the real cause')")
    code = """
        import json, house
        from hf_ext import status
        print(json.dumps([house.problems(), status()["transformers"]]))
        """
    problems, row = answer(run_python(code, env=house))
    mine = [name for row in TABLE if row.module == HOST for name in row.names]
    assert problems == [f"{HOST} lacks {name}" for name in mine]
    assert (row["state"], row["reason"]) == ("failed", "ValueError: the real cause")


def test_debug_variable_prints_the_traceback(house, tmp_path):
    plant(tmp_path, "raise ValueError('the real cause')")
    process = run("-c", USE, env=house | {"HF_EXT_DEBUG": "1"})
    assert process.returncode == 0
    for part in ("Traceback (most recent call last)", "stand_in.py", "raise ValueError('the real cause')"):
        assert part in process.stderr


def test_interrupt_during_registration_reaches_the_user(house, tmp_path):
    plant(tmp_path, "import torch; torch.armed = vars(torch).get('armed', 0) + 1; raise KeyboardInterrupt")
    code = f"""
        import torch
        try:
            import {HOST}
        except KeyboardInterrupt:
            raise SystemExit(torch.armed)
        """
    process = run_python(code, env=house)
    assert (process.returncode, process.stderr) == (1, "")


# --- the real hosts

# One expression a host: our name can be used there. A new row of the table needs one here.
USABLE = {
    "torchvision": "__import__('torchvision').__version__",
    "transformers": "all(name in table for name in ('anchor', 'anchor_continuous', 'mcq_recalibrated')"
    " for table in (modeling.ALL_ATTENTION_FUNCTIONS, masking.ALL_MASK_ATTENTION_FUNCTIONS))",
    "peft": "__import__('peft').get_peft_config({'peft_type': 'BONE'}).peft_type.value == 'BONE'",
    "transformers.quantizers": "'ofq' in __import__('transformers').quantizers.auto.AUTO_QUANTIZER_MAPPING",
    "timm": "__import__('timm').is_model('ofq_w2a2')",
    "evaluate": "__import__('evaluate').load('anchored_mcq_bias').name == 'anchored_mcq_bias'",
}
CHECK = f"""
{TRACES}
import json
from transformers import masking_utils as masking, modeling_utils as modeling

def problems():
    found = [name for name, usable in {USABLE!r}.items() if not eval(usable)]
    for name in sys.modules["hf_ext._autoload"].HOOKS:
        if name in sys.modules:
            found += traces(name)
    return found
"""
REPORT = f"{CHECK}\nprint(json.dumps(problems()))"

# The index's torchvision cannot be imported beside a CPU torch without us, so it is taken away where we are off, and
# timm with it.
NO_TORCHVISION = "import sys; sys.modules['torchvision'] = None"
SWITCHED_OFF = f"""
{NO_TORCHVISION}
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
{CHECK.replace(USABLE["torchvision"], "True").replace(USABLE["timm"], "True")}
assert "hf_ext" not in sys.modules

def snapshot():
    tables = [dict(x._global_mapping) for x in (modeling.AttentionInterface, masking.AttentionMaskInterface)]
    finders = [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_ext")]
    return tables, PreTrainedModel.get_correct_attn_implementation, finders

config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
def build():
    return LlamaForCausalLM._from_config(config, attn_implementation="anchor").config._attn_implementation

before = snapshot()
try:
    build()
    raise SystemExit("the name is there although autoload is off")
except ValueError as error:
    assert "anchor" in str(error), error
import hf_ext
found = problems() + ([] if build() == "anchor" else ["not used"])
hf_ext.unregister()
print(json.dumps(found + ([] if snapshot() == before else ["unregister() does not restore"])))
"""

REAL_THREADS = f"""
def one(number):
    import importlib
    importlib.import_module(("torch", "transformers", "{HOST}", "accelerate")[number % 4])
    from {HOST} import ALL_ATTENTION_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    return [] if "anchor" in ALL_ATTENTION_FUNCTIONS and "anchor" in ALL_MASK_ATTENTION_FUNCTIONS else ["no name"]
{THREADS}{CHECK}
print(json.dumps(found + problems()))
"""

# A spawned child, and a forked DataLoader worker that is the first to import transformers.
CHILDREN = f"""
import multiprocessing

def child(_):
    import torch
    scope = {{}}
    exec({CHECK!r}, scope)
    return scope["problems"]()

if __name__ == "__main__":
    import json
    found = multiprocessing.get_context("spawn").Pool(1).map(child, [0])[0]
    from torch.utils.data import DataLoader
    loader = DataLoader([0], num_workers=1, multiprocessing_context="fork", collate_fn=child)
    print(json.dumps(found + next(iter(loader))))
"""

# Nothing but one warning of ours may come of it.
BROKEN = f"""
{NO_TORCHVISION}
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.filterwarnings("always", message="hf_ext")
    import torch
    from {HOST} import ALL_ATTENTION_FUNCTIONS as table
texts = [str(warning.message) for warning in caught if "hf_ext" in str(warning.message)]
ok = len(texts) == 1 and "SyntaxError" in texts[0] and "hf-ext doctor" in texts[0]
print(json.dumps([] if ok and "sdpa" in table and "anchor" not in table else [*texts, *table]))
"""


def run_children(folder):
    write(folder, {"children.py": CHILDREN})
    return run("children.py", cwd=folder)


def run_broken(folder):
    env = copy_package(folder)
    append(folder / "hf_ext/anchor_attention/register.py", "\ndef nothing(:\n")
    return run("-c", BROKEN, env=env)


def script(code, *flags, **where):
    return lambda folder: run(*flags, "-c", code, **where)


ORDERS = {
    "torch": "import torch",
    "transformers": "import transformers",
    "Trainer": "from transformers import Trainer",
    "PreTrainedModel": "from transformers import PreTrainedModel",
    "modeling_utils": f"import {HOST}",
    "LlamaForCausalLM": "from transformers import LlamaForCausalLM",
    "peft": "import peft",
    "timm": "import timm",
    "evaluate": "import evaluate",
    "datasets_isolated": "import datasets",
    "accelerate": "import accelerate",
    "torchvision": "import torchvision",
    "our_backend": "import hf_ext.anchor_attention.backend",
}
REAL = {
    **{name: script(f"{code}\n{REPORT}", *["-I"] * ("isolated" in name)) for name, code in ORDERS.items()},
    **{f"off_by_{name}": script(SWITCHED_OFF, env=env) for name, env in OFF.items()},
    "24_threads": script(REAL_THREADS),
    "children": run_children,
    "broken_register": run_broken,
}
SMOKE = ("Trainer", "modeling_utils", "off_by_our_switch")


def test_every_host_of_the_table_has_a_check():
    assert set(USABLE) == {row.host for row in TABLE}


@pytest.fixture(scope="module")
def outcome(request, tmp_path_factory):
    """case -> finished process, of the cases that this run of pytest asks for."""
    tests = [item for item in request.session.items if getattr(item, "originalname", "") == "test_real_hosts"]
    with ThreadPoolExecutor(2) as pool:
        cases = [item.callspec.params["case"] for item in tests]
        running = {case: pool.submit(REAL[case], tmp_path_factory.mktemp(case)) for case in cases}
        yield lambda case: running[case].result()


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.smoke] * (case in SMOKE)) for case in REAL])
def test_real_hosts(outcome, case):
    assert answer(outcome(case)) == []


RANK = f"""
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
{CHECK}
with open(f"rank{{dist.get_rank()}}.json", "w") as file:
    json.dump([dist.get_world_size(), total.item(), problems()], file)
dist.destroy_process_group()
"""


def test_both_ranks_of_torchrun(tmp_path):
    write(tmp_path, {"script.py": RANK})
    process = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "script.py", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)] == [[2, 2.0, []]] * 2


def test_half_imported_host_of_a_foreign_class_is_a_failure_with_advice(house, tmp_path):
    theirs = "class Theirs(types.ModuleType): pass\nsys.modules[__name__].__class__ = Theirs"
    edit_host(tmp_path, HOST, f"import sys, types\n{theirs}\nimport torch\n")
    code = f"""
        import {HOST}
        from hf_ext import status
        print(__import__("json").dumps(status()["transformers"]))
        """
    process = run_python(code, env=house)
    assert answer(process)["state"] == "failed"
    assert "Theirs" in process.stderr
    assert "import hf_ext after it" in process.stderr


def test_purged_modules_can_be_imported_again():
    """coverage, among others, empties sys.modules of the package it is about to measure."""
    code = f"""
        import hf_ext, sys, torch, {HOST} as host
        def purge():
            for name in [name for name in sys.modules if name.split(".")[0] == "hf_ext"]:
                del sys.modules[name]
        method = host.PreTrainedModel.get_correct_attn_implementation.__wrapped__
        purge()
        from hf_ext.anchor_attention import AnchorPacking
        purge()
        import hf_ext
        assert hf_ext.register()["transformers"]["state"] == "registered"
        assert len([finder for finder in sys.meta_path if type(finder).__name__ == "_Finder"]) == 1
        hf_ext.unregister()
        assert host.PreTrainedModel.get_correct_attn_implementation is method
        assert "anchor" not in host.AttentionInterface._global_mapping
        """
    process = run_python(code)
    assert process.returncode == 0, process.stderr
