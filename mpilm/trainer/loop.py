"""The training loop."""

from __future__ import annotations

from pathlib import Path

from mpilm.checkpoint.save import State, prune, save
from mpilm.comm.base import Comm
from mpilm.config import Config, to_dict
from mpilm.mesh.shape import AXES
from mpilm.trainer.build import Training, build
from mpilm.trainer.held_out import evaluate
from mpilm.trainer.log import RunLog
from mpilm.trainer.machine import conditions
from mpilm.trainer.step import train_step


def train(config: Config, world: Comm) -> None:
    """Train, evaluate, save and show, to the last step. Collective."""
    run = build(config, world)
    log = RunLog(run)
    settings, steps = config.run, config.train.steps
    for step in range(run.folder.step, steps):
        result = train_step(run.model, run.batches, step)
        run.mesh.trust()  # the first step has shown that all make the same calls
        done = step + 1
        log.step(done, result)
        saving = due(done, config.checkpoint.every) or done == steps
        loss = None
        if run.batches.eval_samples and (due(done, settings.eval_every) or (settings.eval_every and saving)):
            loss = evaluate(run)
            log.evaluation(done, loss)
        if saving:
            log.saved(save_checkpoint(run, done, loss))
    log.finish()


def due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def save_checkpoint(run: Training, done: int, eval_loss: float | None) -> Path:
    """Save the state after `done` steps and remove checkpoints no longer wanted. Collective."""
    config = run.config
    trainer = {
        "step": done,
        "tokens": done * run.batches.step_tokens,
        "seed": config.train.seed,
        "eval_loss": eval_loss,
        "content": dict(run.content),
        "layout": dict(zip(AXES, run.mesh.shape.sizes)),
        "conditions": conditions(run.machine, run.mesh.world),
        "config": to_dict(config),
    }
    model = run.model
    material = run.material
    state = State(
        config.model, material.tokenizer, material.template, trainer, model.shapes, model.moment_shapes, model.pieces(),
        model.optimizer.pieces(), model.holders,
    )  # fmt: skip
    folder = save(run.folder.checkpoints, done, state, run.mesh.world)
    if run.mesh.rank == 0:
        prune(run.folder.checkpoints, config.checkpoint.keep, config.checkpoint.keep_best)
    return folder
