"""lm-evaluation-harness with `peft=ADAPTER`, which imports neither method: its numbers are those of the adapter.

Not a part of CI: it needs lm-eval 0.4.13, in an environment where aslora-meft is installed as well.

    python tests/accept/lm_eval_peft.py
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers as tr
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aslora import ASLoRAConfig
from meft import MEFTConfig

TASK = """task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""


def prepare(home: Path) -> None:
    """A tiny model, an adapter of each method, and a task of 20 rows."""
    letters = [chr(97 + i) for i in range(26)]
    words = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="z"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = tr.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="z", eos_token="y")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    tr.LlamaForCausalLM(tr.LlamaConfig(vocab_size=26, **shape)).save_pretrained(home / "base")
    configs = {
        "aslora": ASLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "meft": MEFTConfig(r=16, num_experts=4, experts_per_token=2, top_k=4, task_type="CAUSAL_LM"),
    }
    for name, config in configs.items():
        model = get_peft_model(tr.LlamaForCausalLM.from_pretrained(home / "base"), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, std=0.5)
        model.save_pretrained(home / name)
    for name in ("base", *configs):
        tokenizer.save_pretrained(home / name)
    rows = [{"prompt": letters[i] + letters[i + 1], "completion": letters[i + 2]} for i in range(20)]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "letters.yaml").write_text(TASK.format(data=home / "data.jsonl"))


def perplexity(home: Path, model_args: str, *before: str, **environment: str) -> float:
    """What lm_eval says, started as a program of its own."""
    out = Path(tempfile.mkdtemp(dir=home))
    words = [sys.executable, "-W", "ignore", *(before or ("-m",)), "lm_eval", "run", "--model", "hf"]
    words += ["--model_args", model_args, "--include_path", str(home), "--tasks", "letters", "--device", "cpu"]
    done = subprocess.run(
        [*words, "--batch_size", "4", "--output_path", str(out)],
        env={**os.environ, "HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    (results,) = out.rglob("results*.json")
    return json.loads(results.read_text())["results"]["letters"]["perplexity,none"]


def main() -> None:
    """Print the perplexities, and fail where an adapter's is not the same on both ways or is that of the base."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        prepare(home)
        pretrained = f"pretrained={home / 'base'}"
        base = perplexity(home, pretrained)
        print(f"base                             {base:.6f}", flush=True)
        for name in ("aslora", "meft"):
            model_args = f"{pretrained},peft={home / name}"
            found = perplexity(home, model_args)
            runner = perplexity(home, model_args, "-m", "aslora_meft.cli", "run", "--", ASLORA_MEFT_AUTOLOAD="0")
            print(f"peft={name:<8} as it is           {found:.6f}")
            print(f"peft={name:<8} aslora-meft run    {runner:.6f}", flush=True)
            if found != runner or abs(found - base) < 1e-3:
                raise SystemExit(f"{name}: {found} is not the adapter's")
        try:
            perplexity(home, model_args, ASLORA_MEFT_AUTOLOAD="0")
        except RuntimeError as error:
            print(f"switched off                     {error}")
        else:
            raise SystemExit("switched off, the adapter loads all the same")


if __name__ == "__main__":
    main()
