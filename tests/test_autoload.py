"""Adapters load in processes that import neither method: torch calls `aslora_meft_autoload.install`."""

import importlib.machinery
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import peft.mapping
import pytest

import aslora_meft_autoload as autoload
from tests.support.processes import run_code

ROOT = Path(__file__).resolve().parents[1]
GROUP = "torch.backends"


@pytest.fixture
def fresh(tmp_path, adapters):
    """Runs code in a fresh process in which the distribution is installed, whether this checkout is or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = tmp_path / "site" / "aslora_meft-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aslora-meft\nVersion: 0\n")
    entries = "".join(f"{name} = {value}\n" for name, value in project["entry-points"][GROUP].items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}")

    def run(code, *before, **environment):
        paths = [*map(str, before), str(info.parent), str(ROOT), str(ROOT / "kernels")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
        words = [sys.executable, "-W", "ignore", "-c", code, *map(str, adapters)]
        done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of a base model with tokenizer, of an ASLoRA and of a MEFT adapter, and a file with their logits."""
    import torch
    from peft import get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from aslora import ASLoRAConfig
    from meft import MEFTConfig

    home = tmp_path_factory.mktemp("adapters")
    words = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(26)}, unk_token="z"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="z", eos_token="y")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=26, **shape)).save_pretrained(home / "base")
    configs = {
        "aslora": ASLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False, task_type="CAUSAL_LM"),
        "meft": MEFTConfig(
            r=16, num_experts=4, experts_per_token=2, top_k=4, init_weights=False, task_type="CAUSAL_LM"
        ),
    }
    logits = {}
    for name, config in configs.items():
        model = get_peft_model(LlamaForCausalLM.from_pretrained(home / "base"), config).eval()
        if name == "aslora":  # layers that share, so that the file holds fewer rows than the model
            for B in model.base_model.shared_b("default").values():
                B.assign(B.stacked_B.detach(), [0, 0, 2, 2])
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
        with torch.no_grad():
            logits[name] = model(torch.arange(8)[None]).logits[0, -1].tolist()
    tokenizer.save_pretrained(home / "base")
    (home / "logits.json").write_text(json.dumps(logits))
    return home / "base", home / "aslora", home / "meft", home / "logits.json"


CHECK = """
import json, sys
base, aslora, meft, expected = sys.argv[1:]
def check(model, name):
    import torch
    with torch.no_grad():
        found = model.eval()(torch.arange(8)[None]).logits[0, -1]
    torch.testing.assert_close(found, torch.tensor(json.load(open(expected))[name]), rtol=0, atol=1e-6)
"""

