"""`train --task`: each task on tiny models with both methods, what it saves, and what it refuses."""

import json
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from aslora_meft.adapter import load_tokenizer
from aslora_meft.arguments.groups import parse_train
from aslora_meft.cli import main
from aslora_meft.tasks.dpo import LOSSES
from aslora_meft.tasks.table import TASKS
from aslora_meft.use import generate
from tests.support.task_models import CHATS, LABELLED, METHODS, PAIRS, TRANSLATED, write_rows

IDS = torch.arange(3, 15).view(2, 6)
SAID = [{"prompt": f"say {i}", "completion": f"yes {i}"} for i in range(20)]
LONG = " ".join("abcdefghijklmnop")
ALIKE = [{"prompt": f"say {c}", "chosen": f" {LONG} yes", "rejected": f" {LONG} no"} for c in "abcdefghij"]


def check_learnt(result, folder, task):
    """An adapter was trained, its numbers written, and the card names the task."""
    weights = load_file(folder / "adapter_model.safetensors")
    assert weights
    assert all(value.isfinite().all() for value in weights.values())
    results = json.loads((folder / "results.json").read_text())
    assert results["task"] == task
    assert results["after"] == result.after
    assert result.after["loss"] != result.before["loss"]
    assert f"| `task` | `{task}` |" in (folder / "README.md").read_text()
    return results


@pytest.mark.parametrize(("method", "rows"), [("aslora", PAIRS), ("meft", CHATS)], ids=["texts", "conversations"])
def test_dpo(run, tmp_path, method, rows):
    pytest.importorskip("trl")
    result = run("dpo", "llama", rows, "--eval_size", 3, method=method)
    check_learnt(result, tmp_path / "out", "dpo")
    # The reference is the base model, so a fresh adapter is equal to it.
    assert result.before["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert result.before["rewards/margins"] == 0
    assert list(result.model.peft_config) == ["default"]
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, again(IDS).logits)


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_of_dpo_is_the_base_model_bit_by_bit(words, models, method):
    """Log-probabilities that trl computes for the reference of a trained adapter, and for the base model alone."""
    trl = pytest.importorskip("trl")
    arguments = parse_train(words("dpo", "llama", PAIRS, method=method))
    task = TASKS["dpo"](arguments, load_tokenizer(arguments.model))
    data = task.load_data()
    trainer = task.make_trainer(task.load_model(torch.device("cpu")), arguments.adapter, data, [])
    trainer.train()
    batch = next(iter(trainer.get_eval_dataloader()))
    reference = trainer.compute_ref_log_probs(trainer.model, batch)
    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    rows = pytest.importorskip("datasets").Dataset.from_list(data.train)
    alone = trl.DPOTrainer(model=base, args=trainer.args, train_dataset=rows, processing_class=task.tokenizer)
    for one, other in zip(reference, alone.compute_ref_log_probs(alone.model, batch), strict=True):
        assert torch.equal(one, other)
    assert list(trainer.model.peft_config) == ["default"]
    with torch.no_grad():
        tuned = trainer.model.eval()(input_ids=batch["input_ids"]).logits
        assert not torch.equal(tuned, base.eval()(input_ids=batch["input_ids"]).logits)


