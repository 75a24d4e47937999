"""The documentation agrees with the results, the code and itself."""

import dataclasses
import importlib
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch
import transformers as tr
from peft import LoraConfig, get_peft_model

import adapter_kernels
import aslora
import meft
import peft_bridge
from aslora_meft.arguments.groups import parse_train
from aslora_meft.planner.command import parse as parse_estimate
from benchmarks.common.places import SMOLLM2

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *ROOT.glob("docs/**/*.md")]
RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def rows_of(name):
    return json.loads((RESULTS / name).read_text())["rows"]


def slug(heading):
    """The anchor that GitHub and mkdocs give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"(?:\]\(|\bsrc(?:set)?=\")([^)\s\"]+)[)\"]", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_the_table_of_other_libraries():
    parts = rows_of("peer_optimizers.json")
    table = re.findall(
        r"^\| [^|]* \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \| ([\d, ]+) \| (\d+) \|$", BENCHMARKS, re.MULTILINE
    )
    told = {
        (
            row["times as long as MEFT"],
            *row["interval"],
            *(round(ms) for ms in row["ms"].values()),
            round(row["MiB kept"]),
        )
        for part in ("layer", "model")
        for row in parts[part]["steps"].values()
    }
    said = {
        (float(ratio), float(low), float(high), *map(int, ms.split(", ")), int(size))
        for ratio, low, high, ms, size in table
    }
    assert said == told


def test_the_table_of_steps_and_the_readme_s_ratios():
    ratios = []
    for row in rows_of("aslora_step.json"):
        size = {
            name: row[f"{name}"]["parameters"] + row[f"{name}"]["optimizer state"]
            for name in ("lora bytes", "aslora bytes at the end")
        }
        ratios.append(size["aslora bytes at the end"] / size["lora bytes"])
        file = row["aslora bytes at the end"]["file"] / row["lora bytes"]["file"]
        low, high = row["step ratio interval"]
        line = (
            f"| {row['model']} | {row['targets']} | {row['settings']['r']} | {row['step ratio']:.3f} "
            f"[{low:.3f}, {high:.3f}] | {row['extra steps of a merge']:+.2f} | {ratios[-1]:.2f} | {file:.2f} |"
        )
        assert line in BENCHMARKS
        if "base ratio" in row:
            peak = row["aslora peak activations"] / row["lora peak activations"]
            low, high = row["base ratio interval"]
            assert f"| {row['model']} | {row['base ratio']:.3f} [{low:.3f}, {high:.3f}] | {peak:.3f} |" in BENCHMARKS
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{min(ratios):.2f} to {max(ratios):.2f} of LoRA's" in readme


def test_the_saved_file_s_share_of_lora_s():
    def adapted(config):
        with torch.device("meta"):
            base = tr.AutoModelForCausalLM.from_config(tr.AutoConfig.from_pretrained(SMOLLM2))
            return get_peft_model(base, config)

    common = {"r": 8, "target_modules": "all-linear"}
    ours = adapted(aslora.ASLoRAConfig(**common, total_steps=100)).base_model.sharing_report().trainable_values["end"]
    share = f"{ours / adapted(LoraConfig(**common)).get_nb_trainable_parameters()[0]:.2f}"
    assert f"{share} of LoRA's (SmolLM2-135M, all linear layers)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{share} times\nLoRA's for all linear layers of SmolLM2-135M" in BENCHMARKS


def test_the_numbers_of_the_claims():
    claims = BENCHMARKS[BENCHMARKS.index("## Claims") : BENCHMARKS.index("## ASLoRA\n")]

    def content(name):
        return json.loads((RESULTS / name).read_text())

    def said(middle, interval, digits):
        low, high = interval
        return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    steps = {targets: [] for targets in ("q,k,v,gate,up", "all-linear")}
    for row in rows_of("aslora_step.json"):
        steps.get(row["targets"], []).append(said(row["step ratio"], row["step ratio interval"], 3))
    for each in steps.values():
        assert f"30 rounds each: {', '.join(each)}" in claims
    peer = rows_of("peer_optimizers.json")["layer"]["steps"]
    fused = peer["torch AdamW, fused"]
    assert said(fused["times as long as MEFT"], fused["interval"], 2) in claims
    assert f"{peer['MEFT']['ms']['update']:.0f} ms against {fused['ms']['update']:.0f}" in claims
    sparse = content("row_adamw.json")["times as fast as SparseAdam"]
    assert said(sparse["median"], sparse["interval"], 1) in claims
    for mode in ("rowwise", "float8"):
        rate = content("row_states.json")["threads"]["1"][f"bfloat16 masters, moments {mode}"]
        rate = rate["rate of a core, over float32"]
        assert said(rate["median"], rate["interval"], 2) in claims


@pytest.mark.parametrize(
    ("page", "ours", "metrics"),
    [
        ("aslora_classify", "ASLoRA r 8", ("loss", "accuracy")),
        ("aslora_classify_diagonal", ".*", ("loss", "accuracy")),
        ("aslora_classify_clinc150", ".*", ("loss", "accuracy")),
        ("aslora_classify_option", ".*", ("loss", "accuracy")),
        ("aslora_classify_diagonal_control", ".*", ("loss", "accuracy")),
        ("aslora_classify_smollm2", ".*", ("loss", "accuracy")),
        ("aslora_classify_few", ".*", ("loss", "accuracy")),
        ("meft_facts", "MEFT", ("loss", "accuracy")), ("meft_facts_capacity", ".*", ("loss", "accuracy")),
        ("meft_forgetting", ".*", ("forgetting",)),
        ("meft_forgetting_controls", ".*", ("forgetting",)), ("meft_sequence", "MEFT .*", ("kept", "untold")),
    ],
)  # fmt: skip
def test_every_comparison_that_was_made_stands_among_the_claims(page, ours, metrics):
    """In this direction or in the other, with its interval."""
    claims = BENCHMARKS[BENCHMARKS.index("## Claims") : BENCHMARKS.index("## ASLoRA\n")].replace("+", "")
    text = (RESULTS / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(rf"^\| {ours} against [^|]+ \| (\w+) \| (\S+)[^|]*\| (\S+) to (\S+) \|", text, re.MULTILINE)
    compared = [(metric, *map(float, numbers)) for metric, *numbers in found if metric in metrics]
    assert len(compared) >= 2
    for metric, gain, low, high in compared:
        digits, unknown = (3, 5e-5) if metric in ("loss", "forgetting") else (1, 0)  # of what the page has rounded
        ways = [(gain, low, high), (-gain, -high, -low)]
        assert any(
            re.search(r"{}(?: points)? \[{}, {}\]".format(*(one_of(number, digits, unknown) for number in way)), claims)
            for way in ways
        ), (metric, gain, low, high)


def one_of(number, digits, unknown):
    """A pattern for what a number is rounded to that is known within `unknown`."""
    return "(?:" + "|".join(re.escape(f"{number + by:.{digits}f}") for by in (-unknown, 0, unknown)) + ")"


def test_the_claims_about_routing():
    arms = {"without balance loss": {}, "balance loss 0.01": {}}
    for row in rows_of("meft_routing.json"):
        if row["task"] == "r 1024, 300 steps":
            arms[row["method"]][row["seed"]] = row["records"]
    paired = set.intersection(*map(set, arms.values()))
    without, balanced = ([records[seed] for seed in paired] for records in arms.values())

    def over(runs, name, place=-1, layers=slice(None)):
        return statistics.mean(statistics.mean(records[place][name][layers]) for records in runs)

    last, at_end = slice(-1, None), over(without, "perplexity")
    first = over(without, "perplexity", 1)
    for line, parts in {
        "MEFT's routing does not collapse": [
            f"perplexity of the load {first:.2f} E in the first 30 steps, {at_end:.2f} E in the last",
            f"0 of {30 * len(paired)} layers collapsed",
            f"in the last layer {over(without, 'perplexity', layers=last):.2f} E",
            f"{100 * over(without, 'never_picked', layers=last):.1f} % of the experts never picked",
        ],
        "The balance loss evens": [
            f"{over(balanced, 'perplexity'):.2f} E against {at_end:.2f} E",
            f"{over(balanced, 'union'):.2f} of the rows instead of {over(without, 'union'):.2f}",
        ],
    }.items():
        (claim,) = re.findall(rf"^\| {line}.*$", BENCHMARKS, re.MULTILINE)
        assert all(part in claim for part in [f"{len(paired)} of 3 seeds", *parts]), parts
    assert all(128 * load > 8 for records in without for load in records[-1]["perplexity"])  # E and P


def test_the_table_of_a_layer_on_a_cpu():
    found = {(row["r"], row["tokens"], row["input"]): row for row in rows_of("meft_cpu.json")}
    table = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \| (\d+) % \| ([\d.]+) \| ([^|]*) \|$", BENCHMARKS, re.MULTILINE)
    assert len(table) == 7
    for r, tokens, kind, used, times, split in table:
        row = found[int(r), int(tokens), kind.lower()]
        assert used == f"{100 * row['|U| / r']:.0f}"
        assert times == f"{row['times as fast']:.1f}"
        theirs, ours = (
            ", ".join(f"{row['milliseconds'][name][part]:.0f}" for part in ("forward", "backward", "update"))
            for name in ("dense", "meft")
        )
        assert split == f"{ours} against {theirs}"


@pytest.mark.parametrize(("page", "config"), [("aslora", aslora.ASLoRAConfig), ("meft", meft.MEFTConfig)])
def test_options_are_fields(page, config):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    section = text.partition("## Options\n")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    named = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(named) >= 8
    assert set(named) <= {field.name for field in dataclasses.fields(config)}


def test_the_page_of_kernels_names_every_op():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:adapter_kernels\.)?(\w+)(?:\(.*?\))?`", text)
    assert set(adapter_kernels.__all__) <= set(named)
    first_cells = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    assert {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)} <= set(adapter_kernels.__all__)


@pytest.mark.parametrize("package", [aslora, meft])
def test_the_reference_has_every_public_name(package):
    text = (ROOT / "docs" / "api" / f"{package.__name__}.md").read_text(encoding="utf-8")
    for name in package.__all__:
        assert re.search(rf"\b{name}\b", text), name
    listed = re.findall(r"::: (\S+)\n    options:(?:\n      .*)*?\n      members: \[([^\]]*)\]", text)
    for path, members in listed:
        owner = importlib.import_module(path.partition(".")[0])
        for part in path.split(".")[1:]:
            owner = getattr(owner, part)
        assert all(hasattr(owner, name) for name in members.split(", ")), path


@pytest.mark.parametrize("package", [aslora, meft, peft_bridge, adapter_kernels])
def test_packages_know_their_version(package):
    assert re.fullmatch(r"\d+\.\d+\.\d+.*|unknown", package.__version__)


def commands_of(name):
    """The arguments of each documented call of a command."""
    texts = [page.read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES]
    found = {words for text in texts for words in re.findall(rf"^aslora-meft {name} (.*)$", text, re.MULTILINE)}
    assert len(found) >= 2
    return found


def test_documented_estimates_are_understood():
    for command in commands_of("estimate"):
        request, _ = parse_estimate(shlex.split(command, comments=True))
        assert request.method == "meft"
        assert request.gpu == 24 * 2**30


def test_documented_training_commands_are_understood(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: d.jsonl\noutput_dir: out\n")
    monkeypatch.chdir(tmp_path)
    for command in commands_of("train"):
        words = shlex.split(command, comments=True)
        words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
        parse_train([*words, "--use_cpu", "true"])


def test_the_table_of_narrow_states_and_hot_rows():
    import torch

    from aslora_meft.planner.rates import ceilings
    from benchmarks.step_bound.__main__ import FFN, HEAD, LAYERS, D
    from meft import MEFTConfig
    from meft.cost.fit import with_hot_rows
    from meft.cost.memory import AdapterShape, Plan, Work
    from meft.cost.step_time import BaseModel, step_time

    text = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    base, states = (
        BaseModel(256, 4 * D * D, FFN, D, HEAD),
        {"float32": ("float32", "float32"), "narrow": ("bfloat16", "rowwise")},
    )
    for strategy in ("stream", "device-rows", "host"):
        for name, (masters, moments) in states.items():
            config = MEFTConfig(r=6400, master_dtype=masters, row_optimizer={"moments": moments})
            shape = AdapterShape.of(config, d=D, layers=LAYERS, base_dtype=torch.bfloat16)
            plan = Plan(shape, Work(512, 1664), strategy)
            speeds = [
                f"{step_time(with_hot_rows(plan, hot), base, ceilings(card)).tokens_per_second:,.0f}"
                for card in ("3090", "4090")
                for hot in (0.0, "8GiB")
            ]
            host = f"{sum(plan.host_bytes().values()) / 2**30:.1f} GiB"
            assert f"| `{strategy}`, {name} | {' | '.join([host, *speeds])} |" in text
