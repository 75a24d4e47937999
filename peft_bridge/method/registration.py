"""Registration of a PEFT method that is not part of PEFT.

`peft.utils.register_peft_method` accepts only names that are members of the enum `PeftType`, and an enum with members
cannot be subclassed. So the member is added to the enum itself, in the way in which the class body would have added it.
"""

from __future__ import annotations

import enum
from typing import cast

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


def add_enum_member(cls: type[enum.Enum], name: str) -> enum.Enum:
    """Return member `name` of the string enum `cls`, added with its name as its value if it was not there."""
    if name not in cls.__members__:
        # type.__setattr__ passes by EnumType's guard; __set_name__ then does what it does for a class body's member.
        type.__setattr__(cls, name, None)
        enum._proto_member(name).__set_name__(cls, name)  # type: ignore[attr-defined]
    return cls[name]


def register_method(name: str, config_cls: type, model_cls: type, prefix: str) -> PeftType:
    """Make PEFT know a method: afterwards `get_peft_model`, `PeftModel.from_pretrained` and `AutoPeftModel` take it.

    Args:
        name: lower-case name; its upper-case form becomes the `PeftType`.
        config_cls: the `PeftConfig` subclass.
        model_cls: the `BaseTuner` subclass.
        prefix: prefix of the method's parameters, e.g. `"aslora_"`.

    Returns:
        The `PeftType` member. A second call with the same classes changes nothing.

    Raises:
        ValueError: another config or model class already holds this name.
    """
    member = cast(PeftType, add_enum_member(PeftType, name.upper()))
    known = (PEFT_TYPE_TO_CONFIG_MAPPING.get(member), PEFT_TYPE_TO_TUNER_MAPPING.get(member))
    if known == (None, None):
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=prefix)
    elif known != (config_cls, model_cls):
        raise ValueError(
            f"name='{name}' is already registered in PEFT with {known[0]}: "
            "uninstall the other package or choose another name."
        )
    return member
