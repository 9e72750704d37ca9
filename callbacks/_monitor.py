"""A monitored metric must be one that a benchmark of the run logs."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_vlm.data.sources.spec import one_of


def refuse_unknown(owner: str, monitor: str, trainer: Trainer) -> None:
    """Refuse, before anything is trained, a monitor that nothing will log.

    Args:
        owner: the callback, to begin the error with. monitor: `val/<benchmark>/<metric>`.
        trainer: its data module knows what is evaluated.

    Raises:
        ValueError: names the nearest metric, or the benchmarks there are.
    """
    evaluations = getattr(trainer.datamodule, "evaluations", {})
    for name, evaluation in evaluations.items():
        if not monitor.startswith(f"val/{name}/"):
            continue
        logged = sorted(f"val/{name}/{metric}" for metric in evaluation.metric_names)
        if monitor not in logged:
            raise ValueError(f"{owner}: nothing will log monitor {monitor!r}{one_of(monitor, logged)}")
        return
    raise ValueError(
        f"{owner}: nothing will log monitor {monitor!r}; it must be val/<benchmark>/<metric> of one of these "
        f"benchmarks: {', '.join(evaluations) or 'none is configured'}"
    )
