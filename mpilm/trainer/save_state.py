"""The state of a run that its checkpoints hold."""

from functools import cache

from mpilm.checkpoint.format import PARAMETER
from mpilm.checkpoint.save import CheckpointState
from mpilm.config.schema import to_dict
from mpilm.engine.hardware import numerics_environment
from mpilm.mesh.shape import AXES
from mpilm.trainer.run import Run


def collect_state(run: Run, step: int, eval_loss: float | None) -> CheckpointState:
    """Return what a checkpoint holds after `step` steps. Tensors are the model's own, not copies."""
    config, model, data = run.config, run.model, run.data
    trainer = {
        "step": step,
        "tokens": step * run.batches.step_tokens,
        "seed": config.train.seed,
        "eval_loss": eval_loss,
        **run.bad_steps.state_dict(),
        "content": dict(run.content),
        "layout": dict(zip(AXES, run.mesh.shape.sizes)),
        "conditions": numerics_environment(run.hardware, run.mesh.world, config.parallel),
        "config": to_dict(config),
    }
    return CheckpointState(
        model=config.model,
        tokenizer=data.tokenizer,
        template=data.template,
        trainer=trainer,
        shapes={PARAMETER: model.shapes, **model.moment_shapes},
        slices={PARAMETER: model.owned_slices(), **model.optimizer.state_slices()},
        shard_owners=cache(model.shard_owners),
    )
