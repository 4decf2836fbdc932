"""Settings of the commands that recompute steps of a run: audit and replay."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mpilm.config.schema import NonNegativeInt, PositiveInt, Threads
from mpilm.errors import ConfigError


@dataclass(frozen=True)
class ReplayData:
    """Data."""

    path: tuple[str, ...] = ()  # Where the text of the run is now, as --data.path of mpilm.train; empty: where it was.


@dataclass(frozen=True)
class ReplayParallel:
    """Parallel layout, of any number of ranks; it need not be that of the run."""

    pipeline: PositiveInt = 1  # Pipeline stages; must divide the ranks. The remaining ranks are data parallel.
    tensor: PositiveInt = 1  # Tensor-parallel ranks; must divide the tensor parts of the run.
    context: PositiveInt = 1  # Context-parallel ranks; must divide the sequence parts of the run.
    expert: PositiveInt = 1  # Expert-parallel ranks; must divide the data-parallel ranks.
    zero: Literal[0, 1, 2, 3] = 0  # ZeRO stage.


@dataclass(frozen=True)
class ReplayCompute:
    """Devices."""

    device: str = "auto"  # Type of device: cpu, cuda (NVIDIA, AMD) or xpu (Intel); auto: a GPU if torch finds one.
    threads: Threads = 0  # CPU threads per rank; 0: as many as the run had, because the last bits depend on it.
    # Keep moments, or also weights and gradients, in files on a local disk: a run of many hosts then fits on one.
    offload: Literal["none", "optimizer", "parameters"] = "none"
    offload_dir: str = ""  # Folder of those files; empty: the folder for temporary files.


@dataclass(frozen=True)
class ReplaySettings:
    """Settings of both commands."""

    runs: Annotated[tuple[str, ...], Positional, arg(metavar="RUN")] = ()  # Run folders.
    allow_version: bool = False  # Recompute although versions, threads or device are not those of the run; bits may differ.
    data: ReplayData = field(default_factory=ReplayData)
    parallel: ReplayParallel = field(default_factory=ReplayParallel)
    train: ReplayCompute = field(default_factory=ReplayCompute)


@dataclass(frozen=True)
class AuditArguments(ReplaySettings):
    """Settings of the audit command."""

    steps: str = ""  # First and last step to recompute, as in 1200:1210; empty: only check what is stored.

    def step_range(self) -> tuple[int, int] | None:
        """Return first and last step, counted from 1; raises ConfigError."""
        if not self.steps:
            return None
        try:
            first, last = (int(number) for number in self.steps.split(":"))
        except ValueError:
            first, last = 0, 0
        if not 1 <= first <= last:
            raise ConfigError(f"--steps {self.steps} is not a first and a last step, counted from 1, as in 1200:1210")
        return first, last


@dataclass(frozen=True)
class ReplayArguments(ReplaySettings):
    """Settings of the replay command."""

    step: NonNegativeInt = 0  # Step to recompute, counted from 1 as in metrics.jsonl.
    # Tensors to show: names of modules (their outputs) or of parameters, with .grad, .update or .value; * and ? match any text.
    watch: tuple[str, ...] = ()
    microbatch: int = -1  # Show gradients of this microbatch alone; -1: of the whole step, and activations of the first.
    compare: str = ""  # Another run folder, whose same step is recomputed and shown beside.
    save: str = ""  # Safetensors file for the tensors that are shown; empty: none.
    text: bool = False  # Show the text of the samples too, with file and position.
