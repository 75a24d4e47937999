"""The ahead-of-time check accepts what fits a GPU and refuses what does not."""

import dataclasses
import re

import pytest

pytest.importorskip("triton")

from adapter_kernels import aot
from adapter_kernels.topk.expert_topk_triton import variants as expert_topk
from adapter_kernels.topk.router_topk_triton import variants as router_topk


@pytest.fixture(scope="module")
def router():
    return router_topk(80)[0]


def test_a_good_variant_is_accepted(router):
    row = aot.examine(router, 80)
    assert row.problems == ()
    assert row.wide
    assert 0 < row.registers < 128


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"launch": {"num_warps": 1, "maxnreg": 24}, "constants": {"BLOCK_E": 1024}}, "spills"),
        ({"aligned": False}, "no 16-byte global load"),
        ({"constants": {"BLOCK_E": 300}}, "does not compile: "),
    ],
    ids=["spills", "narrow", "not a power of two"],
)
def test_a_breach_is_refused(router, change, problem):
    row = aot.examine(dataclasses.replace(router, **change), 80)
    assert row.required
    assert row.problems[0].startswith(problem)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_products_of_16_bits_run_on_tensor_cores(dtype):
    """Products of fp32 do not: they are exact ("ieee")."""
    ptx = {}
    for name in (dtype, "fp32"):
        dots = next(v for v in expert_topk(86) if v.types.get("x_ptr") == f"*{name}")
        ptx[name] = aot._compile(dots, 86).asm["ptx"]
    operand = {"fp16": "f16", "bf16": "bf16"}[dtype]
    assert re.search(rf"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.{operand}\.{operand}\.f32", ptx[dtype])
    assert "mma.sync" not in ptx["fp32"]


def test_too_much_shared_memory_is_refused():
    dots = next(v for v in expert_topk(80) if v.types.get("x_ptr") == "*fp16")
    large = dataclasses.replace(dots, constants=dots.constants | {"BM": 64, "BN": 64, "BK": 256})
    row = aot.examine(dataclasses.replace(large, launch={"num_warps": 8, "num_stages": 4}), 86)
    assert "bytes of shared memory, more than 99 KiB" in row.problems[-1]


def test_the_command_fails_on_a_breach_where_the_gpu_is_required(monkeypatch, capsys, router):
    narrow = dataclasses.replace(router, aligned=False)
    monkeypatch.setattr(aot, "OPS", {"mine": lambda capability: [narrow]})
    for targets, options, code in (((80,), [], 1), ((120,), [], 0), ((80, 120), ["--required"], 1)):
        aot._variants.cache_clear()
        monkeypatch.setattr(aot, "TARGETS", targets)
        assert aot.main(["--jobs", "1", *options]) == code
        printed = capsys.readouterr().out
        assert ("sm_80" in printed, "sm_120" in printed) == (80 in targets, targets == (120,))
        assert "FAILS: no 16-byte global load" in printed if 80 in targets else "reported: no 16-byte" in printed
        assert re.search(r"1 compiled, [01] not accepted, \d+ s$", printed)
    aot._variants.cache_clear()


def test_the_command_fails_when_it_takes_too_long(monkeypatch, capsys, router):
    monkeypatch.setattr(aot, "OPS", {"mine": lambda capability: [router]})
    monkeypatch.setattr(aot, "TARGETS", (80,))
    for seconds, code in (("0", 1), ("600", 0)):
        aot._variants.cache_clear()
        assert aot.main(["--jobs", "1", "--seconds", seconds]) == code
        assert ("FAILS: longer than 0 s" in capsys.readouterr().out) == bool(code)
    aot._variants.cache_clear()


def test_every_op_has_variants_for_every_dtype():
    for op, variants in aot.OPS.items():
        found = variants(90)
        assert found, op
        pointers = {kind for v in found for kind in v.types.values() if kind in ("*fp32", "*fp16", "*bf16")}
        assert op == "row_union" or pointers == {"*fp32", "*fp16", "*bf16"}


def each_kernel():
    """A variant of each kernel and combination of its flags."""
    found = {}
    for variants in aot.OPS.values():
        for v in variants(80):
            flags = {name: value for name, value in v.constants.items() if value is None or isinstance(value, bool)}
            found.setdefault((v.kernel.__name__, *sorted(flags.items())), v)
    return found.values()


def test_every_integer_argument_can_be_1():
    """Triton makes a constant of an argument that is 1, unless it is told not to specialise: that too must compile."""
    kernels = list(each_kernel())
    assert {v.kernel.__name__ for v in kernels} >= {"_router_topk_kernel", "_copy_rows_kernel", "_product_kernel"}
    for v in kernels:
        integers = {name for name, kind in v.types.items() if kind in ("i32", "i64")} & set(v.kernel.arg_names)
        signature = {p.name for p in v.kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")}
        floats = {name for name, kind in v.types.items() if kind == "fp32"}
        assert integers == signature - floats, f"{v.label}: not all integers have a type"
        if v.specialised:
            ones = dict.fromkeys(v.specialised, 1)
            types = {name: kind for name, kind in v.types.items() if name not in ones}
            one = dataclasses.replace(v, types=types, constants={**v.constants, **ones}, wide=False)
            # That it compiles is what counts: no workload has rows of one value, for which triton 3.7.1 spills some.
            assert [p for p in aot.examine(one, 80).problems if not p.startswith("spills")] == [], v.label


def test_some_gpus_alone(monkeypatch, capsys, router):
    monkeypatch.setattr(aot, "OPS", {"mine": lambda capability: [router]})
    aot._variants.cache_clear()
    assert aot.main(["--jobs", "1", "--required", "--gpu", "86", "120"]) == 0
    assert re.findall(r"^\w+", capsys.readouterr().out, re.MULTILINE) == ["sm_86", "triton"]  # sm_120 does not decide
    with pytest.raises(SystemExit):
        aot.main(["--gpu", "7"])
    aot._variants.cache_clear()
