"""Evaluation on the held-out end of the corpus: the same number whatever the number of ranks."""

from __future__ import annotations

from torch import Tensor

from mpilm.parallel.pipeline.stage import no_grad_loss
from mpilm.parallel.tree import block
from mpilm.trainer.build import Training
from mpilm.trainer.step import total_loss


def evaluate(run: Training) -> float:
    """Mean loss a token, in nats, over `run.eval-batches` global batches. Collective over the data axis."""
    data = run.mesh.comm("data")
    total = run.batches.eval_microbatches(run.config.run.eval_batches)
    losses: dict[int, Tensor] = {}
    tokens = 0
    for i in range(*block(data.rank, data.size, total)):
        batch = run.batches.evaluation(i).to(run.machine.device)
        losses[i] = no_grad_loss(run.model, batch, run.autocast)
        tokens += batch.targets.numel()
    counted = total_loss({data.rank: float(tokens)}, data.size, data)
    return total_loss(losses, total, data) / counted
