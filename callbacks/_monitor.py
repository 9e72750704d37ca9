"""A monitored metric must be one that a benchmark of the run can log."""

from __future__ import annotations

from lightning.pytorch import Trainer


def refuse_unknown(owner: str, monitor: str, trainer: Trainer) -> None:
    """Refuse, before anything is trained, a monitor whose benchmark does not exist.

    Args:
        owner: the callback, to begin the error with. monitor: `val/<benchmark>/<metric>`.
        trainer: its data module says what is evaluated; one that does not say is believed.

    Raises:
        ValueError: names the benchmarks there are.
    """
    evaluations = getattr(trainer.datamodule, "evaluations", None)
    if evaluations is None or any(monitor.startswith(f"val/{name}/") for name in evaluations):
        return
    raise ValueError(
        f"{owner}: nothing will log monitor {monitor!r}; it must be val/<benchmark>/<metric> of one of these "
        f"benchmarks: {', '.join(evaluations) or 'none is configured'}"
    )
