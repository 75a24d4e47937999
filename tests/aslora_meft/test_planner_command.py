"""`aslora-meft estimate`: from a config to numbers, and to one sentence where there are none."""

import json
import math

import pytest

from aslora_meft.cli import main
from aslora_meft.errors import UsageError
from aslora_meft.planner.command import parse
from aslora_meft.planner.rates import card, ceilings, device_bytes, rates
from aslora_meft.planner.request import RESERVED
from meft.cost.fit import largest_that_fits
from meft.cost.memory import AdapterShape, Plan, Work
from meft.retrieval.strategies import DEVICE_STRATEGIES

GIB = 2**30
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY = LLAMA_7B | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
SMALL = ["--method", "meft", "--per_device_train_batch_size", "1", "--max_length", "256"]
SMALL += ["--gradient_checkpointing", "true"]


@pytest.fixture
def folder(tmp_path):
    """Makes a folder with nothing but a config.json; returns the words that name it, and a small MEFT run."""

    def make(config=TINY):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ["--model", str(tmp_path), *SMALL]

    return make


@pytest.fixture
def told(folder, capsys):
    """What the command tells as JSON."""

    def ask(*words, config=TINY):
        assert main(["estimate", *folder(config), *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.mark.parametrize(("share", "limit"), [(0.26, 15.5), (0.6, 17.0)])
def test_7b_streamed_stays_below_the_goal(told, share, limit):
    """r 6400, bf16 base, 2 x 256, rows saved."""
    words = ("--r", 6400, "--per_device_train_batch_size", 2, "--retrieval", "stream", "--union-share", share)
    found = told(*words, config=LLAMA_7B)
    parts = found["device_bytes"]
    assert parts["peak"] / GIB <= limit
    assert found["rows"] == "save"
    assert found["trainable_values"] == 1_677_721_600 + 32 * 320 * 4096
    assert parts["base"] == pytest.approx(2 * 6_738_415_616, rel=1e-4)
    assert parts["router"] == 32 * 320 * 4096 * 4
    assert parts["saved rows"] == 32 * 2 * 4096 * round(share * 6400) * 2
    assert found["host_bytes"]["compute copy, page-locked"] == 3_355_443_200
    assert parts["peak"] == sum(size for part, size in parts.items() if part != "peak")


def test_text_says_that_it_is_predicted(folder, capsys):
    assert (
        main(
            [
                "estimate",
                *folder(),
                "--r",
                "256",
                "--per_device_train_batch_size",
                "2",
                "--max_length",
                "16",
                "--gpu",
                "3090",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert text.startswith("PREDICTED, nothing was run")
    for word in (
        "device memory at the peak",
        "host memory",
        "over PCIe per step",
        "GeForce RTX 3090: predicted",
        "fits",
    ):
        assert word in text
    assert "not measured" in text


def test_traffic_is_the_plans(told):
    found = told(
        "--r",
        256,
        "--per_device_train_batch_size",
        2,
        "--max_length",
        16,
        "--retrieval",
        "stream",
        "--union-share",
        0.5,
    )
    shape = AdapterShape(d=64, layers=2, r=256, experts=64, probed=8, top_k=64)
    plan = Plan(shape, Work(32, 128), "stream")
    assert found["crossing"]["bytes_to_device_per_step"] == plan.crossing(to_device=True) == 2 * 2 * (256 + 128) * 64
    assert found["crossing"]["bytes_to_host_per_step"] == plan.crossing(to_device=False)
    assert {k: v for k, v in found["host_bytes"].items() if k != "all"} == plan.host_bytes()
    narrow = found["host_bytes_with"]["master_dtype='bfloat16' and moments='rowwise' of row_optimizer"]
    shape = AdapterShape(d=64, layers=2, r=256, experts=64, probed=8, top_k=64, master=2, mode="rowwise")
    assert narrow == sum(Plan(shape, Work(32, 128), "stream").host_bytes().values())


def test_rows_with_a_place_on_the_device(told, folder, capsys):
    words = ("--r", 256, "--max_length", 16, "--retrieval", "stream")
    assert told(*words, "--device_rows", "auto")["device_rows"] is None  # of a device of no known size
    words += ("--card", "3090")
    without, share = told(*words), told(*words, "--device_rows", 0.25)
    assert without["device_rows"] is None
    hot = share["device_rows"]
    assert hot["device_bytes"] == share["device_bytes"]["hot rows"] == 2 * 64 * 2 * (18 * 64 + 4)
    assert share["device_bytes"]["peak"] == without["device_bytes"]["peak"] + hot["device_bytes"]
    assert share["tokens_per_second_at_most"] > without["tokens_per_second_at_most"]
    assert "recorded trace" in hot["trace"]
    assert told(*words, "--device_rows", 0.25, "--gpus", 2)["device_rows"] is None
    room = without["device_bytes"]["peak"] + 100_000
    auto = told(*words, "--device_rows", "auto", "--gpu", gpu_of(room / 0.95 + 2**31 / 19))
    assert auto["device_rows"]["device_bytes"] > 0
    assert auto["fits"]
    assert main(["estimate", *folder(), *map(str, words), "--device_rows", "0.25"]) == 0
    assert "places for 25.0% of the rows" in capsys.readouterr().out


def gpu_of(nbytes):
    """As an argument: so many bytes beside those that are kept."""
    return f"{(RESERVED + nbytes) / 2**20}MiB"


def test_auto_takes_the_preferred_one_that_fits(told):
    words = ("--r", 8192, "--max_length", 32, "--union-share", 0.01)
    peaks = [told(*words, "--retrieval", s)["device_bytes"]["peak"] for s in DEVICE_STRATEGIES[1:]]
    room = [max(peaks) * 2, *(peak + 2**18 for peak in peaks)]  # the arithmetic adds up what is not live at one time
    taken = []
    for nbytes in room:
        found = told(*words, "--gpu", gpu_of(nbytes))
        assert found["fits"] is True
        assert found["device_bytes"]["peak"] <= nbytes
        taken.append(found["strategy"])
    assert taken[0] == "device-rows"
    assert taken[-1] == "host"
    assert len(set(taken)) >= 3
    least = told(*words, "--gpu", gpu_of(min(peaks) // 2))
    assert (least["strategy"], least["rows"], least["fits"]) == ("host", "refetch", False)
    assert told(*words)["fits"] is None


def test_what_would_fit_does_fit(told):
    words = {"--r": 1024, "--per_device_train_batch_size": 16, "--max_length": 64}
    small = told("--r", 1024, "--per_device_train_batch_size", 8, "--max_length", 64, "--retrieval", "stream")[
        "device_bytes"
    ]["peak"]

    def ask(**changed):
        asked = words | {f"--{name}": value for name, value in changed.items()}
        listed = [word for pair in asked.items() for word in pair]
        return told(*listed, "--retrieval", "stream", "--gpu", gpu_of(small))

    found = ask()
    assert found["fits"] is False
    largest = found["largest_that_fits"]
    assert 7 <= largest["per_device_train_batch_size"] <= 9
    assert 24 <= largest["max_length"] <= 40
    assert largest["r"] == 0
    for name in ("per_device_train_batch_size", "max_length"):
        assert ask(**{name: largest[name]})["fits"] is True, name
    assert ask(per_device_train_batch_size=largest["per_device_train_batch_size"] + 2)["fits"] is False


def test_the_largest_r_fits(told):
    many = told("--r", 65536, "--retrieval", "device-rows", "--gpu", gpu_of(2**24))["largest_that_fits"]["r"]
    assert 0 < many < 65536
    assert told("--r", many, "--retrieval", "device-rows", "--gpu", gpu_of(2**24))["fits"] is True


def test_the_largest_r_is_one_that_num_experts_divides(told):
    words = ("--num_experts", 41, "--retrieval", "device-rows", "--gpu", gpu_of(2**24))
    many = told("--r", 65600, *words)["largest_that_fits"]["r"]
    assert 0 < many < 65600
    assert told("--r", many, *words)["fits"] is True


def test_other_methods(told, folder, capsys):
    found = told("--method", "lora", "--r", 8, "--gpu", "1GiB", "--card", "l4", "--optim", "adamw_8bit")
    assert found["trainable_values"] == 2 * 8 * (64 + 64 + 64 + 32)  # q_proj and v_proj
    assert found["strategy"] is None
    assert found["fits"] is False
    assert set(found["largest_that_fits"]) == {"r", "per_device_train_batch_size", "max_length"}
    assert found["seconds_per_step_at_least"] > 0
    four_bit = told("--method", "ia3", "--load_in_4bit")["device_bytes"]["base"]
    assert four_bit < told("--method", "ia3")["device_bytes"]["base"]
    wide = told("--method", "lora", "--target-modules", "all-linear", "--gradient-checkpointing", "false")
    assert wide["trainable_values"] > found["trainable_values"]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gptj", "n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "vocab_size": 128},
        {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128},
        TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    ],
    ids=["attention of its own", "Conv1D", "mixture of experts"],
)
def test_other_models(told, config):
    found = told("--r", 128, "--card", "a10", config=config)
    assert found["device_bytes"]["router"] == 2 * 32 * 64 * 4
    assert found["seconds_per_step_at_least"] > 0


def test_longer_steps_take_longer(told):
    def seconds(*words):
        return told("--r", 256, "--card", "4090", *words)["seconds_per_step_at_least"]

    once = seconds()
    assert once < seconds("--gradient_accumulation_steps", 4)
    assert once < seconds("--max_length", 512)
    assert seconds("--max_grad_norm", 0) <= once
    assert once < told("--r", 256, "--card", "l4")["seconds_per_step_at_least"] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--r", "0"], "r=0"),
        (["--per_device_train_batch_size", "-1"], "per_device_train_batch_size=-1"),
        (["--r", "10"], "top_k=64"),
        (["--union-share", "1.5"], "union_share=1.5"),
        (["--gpu", "much"], "gpu='much'"),
        (["--gpu", "0GiB"], "gpu='0GiB'"),
        (["--gpu", "nanGiB"], "gpu='nanGiB'"),
        (["--card", "5090ti"], "card='5090ti'"),
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--method", "ia3", "--r", "8"], "r=8 has no meaning with method=ia3"),
        (["--method", "lora", "--retrieval", "stream"], "retrieval=stream has no meaning"),
        (["--method", "boft"], "method=boft cannot be planned: it looks at values"),
        (["--target-modules", "q_proj"], "is no FFN"),
        (["--method", "lora", "--target-modules", "c_attn"], "c_attn"),
        (["--dtype", "fp4"], "fp4"),
        (["--fast"], "--fast"),
        (["--parallel", "zero3"], "parallel=zero3 has no meaning with gpus=1"),
        (["--optim", "lion_8bit"], "adamw_8bit"),
        (["--batch", "2"], "did you mean 'per_device_train_batch_size'"),
        (["--optimizer", "adamw_8bit"], "or 'optim'?"),
        (["--length", "2"], "did you mean 'max_length'"),
        (["--load_in_4bit", "--load_in_8bit"], "exclude each other"),
        (["--method", "lora", "--num_merges", "2"], "num_merges=2 has no meaning with method=lora; drop it or use"),
    ],
)
def test_bad_input_is_one_sentence(words, named, folder, capsys):
    assert main(["estimate", *folder(), *words]) == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("aslora-meft: error: ")]
    assert said.out == ""
    assert len(errors) == 1
    assert named in errors[0]


@pytest.mark.parametrize("config", [None, {"model_type": "no_such_model"}, {"model_type": "vit"}])
def test_models_that_cannot_be_planned(config, folder, tmp_path, capsys):
    assert main(["estimate", *(folder(config) if config else ["--model", str(tmp_path / "none")])]) == 2
    said = capsys.readouterr().err
    assert "model" in said
    assert "Traceback" not in said


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["estimate", "--help"])
    assert end.value.code == 0
    assert "--union_share" in capsys.readouterr().out


