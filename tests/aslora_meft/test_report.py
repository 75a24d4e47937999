"""`aslora-meft report`: pages of made folders, of real runs of both methods, and of what is no run."""

import json
import re
from html.parser import HTMLParser

import pytest
from peft import get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments

from aslora import ASLoRAConfig
from aslora.files.merge_history import merge_history
from aslora_meft.cli import main
from aslora_meft.report.merge_map import Merge, Projection
from aslora_meft.report.run_folder import read_run
from aslora_meft.training import RunRecord
from aslora_meft.training.run_record import RECORD
from meft import MEFTConfig
from tests.support.models import llama

METHODS = {
    "ASLORA": ASLoRAConfig(r=2, merge_start=1, merge_interval=1),
    "MEFT": MEFTConfig(r=32, num_experts=8, top_k=8),
}
CONFIG = {"peft_type": "ASLORA", "r": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "org/<base>"}


class Page(HTMLParser):
    """What a page would load, its charts, and its text."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.charts, self.text, self.ids, self.open = [], [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        links = [found.get(name) for name in ("src", "href", "xlink:href")]
        self.loads += [link for link in links if link and not link.startswith(("#", "data:image/png;base64,"))]
        self.loads += [tag] if tag in ("script", "link", "iframe") else []
        self.charts += [found] if tag == "svg" else []

    def handle_data(self, data):
        self.text += data


def trained(method, folder, steps=6, callback=True, **fields):
    """A run of a plain Trainer."""
    ids = list(range(12))
    data = [{"input_ids": ids, "labels": ids} for _ in range(2 * steps)]
    settings = {"max_steps": steps, "logging_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", **fields}
    model = get_peft_model(llama(4, vocab_size=32, hidden_size=16, intermediate_size=32), METHODS[method])
    trainer = Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=data)
    if callback:
        RunRecord().attach(trainer)
    trainer.train()
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each method, with its model and its events for tensorboard."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for method in METHODS:
            folder = tmp_path_factory.mktemp("runs") / method
            patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
            model = trained(method, folder, report_to="tensorboard")
            model.save_pretrained(folder)
            folders[method] = folder, model
    return folders


@pytest.fixture
def report(tmp_path, capsys):
    """Makes the page of some folders."""

    def report(*folders):
        assert main(["report", *map(str, folders), "--output", str(tmp_path / "page.html")]) == 0
        assert f"Report: {tmp_path / 'page.html'}\n" in capsys.readouterr().out
        return Page(tmp_path / "page.html")

    return report


def record(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / RECORD).write_text("".join(f"{text}\n" for text in texts))
    return folder


def log(step, **values):
    return {"kind": "log", "step": step, "values": values}


@pytest.mark.parametrize("method", METHODS)
def test_reporters_get_the_scalars_of_the_methods_and_the_record_all_of_them(runs, method):
    folder = runs[method][0]
    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    own = {
        "ASLORA": {"aslora/merges", "aslora/trainable_values"},
        "MEFT": {"meft/union_share", "meft/busiest_expert_share", "meft/top_rows_share", "meft/mib_to_device"},
    }
    names = {f"train/{name}" for name in own[method] | {"loss", "tokens_per_second", "memory/host_gib"}}
    assert names <= set(events.Tags()["scalars"])
    logs = read_run("RUN_DIR", str(folder)).logs
    for name in names:
        values = [entry[name.removeprefix("train/")] for entry in logs if "loss" in entry]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values, rel=1e-6)


def test_the_merges_of_a_run_are_those_of_the_model(runs, tmp_path):
    folder, model = runs["ASLORA"]
    merges = model.base_model.sharing_report().merges
    assert len(merges) > 2
    assert merge_history(folder)[1] == merges
    run = read_run("RUN_DIR", str(folder))
    found = [(m.step, p.name, list(m.lower), list(m.upper), m.distance) for p in run.projections for m in p.merges]
    expected = [tuple(merge.values()) for merge in merges]
    assert sorted(found) == sorted(expected)
    # Without the record the adapter's file tells of the merges.
    alone = tmp_path / "alone"
    model.save_pretrained(alone)
    assert [p.merges for p in read_run("RUN_DIR", str(alone)).projections] == [p.merges for p in run.projections]


def test_the_use_of_experts_and_neurons_is_that_of_the_model(runs):
    folder, model = runs["MEFT"]
    uses = read_run("RUN_DIR", str(folder)).layer_use
    for path, traffic in model.base_model.transfer_report().layers.items():
        own = [use for use in uses if use.layer == path]
        assert [use.step for use in own] == [1, 2, 3, 4, 5, 6]
        loads = zip(*(use.expert_load for use in own), strict=True)
        assert [sum(load) for load in loads] == traffic.expert_load.tolist()
        assert all(use.top[-1] == sum(use.expert_load) for use in own)


def test_two_runs_side_by_side_on_a_page_that_loads_nothing(runs, report, tmp_path):
    page = report(runs["ASLORA"][0], runs["MEFT"][0])
    for part in (
        "ASLORA: Merge map",
        "MEFT: Load of the experts over time",
        "training loss of MEFT",
        "Neurons used, |U| / r",
    ):
        assert part in page.text
    assert "Bytes between host and device" not in page.text  # rows are read in place here
    assert page.loads == []
    assert len(page.ids) == len(set(page.ids))
    assert all(chart["role"] == "img" and chart["aria-labelledby"] in page.ids for chart in page.charts)
    pictures = {path.name for path in (tmp_path / "page-figures").iterdir()}
    assert len(pictures) == len(page.charts)
    assert {
        "loss.png",
        "memory.png",
        "merge_map_1.png",
        "dendrogram_1.png",
        "experts_2.png",
        "top_rows_2.png",
    } <= pictures


def test_a_base_model_that_is_no_text_is_shown_with_a_mark(tmp_path, report):
    run = record(tmp_path / "run", log(1, loss=1.0))
    (run / "adapter_config.json").write_text(json.dumps({"peft_type": "ASLORA", "base_model_name_or_path": "a\udcff"}))
    assert "a?" in report(run).text


def test_runs_of_one_name_are_told_apart(tmp_path, report):
    runs = [
        record(tmp_path / part / "run", log(1, loss=1.0), log(2, loss=value))
        for part, value in (("a", 2.0), ("b", 3.0))
    ]
    page = report(*runs)
    assert "training loss of run (1) from 1 to 2; training loss of run (2) from 1 to 3" in page.text


def test_leaves_of_a_dendrogram_stand_together():
    merges = [Merge(1, (0,), (3,), 0.1), Merge(2, (1,), (2,), 0.2), Merge(3, (0, 3), (1, 2), 0.3)]
    assert Projection("p", [0, 1, 2, 3, 4], merges).leaf_order() == [0, 3, 1, 2, 4]
    assert Projection("p", [0, 1, 2, 3, 4], merges[:1]).leaf_order() == [0, 3, 1, 2, 4]


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path):
    begun = {"kind": "begin", "step": 0, "max_steps": 4}
    first = [begun, log(1, loss=4.0), log(2, loss=3.0), log(3, loss=9.0), {"kind": "end", "step": 3, "max_steps": 4}]
    folder = record(tmp_path / "run", *first)
    assert read_run("RUN_DIR", str(folder)).status == "stopped after step 3 of 4"
    record(folder, *first, begun | {"step": 2}, log(3, loss=2.0), log(4, loss=1.0))
    run = read_run("RUN_DIR", str(folder))
    assert run.series("loss") == ([1, 2, 3, 4], [4, 3, 2, 1])
    assert run.status == "finished, 4 steps"


def test_a_run_that_was_killed_is_shown_as_far_as_it_came(tmp_path, report):
    begun = {"kind": "begin", "step": 0, "max_steps": 40, "training": {"seed": "<script>"}}
    record(
        tmp_path / "run", begun, log(1, loss=4.0), log(2, loss=float("nan")), log(3, loss="x"), '{"kind": "log", "st'
    )
    page = report(tmp_path / "run")
    for part in ("not finished: last record at step 3 of 40", "1 of 5 lines", "no results.json", "<script>"):
        assert part in page.text
    assert page.loads == []


def test_what_a_plain_trainer_leaves_is_enough(tmp_path, report):
    trained("MEFT", tmp_path / "run", steps=2, callback=False, save_strategy="steps", save_steps=2)
    page = report(tmp_path / "run")
    assert f"There is no {RECORD}" in page.text
    assert "finished, 2 steps" in page.text
    assert len(page.charts) == 2  # losses and learning rate


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config.json": json.dumps(CONFIG)}, ["No step was logged", "org/<base>", "q_proj"]),
        ({"results.json": '{"before": {"loss": 2}, "after": {"loss": "x"}}'}, ["No step was logged", "before"]),
        ({"trainer_state.json": '{"log_history": [], "global_step": 0}'}, ["No step was logged"]),
        ({"adapter_config.json": json.dumps(CONFIG), "results.json": "{"}, ["results.json is damaged"]),
        ({"adapter_config.json": json.dumps(CONFIG), "results.json": "[]"}, ["results.json holds no JSON object"]),
        ({"adapter_config.json": json.dumps(CONFIG), "adapter_model.safetensors": "x"}, ["file cannot be read"]),
        ({RECORD: '{"kind": "layers", "step": 1, "layers": [1]}'}, ["No step was logged"]),
        (
            {"adapter_config.json": json.dumps(CONFIG), "results.json": '{"sharing": {"projections": [1]}, "data": 3}'},
            ["The merges in the run's files contradict each other"],
        ),
    ],
)
def test_half_a_folder_gives_a_page_that_says_what_is_missing(files, said, tmp_path, report):
    (tmp_path / "run").mkdir()
    for name, content in files.items():
        (tmp_path / "run" / name).write_text(content)
    page = report(tmp_path / "run")
    for part in said:
        assert part in page.text


def test_what_is_no_run_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / RECORD).write_text('{"kind"')
    run = record(tmp_path / "run", log(1, loss=1.0))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for words, said in (
        (["none"], "does not exist"),
        (["file"], "is no folder"),
        (["empty"], "holds neither run_record.jsonl"),
        (["damaged"], "adapter_config.json is damaged"),
        (["torn"], "1 of 1 lines of run_record.jsonl cannot be read"),
        (["run", "run", "run"], "one run or two, and 3"),
        (["run", "--output", "empty"], "is a folder"),
        (["run", "--output", "page.txt"], "does not end with .html"),
        (["run", "--output", "file/page.html"], "is no folder"),
        ([], "RUN_DIR"),
    ):
        assert main(["report", *words]) == 2
        told = capsys.readouterr()
        assert re.fullmatch(r"aslora-meft: error: [^\n]+\n", told.err), told.err
        assert said in told.err
    monkeypatch.setattr("aslora_meft.report.command.find_spec", lambda name: None)
    assert main(["report", str(run)]) == 2
    assert "pip install 'aslora-meft[report]'" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
