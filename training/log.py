"""log.jsonl: what a run says, one JSON object a line, the same for people on stdout, and a picture
of it.

    {"config": …, "versions": …, "commit": …, "hardware": …, "world_size": …, "resumed_at": 0}     each start
    {"step": 20, "loss": …, "nce": …, "grad_norm": …, "skipped": 0, "step_s": …, "data_s": …}      each --log-every
    {"step": 230, "validation": {"t2v_R@1": …}}                                                    each --eval-every

A run that was killed wrote lines of steps after its newest checkpoint. It will take these steps
again, so a resumed run first cuts them off (and the half line that a kill may leave): each step is
in the log once, as if nothing had happened, and only the lines of the starts tell. Lines are
flushed as they come, and are on the disk before a checkpoint is. Durations are of the monotonic
clock: setting the clock back does no harm.

    python runlog.py runs/toy/log.jsonl curves.png        # draw the curves of a log
"""

import json
import math
import os
import sys
from pathlib import Path

from cli import UserError, run

WAYS = ("t2v", "v2t")
LOSSES = ("loss", "nce", "hard", "skp")


class Log:
    """The log of a run that goes on from `step`; what is there of later steps is cut off."""

    def __init__(self, path: Path, step: int):
        self.path = path
        try:
            if path.exists():
                kept = [line for line in read_log(path) if line.get("step", 0) <= step]
                unfinished = path.with_name(f".{path.name}.tmp")
                unfinished.write_text(
                    "".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8"
                )
                os.replace(unfinished, path)
            self.file = open(path, "a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); choose another --out"
            ) from error

    def write(self, entry: dict):
        """Append one line. JSON knows no NaN: what is not finite is written as null."""
        entry = {
            name: None if isinstance(x, float) and not math.isfinite(x) else x
            for name, x in entry.items()
        }
        try:
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); free the disk and run the same "
                "command again: it goes on from the newest checkpoint"
            ) from error

    def flush_to_disk(self):
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
        """Log them; returns the mean of R@1, R@5 and R@10 both ways, by which the best checkpoint
        is chosen.
        """
        self.write(dict(step=step, validation=metrics))
        print(
            f"step {step}  validation: "
            + "  ".join(f"{name} {value:.1f}" for name, value in metrics.items()),
            flush=True,
        )
        return sum(metrics[f"{way}_R@{k}"] for way in WAYS for k in (1, 5, 10)) / 6


def read_log(path: str | Path) -> list[dict]:
    """The lines of a log; one that is not whole JSON (the last, of a run that was killed) is left
    out.
    """
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step", 0), int):
            lines.append(line)
    return lines


def plot_curves(log_path: Path, picture: Path):
    """Loss parts, logit scale, speed and validation recall over steps -> a PNG."""
    # here, not above: it takes a second to import, and only the end of a run draws
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(log_path)
    steps, checks = [x for x in lines if "loss" in x], [x for x in lines if "validation" in x]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")

    def draw(axis, title, entries, names, value):
        for name in names:
            points = [
                (x["step"], value(x)[name]) for x in entries if value(x).get(name) is not None
            ]
            if points:
                axis.plot(*zip(*points), label=name, linewidth=1.2)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)

    draw(axes[0, 0], "loss and its parts", steps, ("loss", "nce", "hard", "skp"), lambda x: x)
    draw(
        axes[0, 1],
        "validation recall, %",
        checks,
        ("t2v_R@1", "t2v_R@5", "v2t_R@1"),
        lambda x: x["validation"],
    )
    draw(
        axes[1, 0],
        "logit scale and gradient norm",
        steps,
        ("logit_scale", "grad_norm"),
        lambda x: x,
    )
    draw(
        axes[1, 1],
        "seconds a step, and of them waiting for data",
        steps,
        ("step_s", "data_s"),
        lambda x: x,
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    try:
        figure.savefig(picture, dpi=110)
    except OSError as error:
        raise UserError(
            f"{picture}: cannot be written ({error.strerror}); free the disk"
        ) from error
    plt.close(figure)


def main():
    if len(sys.argv) != 3:
        raise UserError("runlog.py: takes a log.jsonl and the name of a picture, in this order")
    plot_curves(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run(main)