# In a process that has imported torch and then transformers, and in one that has imported nothing.
AFTER_TORCH = {
    "peft": """
import torch
assert not {"peft", "aslora", "meft"} & set(sys.modules)
from transformers import AutoModelForCausalLM
from peft import PeftModel
check(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), aslora), "aslora")
assert "meft" not in sys.modules
check(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), meft), "meft")
""",
    "transformers": """
from transformers import AutoModelForCausalLM, pipeline
damaged = meft + "-damaged"
import shutil
shutil.copytree(meft, damaged)
data = bytearray(open(damaged + "/adapter_model.safetensors", "rb").read())
data[-9] ^= 1
open(damaged + "/adapter_model.safetensors", "wb").write(data)
model = AutoModelForCausalLM.from_pretrained(base)
assert "meft" not in sys.modules
try:
    model.load_adapter(damaged)  # the call that imports the method checks the file as well
except ValueError as error:
    assert "digest" in str(error), error
else:
    raise AssertionError("loaded")
assert not hasattr(model, "peft_config") and not any("meft_" in name for name, _ in model.named_parameters())
assert all(p.requires_grad for p in model.parameters())
assert "aslora" not in sys.modules
model.load_adapter(aslora)
check(model, "aslora")
check(AutoModelForCausalLM.from_pretrained(meft), "meft")
check(pipeline("text-generation", aslora).model, "aslora")
""",
}
FIRST = {
    "peft": """
from peft import AutoPeftModelForCausalLM, PeftConfig, get_peft_config
assert not {"aslora", "meft"} & set(sys.modules)
assert PeftConfig.from_pretrained(meft).r == 16
assert get_peft_config({"peft_type": "ASLORA", "r": 3}).r == 3
check(AutoPeftModelForCausalLM.from_pretrained(aslora), "aslora")
check(AutoPeftModelForCausalLM.from_pretrained(meft), "meft")
""",
    "one of ours": """
import aslora as package
assert "meft" not in sys.modules
from transformers import AutoModelForCausalLM
from peft import PeftModel
check(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), meft), "meft")
""",
}
# PEFT and transformers import these where they are installed, which takes a third of the time.
HIDDEN = """
import gc, sys
gc.disable()  # imports are faster
sys.modules.update(bitsandbytes=None, scipy=None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_adapters_load_whatever_is_imported_first(fresh, first):
    code, _, errors = fresh(HIDDEN + CHECK + FIRST[first])
    assert code == 0, errors


@pytest.mark.parametrize("loading", AFTER_TORCH)
def test_adapters_load_where_torch_is_imported_first(adapters, loading):
    run_code(CHECK + AFTER_TORCH[loading], *adapters, bare=True)


@pytest.mark.slow
def test_switched_off_it_does_nothing(fresh, tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").touch()
    (tmp_path / "peft" / "mapping.py").write_text("PEFT_TYPE_TO_CONFIG_MAPPING = {}")
    code, output, errors = fresh(
        "import os, sys, torch, peft.mapping\nassert type(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING) is dict\n"
        "assert not [f for f in sys.meta_path if 'aslora' in type(f).__module__]\n"
        "import aslora_meft_autoload as autoload\n"
        "os.environ['ASLORA_MEFT_AUTOLOAD'] = '1'\n"
        "del sys.modules['peft.mapping']\n"
        "autoload.install()\n"
        "import peft.mapping\n"
        "assert type(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING) is autoload._Methods\nprint('fine')",
        tmp_path,
        ASLORA_MEFT_AUTOLOAD="0",
    )
    assert (code, output.strip()) == (0, "fine"), errors


def test_a_broken_package_breaks_no_import_and_is_named(adapters, tmp_path):
    (tmp_path / "meft.py").write_text("raise RuntimeError('half an upgrade')")
    (tmp_path / "aslora.py").write_text("mine = 1")
    output = run_code(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n" + CHECK + "import torch, peft\npeft.LoraConfig(r=2)\n"
        "for folder in (meft, aslora):\n"
        "    try: peft.PeftConfig.from_pretrained(folder)\n"
        "    except ImportError as error: print(error)",
        *adapters,
        bare=True,
    )
    assert "'meft' of aslora-meft, which cannot be imported (RuntimeError: half an upgrade): reinstall" in output
    assert "'aslora' of aslora-meft, which is hidden by another one" in output


def test_the_installed_distribution_has_the_entry_point():
    """After a change of pyproject.toml the checkout must be installed again, which `make setup` does."""
    found = [entry for entry in importlib.metadata.entry_points(group=GROUP) if entry.name == "aslora_meft"]
    assert [entry.value for entry in found] == ["aslora_meft_autoload:install"]
    assert found[0].load() is autoload.install


def test_the_table_is_where_peft_looks_a_method_up():
    """Fails when PEFT renames what the module has in place of `peft_private`."""
    assert autoload._MODULE == "peft.mapping"
    assert isinstance(getattr(peft.mapping, autoload._TABLE), dict)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING is getattr(peft.mapping, autoload._TABLE)


@pytest.fixture
def finder(tmp_path, monkeypatch):
    """The finder at work on a module of the name `stand_in`, with the table as PEFT has it."""
    (tmp_path / "stand_in.py").write_text("TABLE = {'LORA': int}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(autoload, "_MODULE", "stand_in")
    monkeypatch.setattr(autoload, "_TABLE", "TABLE")
    monkeypatch.delitem(sys.modules, "stand_in", raising=False)
    monkeypatch.delenv("ASLORA_MEFT_AUTOLOAD", raising=False)
    return tmp_path


def finders():
    return [entry for entry in sys.meta_path if isinstance(entry, autoload._Finder)]


def test_the_table_is_replaced_once_and_the_finder_goes(finder):
    autoload.install()
    autoload.install()
    assert len(finders()) == 1
    import stand_in

    assert type(stand_in.TABLE) is autoload._Methods
    assert {"LORA": int} == stand_in.TABLE
    assert isinstance(stand_in.__loader__, importlib.machinery.SourceFileLoader)
    assert not finders()
    with pytest.raises(KeyError, match="NOTHING"):
        stand_in.TABLE["NOTHING"]
    assert "ASLORA" not in stand_in.TABLE  # only a look-up imports
    assert stand_in.TABLE.get("ASLORA") is None


@pytest.mark.parametrize("content", ["", "TABLE = 3", "TABLE = None\n__slots__ = ()"])
def test_a_table_of_another_kind_is_left_as_it_is(finder, content):
    (finder / "stand_in.py").write_text(content)
    autoload.install()
    import stand_in

    assert not isinstance(getattr(stand_in, "TABLE", None), autoload._Methods)


def test_an_error_in_the_module_is_its_own_and_the_next_import_is_seen(finder):
    (finder / "stand_in.py").write_text("raise OSError('once')")
    autoload.install()
    with pytest.raises(OSError, match="once"):
        import stand_in
    (finder / "stand_in.py").write_text("TABLE = {}  # of another length, so that no cache of bytecode is used")
    import stand_in

    assert type(stand_in.TABLE) is autoload._Methods


def test_install_raises_nothing(monkeypatch):
    monkeypatch.setattr(autoload, "_MODULE", "never_imported")
    monkeypatch.setattr(sys, "meta_path", None)
    autoload.install()
