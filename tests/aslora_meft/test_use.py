"""`aslora-meft generate`, `evaluate` and `run`, and what `train` leaves for them."""

import io
import json
import shlex
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM, TextStreamer

from aslora import ASLoRAConfig
from aslora_meft.cli import main
from aslora_meft.errors import UsageError
from aslora_meft.use.evaluate import measure
from aslora_meft.use.loaded import BASE, UseArguments, activate, load_adapters
from meft import MEFTConfig


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": f"it is {i}"}) + "\n" for i in range(20)))
    return path


@pytest.fixture(scope="module")
def trained(model_dir, rows, tmp_path_factory):
    """What `train` has written, and its last lines."""
    out = tmp_path_factory.mktemp("trained") / "out"
    words = ["train", "--model", model_dir, "--data", rows, "--output_dir", out, "--r", 4, "--max_steps", 8]
    words += ["--max_length", 24, "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
    words += ["--learning_rate", 1e-2, "--separator", " : ", "--save_strategy", "no"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        assert main([str(word) for word in words]) == 0
        told = sys.stdout.getvalue()
    return out, told.partition("Next:\n")[2].splitlines()


@pytest.fixture(scope="module")
def adapters(model_dir, tokenizer, tmp_path_factory):
    """An ASLoRA and a MEFT adapter that change what is answered."""
    home = tmp_path_factory.mktemp("adapters")
    configs = {
        "shared": ASLoRAConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False, task_type="CAUSAL_LM"),
        "routed": MEFTConfig(
            r=32, num_experts=4, experts_per_token=2, top_k=8, init_weights=False, task_type="CAUSAL_LM"
        ),
    }
    for name, config in configs.items():
        model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(8)
        model.save_pretrained(home / name)
    return [home / name for name in configs]


def answer(model, tokenizer, ids, count=6):
    output = model.eval().generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=count, do_sample=False
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_evaluate_gives_the_numbers_of_train(trained, rows, capsys):
    out, _ = trained
    assert main(["evaluate", str(out), "--data", str(rows), "--held_out", "--compare"]) == 0
    results = json.loads((out / "results.json").read_text())
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["base", "model", "out"]
    for line, name in zip(told[1:3], ("loss", "perplexity"), strict=True):
        assert line.split() == [name, f"{results['before'][name]:.4g}", f"{results['after'][name]:.4g}"]
    assert told[-1] == f"({results['after']['tokens']:,} tokens)"


def test_exact_match_is_what_greedy_decoding_gives(model_dir, tokenizer):
    model = LlamaForCausalLM.from_pretrained(model_dir).eval()
    samples = []
    for start, spoilt in ((5, False), (9, True), (30, False)):
        ids = list(range(start, start + 6))
        found = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, 6), max_new_tokens=4, do_sample=False)
        learnt = found[0, 6:].tolist()
        if spoilt:
            learnt[-1] = (learnt[-1] + 1) % 200
        samples.append({"input_ids": ids + learnt, "labels": [-100] * 6 + learnt})
    assert measure(model, tokenizer, samples, batch_size=2)["exact_match"] == 2 / 3


def test_the_next_commands_can_be_typed(trained, capsys):
    out, lines = trained
    commands = [shlex.split(line) for line in lines]
    assert [words[:3] for words in commands] == [
        ["aslora-meft", command, str(out)] for command in ("generate", "evaluate", "export")
    ]
    assert main(commands[1][1:]) == 0
    assert main(commands[2][1:]) == 0
    assert (out.parent / "out-lora" / "adapter_model.safetensors").is_file()


def test_generate_answers_by_each_adapter_as_it_comes(model_dir, tokenizer, adapters, capsys, monkeypatch, recwarn):
    """Adapters of both methods and the base model beside each other, in pieces."""
    pieces = []
    written = TextStreamer.on_finalized_text
    monkeypatch.setattr(
        TextStreamer, "on_finalized_text", lambda self, text, **k: (pieces.append(text), written(self, text, **k))
    )
    words = ["generate", *map(str, reversed(adapters)), "--prompt", "word1 word2", "--max_new_tokens", "6", "--compare"]
    assert main(words) == 0
    assert not [w for w in recwarn if "peft_config" in str(w.message)]  # of several adapters, which are asked for
    parts = capsys.readouterr().out.split("--- ")[1:]
    found = {part.partition("\n")[0]: part.partition("\n")[2].rstrip("\n") for part in parts}
    ids = tokenizer("word1 word2")["input_ids"]
    base = LlamaForCausalLM.from_pretrained(model_dir)
    expected = {"base model": answer(base, tokenizer, ids)}
    for folder in adapters:
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), folder)
        expected[folder.name] = answer(model, tokenizer, ids)
    assert {name: text.strip() for name, text in found.items()} == {k: v.strip() for k, v in expected.items()}
    assert len(set(expected.values())) == 3
    assert len(pieces) > len(expected)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}], ids=str)
