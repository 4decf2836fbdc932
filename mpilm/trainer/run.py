"""The record of a training run."""

from collections.abc import Mapping
from dataclasses import dataclass

from mpilm.comm.progress import Progress
from mpilm.config.schema import Config
from mpilm.data.batch import Batches
from mpilm.data.training_data import TrainingData
from mpilm.engine.hardware import Hardware
from mpilm.engine.train_model import TrainModel
from mpilm.launch.stop_request import StopRequest
from mpilm.mesh.mesh import Mesh
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
    layout_note: str = ""  # how the layout was chosen

    @property
    def progress(self) -> Progress:
        return self.mesh.progress

    @property
    def remaining_steps(self) -> range:
        """The steps still to do, counted from 0."""
        return range(self.folder.step, self.config.train.steps)
