"""The house's rules that a reader cannot check by eye: imports, sizes of folders and files, private names."""

import ast
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("adapter_kernels", "aslora", "aslora_meft", "meft", "peft_bridge")
# What a package may import of the others.
BELOW = {
    "adapter_kernels": set(),
    "peft_bridge": set(),
    "aslora": {"peft_bridge"},
    "meft": {"peft_bridge", "adapter_kernels"},
    "aslora_meft": {"aslora", "meft", "peft_bridge", "adapter_kernels"},
}
# Names that torch, PEFT, accelerate and DeepSpeed do not document; `kernels` imports none of the other packages.
PRIVATE = (
    *("peft_bridge.torch_private", "peft_bridge.peft_private", "peft_bridge.accelerate_private"),
    *("peft_bridge.deepspeed_private", "adapter_kernels.runtime.torch_private"),
)
MOST_MODULES, MOST_LINES = 12, 300


@cache
def sources():
    """Dotted name -> path of each module."""
    found = {}
    for package in PACKAGES:
        folder = ROOT / ("kernels" if package == "adapter_kernels" else "")
        for path in sorted((folder / package).rglob("*.py")):
            names = list(path.relative_to(folder).with_suffix("").parts)
            found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(name, path):
    """The modules of the house that a module imports, wherever it does, with the line of each."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in sources() else base), node


def at_import(path):
    """The nodes of a file that run when it is imported."""
    waiting = list(tree(path).body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def test_packages_import_only_those_below_them():
    for name, path in sources().items():
        package = name.partition(".")[0]
        for imported, node in imports(name, path):
            other = imported.partition(".")[0]
            assert other not in set(PACKAGES) - {package} - BELOW[package], f"{path}:{node.lineno} imports {imported}"


def test_the_folder_of_kernels_hides_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # Hugging Face has a package of this name


def test_no_imports_in_a_circle():
    arrows = {}
    for name, path in sources().items():
        run = set(map(id, at_import(path)))
        arrows[name] = {other for other, node in imports(name, path) if id(node) in run and other in sources()} - {name}
    done, path_here = set(), []

    def visit(name):
        assert name not in path_here, " -> ".join([*path_here[path_here.index(name) :], name])
        if name not in done:
            path_here.append(name)
            for other in sorted(arrows[name]):
                visit(other)
            done.add(path_here.pop())

    for name in arrows:
        visit(name)


def test_no_import_is_hidden_from_the_interpreter():
    for path in sources().values():
        named = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(tree(path))}
        assert "TYPE_CHECKING" not in named, path


def tracked(*folders):
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the checkout is no git repository")
    return [Path(name) for name in listed.stdout.splitlines() if name.endswith(".py") and (ROOT / name).is_file()]


def test_a_folder_has_a_dozen_modules_at_most():
    folders = ("kernels", "aslora", "aslora_meft", "meft", "peft_bridge", "benchmarks", "examples", "docs")
    counts = Counter(path.parent for path in tracked(*folders) if path.name != "__init__.py")
    assert {str(folder): n for folder, n in counts.items() if n > MOST_MODULES} == {}


def test_a_file_has_three_hundred_lines_at_most():
    folders = ("kernels", "aslora", "aslora_meft", "meft", "peft_bridge", "benchmarks", "examples", "docs")
    lengths = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in tracked(*folders)}
    assert {path: n for path, n in lengths.items() if n > MOST_LINES} == {}


def test_private_names_of_torch_and_peft_stand_in_one_file_each():
    for name, path in sources().items():
        if name in PRIVATE:
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("torch", "peft"):
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                dotted = ast.unparse(node)
                parts = dotted.split(".") if dotted.partition(".")[0] in ("torch", "peft") else []
            else:
                continue
            private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
            assert not private, f"{path}:{node.lineno}: {private}"


# What other libraries than torch and PEFT name so, or is a place of theirs for subclasses and their users.
FROM_OTHER_LIBRARIES = {
    *("_fields", "_asdict", "_getframe", "_proto_member", "_is_owned"),
    *("_actions", "_add_action", "_format_args", "_get_default_metavar_for_optional"),
    *("_tied_weights_keys", "_keys_to_ignore_on_load_unexpected", "_hf_hook"),
}
OF_A_SUBCLASS = {"self", "cls", "super()", "aten"}


def key_in_attributes(node):
    """ "name" of `vars(x)["name"]`, `vars(x).pop("name")` and the same of `x.__dict__`; else None."""
    if isinstance(node, ast.Subscript):
        held, key = node.value, node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        held, key = node.func.value, node.args[0]
    else:
        return None
    of = ast.unparse(held)
    is_attributes = of.startswith("vars(") or of.endswith(".__dict__")
    if not is_attributes or of.removesuffix(".__dict__") in OF_A_SUBCLASS or of == "vars(self)":
        return None
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def test_private_names_of_torch_and_peft_are_not_read_from_their_objects_either():
    """An attribute with an underscore is one that some module of the house defines, or it stands in the files above."""
    ours, seen = set(FROM_OTHER_LIBRARIES), []
    for name, path in sources().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in OF_A_SUBCLASS:
                seen.append((name, path, node.lineno, node.attr))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
                attribute = node.args[1]
                seen += [(name, path, node.lineno, attribute.value)] if isinstance(attribute, ast.Constant) else []
            elif key := key_in_attributes(node):
                seen.append((name, path, node.lineno, key))
    for name, path, line, attribute in seen:
        if name not in PRIVATE and attribute.startswith("_") and not attribute.startswith("__"):
            assert attribute in ours, f"{path}:{line}: {attribute}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
