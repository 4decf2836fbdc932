"""Evaluation on the held-out end of the corpus: the same number whatever the layout."""

from __future__ import annotations

from mpilm.trainer.build import Training
from mpilm.trainer.step import total_loss


def evaluate(run: Training) -> float:
    """Mean loss a token, in nats, over `run.eval-batches` global batches. Collective over the mesh."""
    batches, limit = run.batches, run.config.run.eval_batches
    total = batches.eval_microbatches(limit)
    run.model.forward(total, lambda m: batches.evaluation(m).to(run.machine.device))
    return total_loss(run.model.results(), total, run.mesh.world) / max(1, batches.eval_targets(limit))
