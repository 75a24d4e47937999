"""The pytest plugin: puts ASLoRA rows beside PEFT's LoRA rows, selects them, and holds skips against LoRA's."""

from __future__ import annotations

import gc
import re
import sys
import types
from collections import Counter
from contextlib import contextmanager
from inspect import signature
from typing import Any

import pytest
import torch
import transformers.trainer  # noqa: F401 - asks for datasets once, and must not meet the stand-in
from adopted import ADOPTED, LEFT_OUT
from models import MODELS, Deep
from rows import ADDED, EXTRA, NotOurs, as_aslora, translate_row, with_options

from aslora import ASLoRAConfig, ASLoRAModel
from aslora.layer import ASLoRALayer

OURS, LORA = "aslora-", "lora-"
COMBINATIONS = ("cat", "linear", "svd")


def _expand(cases: list[Any]) -> Any:
    """What parameterized.expand does, by pytest's means."""

    def decorate(function: Any) -> Any:
        names = list(signature(function).parameters)[1:]
        rows = [case if isinstance(case, tuple | list) else (case,) for case in cases]
        return pytest.mark.parametrize(names, rows)(function)

    return decorate


# Packages that the test files import and that need not be installed for the tests that are run.
STUBS = {
    "diffusers": {"StableDiffusionPipeline": type("StableDiffusionPipeline", (), {}), "__version__": "0"},
    "datasets": {"load_dataset": None},
    "parameterized": {"parameterized": types.SimpleNamespace(expand=_expand)},
}


@contextmanager
def stubs() -> Any:
    """Stand-ins for absent packages while the tests are imported, and no longer: PEFT asks whether they are there."""
    made = []
    for name, attributes in STUBS.items():
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(attributes)
            made.append(name)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


