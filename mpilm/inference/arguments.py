"""Settings of the commands that use a trained model: generate and evaluate."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mpilm.config.schema import (
    Config,
    DataConfig,
    DeviceTransport,
    GenerateConfig,
    NonNegativeInt,
    PositiveInt,
    Threads,
    TrainConfig,
)
from mpilm.config.settings import override


@dataclass(frozen=True)
class ModelFolder:
    """Trained model."""

    init_from: str = ""  # Checkpoint, or Hugging Face folder with config.json, *.safetensors and tokenizer.json.
    base: str = ""  # Base model of the LoRA adapter in init-from; empty: the folder that the adapter names.


@dataclass(frozen=True)
class InferenceParallel:
    """Parallel layout; the texts are divided among the replicas of the model."""

    pipeline: PositiveInt = 1  # Ranks that share the layers of one model too large for one rank; must divide the ranks.
    # Ranks that share the matrices of each layer of one model; must divide the ranks. If it divides the tensor parts that the
    # model was trained in, the last bits are those of training.
    tensor: PositiveInt = 1
    expert: PositiveInt = 1  # Ranks that share the experts of each block of one model; must divide the remaining ranks.


@dataclass(frozen=True)
class EvaluateParallel(InferenceParallel):
    """Parallel layout; the windows are divided among the replicas of the model."""

    context: PositiveInt = 1  # Ranks that share the tokens of each window; must divide the ranks.


@dataclass(frozen=True)
class InferenceCompute:
    """Precision and devices."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # Compute precision; weights stay float32.
    device: str = "auto"  # Type of device: cpu, cuda (NVIDIA, AMD) or xpu (Intel); auto: a GPU if torch finds one.
    # How GPU tensors travel between ranks: mpi through pinned memory, gpu-aware-mpi from the GPU by an MPI that can, torch by
    # torch.distributed (NCCL, RCCL or XCCL; on CPUs gloo). auto: the fastest at the start; on CPUs mpi.
    device_transport: DeviceTransport = "mpi"
    threads: Threads = 0  # CPU threads per rank; 0: the cores that the rank may use, divided among the ranks of its node.


@dataclass(frozen=True)
class GenerateArguments:
    """Settings of the generate command."""

    model: ModelFolder = field(default_factory=ModelFolder)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    parallel: InferenceParallel = field(default_factory=InferenceParallel)
    train: InferenceCompute = field(default_factory=InferenceCompute)


@dataclass(frozen=True)
class EvaluateModel(ModelFolder):
    """Trained model."""

    context_length: NonNegativeInt = 0  # Tokens per window; 0: the context length of the model.


@dataclass(frozen=True)
class EvaluateCompute(InferenceCompute):
    """Precision and devices."""

    micro_batch: PositiveInt = 4  # Windows per forward pass; larger may be faster and changes the last digits.


@dataclass(frozen=True)
class EvaluateOutput:
    """Results."""

    dir: str = "auto"  # Folder of evaluation.json; auto: the run folder of the checkpoint, or runs/evaluation-NAME.


@dataclass(frozen=True)
class EvaluateArguments:
    """Settings of the evaluate command."""

    model: EvaluateModel = field(default_factory=EvaluateModel)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: EvaluateParallel = field(default_factory=EvaluateParallel)
    train: EvaluateCompute = field(default_factory=EvaluateCompute)
    run: EvaluateOutput = field(default_factory=EvaluateOutput)
    documents: bool = False  # Score each document separately and write the scores to documents.jsonl.
    held_out: bool = False  # Score all data that the run of the checkpoint held out for evaluation.


def to_config(model: ModelFolder, parallel: InferenceParallel, compute: InferenceCompute, **sections: Any) -> Config:
    """Return the config of a run that only uses a model; `sections` are further sections by name."""
    train: dict[str, Any] = {"micro_batch": 1} | vars(compute)
    config = Config(train=TrainConfig(**train, global_batch=train["micro_batch"]), **sections)
    layout = {f"parallel.{axis}": size for axis, size in vars(parallel).items()}
    return override(config, {"model.init_from": model.init_from, "model.base": model.base, **layout})