def test_margins_and_accuracies_of_pairs_do_not_depend_on_the_batch(run, tmp_path):
    """trl takes the mean over batches, of which the last may be smaller."""
    pytest.importorskip("trl")
    more = [*PAIRS, *({**pair, "chosen": f"{pair['chosen']} {pair['chosen']}"} for pair in PAIRS[:4])]
    found = [
        run("reward", "llama", more, "--eval_size", 9, "--per_device_eval_batch_size", size, out=str(size)).after
        for size in (1, 8)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_dpo_smooths_labels_and_tells_of_cut_answers(run, capsys):
    pytest.importorskip("trl")
    long = [{**pair, "chosen": f"{pair['chosen']} {LONG}"} for pair in PAIRS]
    sharp = run("dpo", "llama", long, "--max_length", 12, "--loss_type", "robust", out="sharp")
    assert "rows have answers cut at max_length=12" in capsys.readouterr().out
    smooth = ["--loss_type", "robust", "--label_smoothing_factor", 0.4]
    assert run("dpo", "llama", long, "--max_length", 12, *smooth, out="smooth").after["loss"] != sharp.after["loss"]


FORMS = [
    ("sft", SAID, [], {"apply_chat_template": False, "separator": "\n"}),
    ("sft", SAID, ["--apply_chat_template", "true"], {"apply_chat_template": True, "separator": ""}),
    ("sft", [{"text": f"say {LONG}"}] * 9, [], {"apply_chat_template": False, "separator": ""}),
    ("dpo", PAIRS, [], {"apply_chat_template": False, "separator": ""}),
    ("dpo", CHATS, [], {"apply_chat_template": True, "separator": ""}),
]


@pytest.mark.parametrize(("task", "rows", "more", "form"), FORMS, ids=["answers", "template", "text", "dpo", "chats"])
def test_generate_asks_as_the_task_has_trained(run, tmp_path, capsys, monkeypatch, task, rows, more, form):
    if task == "dpo":
        pytest.importorskip("trl")
    run(task, "llama", rows, *more)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["prompt_form"] == form
    asked = []
    monkeypatch.setattr(generate, "_answer", lambda loaded, name, ids, options: asked.append(ids[0].tolist()) or "")
    assert main(["generate", str(tmp_path / "out"), "--prompt", "say a"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    turn = [{"role": "user", "content": "say a"}]
    text = "say a" + form["separator"]
    if form["apply_chat_template"]:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert asked == [ids if form["apply_chat_template"] else [tokenizer.bos_token_id, *ids]]


@pytest.mark.parametrize(("method", "model"), [("aslora", "llama"), ("meft", "bert")])
def test_reward(run, tmp_path, method, model):
    pytest.importorskip("trl")
    result = run("reward", model, PAIRS, method=method)
    check_learnt(result, tmp_path / "out", "reward")
    check_reloads(AutoPeftModelForSequenceClassification, result.model, tmp_path / "out")


def check_reloads(auto, model, folder, **inputs):
    """Loads an adapter as its card shows, and compares the outputs."""
    fields = {}
    if (folder / "config.json").exists():
        head = AutoConfig.from_pretrained(folder)
        fields = {"id2label": head.id2label, "pad_token_id": head.pad_token_id}
    loaded = auto.from_pretrained(folder, **fields).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS, **inputs).logits, model.eval()(input_ids=IDS, **inputs).logits)
    return loaded


@pytest.mark.parametrize(("method", "model"), [("aslora", "bert"), ("meft", "llama")])
def test_classification(run, tmp_path, method, model, capsys):
    result = run("classification", model, LABELLED, method=method)
    results = check_learnt(result, tmp_path / "out", "classification")
    assert results["labels"] == ["bad", "good", "odd"]
    loaded = check_reloads(AutoPeftModelForSequenceClassification, result.model, tmp_path / "out")
    assert loaded.config.id2label == {0: "bad", 1: "good", 2: "odd"}
    capsys.readouterr()
    data = str(tmp_path / "data.jsonl")
    assert main(["evaluate", str(tmp_path / "out"), "--data", data, "--held_out"]) == 0
    told = capsys.readouterr().out
    assert f"{result.after['loss']:.4g}" in told
    assert f"{result.after['f1']:.1%}" in told


def test_pairs_of_texts_and_labels_that_are_numbers(run, tmp_path):
    rows = [{"premise": f"a {i}", "hypothesis": f"b {i}", "gold": i % 11} for i in range(22)]
    columns = ["--text_column", "premise", "--text_pair_column", "hypothesis", "--label_column", "gold"]
    run("classification", "bert", rows, *columns)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["labels"] == [str(i) for i in range(11)]


@pytest.mark.parametrize(("method", "model"), [("aslora", "t5"), ("aslora", "bart"), ("meft", "t5")])
def test_seq2seq(run, tmp_path, method, model, capsys):
    targets = ["--target_modules", "q", "v"] if model == "t5" and method == "aslora" else []
    targets = ["--target_modules", "q_proj", "v_proj"] if model == "bart" and method == "aslora" else targets
    result = run("seq2seq", model, TRANSLATED, *targets, method=method)
    check_learnt(result, tmp_path / "out", "seq2seq")
    check_reloads(AutoPeftModelForSeq2SeqLM, result.model, tmp_path / "out", decoder_input_ids=IDS)
    capsys.readouterr()
    data = str(tmp_path / "data.jsonl")
    assert main(["evaluate", str(tmp_path / "out"), "--data", data, "--held_out"]) == 0
    assert f"{result.after['loss']:.4g}" in capsys.readouterr().out


def test_packed_samples_stay_apart(run, capsys):
    """Held-out loss of the untouched model is that of samples one by one, and fewer sequences hold all of them."""
    pytest.importorskip("trl")
    packed = run("sft", "llama", SAID, "--packing", "true", out="packed")
    assert "20 samples" not in capsys.readouterr().out
    alone = run("sft", "llama", SAID, out="alone")
    assert packed.before == pytest.approx(alone.before, rel=1e-5)


@pytest.mark.parametrize(
    ("task", "model", "rows", "more", "sentence"),
    [
        ("dpo", "bert", PAIRS, [], "is an encoder of type 'bert'"),
        ("dpo", "t5", PAIRS, [], "is an encoder-decoder"),
        ("seq2seq", "llama", TRANSLATED, [], "of which transformers has no encoder-decoder"),
        ("dpo", "llama", TRANSLATED, [], "has no column 'chosen'"),
        ("seq2seq", "t5", PAIRS, [], "has no column 'source'"),
        ("classification", "bert", PAIRS, [], "has no column 'text'"),
        (
            "classification",
            "bert",
            [*LABELLED, {"text": "x", "label": None}],
            [],
            "row 19: column 'label' has no label",
        ),
        ("classification", "bert", [*LABELLED, {"text": "x", "label": 0.5}], [], "holds float, not a label"),
        ("classification", "bert", LABELLED[::3], [], "holds one label alone, 'good'"),
        ("dpo", "llama", [*PAIRS, {**PAIRS[0], "chosen": " no a"}], [], "'chosen' equals 'rejected'"),
        ("dpo", "llama", [*PAIRS, CHATS[0]], [], "write all in one form"),
        ("reward", "llama", PAIRS, ["--max_length", 4], "max_length=4"),
        ("dpo", "llama", PAIRS, ["--max_length", 2], "max_length=2 leaves none of the 9 training rows"),
        ("dpo", "llama", PAIRS, ["--packing", "true"], "packing=True has no meaning with task=dpo"),
        ("classification", "bert", LABELLED, ["--beta", 1], "beta=1.0 has no meaning with task=classification"),
        ("dpo", "llama", PAIRS, ["--beta", -1], "beta=-1.0 is out of range"),
        ("reward", "llama", PAIRS, ["--max_length", 4096], "max_length=4096 is more than the model's 64"),
        ("dpo", "llama", ALIKE, ["--max_length", 10], "max_length=10 cuts the two answers of a training row to equal"),
        ("sft", "llama", SAID, ["--packing", "true", "--use_cache", "true"], "packing=True needs use_cache=False"),
        ("reward", "llama", PAIRS, ["--label_smoothing_factor", 0.1], "has no effect with task='reward'"),
    ],
)
def test_bad_input_ends_with_one_sentence(words, tmp_path, capsys, task, model, rows, more, sentence):
    if task in ("dpo", "reward"):
        pytest.importorskip("trl")
    assert main(["train", *words(task, model, rows, *more)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert sentence in error[-1]
    assert error[-1].startswith("aslora-meft: error: ")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("task", "rows", "more", "sentence"),
    [
        ("dpo", PAIRS, ["--loss_type", "nothing"], "loss_type='nothing' is none of trl's losses; give sigmoid, "),
        ("dpo", PAIRS, ["--prediction_loss_only", "true"], "prediction_loss_only=True leaves out the held-out metrics"),
        ("classification", LABELLED, ["--eval_do_concat_batches", "false"], "eval_do_concat_batches=False keeps the"),
    ],
)
def test_refused_before_anything_is_made(words, tmp_path, capsys, task, rows, more, sentence):
    if task == "dpo":
        pytest.importorskip("trl")
    assert main(["train", *words(task, "llama", rows, *more)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"aslora-meft: error: {sentence}")
    assert not (tmp_path / "out").exists()


def test_the_losses_are_those_that_trl_names():
    trl = pytest.importorskip("trl")
    told = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert set(LOSSES) == set(re.findall(r"`'(\w+)'`", told))


def test_an_unknown_label_in_the_held_out_file(words, tmp_path, capsys):
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"text": "x", "label": "worse"}])
    assert main(["train", *words("classification", "bert", LABELLED, "--eval_data", held_out)]) == 2
    assert "row 1: label 'worse' is none of the 3 that were learnt" in capsys.readouterr().err


