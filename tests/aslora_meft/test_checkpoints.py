"""`--resume_from_checkpoint`: a checkpoint of which any file is absent, empty or torn is never taken for whole."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from aslora_meft.arguments.groups import parse_train
from aslora_meft.errors import UsageError
from aslora_meft.train import train
from aslora_meft.training.checkpoints import check_whole, last_whole
from aslora_meft.training.engine_checkpoints import check_engine
from aslora_meft.training.task_state import TaskState

COMMON = [
    "trainer_state.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
]
FILES = {"lora": COMMON, "aslora": COMMON, "meft": COMMON}


def run(method, model_dir, text_file, output, *words):
    fixed = ["--model", model_dir, "--data", text_file, "--output_dir", output, "--method", method, "--max_length", 32]
    fixed += ["--max_steps", 6, "--save_steps", 2, "--save_strategy", "steps", "--learning_rate", 1e-2]
    fixed += ["--disable_tqdm", "true", "--use_cpu", "true", *(["--r", 64] if method == "meft" else [])]
    return train(parse_train([str(word) for word in (*fixed, *words)]))


@pytest.fixture(scope="module")
def finished(model_dir, text_file, tmp_path_factory):
    """Method -> output folder of a run of 6 steps with checkpoints at 2, 4 and 6; each is made once."""
    made = {}

    def of(method):
        if method not in made:
            made[method] = tmp_path_factory.mktemp(method) / "out"
            run(method, model_dir, text_file, made[method])
        return made[method]

    return of


@pytest.fixture
def checkpoint(finished, tmp_path):
    return lambda method: shutil.copytree(finished(method) / "checkpoint-6", tmp_path / "checkpoint-6")


HARM = {
    "absent": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "end": lambda path: path.write_bytes(path.read_bytes()[:-2]),
}


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, names in FILES.items() for name in names])
@pytest.mark.parametrize("harm", HARM)
def test_a_torn_file_is_named(checkpoint, method, name, harm):
    folder = checkpoint(method)
    check_whole(folder)
    HARM[harm](folder / name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as raised:
        check_whole(folder)
    assert "\n" not in str(raised.value)


FULL = ("optimizer.bin", "pytorch_model_fsdp.bin")


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("method", FILES)
def test_a_checkpoint_of_fsdp2_is_whole(checkpoint, method, name):
    folder = checkpoint(method)
    shutil.copy(folder / "optimizer.pt", folder / FULL[1])
    (folder / "optimizer.pt").rename(folder / FULL[0])
    check_whole(folder)
    for harm in ("half", "absent"):
        HARM[harm](folder / name)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            check_whole(folder)


@pytest.fixture
def of_shards(checkpoint):
    """A checkpoint as FSDP2 writes it with SHARDED_STATE_DICT: the configuration, and shards."""

    def of_shards(method):
        folder = checkpoint(method)
        weights = load_file(folder / "adapter_model.safetensors")
        moments = {"state.rows.row_moments": b"", "state.router.exp_avg": torch.ones(2)}
        for name, tensors in (("pytorch_model_fsdp_0", weights), ("optimizer_0", moments)):
            dcp.save(tensors, checkpoint_id=folder / name, no_dist=True)
        for name in ("adapter_model.safetensors", "optimizer.pt"):
            (folder / name).unlink()
        return folder

    return of_shards


@pytest.mark.parametrize("name", [f"{f}/{n}" for f in ("pytorch_model_fsdp_0", "optimizer_0")
                                  for n in (".metadata", "__0_0.distcp")])  # fmt: skip
def test_a_checkpoint_of_shards_is_whole(of_shards, name):
    """Its index is written last, and names the files."""
    for harm in HARM.values():
        folder = of_shards("aslora")
        check_whole(folder)
        harm(folder / name)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as raised:
            check_whole(folder)
        assert "\n" not in str(raised.value)
        shutil.rmtree(folder)


def test_shards_without_the_moments_of_rows_are_not_whole(of_shards):
    folder = of_shards("meft")
    check_whole(folder)
    dcp.save({"state.router.exp_avg": torch.ones(2)}, checkpoint_id=folder / "optimizer_0", no_dist=True)
    with pytest.raises(ValueError, match="no moments of MEFT's rows in optimizer_0"):
        check_whole(folder)


def test_an_optimizer_without_the_moments_of_rows_is_not_whole(checkpoint):
    """As an optimizer's state from elsewhere: the run would go on with fresh moments."""
    folder = checkpoint("meft")
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    torch.save({**state, "state": {}}, folder / "optimizer.pt")
    with pytest.raises(ValueError, match=r"no moments of MEFT's rows, neither in optimizer\.pt nor"):
        check_whole(folder)


@pytest.mark.parametrize("method", ["aslora", "meft"])
def test_a_flipped_bit_of_the_weights_is_seen(checkpoint, method):
    path = checkpoint(method) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="digest"):
        check_whole(path.parent)


def test_a_state_without_its_step_is_not_whole(checkpoint):
    folder = checkpoint("lora")
    (folder / "trainer_state.json").write_text(json.dumps({"epoch": 1}))
    with pytest.raises(ValueError, match=r"trainer_state\.json has no global_step"):
        check_whole(folder)


