"""A method that PEFT does not know becomes one that it knows, once."""

import enum
import pickle
from dataclasses import dataclass

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType

import aslora
from peft_bridge import register_method
from peft_bridge.method.registration import add_enum_member


@dataclass
class ToyConfig(PeftConfig):
    pass


class ToyModel(BaseTuner):
    pass


@pytest.fixture
def toy():
    """Register a method, and forget it again."""
    member = register_method("toymethod", ToyConfig, ToyModel, "toy_")
    yield member
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(member, None)
    PeftType._member_names_.remove("TOYMETHOD")
    PeftType._member_map_.pop("TOYMETHOD")
    PeftType._value2member_map_.pop("TOYMETHOD")
    type.__delattr__(PeftType, "TOYMETHOD")


def test_peft_knows_the_method(toy):
    assert PEFT_TYPE_TO_CONFIG_MAPPING[toy] is ToyConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[toy] is ToyModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[toy] == "toy_"


def test_the_member_is_like_those_of_the_class_body(toy):
    assert toy is PeftType.TOYMETHOD is PeftType("TOYMETHOD") is PeftType["TOYMETHOD"]
    assert toy in list(PeftType)
    assert (toy.name, toy.value, str(toy.value)) == ("TOYMETHOD", "TOYMETHOD", "TOYMETHOD")
    assert toy == "TOYMETHOD"
    assert isinstance(toy, PeftType)
    assert type(toy) is type(PeftType.LORA)
    assert pickle.loads(pickle.dumps(toy)) is toy
    assert repr(toy) == repr(PeftType.LORA).replace("LORA", "TOYMETHOD")
    assert {toy: 1}[PeftType("TOYMETHOD")] == 1


def test_a_second_call_changes_nothing(toy):
    before = [dict(m) for m in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)]
    members = list(PeftType)
    assert register_method("toymethod", ToyConfig, ToyModel, "toy_") is toy
    assert register_method("aslora", aslora.ASLoRAConfig, aslora.ASLoRAModel, "aslora_") is PeftType.ASLORA
    assert list(PeftType) == members
    mappings = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    assert [dict(m) for m in mappings] == before


@pytest.mark.parametrize("name", ["toymethod", "lora"])
def test_a_name_that_is_taken_is_an_error(toy, name):
    class Other(PeftConfig):
        pass

    holder = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())]
    with pytest.raises(ValueError, match=f"name='{name}' is already registered.*choose another name"):
        register_method(name, Other, ToyModel, "other_")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())] is holder


def test_other_members_stay_as_they_are():
    class Kind(str, enum.Enum):  # noqa: UP042 (as PeftType is)
        ONE = "ONE"

    before = Kind.ONE
    two = add_enum_member(Kind, "TWO")
    assert list(Kind) == [before, two]
    assert add_enum_member(Kind, "ONE") is before
    assert len(Kind.__members__) == 2
