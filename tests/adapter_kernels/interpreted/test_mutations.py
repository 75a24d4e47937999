"""The checks fail for kernels that are wrong: a line of the source is changed, and its check must notice."""

import pytest

from tests.support.kernels.mutations import MUTATIONS, PAIRS, Mutation, is_noticed, run


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.op)
def test_a_wrong_kernel_is_noticed(tmp_path, mutation):
    assert is_noticed(mutation, tmp_path, "cpu")


@pytest.mark.parametrize(("op", "check"), PAIRS, ids=lambda part: getattr(part, "__name__", part))
def test_the_right_one_passes(tmp_path, op, check):
    run(Mutation(op, check, "import torch\n", "import torch\n"), tmp_path, "cpu")
