"""The command line and the recipes over the methods: `aslora-meft train`, `estimate`, `export` and `doctor`."""

import logging
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("aslora-meft")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"

# At every import it warns that it has not loaded a kernel from the hub, which nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
