"""`torchrun` and `accelerate launch` by their own code, with ranks that are forked instead of started."""

import itertools
import os
import select
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


def launch(launcher, folder, *words):
    """Run `aslora-meft WORDS` by two ranks on the CPU; each keeps what it has trained in `folder`.

    Args:
        words: several commands with "then" between run one after the other in the same processes.
        launcher: "torchrun", "accelerate", or a file with accelerate's configuration.
    """
    from torch.distributed import run  # `--`: else its own parser takes `--r` for one of its options

    config_from_args = run.config_from_args

    def forked(args):
        config, _, command = config_from_args(args)
        config.start_method = "fork"
        return config, work, [folder, *command[command.index("aslora_meft") + 1 :]]

    run.config_from_args = forked
    if launcher == "torchrun":
        run.main(["--nproc_per_node=2", "-m", "--", "aslora_meft", *words])
        return
    from accelerate.commands import launch

    machine = ["--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--num_processes=2"]
    machine = machine if launcher == "accelerate" else [f"--config_file={launcher}"]
    arguments = [*machine, "--main_process_port=0", "-m", "--", "aslora_meft", *words]
    launch.launch_command(launch.launch_command_parser().parse_args(arguments))


def work(folder, *words):
    """What a rank does. Where the environment has that, the second one is killed in its optimizer step KILLED_AT, or
    the rank KILLED_IN_SAVE while the first one writes the checkpoint of step 4.
    """
    from aslora_meft import cli, train
    from tests.support.fsdp2 import forget, fsdp2_on_cpu

    torch.set_num_threads(1)
    inner, kept = train.train, []
    train.train = lambda options: kept.append(inner(options))
    rank = int(os.environ["RANK"])
    if rank == 1 and "KILLED_AT" in os.environ:
        kill_in_step(int(os.environ["KILLED_AT"]))
    if "KILLED_IN_SAVE" in os.environ:
        kill_in_save(rank, int(os.environ["KILLED_IN_SAVE"]), Path(folder))
    prepared = nullcontext()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        torch.distributed.init_process_group("gloo")
        prepared = fsdp2_on_cpu(rank)
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from tests.support import zero

        torch.distributed.init_process_group("gloo")
        zero.start(rank)
        zero.let_accelerate_take_gloo()
        at = words.index("--use_cpu")  # with it accelerate does not look for DeepSpeed
        words = words[:at] + words[at + 2 :]
    found = []
    with prepared:
        for then, command in itertools.groupby(words, "then".__eq__):
            if then:
                forget()
            elif code := cli.main(list(command)):
                sys.exit(code)
            else:
                found.append(result_of(kept.pop().model))
    torch.save(found[0] | {"runs": found}, Path(folder) / f"rank{rank}.pt")


def result_of(model):
    from tests.support.fsdp2 import whole
    from tests.support.tiny_meft import Tiny

    node = getattr(getattr(model.base_model, "ranks", None), "node", None)
    state = {name: value.detach().clone() for name, value in whole(trained(model)).items()}
    for number, table in enumerate(Tiny.tables(model)):
        state |= {f"{number}.{name}": value.clone() for name, value in table.moments.tensors().items()}
    return {"state": state, "summed": node.sum.bytes_between_ranks if node is not None else 0}


def trained(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def kill_in_step(number):
    """Kill this process as an optimizer begins its step of this number."""
    numbers = itertools.count(1)

    def kill(*_):
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_pre_hook(kill)


def kill_in_save(rank, killed, folder):
    """Kill a rank while the first one writes the checkpoint of step 4, of which there is the half of a file by then.

    Where the second one is killed, the first one goes on once it is gone, and the launcher does not end it before.
    """
    from transformers import Trainer

    save, process, saving = Trainer._save_optimizer_and_scheduler, folder / "second_rank", folder / "saving"

    def until(reached):
        end = time.monotonic() + 30
        while not reached():
            assert time.monotonic() < end
            time.sleep(0.01)

    def save_or_end(self, output_dir):
        if self.state.global_step == 4 and rank == 0:
            Path(output_dir, "optimizer.pt").write_bytes(b"PK")
            if killed == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            until(process.exists)
            ended = os.pidfd_open(int(process.read_text()))
            saving.touch()
            assert select.select([ended], [], [], 30)[0]
        elif self.state.global_step == 4 and killed == 1:
            process.with_suffix(".draft").write_text(str(os.getpid()))
            process.with_suffix(".draft").rename(process)
            until(saving.exists)
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    Trainer._save_optimizer_and_scheduler = save_or_end


if __name__ == "__main__":
    launch(*sys.argv[1:])
