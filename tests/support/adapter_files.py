"""Files of a saved adapter, changed by hand."""

import json
from contextlib import contextmanager

import pytest
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def rewrite(folder, change):
    """Change the tensors of a file with `change(tensors)`."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder, **fields):
    """Give fields of the configuration other values, or new ones."""
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | fields))


@contextmanager
def refused(tiny, model, match=None, error=ValueError, broken="broken"):
    """What is done within fails with one sentence, and the model is then as it was before.

    Args:
        broken: an adapter that PEFT has added before it read the file, and that goes.
    """
    before = tiny.whole_state(model)
    try:
        with pytest.raises(error, match=match) as raised:
            yield
        assert "\n" not in str(raised.value)
        kept = {name: value for name, value in tiny.whole_state(model).items() if f".{broken}" not in name}
        tiny.assert_equal(kept, before)
    finally:
        if broken in model.peft_config:
            model.delete_adapter(broken)
    tiny.assert_equal(tiny.whole_state(model), before)
