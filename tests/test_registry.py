"""register(), unregister(), status(), and what they do when a name or a host function belongs to somebody else.

These run in this process: `host` takes our names out of transformers first and restores every table afterwards.
"""

import json
import sys
import threading
from functools import wraps
from types import SimpleNamespace

import pytest
from processes import answer, append, build_house, edit_host, run_python
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, masking_utils, modeling_utils

import hf_ext
from hf_ext import RegistrationError, _autoload, compat, register, status, unregister
from hf_ext.anchor_attention.support import check_at_load
from hf_ext.registry import TABLE

HOST = "transformers.modeling_utils"
CHECK = "get_correct_attn_implementation"
STATES = {"waiting", "running", "registered", "native", "not needed", "failed", "off"}
SERVED = {"waiting", "registered", "native", "not needed"}
NAMES = [name for row in TABLE if row.host == "transformers" for name in row.names]
# A refused name is a warning on top of the error: once a process, so that no test can count on it.
quiet = pytest.mark.filterwarnings("ignore:hf_ext could not")


def foreign(*_, **__):
    """Somebody else's attention function."""


@pytest.fixture
def host():
    """transformers without our names: its two tables and the method that we wrap."""
    unregister()
    tables = SimpleNamespace(
        attention=modeling_utils.AttentionInterface._global_mapping,
        mask=masking_utils.AttentionMaskInterface._global_mapping,
        check=getattr(PreTrainedModel, CHECK),
    )
    before = [(table, dict(table)) for table in (tables.attention, tables.mask)]
    yield tables
    # By hand, not by unregister(): it is what is tested here.
    _autoload.disarm()
    _autoload.ERRORS.clear()
    setattr(PreTrainedModel, CHECK, tables.check)
    for table, entries in before:
        table.clear()
        table.update(entries)
    register()


