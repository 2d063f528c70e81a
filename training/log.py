"""log.jsonl: what a run says, one JSON object a line, the same for people on stdout, and a picture.

    {"config": …, "versions": …, "commit": …, "hardware": …, "resumed_at": 0}     each start
    {"step": 20, "loss": …, "nce": …, "grad_norm": …, "skipped": 0, "step_s": …}  each --log-every
    {"step": 230, "validation": {"t2v_R@1": …}}                                   each --eval-every

A run that was killed wrote lines of steps after its newest checkpoint. It will take these steps
again, so a resumed run first cuts them off (and the half line that a kill may leave). Each step is
in the log once, as if nothing had happened; only the lines of the starts tell. Lines are flushed as
they come, and are on the disk before a checkpoint is. Durations are of the monotonic clock: setting
the clock back does no harm. Nothing is computed from a log, so its lines carry no checksums.

    python -m training.log runs/toy/log.jsonl curves.png        # draw the curves of a log
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from cli import UserError, parse_config, run, write_whole

WAYS = ("t2v", "v2t")
LOSSES = ("loss", "nce", "hard", "skp")


class Log:
    """The log of a run that goes on from `step`; what is there of later steps is cut off."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists():
            kept = [line for line in read_log(path) if line.get("step", 0) <= step]
            with write_whole(path) as unfinished:
                text = "".join(json.dumps(line) + "\n" for line in kept)
                unfinished.write_text(text, encoding="utf-8")
        try:
            self.file = open(path, "a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); choose another --out"
            ) from error

    def write(self, entry: dict) -> None:
        """Append one line. JSON knows no NaN: what is not finite is written as null."""
        line = {}
        for name, value in entry.items():
            is_odd = isinstance(value, float) and not math.isfinite(value)
            line[name] = None if is_odd else value
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); free the disk and run the "
                "same command again: it goes on from the newest checkpoint"
            ) from error

    def flush_to_disk(self) -> None:
        os.fsync(self.file.fileno())

    def step(self, line: dict, config) -> None:
        """Log the line of a step, and print it."""
        step, step_s = line["step"], line["step_s"]
        pairs_per_s = config.batch_size / step_s
        self.write(dict(line, pairs_per_s=pairs_per_s))

        losses = "".join(f"  {name} {line[name]:.3f}" for name in LOSSES if name in line)
        minutes = (config.steps - step) * step_s / 60
        print(
            f"step {step}/{config.steps}{losses}  scale {line['logit_scale']:.1f}  "
            f"grad {line['grad_norm']:.2f}  lr {line['lr']:.1e}  {pairs_per_s:.0f} pairs/s  "
            f"step {1000 * step_s:.0f} ms (data {1000 * line['data_s']:.0f})  "
            f"{minutes:.1f} min left",
            flush=True,
        )

    def validation(self, step: int, metrics: dict) -> float:
        """Log them. Returns the mean of R@1, R@5 and R@10 both ways: it chooses the best."""
        self.write(dict(step=step, validation=metrics))
        listed = "  ".join(f"{name} {value:.1f}" for name, value in metrics.items())
        print(f"step {step}  validation: {listed}", flush=True)
        return sum(metrics[f"{way}_R@{k}"] for way in WAYS for k in (1, 5, 10)) / 6


def read_log(path: str | Path) -> list[dict]:
    """The lines of a log, without those that are not whole JSON (the last, of a killed run)."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step", 0), int):
            lines.append(line)
    return lines


# ---- curves --------------------------------------------------------------------------------------

CURVES = {
    "loss and its parts": LOSSES,
    "validation recall, %": ("t2v_R@1", "t2v_R@5", "v2t_R@1"),
    "logit scale and gradient norm": ("logit_scale", "grad_norm"),
    "seconds a step, and of them waiting for data": ("step_s", "data_s"),
}


def plot_curves(log_path: Path, picture: Path) -> None:
    """`CURVES` over steps -> a PNG. Raises UserError where it cannot be written."""
    # here, not above: it takes a second to import, and only the end of a run draws
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line | line.get("validation", {}) for line in read_log(log_path)]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for axis, (title, names) in zip(axes.flat, CURVES.items()):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name, linewidth=1.2)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)

    with write_whole(picture) as unfinished:
        figure.savefig(unfinished, dpi=110)
    plt.close(figure)


@dataclass
class CurvesConfig:
    """Draw the curves of a log."""

    log: Positional[str]  # a run's log.jsonl
    picture: Positional[str]  # PNG file to write


def main() -> None:
    config = parse_config(CurvesConfig)
    if not Path(config.log).is_file():
        raise UserError(f"{config.log}: no such log; name a run's log.jsonl")
    plot_curves(Path(config.log), Path(config.picture))


if __name__ == "__main__":
    run(main)
