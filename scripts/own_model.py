"""An example of mpilm.data_parallel: an image classifier, in its own training loop, on any number of ranks.

python scripts/own_model.py
mpirun -n 4 python scripts/own_model.py

It learns to distinguish circles, squares and crosses in noise. It prints the same numbers on 1, 2, 3 or 8 ranks, and resumes
from FOLDER (runs/shapes).
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.comm.base import Comm
from mpilm.data_parallel import DataParallel, launch

STEPS, MICROBATCHES, IMAGES, SIDE = 160, 8, 16, 16


def draw_images(step: int, m: int) -> tuple[Tensor, Tensor]:
    """Draw the images of microbatch m of a step, (IMAGES, 1, SIDE, SIDE), and return them with their shapes, (IMAGES,)."""
    generator = torch.Generator().manual_seed(step * MICROBATCHES + m)
    shapes = torch.randint(0, 3, (IMAGES,), generator=generator)
    centre = 5 + 6 * torch.rand(IMAGES, 2, 1, 1, generator=generator)
    radius = 3 + 2 * torch.rand(IMAGES, 1, 1, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    down, right = (rows - centre[:, 0]).abs(), (columns - centre[:, 1]).abs()
    circle = down**2 + right**2 < radius**2
    square = torch.maximum(down, right) < 0.85 * radius
    cross = (torch.minimum(down, right) < 1) & (torch.maximum(down, right) < radius)
    images = torch.stack([circle, square, cross])[shapes, torch.arange(IMAGES)].float()
    return (images + 0.4 * torch.randn(images.shape, generator=generator))[:, None], shapes


def build_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(512, 3),
    )  # fmt: skip


def main(comm: Comm) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_network()
    parallel = DataParallel(model, comm, MICROBATCHES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/shapes"
    for step in range(parallel.load(folder, optimizer), STEPS):
        losses, correct = {}, {}
        for m in parallel.microbatches(step):
            images, shapes = draw_images(step, m)
            scores = model(images)
            loss = F.cross_entropy(scores, shapes) / MICROBATCHES
            loss.backward()
            losses[m], correct[m] = loss.detach(), (scores.argmax(1) == shapes).sum()
        optimizer.step()
        loss, hits = parallel.total(losses), parallel.total(correct)
        if (step + 1) % 20 == 0:
            parallel.save(folder, step + 1, optimizer)
            if comm.rank == 0:
                print(f"step {step + 1:>3}: loss {loss:.6f}, {hits / MICROBATCHES / IMAGES:.0%} right", flush=True)


if __name__ == "__main__":
    if any(argument.startswith("-") for argument in sys.argv[1:]):
        print(f"usage: own_model.py [FOLDER]\n\n{__doc__}")
        sys.exit(sys.argv[1] not in ("-h", "--help"))
    launch(main)
