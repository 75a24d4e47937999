"""The methods of a settings file as experiment folders of PEFT's own `method_comparison`, for a larger model.

    python -m benchmarks.aslora_classify.experiments PEFT/method_comparison/MetaMathQA/experiments

writes `METHOD/MODEL-NAME-lr_RATE/` with `adapter_config.json` and `training_params.json` for each method and rate. The
comparison's `run.py` takes such a folder where aslora-meft is installed. Methods whose layers this benchmark ties by
itself are no PEFT configuration and are left out.
"""

import argparse
import json
import sys
from pathlib import Path

from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from benchmarks.aslora_classify.methods import Method
from benchmarks.aslora_classify.runs import read_settings

RATES = (1e-4, 2e-4, 4e-4, 8e-4)
STEPS = 5000  # of the comparison's default_training_params.json
WEIGHT_DECAY = 0.1  # also from there


def write(method: Method, rate: float, model: str, folder: Path) -> Path:
    """Write one experiment; the folder that was written."""
    fields = dict(method.config, task_type="CAUSAL_LM")
    if method.peft_type == "ASLORA":
        fields["total_steps"] = STEPS
    name = method.name.lower().replace(" ", "-")
    place = folder / method.peft_type.lower() / f"{model}-{name}-lr_{rate:g}"
    PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type](**fields).save_pretrained(str(place))
    parameters = {"optimizer_kwargs": {"lr": rate, "weight_decay": WEIGHT_DECAY}}
    (place / "training_params.json").write_text(json.dumps(parameters, indent=2) + "\n", encoding="utf-8")
    return place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that gets the experiments")
    parser.add_argument("--settings", type=Path, default=Path(__file__).with_name("settings.json"))
    parser.add_argument("--model", default="llama-3.2-3B", help="the model's name, as the comparison's folders have it")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    args = parser.parse_args()
    for method in read_settings(args.settings).methods:
        if method.sharing != "similarity":
            print(f"{method.name}: left out, as its layers are tied by the benchmark", file=sys.stderr)
            continue
        for rate in args.rates:
            print(write(method, rate, args.model, args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
