"""The tiny model on which most tests of ASLoRA work."""

import pytest

from tests.support.tiny_aslora import Tiny


@pytest.fixture(scope="session")
def tiny():
    return Tiny