def test_what_was_trained_beside_the_layers_is_in_force_with_its_adapter_alone(model_dir, adapters, tmp_path, fields):
    """After the base model, and beside an adapter that has nothing of the kind."""
    config = ASLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **fields)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.save_pretrained(tmp_path / "more")
    folders = [tmp_path / "more", *adapters]
    ids = torch.tensor([[0, 5, 6, 7]])

    @torch.no_grad()
    def logits(model):
        return model.eval()(ids).logits

    expected = {BASE: logits(LlamaForCausalLM.from_pretrained(model_dir))}
    for folder in folders:
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), folder)
        expected[folder.name] = logits(model)
    loaded = load_adapters([str(folder) for folder in folders], UseArguments())
    for name in (BASE, "more", "shared", BASE, "routed", "more"):
        activate(loaded.model, name)
        assert torch.equal(logits(loaded.model), expected[name]), name


def test_prompts_have_the_form_of_training(trained, tokenizer, model_dir, capsys):
    out, _ = trained
    assert main(["generate", str(out), "--prompt", "say 3", "--max_new_tokens", "6"]) == 0
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), out)
    ids = [0, *tokenizer("say 3 : ", add_special_tokens=False)["input_ids"]]
    assert capsys.readouterr().out.strip() == answer(model, tokenizer, ids).strip()


def test_a_chat_keeps_its_turns(adapters, tokenizer, model_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("word1\n\nword2\n"))
    assert main(["generate", str(adapters[0]), "--chat", "--max_new_tokens", "4"]) == 0
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), adapters[0])
    turns, expected = [], []
    for prompt in ("word1", "word2"):
        turns.append({"role": "user", "content": prompt})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        expected.append(answer(model, tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], 4))
        turns.append({"role": "assistant", "content": expected[-1]})
    assert capsys.readouterr().out.split() == " ".join(expected).split()


BAD = {
    "no adapter": (["generate", "{tmp}", "--prompt", "a"], "holds no adapter_config.json"),
    "no folder": (["evaluate", "{tmp}/none", "--data", "{rows}"], "does not exist"),
    "empty prompt": (["generate", "{out}", "--prompt", " "], "prompt=' ' is empty"),
    "no tokens": (["generate", "{out}", "--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens=0"),
    "temperature": (["generate", "{out}", "--prompt", "a", "--temperature", "nan"], "temperature=nan"),
    "too long": (["generate", "{out}", "--prompt", "x " * 99], "the model takes 128"),
    "model": (["generate", "{out}", "--prompt", "a", "--model", "./nothing"], "model='./nothing'"),
    "batch": (["evaluate", "{out}", "--data", "{rows}", "--batch_size", "0"], "batch_size=0"),
    "data": (["evaluate", "{out}", "--data", "{tmp}/no.jsonl"], "does not exist"),
    "split": (["evaluate", "{shared}", "--data", "{rows}", "--held_out"], "held_out=True needs the results.json"),
    "no program": (["run", "--"], "no program is given"),
    "program": (["run", "--", "nothing-of-that-name"], "'nothing-of-that-name' is no Python file"),
    "unknown": (["generate", "{out}", "--promt", "a"], "did you mean 'prompt'"),
    "damaged": (["generate", "{damaged}", "--prompt", "a"], "digest"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, trained, rows, adapters, tmp_path, capsys):
    words, match = BAD[case]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in adapters[0].iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    config = json.loads((damaged / "adapter_config.json").read_text())
    (damaged / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))
    (tmp_path / "empty").mkdir()
    names = {"tmp": tmp_path / "empty", "out": trained[0], "rows": rows, "shared": adapters[0], "damaged": damaged}
    assert main([word.format(**names) for word in words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aslora-meft: error")]
    assert match in line


def test_tokens_that_the_model_does_not_have_are_named(model_dir, adapters, tmp_path):
    config = ASLoRAConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6], task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config).save_pretrained(tmp_path)
    saved = tmp_path / "adapter_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"trainable_token_indices": [5, 10**6]}))
    with pytest.raises(UsageError, match=rf"ADAPTER_DIR='{tmp_path}': trainable_token_indices=\[5, 1000000\]"):
        load_adapters([str(adapters[0]), str(tmp_path)], UseArguments())


def test_adapters_of_different_bases_are_refused(adapters, trained, tmp_path, capsys):
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "another"}))
    assert main(["generate", str(trained[0]), str(tmp_path), "--prompt", "a"]) == 2
    assert "was trained on 'another' and" in capsys.readouterr().err


def test_run_starts_programs_with_both_methods_known(tmp_path, capsys, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, helper\nfrom peft import PEFT_TYPE_TO_CONFIG_MAPPING as known\n"
        "print(__name__, sys.argv[1:], 'ASLORA' in known, 'MEFT' in known)\n"
    )
    (tmp_path / "helper.py").write_text("")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["run", "--", str(program), "--help", "a"]) == 0
    assert capsys.readouterr().out == "__main__ ['--help', 'a'] True True\n"
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["run", "-m", "program", "b"]) == 0
    assert capsys.readouterr().out == "__main__ ['b'] True True\n"
    with pytest.raises(SystemExit) as end:  # a command that a package has installed
        main(["run", "--", "transformers", "--help"])
    assert end.value.code in (0, None)