def test_cards():
    for name, found in rates()["cards"].items():
        assert all(found[key]["source"] for key in ("memory_gib", "bf16_flops", "memory_bytes_per_second", "pcie"))
        assert all(math.isfinite(value) and value > 0 for value in vars(ceilings(name)).values())
    assert card("RTX 3090") is not None
    assert ceilings("3090").to_device == 25e9
    assert device_bytes("24GiB") == device_bytes("4090") == 24 * GIB
    assert device_bytes("24 GB") == 24 * 10**9
    for bad in ("", "24", "GiB", "-1GiB"):
        with pytest.raises(UsageError, match="gpu="):
            device_bytes(bad)


def test_a_named_gpu_is_also_the_card():
    request, _ = parse(["--model", "m", "--gpu", "3090"])
    assert (request.card, request.gpu) == ("3090", 24 * GIB)
    request, _ = parse(["--model", "m", "--card", "l4"])
    assert request.gpu == 24 * GIB
    request, _ = parse(["--model", "m", "--gpu", "16GiB", "--card", "h200"])
    assert (request.card, request.gpu) == ("h200", 16 * GIB)
    request, _ = parse(["--model", "m", "--gpu", "24GiB"])
    assert request.card is None


def test_largest_of_nothing_is_asked_once():
    asked = []
    assert largest_that_fits(lambda n: asked.append(n) or False, 1000) == 0
    assert asked == [1]


