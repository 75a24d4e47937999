"""What the model card of an adapter says: the method, how to serve it, and the sizes of its routed layers."""

from __future__ import annotations

import json
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from peft_bridge import MethodCard, read_results

ABOUT = (
    "MEFT ([arXiv 2406.04984](https://arxiv.org/abs/2406.04984)) puts many extra neurons beside each FFN and keeps "
    "them in host memory. A router picks a few of them for each token."
)
SERVE = (
    "`aslora-meft export ADAPTER --to model OUT` writes an ordinary model folder that loads without aslora-meft. The "
    "adapter cannot be merged: a routed adapter has no equal weight matrix."
)


def routing_section(folder: Path) -> list[str]:
    """Sizes of the routed layers, from the adapter's file, and how they were used, where a run has told."""
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # not a dict
    routers = [shape for key, shape in shapes.items() if ".meft_router" in key]
    experts = config.get("num_experts") or (min(routers[0]) if routers else "?")
    rows = [
        ("layers", f"{len(routers)}"),
        ("neurons a layer", f"{config.get('r')}"),
        ("experts", f"{experts}, of which a token uses {config.get('experts_per_token')}"),
        ("neurons a token", f"{config.get('top_k')}"),
    ]
    used = read_results(folder).get("transfers", {})
    if used:
        rows += [
            ("mean share of neurons used a pass and layer", f"{used['union_share']:.3f}"),
            ("load of the busiest expert beside an even load", f"{used['busiest_expert_share']:.2f}"),
            ("experts never used", f"{used['idle_expert_share']:.1%}"),
        ]
    table = ["| what | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return ["## Routing", "\n".join(table)]


CARD = MethodCard("MEFT", ABOUT, SERVE, routing_section)
