import pytest

from aslora_meft.arguments.groups import parse_train
from aslora_meft.errors import UsageError

NEEDED = ["--model", "m", "--data", "d.jsonl", "--output_dir", "o"]


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = write(
        tmp_path,
        "model: m\ndata: d.jsonl\noutput_dir: o\nr: 4\nlearning_rate: 3e-4\nsave_strategy: no\ncompletion_only: false\n"
        "method: aslora\nlora_alpha: null\ntarget_modules: [q_proj, v_proj]\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "eval_data: null\nmerge_start: 0.1\n",
    )
    arguments = parse_train([config, "--r", "2", "--seed=7"])
    assert arguments.adapter.r == 2
    assert arguments.adapter.lora_alpha == 16
    assert arguments.adapter.target_modules == {"q_proj", "v_proj"}
    assert arguments.trainer.learning_rate == 3e-4
    assert arguments.trainer.save_strategy == "no"
    assert arguments.trainer.lr_scheduler_kwargs == {"num_cycles": 2}
    assert arguments.trainer.seed == 7
    assert arguments.data.completion_only is False
    assert arguments.data.eval_data is None
    assert arguments.adapter.merge_start == 0.1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--r", "two"], ["r='two'", "integer", "8"]),
        (["--method", "dora"], ["--method", "dora", "aslora", "lora"]),
        (["--lerning_rate", "1"], ["--lerning_rate", "learning_rate"]),
        (["--eval_strategy", "sometimes"], ["sometimes"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_words_are_named(words, named):
    with pytest.raises(UsageError) as error:
        parse_train([*NEEDED, *words])
    assert all(word in str(error.value) for word in named), error.value
    assert "\n" not in str(error.value)


def test_values_may_end_in_dashes(tmp_path):
    words = [write(tmp_path, 'hub_model_id: "=--"\n'), *NEEDED]
    assert parse_train(words).trainer.hub_model_id == "=--"
    assert parse_train([*words, "--hub_model_id=a=--"]).trainer.hub_model_id == "a=--"


def test_missing_fields_are_named():
    with pytest.raises(UsageError, match=r"--model, --data, --output_dir"):
        parse_train([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 8\n", "unknown field 'rank'"),
        ("lora_alfa: 8\n", "did you mean 'lora_alpha'"),
        ("- r\n", "holds no fields"),
        ("r: [\n", "is not valid YAML"),
        ("r: many\n", "r='many' is no integer"),
        ("r: {a: 1}\n", "r='{\"a\": 1}' is no integer"),
        ("row_optimizer: 3\nmethod: meft\n", "row_optimizer='3' is no JSON object"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        parse_train([write(tmp_path, text), *NEEDED])


def test_missing_file_is_named():
    with pytest.raises(UsageError, match=r"'none\.yaml' does not exist"):
        parse_train(["none.yaml", *NEEDED])