def test_ranks_hold_shards_and_share_rows_once_a_node(told):
    words = ("--r", 64, "--card", "3090", "--gpus", 4)
    one = told(*words)
    ddp = one["ranks"]
    parts = one["device_bytes"]
    assert ddp["device_bytes_per_rank"]["peak"] - parts["peak"] == ddp["device_bytes_per_rank"]["ddp buckets"] > 0
    apart, shared = ddp["host"]["a copy each"], ddp["host"]["shared"]
    tables = {part: size for part, size in one["host_bytes"].items() if part != "all" and "gradient" not in part}
    assert tables.items() <= shared["bytes_once"].items()
    assert not tables.keys() & shared["bytes_per_rank"].keys()
    assert tables.items() <= apart["bytes_per_rank"].items()
    assert apart["bytes_of_node"] == 4 * sum(apart["bytes_per_rank"].values())
    assert shared["bytes_of_node"] == 4 * sum(shared["bytes_per_rank"].values()) + sum(shared["bytes_once"].values())
    assert apart["tokens_per_second_at_most"] <= shared["tokens_per_second_at_most"]
    for parallel in ("fsdp2", "zero3"):  # rows as under DDP; the base model is shared out
        sharded = told(*words, "--parallel", parallel)["ranks"]
        assert sharded["host"].keys() == ddp["host"].keys()
        assert sharded["host"]["shared"]["bytes_once"] == shared["bytes_once"]
        assert sharded["device_bytes_per_rank"]["base"] == -(-parts["base"] // 4)
    lora = told("--method", "lora", *words[2:], "--parallel", "fsdp2")["ranks"]
    assert lora["host"]["a copy each"]["bytes_of_node"] == 0
    assert lora["device_bytes_per_rank"]["gathered"] > 0
    assert lora["device_bytes_per_rank"]["base"] == -(-parts["base"] // 4)


def test_fsdp2_shards_the_routers_of_meft_and_not_its_rows(told):
    words = ("--r", 64, "--card", "3090", "--gpus", 4, "--parallel", "fsdp2", "--placement", "device")
    found = told(*words)
    one, each = found["device_bytes"], found["ranks"]["device_bytes_per_rank"]
    assert each["adapter"] == one["adapter"] > 0
    assert each["router"] == -(-one["router"] // 4)
    for part, times in {"optimizer": 2, "gradients": 1}.items():
        sharded = min(one[part], times * one["router"])  # of what there is at the peak
        assert each[part] == one[part] - sharded + -(-sharded // 4)


def test_what_would_fit_on_each_of_several_gpus(told):
    """By DDP each has its buckets beside what one process has, so less fits."""

    def ask(batch, gpus=2):
        words = ("--method", "lora", "--r", 16, "--target_modules", "all-linear", "--gpu", gpu_of(700_000))
        words += ("--max_length", 8, "--gpus", gpus, "--per_device_train_batch_size", batch)
        return told(*words, config=TINY | {"num_hidden_layers": 1})

    found = ask(16)
    assert found["fits"] is False
    assert found["fits_with"]
    batch = found["largest_that_fits"]["per_device_train_batch_size"]
    assert [ask(size)["fits"] for size in (batch, batch + 1)] == [True, False]
    assert ask(batch + 1, gpus=1)["fits"] is True
