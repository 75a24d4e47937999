"""Code of exported folders is copied to a cache of transformers: here to one of the test run's own."""

import sys
import tempfile

import pytest


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
    from aslora_meft.export.meft_model import export_model
    from tests.support.exported_models import save_adapter, save_base

    folder = tmp_path_factory.mktemp("exported")
    model = save_adapter(save_base(folder / "base"), folder / "adapter")
    export_model(folder / "adapter", folder / "model")
    return model, folder
