"""Parameters and gradients as views of flat buffers, so that sums, exchanges and checkpoints touch few long vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mpilm.parallel.layout import Layout

ALIGNMENT = 16  # elements; 64 bytes: a kernel may take another path, with other roundings, on unaligned memory


class FlatLayout:
    """Where each tensor lies in a flat buffer: {name: (offset, shape)}, every offset a multiple of ALIGNMENT."""

    def __init__(self, layouts: Iterable[Layout]):
        self.slots: dict[str, tuple[int, Layout]] = {}
        self.numel = 0
        for layout in layouts:
            self.slots[layout.name] = (self.numel, layout)
            self.numel += -(-layout.numel // ALIGNMENT) * ALIGNMENT

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors as views of `flat`."""
        return {name: flat[at : at + lay.numel].view(lay.shape) for name, (at, lay) in self.slots.items()}


class FlatParameters:
    """The parameters of a model in one flat float32 buffer.

    They lie in the reverse of the order in which forward uses them, which is the order in which backward is done with
    their gradients. Tied parameters come first: they have a gradient but no memory of their own.
    """

    def __init__(self, layouts: Mapping[str, Layout], device: torch.device):
        backward_order = list(layouts.values())[::-1]
        tied = [layout for layout in backward_order if layout.tied_to is not None]
        owned = [layout for layout in backward_order if layout.tied_to is None]
        self.device = device
        self.tied = {layout.name: str(layout.tied_to) for layout in tied}
        self.owned = FlatLayout(owned)
        self.gradients = FlatLayout(tied + owned)
        self.tied_numel = self.gradients.numel - self.owned.numel
        self.values = torch.zeros(self.owned.numel, device=device)
        self.by_name = self.owned.views(self.values)

    def new_gradient(self) -> Tensor:
        """A flat gradient buffer, tied uses included."""
        return torch.zeros(self.gradients.numel, device=self.device)

    def install(self, model: nn.Module) -> None:
        """Make the parameters of `model`, built on the meta device, views of the flat buffer."""
        for name, parameter in list(model.named_parameters()):
            values = self.by_name[self.tied.get(name, name)]
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, attribute, nn.Parameter(values, requires_grad=parameter.requires_grad))

    def add_tied(self, gradient: Tensor) -> Tensor:
        """Add the summed gradient of each tied use to its owner's; returns the part that belongs to owned parameters."""
        own = gradient[self.tied_numel :]
        views, owners = self.gradients.views(gradient), self.owned.views(own)
        for name, owner in self.tied.items():
            owners[owner].add_(views[name])
        return own
