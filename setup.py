"""The one step of building that pyproject.toml cannot describe."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Gives an editable install its own copy of the module that `import torch` calls.

    Otherwise a checkout that was moved or deleted would leave an entry point without a module, and torch raises then.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            self.copy_file("aslora_meft_autoload.py", self.get_finalized_command("install").install_lib)


setup(cmdclass={"build_py": BuildPy})
