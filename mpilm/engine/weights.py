"""Initial weights from a Hugging Face folder, and the state of a checkpoint."""

from pathlib import Path

from mpilm.checkpoint.format import PARAMETER
from mpilm.checkpoint.load import load_checkpoint, load_hf_weights
from mpilm.checkpoint.pretrained import find_base_model, has_adapter
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.engine.pipelined import PipelinedModel
from mpilm.engine.train_model import TrainModel
from mpilm.parallel.reduce.diloco import OUTER_MOMENTUM


def load_initial_weights(model: PipelinedModel, world: Comm) -> None:
    """Load the weights in the folder that model.init-from names; draw an adapter that it does not hold. Collective."""
    shape = model.config.model
    folder = Path(shape.init_from).expanduser()
    base = run_on_all_ranks(world, lambda: find_base_model(folder, shape.base))
    if not shape.lora_rank:
        load_hf_weights(base, model.owned_slices(), model.shapes, shape, world)
        return model.all_gather_parameters()
    load_hf_weights(base, model.frozen_slices(), model.frozen_shapes, shape, world)
    model.sync_frozen_parameters()
    if has_adapter(folder):
        load_hf_weights(folder, model.owned_slices(), model.shapes, shape, world, adapter=True)
        return model.all_gather_parameters()
    return model.init_trained_parameters()


def load_checkpoint_state(model: TrainModel, checkpoint: Path, updates: int, world: Comm) -> None:
    """Load weights and moments of a verified checkpoint, taken after so many updates. Collective."""
    slices = {PARAMETER: model.owned_slices(), **model.optimizer.state_slices()}
    shapes = {PARAMETER: model.shapes, **model.moment_shapes}
    load_checkpoint(checkpoint, slices, shapes, model.config.model, world, (OUTER_MOMENTUM,))
    model.optimizer.set_step(updates)
    model.reset_residuals()
    model.all_gather_parameters()
