"""What surrounds a training run: checkpoints, interruption, progress, its record, what is written at its end.

Public: `RunRecord`, which any Trainer takes.
"""

from .run_record import RunRecord

__all__ = ["RunRecord"]
