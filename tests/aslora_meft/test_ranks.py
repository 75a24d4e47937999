"""Two ranks on the CPU by the code of `torchrun` and of `accelerate launch`, with one copy of MEFT's rows for both."""

from pathlib import Path

import pytest
import torch

from aslora_meft.arguments.groups import parse_train
from aslora_meft.train import train
from tests.support import launched
from tests.support.processes import run_together, saved_by_ranks
from tests.support.tiny_meft import Tiny

pytestmark = pytest.mark.slow


@pytest.fixture
def words(model_dir, text_file):
    """Clipping, accumulation, evaluations between, a checkpoint in the middle."""

    def words(output, *more):
        fixed = ["--model", model_dir, "--data", text_file, "--output_dir", output, "--method", "meft", "--r", 64]
        fixed += ["--max_length", 16, "--max_steps", 4, "--learning_rate", 1e-2, "--max_grad_norm", 0.1]
        fixed += ["--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2]
        fixed += ["--logging_steps", 1, "--adam_epsilon", 1e-3, "--disable_tqdm", "true", "--use_cpu", "true"]
        return [str(word) for word in (*fixed, *more)]

    return words


def of_ranks(launcher, folder, words):
    """What each of two ranks has trained."""
    folder.mkdir()
    code, log = Path(launched.__file__).read_text(), folder / "log"
    words = ["train", *words, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    run_together(code, [([launcher, folder, *words], log)], 120, file=launched.__file__)
    ranks = saved_by_ranks(folder)
    Tiny.assert_equal(ranks[0]["state"], ranks[1]["state"])
    assert all(rank["summed"] for rank in ranks)
    return ranks[0]["state"]


def of_one_process(words):
    batch = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    model = train(parse_train([*words, *batch])).model
    state = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    for number, table in enumerate(Tiny.tables(model)):
        state |= {f"{number}.{name}": value.clone() for name, value in table.moments.tensors().items()}
    return state


def assert_close(state, expected):
    """But for the order of the sums, in float32."""
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            state[name], value, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_ranks_train_as_one_process_and_each_goes_on_from_the_others_checkpoint(words, tmp_path):
    expected = of_one_process(words(tmp_path / "one"))
    found = of_ranks("torchrun", tmp_path / "ranks", words(tmp_path / "two"))
    assert_close(found, expected)
    resumed = of_ranks(
        "accelerate", tmp_path / "resumed ranks",
        words(tmp_path / "three", "--resume_from_checkpoint", tmp_path / "one" / "checkpoint-2"),
    )  # fmt: skip
    assert_close(resumed, expected)
    alone = words(tmp_path / "four", "--resume_from_checkpoint", tmp_path / "two" / "checkpoint-2")
    assert_close(of_one_process(alone), expected)
