"""log.jsonl: what a run says, one JSON object a line; the same for people on stdout; its curves.

    {"config": …, "versions": …, "hardware": …, "world_size": …, "resumed_at": 0}    each start
    {"step": 20, "loss": …, "nce": …, "grad_norm": …, "skipped": 0, "step_s": …}     --log-every
    {"step": 240, "validation": {"t2v_R@1": …}, "note": "5 of 7 videos: …"}          --eval-every

A run that was killed has lines of steps after its newest checkpoint. It will take these steps
again. So a resumed run first cuts these lines off, and the half line that a kill may leave. Each
step is in the log once, as if nothing had happened; only the lines of the starts tell. Lines are
on the disk before the checkpoint of their step is. Durations come from the monotonic clock, so
setting the clock back does no harm. Nothing is computed from a log, so it has no checksum.

    python -m training.log runs/toy/log.jsonl curves.png        # draw the curves of a log
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from cli import UserError, parse_config, run, write_whole

LOSSES = ("loss", "nce", "hard", "skp")
SCORES = ("t2v_R@1", "t2v_R@5", "t2v_R@10", "v2t_R@1", "v2t_R@5", "v2t_R@10")
PANELS = {  # of curves.png
    "loss and its parts": LOSSES,
    "validation recall, %": ("t2v_R@1", "t2v_R@5", "v2t_R@1"),
    "logit scale and gradient norm": ("logit_scale", "grad_norm"),
    "seconds per step, and of them waiting for data": ("step_s", "data_s"),
}


class Log:
    """The log of a run that goes on from `step`; what is there of later steps is cut off."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists():
            kept = [line for line in read_log(path) if line.get("step", 0) <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            with write_whole(path) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")

    def write(self, entry: dict) -> None:
        """Append one line. JSON knows no NaN: what is not finite is written as null."""
        finite = {}
        for name, value in entry.items():
            is_lost = isinstance(value, float) and not math.isfinite(value)
            finite[name] = None if is_lost else value
        try:
            self.file.write(json.dumps(finite) + "\n")
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

    def validation(self, step: int, metrics: dict, note: str = "") -> float:
        """Log metrics; their score, the mean of SCORES, chooses the best checkpoint.

        note: why they would not be comparable.
        """
        self.write(dict(step=step, validation=metrics, note=note))
        listed = "  ".join(f"{name} {value:.1f}" for name, value in metrics.items())
        print(f"step {step}  validation: {listed}{note and f'  ({note})'}", flush=True)
        return sum(metrics[name] for name in SCORES) / len(SCORES)


def read_log(path: str | Path) -> list[dict]:
    """The lines of a log. The last line of a killed run may be half a line: it is left out.

    Raises UserError where the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a log.jsonl") from error

    lines = []
    for row in text.splitlines():
        try:
            line = json.loads(row)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step", 0), int):
            lines.append(line)
    return lines


def plot_curves(log: str | Path, picture: str | Path) -> None:
    """Draw losses, recall, scale and speed over the steps of a log, as a PNG."""
    # here, not above: it takes a second to import, and only the end of a run draws
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line | line.get("validation", {}) for line in read_log(log) if "step" in line]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for axis, (title, names) in zip(axes.flat, PANELS.items()):
        for name in names:
            points = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name, linewidth=1.2)

        axis.set(title=title, xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)

    notes = {line["note"] for line in lines if line.get("note")}
    if notes:
        figure.suptitle(f"validation: {'; '.join(notes)}", fontsize=8)
    with write_whole(picture) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)
    plt.close(figure)


@dataclass
class CurvesConfig:
    """Draw the curves of a run."""

    log: Positional[str]  # a run's log.jsonl
    picture: Positional[str]  # a PNG file to write


def main() -> None:
    config = parse_config(CurvesConfig)
    plot_curves(config.log, config.picture)


if __name__ == "__main__":
    run(main)
