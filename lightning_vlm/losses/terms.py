"""Named loss terms and the one denominator.

A loss never averages. It returns terms `{name: Term(sum, weight)}`, and says beforehand, from masks alone, how many
units each term has (`{name: count}`). The step divides each term once by its count over the whole optimizer step, all
micro-batches and all ranks, so that the same samples give the same gradient however they are cut up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of the objective: `weight * sum / count`, where `count` is taken over the optimizer step.

    Attributes:
        sum: scalar tensor with grad, summed (never averaged) over the micro-batch; nats unless the loss says otherwise.
        weight: factor of this term in the objective; a plain number.
    """

    sum: torch.Tensor
    weight: float = 1.0


def objective(terms: Mapping[str, Term], counts: Mapping[str, float]) -> torch.Tensor:
    """Σ weight · sum / count over the terms; a term whose count is 0 contributes 0 but keeps its graph.

    Args:
        terms: the micro-batch's terms.
        counts: units of each term over the whole optimizer step (all micro-batches, all ranks).

    Returns:
        Scalar tensor to run backward on.

    Raises:
        KeyError: a term without a count.
    """
    total = None
    for name, term in terms.items():
        if name not in counts:
            raise KeyError(f"loss term {name!r} has no count; counted terms: {sorted(counts)}")
        count = counts[name]
        part = term.sum * (term.weight / count if count else 0.0)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("a loss must return at least one term")
    return total