def our_finders():
    return [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_ext")]


def no_name_is_in(host):
    return not [name for name in NAMES if name in host.attention or name in host.mask]


def snapshot(host):
    return dict(host.attention), dict(host.mask), getattr(PreTrainedModel, CHECK), list(sys.meta_path)


# --- register, unregister


@pytest.mark.smoke
def test_unregister_restores_and_register_works_again(host):
    before = snapshot(host)
    assert host.check.__code__.co_filename == modeling_utils.__file__
    assert not our_finders()
    for _ in range(2):
        register()
        assert set(NAMES) <= host.attention.keys() & host.mask.keys()
        assert getattr(PreTrainedModel, CHECK) is not host.check
        unregister()
        after = snapshot(host)
        assert after == before
        assert after[2] is host.check


def test_unregister_says_that_every_host_is_off(host):
    register()
    report = unregister()
    assert {row["state"] for row in report.values()} == {"off"}
    assert report == status()


def test_unregister_twice_is_once(host):
    before = snapshot(host)
    unregister()
    assert snapshot(host) == before


def test_register_is_idempotent(host):
    first = register()
    once = snapshot(host)
    assert register() == first == status()
    assert snapshot(host) == once
    assert getattr(PreTrainedModel, CHECK).__wrapped__ is host.check


@pytest.mark.parametrize("turn", range(5))
def test_register_from_24_threads_registers_once(host, turn):
    start, outcomes = threading.Barrier(24), []

    def work():
        start.wait()
        outcomes.append(register()["transformers"]["state"])

    threads = [threading.Thread(target=work) for _ in range(24)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert outcomes == ["registered"] * 24
    assert len(our_finders()) == 1
    assert getattr(PreTrainedModel, CHECK).__wrapped__ is host.check


def test_living_model_gets_the_hosts_error_after_unregister(host):
    register()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}
    model = LlamaForCausalLM._from_config(LlamaConfig(num_hidden_layers=1, **sizes), attn_implementation="anchor")
    inputs = model.dummy_inputs["input_ids"] % 8
    model(inputs)
    unregister()
    with pytest.raises((KeyError, ValueError), match="anchor"):
        model(inputs)


def test_unregister_while_a_host_is_half_imported(tmp_path):
    env = build_house(tmp_path)
    edit_host(
        tmp_path,
        HOST,
        'import torch, hf_ext\nNAMES = {"own": "the host\'s"}\nhf_ext.unregister()\n',
    )
    code = f"""
        import json, {HOST} as host
        from house import traces
        print(json.dumps([host.NAMES, traces("{HOST}")]))
        """
    assert answer(run_python(code, env=env)) == [{"own": "the host's"}, []]


def test_unregister_takes_the_names_out_of_every_host(tmp_path):
    env = build_house(tmp_path)
    code = """
        import json, sys
        finders = list(sys.meta_path)
        import house, hf_ext
        assert house.problems() == []
        hf_ext.unregister()
        gone = house.problems()
        assert sys.meta_path == finders
        hf_ext.register()
        print(json.dumps([gone, house.problems()]))
        """
    gone, back = answer(run_python(code, env=env))
    assert sorted(gone) == sorted(f"{row.module} lacks {name}" for row in TABLE for name in row.names)
    assert back == []


def test_register_tries_a_failed_host_again(tmp_path):
    env = build_house(tmp_path)
    append(
        tmp_path / "hf_ext/stand_in.py",
        """
        _add = add
        def add(*row):
            if not hasattr(torch, "ready"):
                raise ValueError("not yet")
            _add(*row)
        """,
    )
    code = """
        import json, torch, warnings
        warnings.simplefilter("ignore")
        import house, hf_ext, transformers.modeling_utils
        assert hf_ext.status()["transformers"]["state"] == "failed"
        torch.ready = True
        row = hf_ext.register()["transformers"]
        print(json.dumps([row["state"], row["reason"]]))
        """
    assert answer(run_python(code, env=env)) == ["registered", None]


# --- status


@pytest.mark.smoke
def test_status_has_one_row_a_host_with_all_its_names():
    report = status()
    assert list(report) == list(dict.fromkeys(row.host for row in TABLE))
    for host, entry in report.items():
        rows = [row for row in TABLE if row.host == host]
        assert list(entry) == ["state", "names", "reason", "module"]
        assert entry["names"] == [name for row in rows for name in row.names]
        assert entry["module"] == rows[0].module
        assert entry["state"] in STATES
        assert entry["reason"] is None
    assert report == json.loads(json.dumps(report))


def test_status_states(host):
    assert {entry["state"] for entry in status().values()} == {"off"}
    report = register()
    assert report["transformers"]["state"] == "registered"
    for row in TABLE:
        assert (report[row.host]["state"] == "waiting") == (row.module not in sys.modules)


# --- names and functions that belong to somebody else


def take(host, table, holder=foreign):
    getattr(host, table)["anchor"] = holder


def assert_nothing_of_ours(host, table):
    other = host.mask if table == "attention" else host.attention
    assert getattr(host, table)["anchor"] is foreign
    assert "anchor" not in other
    assert getattr(PreTrainedModel, CHECK) is host.check


@pytest.mark.smoke
@quiet
@pytest.mark.parametrize("table", ["attention", "mask"])
def test_taken_name_is_refused_and_stays(host, table):
    take(host, table)
    with pytest.raises(RegistrationError) as caught:
        register()
    for word in ("transformers", "'anchor'", foreign.__module__, __file__):
        assert word in str(caught.value)
    assert_nothing_of_ours(host, table)
    report = status()
    assert report["transformers"]["state"] == "failed"
    assert __file__ in report["transformers"]["reason"]
    assert {report[row.host]["state"] for row in TABLE if row.host != "transformers"} <= SERVED


@quiet
@pytest.mark.parametrize("name", ["anchor_continuous", "mcq_recalibrated"])
@pytest.mark.parametrize("table", ["attention", "mask"])
def test_all_names_are_added_or_none(host, table, name):
    """Also when the name that is taken belongs to a method that comes after others."""
    getattr(host, table)[name] = foreign
    with pytest.raises(RegistrationError, match=f"'{name}'"):
        register()
    assert getattr(host, table).pop(name) is foreign
    assert no_name_is_in(host)
    assert getattr(PreTrainedModel, CHECK) is host.check


@quiet
@pytest.mark.parametrize("channel", ["autoload", "import", "run"])
@pytest.mark.parametrize("table", ["attention", "mask"])
def test_taken_name_never_raises_while_arming(host, table, channel):
    take(host, table)
    _autoload.arm(channel)
    assert_nothing_of_ours(host, table)
    assert status()["transformers"]["state"] == "failed"


TAKEN = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import transformers.modeling_utils as host
    import hf_ext, house
problems = house.problems()
print(json.dumps([[str(warning.message) for warning in caught], hf_ext.status()["transformers"], problems]))
"""


def test_taken_name_under_autoload_is_one_warning(tmp_path):
    """As when a later version of the host, or another plugin, brings the name itself."""
    env = build_house(tmp_path)
    edit_host(tmp_path, HOST, 'import torch\ndef theirs(): ...\nNAMES = {"anchor": theirs}\n')
    append(
        tmp_path / "hf_ext/stand_in.py",
        f"""
        _add = add
        def add(module, when, *names):
            if module == "{HOST}":
                from hf_ext.compat import claim_all
                claim_all([(table(module, when), name, "ours") for name in names], host="transformers")
            _add(module, when, *names)
        """,
    )
    texts, entry, problems = answer(run_python(TAKEN, env=env))
    assert len(texts) == 1
    for word in ("transformers", "'anchor'", str(tmp_path / "transformers"), "hf-ext doctor"):
        assert word in texts[0]
    assert (entry["state"], "'anchor'" in entry["reason"]) == ("failed", True)
    assert problems == [f"{HOST} lacks {name}" for name in NAMES]


def test_load_check_is_wrapped_once(host):
    register()
    once = getattr(PreTrainedModel, CHECK)
    compat.wrap_load_check(check_at_load)
    assert getattr(PreTrainedModel, CHECK) is once


def test_our_own_function_already_there_is_no_conflict(host):
    register()
    ours = host.attention["anchor"], host.mask["anchor"]
    unregister()
    host.attention["anchor"], host.mask["anchor"] = ours
    assert register()["transformers"]["state"] == "registered"


@quiet
@pytest.mark.parametrize("between", [status, unregister], ids=["at_once", "after_unregister"])
def test_register_works_once_the_name_is_free(host, between):
    take(host, "mask")
    with pytest.raises(RegistrationError):
        register()
    between()
    del host.mask["anchor"]
    assert register()["transformers"]["state"] == "registered"


@quiet
def test_unregister_leaves_somebody_elses_name(host):
    take(host, "mask")
    with pytest.raises(RegistrationError):
        register()
    unregister()
    assert_nothing_of_ours(host, "mask")


def wrapped_plainly(inner):
    def theirs(*args, **kwargs):
        return inner(*args, **kwargs)

    return theirs


def wrapped_with_functools(inner):
    """It carries the name, the module and the attributes of what it wraps."""
    return wraps(inner)(wrapped_plainly(inner))


WRAPPERS = pytest.mark.parametrize("wrap", [wrapped_plainly, wrapped_with_functools])


@WRAPPERS
@pytest.mark.parametrize("table", ["attention", "mask"])
def test_function_that_was_replaced_later_stays(host, table, wrap):
    register()
    theirs = wrap(getattr(host, table)["anchor"])
    take(host, table, theirs)
    with pytest.raises(RegistrationError, match=r"transformers.*'anchor'"):
        unregister()
    assert getattr(host, table)["anchor"] is theirs
    assert "anchor" not in (host.mask if table == "attention" else host.attention)
    assert getattr(PreTrainedModel, CHECK) is host.check


MOVED = [(PreTrainedModel, CHECK), (modeling_utils, "AttentionInterface"), (masking_utils, "AttentionMaskInterface")]


@quiet
@pytest.mark.parametrize(("owner", "name"), MOVED, ids=[name for _, name in MOVED])
def test_host_that_moved_its_interface_keeps_nothing_of_ours(host, monkeypatch, owner, name):
    """Names without the load check, say, would let any model through."""
    with monkeypatch.context() as moved:
        moved.delattr(owner, name)
        entry = register()["transformers"]
        assert (entry["state"], name in entry["reason"]) == ("failed", True)
    assert no_name_is_in(host)
    assert getattr(PreTrainedModel, CHECK) is host.check


@WRAPPERS
def test_load_check_that_somebody_wrapped_after_us_stays_and_is_named(host, wrap):
    register()
    theirs = wrap(getattr(PreTrainedModel, CHECK))
    setattr(PreTrainedModel, CHECK, theirs)
    with pytest.raises(RegistrationError) as caught:
        unregister()
    assert __name__ in str(caught.value) or __file__ in str(caught.value)
    assert getattr(PreTrainedModel, CHECK) is theirs
    assert no_name_is_in(host)
    assert not our_finders()


def test_unregister_again_after_they_unwrapped(host):
    """What the message of the first attempt advises."""
    register()
    ours = getattr(PreTrainedModel, CHECK)
    setattr(PreTrainedModel, CHECK, wrapped_plainly(ours))
    with pytest.raises(RegistrationError):
        unregister()
    setattr(PreTrainedModel, CHECK, ours)
    unregister()
    assert getattr(PreTrainedModel, CHECK) is host.check


# --- the package


@pytest.mark.parametrize("name", ["regsiter", "AnchorPackin", "utils"])
def test_unknown_attribute_lists_what_is_offered(name):
    with pytest.raises(AttributeError) as caught:
        getattr(hf_ext, name)
    assert repr(name) in str(caught.value)
    for offered in hf_ext.__all__:
        assert offered in str(caught.value)


def test_every_public_name_is_there_and_listed():
    assert set(hf_ext.__all__) <= set(dir(hf_ext))
    for name in hf_ext.__all__:
        assert getattr(hf_ext, name) is not None


def test_lazy_names_are_the_real_objects():
    from hf_ext import registry
    from hf_ext.anchor_attention import AnchorPacking

    assert hf_ext.register is registry.register
    assert hf_ext.AnchorPacking is AnchorPacking
