"""How the quality benchmarks train and which runs they report, the same for every method.

A method's learning rate is the one with the smallest mean loss on validation data over the tuning seeds. The rates
tried are a factor of 2 apart, and more are tried until the best lies inside. With this rate the method is then trained
once for each reported seed, none of which is a tuning seed. Gradients are clipped; the rate rises, then falls linearly.
A run whose last training loss, the mean over a tenth of its steps, exceeds its first has diverged: its rate is given
up, the run stays in the file and is counted, and the method gets the best of the other rates. Where there are no tuning
seeds, a method has one rate, chosen elsewhere and fixed: a run that diverges is counted, and none takes its place.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from transformers import get_linear_schedule_with_warmup

CLIP = 1.0  # norm of the gradient
WARMUP = 0.1  # of the steps
FACTOR = 2.0  # from one rate to the next
MOST_RATES = 12
TUNING, REPORTED, DIVERGED = "valid", "test", "diverged"  # "split" of a row; only the second is compared


@dataclass(frozen=True)
class Protocol:
    """The rates tried first, ascending by a factor of 2, and the seeds; without tuning seeds, one fixed rate."""

    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if set(self.tuning_seeds) & set(self.seeds):
            raise ValueError(f"seeds={self.seeds} are reported and also choose rates: let none be in tuning_seeds.")
        if any(above != FACTOR * rate for rate, above in zip(self.rates, self.rates[1:], strict=False)):
            raise ValueError(f"rates={self.rates} must ascend by a factor of {FACTOR:g}.")
        if not self.tuning_seeds and len(self.rates) > 1:
            raise ValueError(f"rates={self.rates}: without tuning_seeds give one rate, or give tuning_seeds.")


def warmup_steps(steps: int) -> int:
    """Steps in which the learning rate rises."""
    return math.ceil(WARMUP * steps)


def adamw(groups: Sequence[dict]) -> torch.optim.Optimizer:
    """AdamW without weight decay."""
    return torch.optim.AdamW(groups, weight_decay=0.0)


def train(
    groups: Sequence[dict],
    losses: Iterable[torch.Tensor],
    steps: int,
    made: Callable[[Sequence[dict]], torch.optim.Optimizer] = adamw,
) -> list[float]:
    """Take a step for each of `losses`, which are computed one by one as they are asked for.

    Args:
        groups: parameter groups, each with its highest rate as `lr`.
        steps: as many as there are losses.
        made: makes the optimizer.

    Returns:
        The losses as numbers; the last may be nan or inf, which ends the training.
    """
    optimizer = made(groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    schedule = get_linear_schedule_with_warmup(optimizer, warmup_steps(steps), steps)
    values = []
    for loss in losses:
        values.append(loss.item())
        if not math.isfinite(values[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return values


def ends(losses: Sequence[float]) -> dict[str, float | None]:
    """What a row keeps of the training losses: the first, and the mean over the last tenth, as one batch says little.

    None stands for inf and nan, which JSON does not have.
    """
    last = losses[-math.ceil(len(losses) / 10) :]
    numbers = {"first_train_loss": losses[0], "last_train_loss": mean(last)}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def diverged(row: dict) -> bool:
    """Whether a run ended with a higher training loss than it began with, or with none."""
    first, last = row["first_train_loss"], row["last_train_loss"]
    return first is None or last is None or row["loss"] is None or last > first


def choose_rate(loss: Callable[[float], float], rates: Sequence[float]) -> float:
    """The rate with the smallest loss, once a lower and a higher one were tried too. Of equal ones the lowest.

    Args:
        loss: called once for each rate; inf for one that must not be taken.

    Raises:
        RuntimeError: none was found.
    """
    tried = {rate: loss(rate) for rate in rates}
    while len(tried) < MOST_RATES:
        best = min(sorted(tried), key=tried.__getitem__)
        if best == min(tried):  # also where none may be taken: too high is the likely reason
            following = best / FACTOR
        elif best == max(tried):
            following = best * FACTOR
        else:
            return best
        tried[following] = loss(following)
    raise RuntimeError(f"No learning rate from {min(tried):g} to {max(tried):g} is better than those beside it.")


def tuning_loss(rows: Iterable[dict]) -> float:
    """Mean validation loss of a rate's runs; inf if one of them diverged."""
    rows = list(rows)
    return math.inf if any(map(diverged, rows)) else mean(row["loss"] for row in rows)


def run_method(
    once: Callable[[float, int, str], dict], protocol: Protocol, ended: Callable[[float], bool]
) -> Iterator[dict]:
    """All runs of a method on a task: those that choose the rate, if it is not fixed, then the reported ones, which are
    yielded.

    Args:
        once: (rate, seed, "valid" or "test") -> the row of this run, found in the file or new. It keeps a diverged run
            that was to be reported as split "diverged".
        ended: whether there is such a run of a rate, of now or of an earlier call.

    Raises:
        RuntimeError: there is no rate that the protocol could choose.
    """
    if not protocol.tuning_seeds:
        (fixed,) = protocol.rates
        yield from (once(fixed, seed, REPORTED) for seed in protocol.seeds)
        return

    def loss(rate: float) -> float:
        if ended(rate):
            return math.inf
        return tuning_loss(once(rate, seed, TUNING) for seed in protocol.tuning_seeds)

    while True:
        rate = choose_rate(loss, protocol.rates)
        reported = []
        for seed in protocol.seeds:
            reported.append(once(rate, seed, REPORTED))
            if diverged(reported[-1]):
                break
        else:
            yield from reported
            return
