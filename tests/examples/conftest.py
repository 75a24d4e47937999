"""The model that the examples run with."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.models import llama


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A saved random Llama of 4 layers with a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    llama(4, max_position_embeddings=1024, **sizes, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
