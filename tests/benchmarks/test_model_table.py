"""A sample of the table of `python -m benchmarks.model_table`, which is made whole before a release."""

from pathlib import Path

import pytest

from benchmarks.model_table.checks import METHODS, Row, check, model_types
from tests.support.processes import run_code

ROOT = Path(__file__).resolve().parents[2]
FULL = ["llama", "bert", "t5", "opt", "mixtral", "llama4_text"]


@pytest.mark.parametrize("model_type", FULL)
def test_a_sample_of_architectures(model_type, one_thread):
    row = check(model_type)
    found = dict(row.found)
    if model_type == "llama4_text":  # PEFT names it llama4; its router gives a tuple
        assert "name linear layers" in found.pop("ASLoRA, default")
        assert "Llama4Router gives more than" in found.pop("ASLoRA, all-linear")
    assert set(found.values()) == {"yes"}


def test_an_architecture_without_ffn_or_default_says_so(one_thread):
    row = check("mamba")
    assert "PEFT has no default" in row.found["ASLoRA, default"]
    assert "'out_proj' of model type 'mamba' cannot be adapted" in row.found["ASLoRA, all-linear"]
    assert "no module of this model looks like one" in row.found["MEFT, default"]


def test_the_page_has_all_architectures_and_a_reason_for_each_no():
    listed = (ROOT / "docs" / "models.md").read_text()
    names = [line.split("|")[1].strip() for line in listed.splitlines() if line.startswith("| ")][1:]
    untried = [line[2:].partition(":")[0] for line in listed.splitlines() if line.startswith("- ")]
    assert sorted(names + untried) == model_types()
    assert len(names) >= 60
    reasons = listed.partition("## Reasons")[2].partition("## Not tried")[0]
    numbers = {int(part.partition(")")[0]) for part in listed.partition("## Reasons")[0].split("no (")[1:]}
    assert numbers == set(range(1, len(numbers) + 1))
    assert all(f"\n{number}. " in reasons for number in numbers)


def test_rows_of_the_page():
    from benchmarks.model_table.__main__ import page

    yes = Row("good", "Good", dict.fromkeys(METHODS, "yes"), r"a\.\d+\.b|c")
    no = Row("bad", "Bad", {**dict.fromkeys(METHODS, "yes"), "MEFT, default": "ValueError: why"})
    left = Row("odd", "Odd", dict.fromkeys(METHODS, "not tried: no tiny model (x)"))
    made = page([yes, no, left])
    assert r"| good | Good | yes | yes | yes | `a\.\d+\.b\|c` |" in made
    assert "| bad | Bad | yes | yes | no (1) |  |" in made
    assert "\n1. ValueError: why\n" in made
    assert "- odd: not tried: no tiny model (x)" in made


def test_the_script_prints_the_table_of_what_it_is_given():
    said = run_code("import runpy; runpy.run_module('benchmarks.model_table', run_name='__main__')", "gpt2")
    assert "| gpt2 | GPT2LMHeadModel | yes | yes | yes | `mlp` |" in said
