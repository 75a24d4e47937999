"""For all tests: nothing is downloaded, hypothesis is patient, what is garbage, the order, and what needs a GPU."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What modules have made is no garbage: else each of many collections looks through it, for half a second."""
    gc.disable()
    result = yield
    gc.enable()
    gc.freeze()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(nextitem, item):
    """Nor is what a file's tests have imported: trainers collect garbage several times each, of all that is there."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return result


def pytest_collection_modifyitems(items):
    """The slow ones first, so that no process is left alone with one at the end; `gpu` only where there is one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
