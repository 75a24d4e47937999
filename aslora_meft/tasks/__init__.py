"""What a run teaches: one module a task, which says its model, data, trainer and metrics."""