@pytest.mark.parametrize("told", [True, False])
def test_of_several_ranks_each_state_must_be_there(checkpoint, told):
    """The last rank's too, where the checkpoint tells how many there were, and of two in any case."""
    folder = checkpoint("lora")
    file = folder / "trainer_state.json"
    state = json.loads(file.read_text())
    entry = state["stateful_callbacks"][TaskState.__name__]["attributes"]
    assert entry == {"ranks": 1}
    del entry["ranks"]
    entry |= {"ranks": 3} if told else {}
    file.write_text(json.dumps(state))
    for rank in range(3):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
    (folder / "rng_state.pth").unlink()
    check_whole(folder)
    for rank in (2, 1):
        (folder / f"rng_state_{rank}.pth").rename(kept := folder / "kept.pth")
        if told or rank == 1:
            with pytest.raises(ValueError, match=rf"rng_state_{rank}\.pth is missing"):
                check_whole(folder)
        kept.rename(folder / f"rng_state_{rank}.pth")
    for rank in (2, 1):
        (folder / f"rng_state_{rank}.pth").unlink()
    with pytest.raises(ValueError, match=r"rng_state_1\.pth is missing"):
        check_whole(folder)


ENGINES = {
    "DDP": ("neither FSDP2 nor DeepSpeed", ["optimizer.pt"], {}),
    "full": ("FSDP2 with FULL_STATE_DICT", ["pytorch_model_fsdp.bin", "optimizer.bin"], {"fsdp": "FULL_STATE_DICT"}),
    "sharded": (
        "FSDP2 with SHARDED_STATE_DICT", ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"],
        {"fsdp": "SHARDED_STATE_DICT"},
    ),
    "DeepSpeed": ("DeepSpeed", ["latest"], {"deepspeed": True}),
}  # fmt: skip


@pytest.mark.parametrize("run", ENGINES)
@pytest.mark.parametrize("written", ENGINES)
def test_another_engine_goes_on_from_no_checkpoint(tmp_path, written, run):
    """A Trainer would leave out the optimizer's state without a word, or end in an error of its own."""
    for name in ENGINES[written][1]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    engine = ENGINES[run][2]
    plugin = SimpleNamespace(state_dict_type=SimpleNamespace(name=engine.get("fsdp")))
    trainer = SimpleNamespace(
        is_deepspeed_enabled="deepspeed" in engine, is_fsdp_enabled="fsdp" in engine,
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
    )  # fmt: skip
    if written == run:
        check_engine(tmp_path, trainer)
        return
    with pytest.raises(UsageError) as raised:
        check_engine(tmp_path, trainer)
    assert f"was written under {ENGINES[written][0]}, and this run is under {ENGINES[run][0]}: " in str(raised.value)


def test_the_newest_whole_one_is_found(finished, tmp_path):
    output = shutil.copytree(finished("lora"), tmp_path / "out")
    assert last_whole(output) == (output / "checkpoint-6", {})
    shutil.copytree(output / "checkpoint-6", output / "checkpoint-10")  # 10 is newer than 6
    assert last_whole(output)[0].name == "checkpoint-10"
    (output / "checkpoint-10" / "optimizer.pt").unlink()
    (output / "checkpoint-6" / "scheduler.pt").write_bytes(b"")
    (output / "checkpoint-7").mkdir()
    found, passed = last_whole(output)
    assert found.name == "checkpoint-4"
    assert [path.name for path in passed] == ["checkpoint-10", "checkpoint-7", "checkpoint-6"]


@pytest.mark.parametrize("method", FILES)
def test_a_run_goes_on_from_the_last_whole_checkpoint(finished, model_dir, text_file, tmp_path, method):
    """It ends where the uninterrupted run ended, and tells what it has passed over."""
    output = shutil.copytree(finished(method), tmp_path / "out")
    HARM["half"](output / "checkpoint-6" / "optimizer.pt")
    with pytest.warns(UserWarning, match=r"checkpoint-6' is not whole \(optimizer\.pt is damaged.*checkpoint-4'"):
        run(method, model_dir, text_file, output, "--resume_from_checkpoint", "last")
    expected = load_file(finished(method) / "adapter_model.safetensors")
    actual = load_file(output / "adapter_model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert (output / "torn-checkpoint-6").is_dir()
    check_whole(output / "checkpoint-6")


def test_a_torn_checkpoint_that_is_named_is_refused(finished, model_dir, text_file, tmp_path):
    output = shutil.copytree(finished("lora"), tmp_path / "out")
    before = sorted(path.name for path in output.iterdir())
    HARM["half"](output / "checkpoint-6" / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"no whole checkpoint: adapter_model\.safetensors is damaged"):
        run("lora", model_dir, text_file, output, "--resume_from_checkpoint", output / "checkpoint-6")
    for checkpoint in output.glob("checkpoint-*"):
        HARM["absent"](checkpoint / "scheduler.pt")
    with pytest.raises(UsageError, match=r"no checkpoint .*checkpoint-6.*checkpoint-4.*scheduler\.pt is missing"):
        run("lora", model_dir, text_file, output, "--resume_from_checkpoint", "last")
    assert sorted(path.name for path in output.iterdir()) == before
