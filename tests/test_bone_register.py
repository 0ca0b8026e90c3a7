"""BONE as a true member of PEFT's enum: identities, pickles, and an undo that leaves nothing."""

import copy
import pickle

import peft
import pytest
from peft import mapping
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

import hf_ext
from hf_ext import BoneConfig, BoneModel, RegistrationError, compat
from hf_ext.bone_adapter import register

if compat.has_native_bone():
    pytest.skip("this peft has Bone itself", allow_module_level=True)

TABLES = [value for name, value in vars(mapping).items() if name.startswith("PEFT_TYPE_TO_")]


def state_of_the_host():
    enum = [PeftType._member_map_, PeftType._value2member_map_, vars(PeftType)]
    return [dict(table) for table in (*TABLES, *enum)], list(PeftType._member_names_), set(vars(peft))


@pytest.fixture
def unregistered():
    """PEFT as if hf_ext had never been there."""
    register.remove()
    yield
    register.add()


def test_the_name_is_a_member_like_the_others():
    member = PeftType.BONE
    assert PeftType("BONE") is member is PeftType["BONE"]
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert (member.name, member.value, str(member)) == ("BONE", "BONE", "PeftType.BONE")
    assert list(PeftType)[-1] is member
    assert member in PeftType
    assert member == "BONE"
    assert len({member, "BONE"}) == 1
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member


def test_every_table_has_it():
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["BONE"] is BoneConfig is peft.BoneConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["BONE"] is BoneModel is peft.BoneModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["BONE"] == "bone_"
    assert "BONE" not in mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_undo_leaves_the_host_as_it_was(unregistered):
    before = state_of_the_host()
    assert "BONE" not in PeftType.__members__
    assert not hasattr(PeftType, "BONE")
    assert list(PeftType) == list(PeftType.__members__.values())
    register.add()
    assert state_of_the_host() != before
    register.remove()
    assert state_of_the_host() == before
    with pytest.raises(KeyError):
        peft.get_peft_config({"peft_type": "BONE"})


def test_the_member_outlives_its_registration():
    member = PeftType.BONE
    config = BoneConfig(r=4)
    register.remove()
    assert config.peft_type is member
    assert BoneConfig(r=4).peft_type is member
    register.add()
    assert PeftType.BONE is member


def test_adding_twice_changes_nothing():
    before = state_of_the_host()
    register.add()
    assert state_of_the_host() == before


def test_removing_twice_changes_nothing(unregistered):
    before = state_of_the_host()
    register.remove()
    assert state_of_the_host() == before


def test_a_method_of_somebody_else_stays(unregistered):
    class TheirConfig(peft.PeftConfig):
        pass

    compat.add_peft_method("bone", {}, TheirConfig, BoneModel)
    before = state_of_the_host()
    try:
        with pytest.raises(RegistrationError, match=r"peft already has .*BONE.* from .*test_bone_register"):
            register.add()
        assert state_of_the_host() == before
    finally:
        compat.remove_peft_method("bone", {}, TheirConfig, BoneModel)


def test_a_class_of_somebody_else_in_peft_stays(unregistered, monkeypatch):
    theirs = type("BoneConfig", (), {})
    monkeypatch.setattr(peft, "BoneConfig", theirs, raising=False)
    before = state_of_the_host()
    with pytest.raises(RegistrationError, match="peft already has 'BoneConfig'"):
        register.add()
    assert state_of_the_host() == before
    assert peft.BoneConfig is theirs


def test_undo_leaves_what_replaced_us(unregistered, monkeypatch):
    register.add()
    theirs = type("BoneConfig", (), {})
    monkeypatch.setattr(peft, "BoneConfig", theirs)
    with pytest.raises(RegistrationError, match="replaced after it registered"):
        register.remove()
    assert peft.BoneConfig is theirs
    assert "BONE" not in PeftType.__members__


def test_the_host_refuses_a_second_method_of_this_name():
    with pytest.raises(KeyError, match="already PEFT method called 'bone'"):
        register_peft_method(name="bone", config_cls=BoneConfig, model_cls=BoneModel)


def test_status_names_it():
    peft_row = {"state": "registered", "names": ["BONE"], "reason": None, "module": "peft.tuners"}
    assert hf_ext.status()["peft"] == peft_row


def test_native_bone_is_left_alone(monkeypatch):
    """The lane of the lowest versions runs the real thing."""
    monkeypatch.setattr(compat, "has_native_bone", lambda: True)
    before = state_of_the_host()
    assert register.add() == "native"
    assert state_of_the_host() == before
