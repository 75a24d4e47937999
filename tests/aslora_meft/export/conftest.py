"""Code of exported folders is copied to a cache of transformers: here to one of the test run's own."""

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file are imported by name


@pytest.fixture(autouse=True, scope="session")
def _modules_cache(tmp_path_factory):
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setenv("HF_MODULES_CACHE", folder)  # for processes
        yield
        if folder in sys.path:
            sys.path.remove(folder)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A tiny Llama with an adapter: (PEFT model, folder with base, adapter and model)."""
    from exported_models import save_adapter, save_base

    from aslora_meft.export.meft_model import export_model

    folder = tmp_path_factory.mktemp("exported")
    model = save_adapter(save_base(folder / "base"), folder / "adapter")
    export_model(folder / "adapter", folder / "model")
    return model, folder
