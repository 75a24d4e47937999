"""`torchrun` and `accelerate launch` by their own code, with ranks that are forked instead of started."""

import itertools
import os
import signal
import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


def launch(launcher, folder, *words):
    """Run `aslora-meft WORDS` by two ranks on the CPU; each keeps what it has trained in `folder`.

    Args:
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
    """What a rank does; the second one is killed in its optimizer step KILLED_AT, where the environment has that."""
    from aslora_meft import cli, train
    from tests.support.fsdp2 import fsdp2_on_cpu, whole
    from tests.support.tiny_meft import Tiny

    torch.set_num_threads(1)
    inner, kept = train.train, []
    train.train = lambda options: kept.append(inner(options))
    if os.environ["RANK"] == "1" and "KILLED_AT" in os.environ:
        kill_in_step(int(os.environ["KILLED_AT"]))
    rank = int(os.environ["RANK"])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        torch.distributed.init_process_group("gloo")
        with fsdp2_on_cpu(rank):
            code = cli.main(list(words))
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from tests.support import zero

        torch.distributed.init_process_group("gloo")
        zero.start(rank)
        zero.let_accelerate_take_gloo()
        words = list(words)
        at = words.index("--use_cpu")  # with it accelerate does not look for DeepSpeed
        code = cli.main(words[:at] + words[at + 2 :])
    else:
        code = cli.main(list(words))
    if code:
        sys.exit(code)
    model = kept[0].model
    node = getattr(getattr(model.base_model, "ranks", None), "node", None)
    state = {name: value.detach().clone() for name, value in whole(trained(model)).items()}
    for number, table in enumerate(Tiny.tables(model)):
        state |= {f"{number}.{name}": value.clone() for name, value in table.moments.tensors().items()}
    result = {"state": state, "summed": node.sum.bytes_between_ranks if node is not None else 0}
    torch.save(result, Path(folder) / f"rank{rank}.pt")


def trained(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def kill_in_step(number):
    """Kill this process as an optimizer begins its step of this number."""
    numbers = itertools.count(1)

    def kill(*_):
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_pre_hook(kill)


if __name__ == "__main__":
    launch(*sys.argv[1:])
