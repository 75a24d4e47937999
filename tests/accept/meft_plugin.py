"""The pytest plugin that adds MEFT rows to PEFT's tests; it stands beside the one for ASLoRA in one run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from meft_rows import MODELS_ASIDE, MORE_MODELS, NOT_APPLICABLE, ROWS, SKIPPED, TESTS_ASIDE
from models import with_ffns
from plugin import LORA

from meft import MEFTConfig, MEFTModel

MEFT = "meft-"


class MEFTHarness:
    """MEFT's part of a run; its results are printed by `report`."""

    def __init__(self) -> None:
        self.not_found: set[Any] = {(file, names) for file, rows in ROWS.items() for names in rows}
        self.not_found |= {*MODELS_ASIDE, *TESTS_ASIDE, *SKIPPED}
        self.by_file = Counter[str]()
        self.aside = Counter[str]()
        self.outcomes: dict[str, str] = {}
        self.about_us = set[str]()
        self.is_sample = False

    # ---------------------------------------------------------------- collection

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Add the rows; by now the plugin for ASLoRA, which comes first, has marked those of LoRA."""
        file = metafunc.module.__file__.rpartition("/")[2]
        marks = metafunc.definition.own_markers
        places = {_names(mark): i for i, mark in enumerate(marks) if mark.name == "parametrize"}
        for names, rows in ROWS.get(file, {}).items():
            if names not in places:
                continue
            values = list(marks[places[names]].args[1])
            of_lora = [value.values for value in values if str(getattr(value, "id", "")).startswith(LORA)]
            if not of_lora:
                continue
            values += [pytest.param(*_with_task(row, of_lora[0]), id=MEFT + title) for title, row in rows]
            marks[places[names]] = pytest.mark.parametrize(",".join(names), values).mark
            self.not_found.discard((file, names))
            if file == "test_decoder_models.py" and (place := places.get(("model_id",))) is not None:
                marks[place] = pytest.mark.parametrize("model_id", [*marks[place].args[1], *MORE_MODELS]).mark

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> Any:
        """Hold MEFT's items back while the plugin for ASLoRA picks its own.

        With a keyword (`-k`), those are run that have no model, an MLP or a model that it names.
        """
        ours, others = [], []
        for item in items:
            model = _model_of(item)
            test = item.originalname  # type: ignore[attr-defined]
            if not is_meft(item):
                others += [item] if model not in MORE_MODELS else []
                continue
            self.not_found -= {model, test, f"{item.path.name}::{test}"}
            if kind := MODELS_ASIDE.get(model) or TESTS_ASIDE.get(test):
                self.aside[kind] += 1
            else:
                ours.append(item)
                self.by_file[item.path.name] += 1
        items[:] = others
        yield
        if keyword := config.option.keyword:
            self.is_sample = True
            ours = [item for item in ours if any(name in _model_of(item) for name in (keyword, "MLP"))]
        items += ours

    # ---------------------------------------------------------------- running

    @pytest.fixture(autouse=True)
    def watched_meft(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note which tests are about MEFT, and give PEFT's MLPs FFNs where they have single linear layers."""
        if not is_meft(request.node):
            return
        inject, check = MEFTModel.inject_adapter, MEFTConfig.__post_init__
        load = MEFTConfig.from_pretrained.__func__

        def inject_adapter(tuner: MEFTModel, *args: Any, **kwargs: Any) -> None:
            self.about_us.add(request.node.nodeid)
            inject(tuner, *args, **kwargs)

        def post_init(config: MEFTConfig) -> None:
            self.about_us.add(request.node.nodeid)
            check(config)

        def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            self.about_us.add(request.node.nodeid)
            return load(cls, *args, **kwargs)

        monkeypatch.setattr(MEFTModel, "inject_adapter", inject_adapter)
        monkeypatch.setattr(MEFTConfig, "__post_init__", post_init)
        monkeypatch.setattr(MEFTConfig, "from_pretrained", classmethod(from_pretrained))
        for name in {"MLP", "DeepMLP"} & vars(request.module).keys():
            model = getattr(request.module, name)
            monkeypatch.setattr(
                request.module, name, lambda *args, _model=model, **kwargs: with_ffns(_model(*args, **kwargs))
            )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcomes of MEFT's items."""
        if MEFT not in report.nodeid or (report.when != "call" and report.passed):
            return
        if self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome


def _model_of(item: pytest.Item) -> str:
    """The name of an item's model; "MLP" where it has none."""
    return item.callspec.params.get("model_id", "MLP") if hasattr(item, "callspec") else "MLP"


def is_meft(item: pytest.Item) -> bool:
    """Whether an item has a MEFT row."""
    return hasattr(item, "callspec") and MEFT in item.callspec.id


def report(harness: MEFTHarness) -> list[str]:
    """Print what MEFT's part shows, and return the problems."""
    taken = Counter(harness.aside)
    problems = [f"the suite has nothing for this entry any more: {entry}" for entry in harness.not_found]
    problems += [f"nothing selected from {file}" for file in ROWS if not harness.by_file[file]]
    for node, outcome in harness.outcomes.items():
        kind = _kind_of_skip(node)
        if outcome == "failed":
            problems.append(f"failed: {node}")
        elif (outcome == "skipped") != (kind is not None):
            problems.append(f"{outcome}, unlike in the table: {node}")
        elif kind is not None:
            taken[kind] += 1
        elif node not in harness.about_us:
            problems.append(f"passed without a MEFT config or adapter: {node}")
    print("\nPEFT's own tests over MEFT")
    print("  " + ", ".join(f"{file}: {harness.by_file[file]}" for file in ROWS))
    for kind, (reason, number) in NOT_APPLICABLE.items():
        print(f"not applicable: {kind}: {taken[kind]} ({reason})")
        if taken[kind] != number and not harness.is_sample:
            problems.append(f"not applicable for {kind}: {taken[kind]}, not {number}")
    for problem in problems:
        print(problem)
    totals = Counter(harness.outcomes.values())
    print(
        f"MEFT: passed: {totals['passed']}, failed: {totals['failed']}, not applicable: {taken.total()}, "
        f"problems: {len(problems)}"
    )
    return problems


def _kind_of_skip(node: str) -> str | None:
    path, _, rest = node.partition("[")[0].partition("::")
    test = rest.rpartition("::")[2]
    return SKIPPED.get(test) or SKIPPED.get(f"{path.rpartition('/')[2]}::{test}")


def _names(mark: Any) -> tuple[str, ...]:
    names = mark.args[0]
    return tuple(n.strip() for n in (names.split(",") if isinstance(names, str) else names))


def _with_task(row: list[Any], of_lora: Any) -> list[Any]:
    task = {"task_type": of_lora[1]["task_type"]} if len(row) == 2 and "task_type" in of_lora[1] else {}
    return [{**value, **task} if isinstance(value, dict) else value for value in row]
