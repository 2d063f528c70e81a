"""open_clip's loss and the op's module train the same small model: are the losses the same?

    python -m bench.open_clip                       # 50 steps on 2 processes: seconds

Both start from the same weights and see the same batches. A model with two linear towers stands for
open_clip's own, which cannot be imported without torchvision; its loss class can, and is used as
`pip install --no-deps open_clip_torch` brings it.
"""

import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cli import UserError, parse_config, run
from kernels.distributed import KnowledgeLoss


@dataclass
class BenchConfig:
    """Steps with open_clip's loss, and with ours."""

    steps: int = 50  # optimizer steps
    procs: int = 2  # processes
    batch: int = 64  # pairs of a process


class Towers(nn.Module):
    """What open_clip's CLIP returns, from two linear maps."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(32, 16), nn.Linear(32, 16)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07)

    def forward(self, image, text):
        features = F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1)
        return *features, self.logit_scale.exp()


def load_clip_loss():
    """open_clip.loss.ClipLoss, without the rest of the package."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        raise UserError("open_clip: not installed; pip install --no-deps open_clip_torch")
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss


def train(loss_module, config: BenchConfig, rank: int) -> list[float]:
    """The loss of the whole batch at each step."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Towers())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(config.steps):
        generator = torch.Generator().manual_seed(step * config.procs + rank)
        image = torch.randn(config.batch, 32, generator=generator)
        text = image.roll(1, dims=1) + torch.randn(config.batch, 32, generator=generator)

        loss = loss_module(*model(image, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / config.procs)
    return losses


def work(rank: int, config: BenchConfig, folder: str) -> None:
    """What one process does: both trainings."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", config.procs)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=config.procs)
    sizes = dict(rank=rank, world_size=config.procs)
    theirs = load_clip_loss()(local_loss=True, gather_with_grad=True, **sizes)
    losses = dict(theirs=train(theirs, config, rank), ours=train(KnowledgeLoss(), config, rank))
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def compare(config: BenchConfig) -> dict[str, list[float]]:
    """{"theirs", "ours": the loss of each step}."""
    load_clip_loss()  # fail before the processes start
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (config, folder), nprocs=config.procs)
        return json.loads(Path(folder, "losses.json").read_text())


def main():
    config = parse_config(BenchConfig)
    losses = compare(config)
    print(f"torch {torch.__version__}, {config.procs} processes of {config.batch} pairs")
    print("| step | open_clip's loss | the op's |\n|---|---|---|")
    for step in sorted({0, config.steps // 2, config.steps - 1}):
        print(f"| {step + 1} | {losses['theirs'][step]:.6f} | {losses['ours'][step]:.6f} |")
    worst = max(abs(a - b) for a, b in zip(losses["theirs"], losses["ours"]))
    print(f"\nlargest difference of the {config.steps} steps: {worst:.1e}")


if __name__ == "__main__":
    run(main)
