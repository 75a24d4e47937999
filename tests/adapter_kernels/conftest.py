"""The checks beside this file are imported by name; hypothesis keeps its patience on a busy machine."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("busy machine", deadline=None, max_examples=50)
settings.load_profile("busy machine")
