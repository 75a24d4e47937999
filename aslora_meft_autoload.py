"""Lets PEFT load adapters of ASLoRA and MEFT in programs that import neither.

torch calls `install` at the end of `import torch` (entry point group `torch.backends`). It imports nothing: it only
arranges that PEFT's table of methods, once PEFT makes it, imports ours when an adapter's file names one of them.
`ASLORA_MEFT_AUTOLOAD=0` turns it off. See docs/integrations.md.
"""

import importlib
import os
import sys
from typing import Any

# The module and the name are PEFT's own. peft_bridge/peft_private.py would import PEFT, so they are written here;
# tests/test_autoload.py notices when PEFT changes them.
_MODULE, _TABLE = "peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING"
_PACKAGES = {"ASLORA": "aslora", "MEFT": "meft"}


class _Methods(dict):
    """PEFT's table from a method's name to its configuration class; it imports ours when they are looked up."""

    def __missing__(self, key: Any) -> Any:
        package = _PACKAGES.get(key) if isinstance(key, str) else None  # a PeftType is a string too
        if package is None:
            raise KeyError(key)
        try:
            module = importlib.import_module(package)
        except Exception as error:
            reason = f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"
            raise ImportError(_sentence(package, reason)) from error
        if key not in self:
            raise ImportError(_sentence(package, f"is hidden by another one ({getattr(module, '__file__', None)})"))
        return self[key]


def _sentence(package: str, reason: str) -> str:
    return (
        f"This adapter needs the package '{package}' of aslora-meft, which {reason}: reinstall aslora-meft, or take "
        "other packages of that name out of sys.path."
    )


class _Finder:
    """Finds `peft.mapping` as Python would, and replaces its table as soon as the module has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Any) -> None:
        try:
            run = loader.exec_module

            def exec_module(module: Any) -> None:
                loader.exec_module = run
                run(module)
                try:
                    setattr(module, _TABLE, _Methods(getattr(module, _TABLE)))
                    sys.meta_path.remove(self)  # type: ignore[arg-type]
                except Exception:
                    pass

            loader.exec_module = exec_module
        except Exception:
            pass


def install() -> None:
    """Wait for PEFT's table of methods. Never raises; does nothing where the table is there already."""
    try:
        if os.environ.get("ASLORA_MEFT_AUTOLOAD", "1") != "1" or _MODULE in sys.modules:
            return
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
    except Exception:
        pass
