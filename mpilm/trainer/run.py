"""The record of a training run, and the state that its checkpoints hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from mpilm.checkpoint.save import CheckpointState
from mpilm.comm.flight_recorder import FlightRecorder
from mpilm.config.schema import Config
from mpilm.config.settings import to_dict
from mpilm.data.batch import Batches
from mpilm.data.training_data import TrainingData
from mpilm.engine.hardware import Hardware, numerics_environment
from mpilm.engine.recheck import Recheck
from mpilm.engine.state_check import check_state
from mpilm.engine.train_model import TrainModel
from mpilm.launch.stop_request import StopRequest
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import AXES
from mpilm.telemetry.memory import MemoryMeter
from mpilm.trainer.recovery.bad_steps import BadStepTracker
from mpilm.trainer.run_folder import RunFolder


@dataclass(frozen=True)
class Run:
    """The parts of a training run on one rank."""

    config: Config
    hardware: Hardware
    mesh: Mesh
    data: TrainingData
    batches: Batches
    folder: RunFolder
    content: Mapping[str, str]  # digests of what the run has read, by setting
    model: TrainModel
    stop_request: StopRequest
    bad_steps: BadStepTracker
    memory: MemoryMeter
    recheck: Recheck
    layout_note: str = ""  # how the layout was chosen

    @property
    def recorder(self) -> FlightRecorder:
        return self.mesh.recorder

    @property
    def remaining_steps(self) -> range:
        """The steps still to do, counted from 0."""
        return range(self.folder.step, self.config.train.steps)

    @property
    def peak_bytes(self) -> int:
        """The most memory that this rank has used."""
        return self.memory.peak_bytes(self.model.shared_bytes)


def collect_state(run: Run, step: int, eval_loss: float | None) -> CheckpointState:
    """Return what a checkpoint holds after `step` steps. Tensors are the model's own, not copies."""
    config, model, data = run.config, run.model, run.data
    trainer = {
        "step": step,
        "tokens": step * run.batches.step_tokens,
        "seed": config.train.seed,
        "eval_loss": eval_loss,
        "checked": True,  # by `check`, without which nothing is saved
        "rechecked": run.recheck.last_good if run.recheck.every else step,  # a suspect checkpoint has a good one before it
        **run.bad_steps.state_dict(),
        "content": dict(run.content),
        "layout": dict(zip(AXES, run.mesh.shape.sizes)),
        "conditions": numerics_environment(run.hardware, run.mesh.world, config.parallel),
        "config": to_dict(config),
    }
    tensors = model.state_shapes, model.state_slices(), model.shard_owners, model.parts, partial(check_state, model, step)
    return CheckpointState(config.model, data.tokenizer, data.template, trainer, *tensors)
