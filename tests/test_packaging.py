"""What a wheel contains."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("adapter_kernels", "aslora", "aslora_meft", "meft", "peft_bridge")


@pytest.mark.slow
def test_a_wheel_contains_every_module(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("the checkout is no git repository")
    checkout = tmp_path / "checkout"
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    compiler = tmp_path / "compiler"  # what the libraries compute is tested elsewhere: without optimisation, in a third
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    subprocess.run(build, cwd=checkout, check=True, env={**os.environ, "CXX": str(compiler)})
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (entry_points,) = (name for name in file.namelist() if name.endswith("dist-info/entry_points.txt"))
        assert "[torch.backends]\naslora_meft = aslora_meft_autoload:install" in file.read(entry_points).decode()
        assert "aslora_meft_autoload.py" in file.namelist()
        found = {name for name in file.namelist() if name.split("/")[0] in PACKAGES}
    wanted = {name.removeprefix("kernels/") for name in tracked.stdout.splitlines()}
    wanted = {name for name in wanted if name.split("/")[0] in PACKAGES and name.endswith((".py", ".typed", ".json"))}
    assert wanted <= found
    libraries = {name.split(".")[0] for name in found - wanted}
    assert libraries <= {"adapter_kernels/topk/_host_topk", "meft/table/_row_adamw"}  # where there is a compiler: both
    assert len(libraries) == (2 if shutil.which("g++") else 0)


def test_an_editable_install_has_its_own_copy_of_what_torch_imports(tmp_path):
    """So that a checkout that is gone breaks no `import torch`."""
    for name in ("aslora_meft_autoload.py", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "a"\nversion = "0"\n[tool.setuptools]\npy-modules = ["aslora_meft_autoload"]\n'
    )
    build = "import setuptools.build_meta as backend; backend.build_editable('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        assert file.read("aslora_meft_autoload.py") == (ROOT / "aslora_meft_autoload.py").read_bytes()