@pytest.mark.parametrize("words_of", [["--task", "dpo"], ["--task", "reward"], ["--packing", "true"]])
def test_without_trl_a_sentence_names_it(words, capsys, monkeypatch, words_of):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    task = words_of[1] if words_of[0] == "--task" else "sft"
    more = [] if words_of[0] == "--task" else words_of
    assert main(["train", *words(task, "llama", PAIRS, *more)]) == 2
    assert "needs the package trl; pip install 'aslora-meft[trl]'" in capsys.readouterr().err


def test_classifiers_do_not_generate(run, tmp_path, capsys):
    run("classification", "llama", LABELLED)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "out"), "--prompt", "x"]) == 2
    assert "task_type=SEQ_CLS" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["dpo", "classification"])
def test_a_run_of_a_task_resumes_to_equal_weights(run, tmp_path, task):
    if task == "dpo":
        pytest.importorskip("trl")
    rows = PAIRS if task == "dpo" else LABELLED
    saves = ["--save_strategy", "steps", "--save_steps", 1]
    run(task, "llama", rows, *saves, out="whole")
    resume = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-1"]
    run(task, "llama", rows, *saves, *resume, out="resumed")
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_report_to_reaches_the_trainer(run, tmp_path):
    pytest.importorskip("tensorboard")
    run("classification", "bert", LABELLED, "--report_to", "tensorboard")
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("task", "rows", "quantised"), [("reward", PAIRS, "4bit"), ("classification", LABELLED, "8bit")]
)
def test_a_quantised_base(run, model_dir, tmp_path, task, rows, quantised, capsys):
    """What is trained stays in float32, also where trl would cast it."""
    pytest.importorskip("bitsandbytes")
    if task == "reward":
        pytest.importorskip("trl")
    result = run(task, model_dir, rows, f"--load_in_{quantised}", "true")
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}
    assert f"base weights in {'NF4' if quantised == '4bit' else 'INT8'}" in capsys.readouterr().out
    words = ["--data", tmp_path / "data.jsonl", "--held_out", f"--load_in_{quantised}", "true"]
    assert main(["evaluate", str(tmp_path / "out"), *map(str, words)]) == 0
    assert f"{result.after['loss']:.4g}" in capsys.readouterr().out


@pytest.mark.parametrize("fields", [{"task": "chess"}, {"task": ["dpo"]}, {"labels": "bad, good"}, {"labels": []}])
def test_results_that_train_did_not_write(run, tmp_path, capsys, fields):
    run("classification", "llama", LABELLED)
    results = tmp_path / "out" / "results.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), **fields}))
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), "--data", str(tmp_path / "data.jsonl")]) == 2
    assert f"it has {next(iter(fields))}=" in capsys.readouterr().err
