"""The tiny model on which most tests of MEFT work."""

import pytest

from tests.support.tiny_meft import Tiny


@pytest.fixture(scope="session")
def tiny():
    return Tiny
