"""gather_rows' and scatter_rows' kernel against the oracle: bit by bit, in poisoned memory."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_kernels import gather_rows, override, scatter_rows
from tests.support.kernels import kernel_checks
from tests.support.kernels.row_checks import check_gather, check_scatter, same_bits, table
from tests.support.kernels.selection_checks import generator

gather = partial(gather_rows, impl="triton")
scatter = partial(scatter_rows, impl="triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1, 4096), (37, 576), (5, 4100), (3, 7)])
@pytest.mark.parametrize("tables", [1, 2])
def test_copies_bit_by_bit(fenced, dtype, n, d, tables):
    both = [table(50, d, dtype, seed) for seed in range(tables)]
    check_gather(gather, torch.randint(-1, 50, (n,), generator=generator(), dtype=torch.int32), both)
    ids = torch.randperm(50, generator=generator(1))[:n]
    ids[n // 2] = -1
    check_scatter(scatter, ids, [table(n, d, dtype, seed) for seed in range(tables)], (50, d))


def test_none_all_and_repeated_rows(fenced):
    one = table(9, 40, torch.bfloat16)
    check_scatter(scatter, torch.arange(8, -1, -1), [one], (9, 40))
    check_gather(gather, torch.zeros(20, dtype=torch.int64), [one])
    assert gather(torch.empty(0, dtype=torch.int32), [one])[0].shape == (0, 40)
    assert gather(torch.zeros(3, dtype=torch.int32), [one[:, :0]])[0].shape == (3, 0)


def test_more_rows_than_programs_take_at_once(fenced):
    with override("gather_rows.copy", DEVICE_PROGRAMS=3, BM=2, BN=16):
        check_gather(gather, torch.arange(19) % 7, [table(7, 40, torch.float16)])


def test_many_rows(fenced):
    with override("gather_rows.copy", BM=256):
        check_gather(gather, torch.randint(-1, 700, (512,), generator=generator()), [table(700, 24, torch.bfloat16)])
        ids = torch.randperm(700, generator=generator(1))[:512]
        check_scatter(scatter, ids, [table(512, 24, torch.bfloat16)], (700, 24))


def test_an_id_out_of_range_reads_and_writes_nothing(fenced):
    one = table(4, 16, torch.float32)
    ids = torch.tensor([3, 4, -2, 2**31 - 1])
    assert same_bits(gather(ids, [one])[0], torch.cat([one[3:], torch.zeros(3, 16)]))
    check_scatter(
        lambda _, rows, tables: scatter(ids, rows, tables), torch.tensor([3, -1, -1, -1]), [one.clone()], (4, 16)
    )


def test_an_id_of_64_bits_does_not_wrap_around(fenced):
    one, ids = table(4, 16, torch.float32), torch.tensor([2**32 + 1])
    assert same_bits(gather(ids, [one])[0], torch.zeros(1, 16))
    target = one.clone()
    scatter(ids, [torch.ones(1, 16)], [target])
    assert same_bits(target, one)


def test_given_buffers_are_filled():
    out = [kernel_checks.Fenced((2, 24), torch.float32) for _ in range(2)]
    both = [table(5, 24, torch.float32, seed) for seed in range(2)]
    result = gather(torch.tensor([4, 0]), both, out=[x.tensor for x in out])
    assert [x.data_ptr() for x in result] == [x.tensor.data_ptr() for x in out]
    for buffer, one in zip(out, both, strict=True):
        assert buffer.intact()
        assert same_bits(buffer.tensor, one[[4, 0]])


@given(st.data())
def test_any_rows(data):
    r, d = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from(DTYPES))
    ids = data.draw(st.lists(st.integers(-1, r - 1), min_size=1, max_size=12))
    distinct = [i for k, i in enumerate(ids) if i not in ids[:k] or i < 0]
    with pytest.MonkeyPatch.context() as patch, kernel_checks.fenced_memory(patch):
        check_gather(gather, torch.tensor(ids), [table(r, d, dtype)])
        check_scatter(scatter, torch.tensor(distinct), [table(len(distinct), d, dtype)], (r, d))
