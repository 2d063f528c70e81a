"""What changes while a run goes on: its step and progress, the log, the checkpoints.

A folder holds one run. The first rank writes there; the others only count along:

    log.jsonl                log.py
    step-000240.safetensors  checkpoint.py: the newest --keep, with the optimizer's state
    best.safetensors         the best on validation, weights only
"""

import time
from dataclasses import asdict
from pathlib import Path

import torch

from cli import UserError
from training.checkpoint import Checkpoint, list_checkpoints, save_checkpoint
from training.log import Log
from training.processes import Ranks

SKIP_AT_MOST = 3  # steps in a row that may be left out for a loss or gradient of NaN or infinity


class Run:
    """The state of a run, from its first step or from a checkpoint on."""

    def __init__(self, config, ranks: Ranks, model, optimizers: list, data):
        self.config, self.ranks, self.out = config, ranks, Path(config.out)
        self.model, self.optimizers = model, optimizers
        self.data = data  # its tokenizer, vocab, trained_on and fingerprint()
        self.step, self.saved = 0, None
        self.order = None  # of the samples, in this epoch
        self.progress = dict(data=data.fingerprint(), best=None, skipped=0, skipped_in_a_row=0)
        self.steps_logged, self.seconds, self.seconds_waited = 0, 0.0, 0.0  # since the last line

    def resume(self, found: Checkpoint) -> None:
        """Go on from a checkpoint. Raises UserError if it comes of other settings or data."""
        changed = []
        for name, new in asdict(self.config).items():
            old = found.config.get(name, "unknown")  # to an older version of this code
            if name not in self.config.FREE and new != old:
                changed.append(f"--{name.replace('_', '-')} {old} → {new}")

        if changed:
            raise UserError(
                f"{self.out}: holds a run with other settings ({', '.join(changed)}); "
                "choose another --out, or delete the folder"
            )

        if found.progress["data"] != self.progress["data"]:
            raise UserError(
                f"{self.out}: holds a run on other captions or videos (has the data file changed, "
                "or are other videos broken now?); restore them, choose another --out, or delete "
                "the folder"
            )

        self.model.load_state_dict(found.model.state_dict())
        self.order = found.training.pop("order").numpy()
        restore_optimizers(self.optimizers, self.model, found.training)
        self.step, self.saved, self.progress = found.step, found.path, found.progress
        self.say(f"{self.saved}: goes on from step {self.step} of {self.config.steps}")

    def say(self, line: str) -> None:
        if self.ranks.is_first:
            print(line, flush=True)

    def open_log(self, facts: dict) -> None:
        """The log, cut off after this run's step, with a line on this start."""
        if self.ranks.is_first:
            parameters = sum(p.numel() for p in self.model.parameters())
            start = dict(world_size=self.ranks.world_size, parameters=parameters)
            self.log = Log(self.out / "log.jsonl", self.step)
            self.log.write(dict(config=asdict(self.config), **start, **facts, resumed_at=self.step))

    def next_batch(self, batches) -> dict[str, torch.Tensor]:
        """The next batch, on this rank's device. Seconds of waiting are counted."""
        self.step_began = time.perf_counter()
        batch = next(batches)
        batch = {name: x.to(self.ranks.device, non_blocking=True) for name, x in batch.items()}
        self.seconds_waited += time.perf_counter() - self.step_began
        return batch

    def count_step(self) -> None:
        self.step += 1
        self.steps_logged += 1
        self.seconds += time.perf_counter() - self.step_began

    def skip_step(self, parts: dict[str, float]) -> None:
        """Leave the weights as they are; end the run after too many such steps in a row."""
        self.progress["skipped"] += 1
        self.progress["skipped_in_a_row"] += 1
        what = (
            f"step {self.step + 1}: loss {parts['loss']} with gradient norm {parts['grad_norm']} "
            "is not finite"
        )
        if self.progress["skipped_in_a_row"] > SKIP_AT_MOST:
            self.ranks.fail(
                f"{what}, after {SKIP_AT_MOST} skipped steps; the last good checkpoint is "
                f"{self.saved or 'none, this run saved none yet'}; lower --lr or raise --warmup"
            )
        self.say(f"{what}: skipped, the weights stay as they are")

    def log_step(self, parts: dict[str, float], lr: float) -> None:
        """A line of the log: means of the ranks, seconds per step since the last line."""
        if self.ranks.is_first:
            line = dict(
                step=self.step,
                **parts,
                logit_scale=self.model.logit_scale.exp().item(),
                lr=lr,
                skipped=self.progress["skipped"],
                step_s=self.seconds / self.steps_logged,
                data_s=self.seconds_waited / self.steps_logged,
            )
            self.log.step(line, self.config)
        self.steps_logged, self.seconds, self.seconds_waited = 0, 0.0, 0.0

    def save(self, metrics: dict[str, float] | None) -> None:
        """Write a checkpoint, and best.safetensors if `metrics` are the best; all ranks wait."""
        if self.ranks.is_first:
            if metrics:
                score = self.log.validation(self.step, metrics, self.data.val_note)
                best = self.progress["best"]
                if best is None or score > best:
                    self.progress["best"] = score
                    self.write_checkpoint("best")

            self.log.flush_to_disk()
            training = optimizer_tensors(self.optimizers, self.model)
            training["order"] = torch.from_numpy(self.order)
            self.saved = self.write_checkpoint(f"step-{self.step:06d}", training)

            if not self.log.path.exists():
                raise UserError(
                    f"{self.out}: was deleted or moved while the run went on; its newest state is "
                    f"{self.saved}, from which the same command goes on with a new log"
                )

            if self.config.keep:
                for old in list_checkpoints(self.out)[: -self.config.keep]:
                    old.unlink()
        self.ranks.wait()

    def write_checkpoint(self, name: str, training: dict | None = None) -> Path:
        path = self.out / f"{name}.safetensors"
        state = dict(config=asdict(self.config), step=self.step, progress=self.progress)
        state |= dict(training=training, trained_on=self.data.trained_on)
        save_checkpoint(path, self.model, self.data.tokenizer, self.data.vocab, **state)
        return path


def optimizer_tensors(optimizers: list, model) -> dict[str, torch.Tensor]:
    """{"<moment>.<parameter>": tensor}: the state by name, so that order does not matter."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for moment, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{moment}.{name}"] = value
    return tensors


def restore_optimizers(optimizers: list, model, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse. A run whose steps were all skipped has no state yet."""
    optimizer_of = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            optimizer_of |= dict.fromkeys(group["params"], optimizer)

    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        moment, _, name = key.partition(".")
        parameter = parameters[name]
        device = "cpu" if moment == "step" else parameter.device
        optimizer_of[parameter].state[parameter][moment] = value.to(device)
