import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from aslora_meft.arguments.groups import parse_train
from aslora_meft.train import train
from tests.support import task_models
from tests.support.models import llama
from tests.support.task_models import METHODS, SETTINGS, write_rows

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [f"word{i} " for i in range(40)]


@pytest.fixture(scope="session")
def tokenizer():
    """Bytes and a few merges: any text can be tokenised, and decoded again."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(WORDS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer):
    """A saved random Llama of 4 layers with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    # Blocks of 4-bit weights need a width of 64.
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    llama(4, max_position_embeddings=128, **sizes, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Text that repeats itself, so that little training lowers its loss."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(WORDS) * 20)
    return path


@pytest.fixture(scope="session", name="models")
def task_models_saved(tmp_path_factory, tokenizer):
    return task_models.save_models(tmp_path_factory.mktemp("models"), tokenizer)


@pytest.fixture
def words(models, tmp_path):
    """Command line of a task: words(task, model, rows, *more)."""

    def words(task, model, rows, *more, method="aslora", out="out"):
        data = write_rows(tmp_path / "data.jsonl", rows)
        fixed = ["--task", task, "--model", models / model, "--data", data, "--output_dir", tmp_path / out]
        return [str(word) for word in (*fixed, *METHODS[method], *SETTINGS, *more)]

    return words


@pytest.fixture
def run(words):
    def run(*args, **kwargs):
        return train(parse_train(words(*args, **kwargs)))

    return run