class Offline(dict):
    """For `hub_online_once`: every model is known already, so that no request is made."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


class Harness:
    """One run; its results are read by run.py."""

    def __init__(self) -> None:
        self.rows = Counter[str]()
        self.models_missing = set[str]()
        self.deselected = 0
        self.selected = 0
        self.by_file = Counter[str]()
        self.not_found = {(file, pattern) for file, patterns in ADOPTED.items() for pattern in patterns}
        self.not_found |= {*LEFT_OUT, *ADDED, *EXTRA}
        self.lora_items: dict[str, pytest.Item] = {}
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.refused = Counter[str]()
        self.kinds_left_out = set[str]()
        self.about_us = set[str]()
        self._session: pytest.Session | None = None
        self._seen_rows = set[str]()

    # ---------------------------------------------------------------- collection

    @pytest.hookimpl(wrapper=True)
    def pytest_pycollect_makemodule(self, module_path: Any, parent: Any) -> Any:
        """Import with the stand-ins, and give PEFT's model factory our model."""
        collector = yield
        with stubs():
            module = collector.obj
        if wrapper := getattr(module, "MockTransformerWrapper", None):
            original = wrapper.from_pretrained.__func__

            def from_pretrained(cls: type, model_id: str, dtype: Any = None) -> Any:
                return original(cls, model_id, dtype) if model_id != "Deep" else _deep(dtype)

            wrapper.from_pretrained = classmethod(from_pretrained)
        if "hub_online_once" in vars(module):
            accesses = "_HUB_MODEL_ACCESSES"
            utils = sys.modules[module.hub_online_once.__module__]
            getattr(utils, accesses)  # an AttributeError here: PEFT has changed how it counts
            setattr(utils, accesses, Offline())
        return collector

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Replace the rows of each parametrisation by ASLoRA's and, for comparison, the LoRA rows they come from."""
        file, name = metafunc.module.__file__.rpartition("/")[2], metafunc.function.__name__
        cls = metafunc.cls.__name__ if metafunc.cls else ""
        if name in LEFT_OUT:
            self.not_found.discard(name)
            return
        marks = metafunc.definition.own_markers
        for i, mark in enumerate(marks):
            if mark.name == "parametrize":
                names, values = mark.args[0], list(mark.args[1])
                names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
                if values := self._values(names, values, ADDED.get(cls) or ADDED.get(name) or []):
                    marks[i] = pytest.mark.parametrize(",".join(names), values).mark
                    self.not_found -= {cls, name}
        if pattern := next((p for p in ADOPTED.get(file, []) if re.fullmatch(p, f"{cls}::{name}")), None):
            self.not_found.discard((file, pattern))
            ids = [f"{OURS}adopted", f"{LORA}adopted"]
            metafunc.parametrize("in_place_of_lora", [True, False], ids=ids, indirect=True)

    def _values(self, names: list[str], values: list[Any], added: list[list[Any]]) -> list[Any]:
        """What takes the place of a parametrisation's values; nothing if it stays as it is."""
        if names == ["model_id"]:
            self.models_missing |= {value for value in values if value not in MODELS}
            return [value for value in values if value in MODELS]
        if names[0] == "combination_type":
            self.kinds_left_out |= {row[0] for row in values if row[0] not in COMBINATIONS}
            return [row for row in values if row[0] in COMBINATIONS]
        return self._rows(names, [*values, *(row for row in added if len(row) == len(names))])

    def _rows(self, names: list[str], values: list[Any]) -> list[Any]:
        """ASLoRA's rows for LoRA's among `values`, then those of LoRA, with ids that differ in their prefix only."""
        pairs: list[tuple[list[Any], list[Any]]] = []
        for value in values:
            row = value.values if isinstance(value, type(pytest.param())) else value
            row = list(row) if isinstance(row, list | tuple) else [row]
            try:
                ours = translate_row(row)
            except NotOurs as reason:
                self._count(f"left out: {reason}", row)
                continue
            if ours is not None:
                self._count("taken over", row)
                pairs.append((row, ours))
        if pairs:
            for row, options in EXTRA.get(tuple(names), []):
                self.not_found.discard(tuple(names))
                self._count("added for ASLoRA's own options", row)
                pairs.append((row, with_options(row, options)))
        titles = [row[0] if isinstance(row[0], str) else f"row {n}" for n, (row, _) in enumerate(pairs)]
        return [
            pytest.param(*pair[place], id=prefix + title)
            for prefix, place in ((OURS, 1), (LORA, 0))
            for title, pair in zip(titles, pairs, strict=True)
        ]

    def _count(self, what: str, row: list[Any]) -> None:
        key = f"{what} {row}"
        if key not in self._seen_rows:
            self._seen_rows.add(key)
            self.rows[what] += 1

    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Keep ASLoRA's items, set LoRA's aside, drop the others."""
        self._session = session
        ours = []
        for item in items:
            parameters = item.callspec.id if hasattr(item, "callspec") else ""
            if OURS in parameters:
                ours.append(item)
                self.by_file[item.path.name] += 1
            elif LORA in parameters:
                self.lora_items[item.nodeid] = item
            else:
                self.deselected += 1
        self.selected = len(ours)
        items[:] = ours

    def pytest_collection_finish(self) -> None:
        """What modules have made is no garbage: else each of many collections looks through it, for half a second."""
        gc.freeze()

    # ---------------------------------------------------------------- running

    @pytest.fixture(autouse=True)
    def in_place_of_lora(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """In an adopted test, let the names of LoRA's classes in its module stand for ASLoRA's."""
        if not getattr(request, "param", False):
            return
        classes = {"LoraConfig": as_aslora, "LoraLayer": ASLoRALayer}
        for name in classes.keys() & vars(request.module).keys():
            monkeypatch.setattr(request.module, name, classes[name])
        if check := getattr(request.cls, "check_requires_grad", None):
            monkeypatch.setattr(
                request.cls,
                "check_requires_grad",
                lambda test, model, *names: check(test, model, *(_our_name(model, name) for name in names)),
            )

    @pytest.fixture(autouse=True)
    def watched(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note which tests are about ASLoRA, and check that kinds of combination that it lacks are refused."""
        inject, check = ASLoRAModel.inject_adapter, ASLoRAConfig.__post_init__
        load = ASLoRAConfig.from_pretrained.__func__
        combine = ASLoRAModel.add_weighted_adapter

        def inject_adapter(tuner: ASLoRAModel, *args: Any, **kwargs: Any) -> None:
            self.about_us.add(request.node.nodeid)
            inject(tuner, *args, **kwargs)

        def post_init(config: ASLoRAConfig) -> None:
            self.about_us.add(request.node.nodeid)
            check(config)

        def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            self.about_us.add(request.node.nodeid)
            return load(cls, *args, **kwargs)

        def add_weighted_adapter(tuner: ASLoRAModel, *args: Any, **kwargs: Any) -> None:
            kind = kwargs.get("combination_type", "svd")
            if kind in COMBINATIONS:
                return combine(tuner, *args, **kwargs)
            with pytest.raises(ValueError, match="combination_type"):
                combine(tuner, *args, **kwargs)
            self.refused[kind] += 1
            if "uneven" in args[2]:
                raise ValueError("PEFT's test waits for this")
            return None

        monkeypatch.setattr(ASLoRAModel, "inject_adapter", inject_adapter)
        monkeypatch.setattr(ASLoRAConfig, "__post_init__", post_init)
        monkeypatch.setattr(ASLoRAConfig, "from_pretrained", classmethod(from_pretrained))
        monkeypatch.setattr(ASLoRAModel, "add_weighted_adapter", add_weighted_adapter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcome, and let LoRA run what ASLoRA has skipped."""
        if report.when != "call" and report.passed:
            return
        if self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome
        if report.skipped:
            self.reasons[report.nodeid] = report.longrepr[2] if isinstance(report.longrepr, tuple) else "xfail"
            if OURS in report.nodeid and (twin := self.lora_items.get(counterpart(report.nodeid))):
                assert self._session is not None
                self._session.items.append(twin)


def counterpart(nodeid: str) -> str:
    """The LoRA item that belongs to an ASLoRA item."""
    return nodeid.replace(OURS, LORA)


def _deep(dtype: Any) -> Deep:
    torch.manual_seed(0)
    return Deep().to(dtype or torch.float32)


def _our_name(model: Any, name: str) -> str:
    """The parameter of ASLoRA that stands for a parameter of LoRA."""
    match = re.fullmatch(r"base_model\.model\.(?P<path>.+)\.lora_(?P<kind>[AB])\.(?P<adapter>\w+)\.weight", name)
    if match is None:
        return name
    start = f"base_model.aslora_{match['kind']}.{match['adapter']}.{match['path'].replace('.', '~')}="  # a group's key
    (ours,) = [n for n, _ in model.named_parameters() if n.startswith(start)]
    return ours
