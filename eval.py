"""How good is a model? Embed a gallery, rank it, and write one JSON and one page that say it all.

Retrieval asks one question many times: among all videos, at which place does the right one stand?
With sim [n_text, n_video] (row = caption, column = video) each caption ranks its row, text to video
(t2v), and each video ranks its column (v2t):

    rank = 1 + (wrong candidates that score strictly better) + ½ (wrong candidates that tie)
    R@K  = percent of queries with rank ≤ K      MdR, MnR = median and mean rank (1 is best)

Two details make or break the number. *A tie counts half*: a model that scores everything alike gets
the middle rank, which is chance. (Counting only the strictly better ones would give it R@1 = 100.)
*Several captions per video*: each caption is a t2v query of its own. In v2t a video takes the best
rank that any of its captions reaches, and its other captions never compete. The candidates are the
captions of all other videos (v2t), or of each other video its best caption only (v2t_grouped, as
CLIP4Clip and X-Pool count). The two agree in R@1 and differ below.

A *task* is a gallery with captions, or questions, and a protocol: datasets/tasks.py.

    python eval.py --task toy                                 # the model that ships
    python eval.py --task toy --checkpoint runs/toy           # newest checkpoint of a run
    python eval.py --task csv --checkpoint runs/mine --data FILE.csv
    python eval.py --task msrvtt --checkpoint runs/9k --data-root FOLDER
    python eval.py --task search --checkpoint runs/mine --videos DIR     # find your own videos
    python eval.py --compare runs/a runs/b                    # two results, and how sure

writes metrics.json (metrics, counts, protocol, weights, versions) and report.html into --out. A
result on an incomplete set says so itself: "N of M videos: not comparable".
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while importing: no traceback

import contextlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch

from cli import (
    UserError,
    check_ranges,
    keep_freed_memory,
    make_folder,
    parse_config,
    run,
    write_whole,
)
from data import keep_decodable, load_videos, open_cache
from datasets.split import Question, Split
from datasets.tasks import PUBLISHED, TASKS, Task
from report.page import Results, choice_table, rank_table, render, write_report
from search.query import BATCH_PIXELS, check_finite, embed_batches, embed_texts, search_folder
from training.checkpoint import Checkpoint, hash_text, load_checkpoint
from training.clip import is_clip, zero_shot
from videos.cache import FrameCache
from videos.workers import prefetch

# by the README's first command; fp16, weights only
SHIPPED = Path(__file__).parent / "weights" / "toy.safetensors"
TILE = 1024  # a tile of so many rows and columns stays in a CPU's cache
MATRIX_LIMIT = 2**28  # entries of a similarity matrix that is held as a whole: 2 GiB

# ---- ranks ---------------------------------------------------------------------------------------


def to_grid(emb) -> torch.Tensor:
    """[..., E] -> float64, rounded to 2^-26 of the longest row.

    Floating-point sums depend on their order, so one pair may score differently in two tiles of the
    same product. On this grid products are multiples of 2^-52, and every partial sum stays below 2
    (Cauchy-Schwarz): 53 bits hold it exactly. So a score is a number, not an accident of tile,
    thread or machine, and equal embeddings tie exactly.
    """
    emb = torch.as_tensor(emb).detach().cpu().double()
    longest = emb.norm(dim=-1).max().clamp(min=1e-30)
    unit = 2.0 ** torch.floor(torch.log2(longest) + 0.6)  # dividing by a power of two is exact
    return torch.round(emb / unit * 2**26) / 2**26 * unit


def similarity(text_emb, video_emb) -> torch.Tensor:
    """sim [n_text, n_video], float64: dot products of embeddings [n, E], exact on the grid."""
    return to_grid(text_emb) @ to_grid(video_emb).T


def count_ranks(scores, video_of_text, n_text: int, n_video: int) -> dict[str, np.ndarray]:
    """{"t2v": [n_text], "v2t": [videos with captions]}, float64, 1-based: a rank may end in .5.

    And "v2t_grouped", as "v2t", where a video has several captions.

    scores(rows, columns) gives one float64 tile of sim; video_of_text [n_text] is the column of
    each caption's video. Counting half of the ties makes one formula of the rank, since
    (1 + sign(x)) / 2 is 1 above zero, ½ at zero and 0 below:

        rank = 1 + Σ_wrong (1 + sign(s_wrong − s_right)) / 2

    A sum can be taken tile by tile: 100,000 × 100,000 scores need no matrix of 80 GB.
    """
    video_of_text = torch.as_tensor(video_of_text).long()
    assert video_of_text.shape == (n_text,) and n_text, f"{video_of_text.shape=}, {n_text=}"
    first, last = int(video_of_text.min()), int(video_of_text.max())
    assert 0 <= first and last < n_video, f"videos {first} … {last} of {n_video}"

    # the scores of the right pairs [n_text]; a video is as good as its best caption [n_video]
    parts = []
    for i in range(0, n_text, TILE):
        rows = slice(i, i + TILE)
        parts.append(scores(rows, video_of_text[rows]).diagonal())
    positive = torch.cat(parts)
    best = torch.full((n_video,), -torch.inf, dtype=torch.float64)
    best.scatter_reduce_(0, video_of_text, positive, "amax")

    has_several = n_text > int((best > -torch.inf).sum())

    # Σ sign over all candidates, the right ones too
    above = torch.zeros_like(positive)
    below = torch.zeros_like(best)
    groups_below = torch.zeros_like(best)

    for j in range(0, n_video, TILE):
        columns = slice(j, j + TILE)
        if has_several:  # each video's best caption
            groups = torch.full_like(best[:, None] * best[columns], -torch.inf)
        for i in range(0, n_text, TILE):
            rows = slice(i, i + TILE)
            tile = scores(rows, columns)
            above[rows] += (tile - positive[rows, None]).sign().sum(1)
            below[columns] += (tile - best[columns]).sign().sum(0)
            if has_several:
                group = video_of_text[rows, None].expand_as(tile)
                groups.scatter_reduce_(0, group, tile, "amax")
        if has_several:
            groups_below[columns] = (groups - best[columns]).sign().sum(0)

    # take the right candidates out again: one of a caption, of a video all its captions
    half_ties = (1 + (positive - best[video_of_text]).sign()) / 2
    own = torch.zeros_like(best).index_add_(0, video_of_text, half_ties)
    asks = best > -torch.inf
    ranks = dict(t2v=1 + (n_video + above) / 2 - 0.5, v2t=(1 + (n_text + below) / 2 - own)[asks])
    if has_several:
        ranks["v2t_grouped"] = (1 + (n_video + groups_below) / 2 - 0.5)[asks]
    return {name: rank.numpy() for name, rank in ranks.items()}


def retrieval_ranks(text_emb, video_emb, video_of_text) -> dict[str, np.ndarray]:
    """`count_ranks` of embeddings [n_text, E], [n_video, E].

    Equals the ranks of `similarity(text_emb, video_emb)`, without a matrix of that size. Raises
    UserError where an embedding is not finite.
    """
    text, video = to_grid(text_emb), to_grid(video_emb)
    check_finite(text, "text embeddings")
    check_finite(video, "video embeddings")

    def scores(rows, columns):
        return text[rows] @ video[columns].T

    return count_ranks(scores, video_of_text, len(text), len(video))


def matrix_ranks(sim, video_of_text) -> dict[str, np.ndarray]:
    """`count_ranks` of a similarity matrix.

    sim [n_text, n_video], array or tensor: row = caption, column = video. Raises UserError where it
    is not finite.
    """
    sim = torch.as_tensor(sim).detach().cpu()
    assert sim.ndim == 2, f"sim has shape {tuple(sim.shape)}, not [n_text, n_video]"
    check_finite(sim, "sim")

    def scores(rows, columns):
        return sim[rows, columns].double()

    return count_ranks(scores, video_of_text, *sim.shape)


def retrieval_metrics(sim, video_of_text) -> dict[str, float]:
    """`summarize` of `matrix_ranks`."""
    return summarize(matrix_ranks(sim, video_of_text))


def dual_softmax_ranks(sim, video_of_text, scale: float) -> dict[str, np.ndarray]:
    """{"dsl_t2v": …}: the ranks of a similarity matrix after the dual softmax.

    Each score is multiplied by the share that its query has among *all* queries that want the same
    candidate: sim_ij · softmax_i(scale · sim_ij) for t2v, over j for v2t. A candidate that
    everybody wants is worth less. That uses the whole query set at once, which a search engine
    never sees. sim [n_text, n_video] float64; scale: exp(logit_scale).
    https://arxiv.org/abs/2109.04290
    """
    found = {}
    for way, queries in (("t2v", 0), ("v2t", 1)):
        ranks = matrix_ranks(sim * torch.softmax(scale * sim, dim=queries), video_of_text)
        found |= {f"dsl_{name}": rank for name, rank in ranks.items() if name.startswith(way)}
    return found


def multiple_choice_points(scores, answers, kinds: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """{"mc_accuracy": [n], "mc_accuracy_KIND": …}: 100 where the right option scores highest.

    scores [n, options], answers [n]: the right option, kinds [n]. Options that tie for the best
    share the point, so a constant model gets chance. Raises UserError where a score is not finite.
    """
    scores, answers = torch.as_tensor(scores).double(), torch.as_tensor(answers)
    assert scores.ndim == 2 and answers.shape == (len(scores),), (scores.shape, answers.shape)
    check_finite(scores, "multiple choice")

    best = scores == scores.amax(dim=1, keepdim=True)  # [n, options]
    is_right = best[torch.arange(len(scores)), answers]
    points = {"mc_accuracy": (100 * is_right.double() / best.sum(dim=1)).numpy()}  # [n]
    for kind in sorted(set(kinds) - {""}):
        points[f"mc_accuracy_{kind}"] = points["mc_accuracy"][np.array(kinds) == kind]
    return points


# ---- numbers, and how sure they are --------------------------------------------------------------


def values_per_query(outcomes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{metric that is a mean over queries: its value for each query, percent}.

    outcomes: ranks by their way (t2v, v2t, …), and points of multiple choice.
    """
    values = {}
    for name, outcome in outcomes.items():
        if name.startswith("mc_"):
            values[name] = outcome
        else:
            values |= {f"{name}_R@{k}": 100.0 * (outcome <= k) for k in (1, 5, 10)}
    return values


def summarize(outcomes: dict[str, np.ndarray]) -> dict[str, float]:
    """{"t2v_R@1": …, R@5, R@10 (percent), MdR, MnR, the same for other ways, "mc_accuracy": …}.

    outcomes: as of `values_per_query`.
    """
    metrics = {name: float(v.mean()) for name, v in values_per_query(outcomes).items()}
    for name, ranks in outcomes.items():
        if not name.startswith("mc_"):
            metrics |= {f"{name}_MdR": float(np.median(ranks)), f"{name}_MnR": float(ranks.mean())}
    return metrics


def bootstrap(values: np.ndarray) -> list[float]:
    """[low, high]: where 95 % of the means of resampled queries lie.

    To draw n of n queries with replacement is to draw how often each *distinct* value comes: a
    multinomial. So 10,000 resamples of any gallery take milliseconds.
    """
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(values), counts / len(values), 10_000)  # [resamples, distinct]
    return np.percentile(drawn @ distinct / len(values), [2.5, 97.5]).tolist()


# ---- embeddings: fp32 on every device, so that a number does not depend on the machine -----------


def embed_videos(model, cache: FrameCache, paths: Sequence[str], window=(0.0, None)):
    """video_emb [n_video, E], float32 on the CPU, of uniform frames of the seconds `window`.

    Raises VideoError where a video is broken.
    """
    num_frames = model.config.num_frames
    batch_size = max(1, BATCH_PIXELS // (num_frames * cache.size**2))

    def load(first: int):
        return load_videos(cache, paths[first : first + batch_size], num_frames, window=window)

    return embed_batches(model, prefetch(load, range(0, len(paths), batch_size)))


def evaluate_retrieval(model, tokenizer, split: Split, cache: FrameCache) -> dict[str, float]:
    """Retrieval metrics of a split whose videos all decode: the validation of a training run.

    The model has neither dropout nor batch statistics: it is the same in training and evaluation.
    """
    text_emb = embed_texts(model, tokenizer, split.captions)
    video_emb = embed_videos(model, cache, split.video_paths, split.window)
    return summarize(retrieval_ranks(text_emb, video_emb, split.video_of_caption))


# ---- one evaluation ------------------------------------------------------------------------------


@dataclass
class EvalFlags:
    # a file, a run's folder (its newest), or CLIP's weights; None: the one that ships
    checkpoint: str | None = None
    # toy: embedded; csv: your own, --data; search: --videos; else published
    task: Literal[(*TASKS, "search")] = "toy"
    data_root: str | None = None  # annotations and videos of a published set: docs/benchmarks.md
    videos_root: str | None = None  # where videos are that are not there; csv: paths are below it
    data: str | None = None  # csv: file with video, caption; toy: its folder
    split: Literal["val", "test"] = "test"  # which gallery, where there are several
    dsl: bool = False  # also the dual softmax over the whole query set, under its own names
    out: str | None = None  # for the results; None: eval-TASK-SPLIT beside the checkpoint
    compare: tuple[str, str] | None = None  # two results (folders of metrics.json) side by side
    json: bool = False  # the result as JSON on stdout, all else on stderr
    cache: str = "cache"  # decoded frames, toy world
    cache_gb: float = 64.0  # for decoded frames; what does not fit is decoded again when needed
    max_broken: float = 0.05  # share of unusable videos that stops the evaluation
    seed: int = 0  # of the examples that the report draws
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one


@dataclass
class SearchFlags:
    videos: str | None = None  # folder of your videos
    query: str | None = None  # what to look for; None: asked for, one per line
    top: int = 10  # how many videos to show
    window: float = 8.0  # seconds of a video that are embedded at once; inf: all
    index: str | None = None  # folder of the index; None: CACHE/index


@dataclass
class EvalConfig(EvalFlags, SearchFlags):
    """Evaluate a checkpoint: retrieval, and multiple choice where the task has it."""


def measure(config: EvalConfig, checkpoint: Checkpoint, task: Task) -> Results:
    """The ranks of all captions and videos, and the points of all questions.

    Retrieval if the task has captions, accuracy if it has questions. Unusable videos are left out
    and listed in the split's `broken`. Raises UserError where more than the share `max_broken` of
    the videos cannot be used.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    room = dict(gigabytes=config.cache_gb, num_videos=len(task.split.video_paths))
    cache = open_cache(Path(config.cache) / "frames", model.config, **room)
    split = keep_decodable(task.split, cache, max_broken=config.max_broken)
    video_emb = embed_videos(model, cache, split.video_paths, split.window)
    text_emb, outcomes = video_emb[:0], {}
    if split.captions:
        text_emb = embed_texts(model, tokenizer, split.captions)
        outcomes |= retrieval_ranks(text_emb, video_emb, split.video_of_caption)

    if config.dsl:
        if not 0 < len(text_emb) * len(video_emb) <= MATRIX_LIMIT:
            raise UserError(
                f"--dsl: {len(text_emb):,} captions × {len(video_emb):,} videos; it needs all "
                f"similarities at once, between 1 and {MATRIX_LIMIT:,} of them; leave it out"
            )
        sim, scale = similarity(text_emb, video_emb), model.logit_scale.exp().item()
        outcomes |= dual_softmax_ranks(sim, split.video_of_caption, scale)

    questions = [question for question in task.questions if question.video not in split.broken]
    option_scores = np.zeros((0, 0))
    if questions:
        number = {path: i for i, path in enumerate(split.video_paths)}
        asked_emb = video_emb[[number[question.video] for question in questions]]
        option_scores = score_options(model, tokenizer, questions, asked_emb)
        answers = [question.answer for question in questions]
        kinds = [question.kind for question in questions]
        outcomes |= multiple_choice_points(option_scores, answers, kinds)

    embedded = (text_emb.numpy(), video_emb.numpy())
    return Results(split, *embedded, outcomes, questions, option_scores)


def score_options(model, tokenizer, questions: list[Question], asked_emb) -> np.ndarray:
    """[questions, options], float64: the options against the embedding [questions, E] of a video.

    Raises UserError where the questions have different numbers of options.
    """
    if len({len(question.options) for question in questions}) > 1:
        raise UserError(
            "the questions have different numbers of options: their accuracies cannot be averaged"
        )
    options = []
    for question in questions:
        options += question.options
    option_emb = to_grid(embed_texts(model, tokenizer, options))
    option_emb = option_emb.unflatten(0, (len(questions), -1))  # [questions, options, E]
    return (option_emb * to_grid(asked_emb)[:, None]).sum(-1).numpy()


# ---- the record ----------------------------------------------------------------------------------

GROUPED_PROTOCOL = (
    " v2t_grouped compares with CLIP4Clip's and X-Pool's tables, where each video of the gallery "
    "is represented by its best caption; v2t lets every caption compete."
)
DSL_PROTOCOL = (
    " Metrics named dsl_ use the dual softmax over the whole query set: they compare only with "
    "others that do."
)


def machine_facts(device: str) -> dict:
    """{versions, commit, date, hardware}: where, when and with what a number was made."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = found.stdout.strip()
    except OSError:  # no git
        commit = ""

    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    versions = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        opencv=cv2.__version__,
    )
    date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return dict(versions=versions, commit=commit or "unknown", date=date, hardware=hardware)


def make_record(
    config: EvalConfig, checkpoint: Checkpoint, task: Task, results: Results, device: str
) -> dict:
    """What metrics.json holds: every metric, and all that is needed to compare it with another."""
    counts, note = task.count(results.split, checkpoint.trained_on, len(results.questions))

    sizes, protocol = checkpoint.model.config, task.protocol
    if "v2t_grouped" in results.outcomes:
        protocol += GROUPED_PROTOCOL
    if config.dsl:
        protocol += DSL_PROTOCOL

    return dict(
        task=config.task,
        split=config.split,
        protocol=protocol,
        **summarize(results.outcomes),
        note=note,
        **counts,
        official=task.split.official,
        **results.split.count_broken(),
        unusable=results.split.broken,
        checkpoint=str(checkpoint.path),
        checkpoint_sha256=checkpoint.sha256,
        step=checkpoint.step,
        frames=sizes.num_frames,
        image_size=sizes.image_size,
        text_length=sizes.text_length,
        window=list(results.split.window),
        trained_on=checkpoint.config.get("dataset"),
        trained_videos=checkpoint.trained_on.counts,
        logit_scale=checkpoint.model.logit_scale.exp().item(),
        training_seed=checkpoint.config.get("seed"),
        seed=config.seed,
        **machine_facts(device),
        **outcome_facts(results),
    )


def outcome_facts(results: Results) -> dict:
    """{intervals, queries_sha256, outcomes}: how sure, of which queries, and what each of them got.

    An outcome is a line of numbers: a rank per caption or video, a point per question.
    """
    queries = [results.split.captions, results.split.video_of_caption.tolist()]
    queries += [(question.options, question.answer) for question in results.questions]
    outcomes = {name: " ".join(map("{:.9g}".format, o)) for name, o in results.outcomes.items()}
    intervals = {name: bootstrap(v) for name, v in values_per_query(results.outcomes).items()}
    return dict(
        intervals=intervals,
        queries_sha256=hash_text(json.dumps(queries)),
        outcomes=outcomes,
    )


# who reads a flag: one of another task is a forgotten --task
READERS = {
    **dict.fromkeys(("query", "videos", "index"), ["search"]),
    "data": ["csv", "toy"],
    **dict.fromkeys(("data_root", "videos_root"), ["csv", *PUBLISHED]),
}


def check_flags(config: EvalConfig) -> None:
    """Raise UserError for a value out of its range, or a flag that the task would not read."""
    check_ranges(config, dict(max_broken=0, seed=0, cache_gb=0), dict(max_broken=1))
    for name, tasks in READERS.items():
        flag, value = f"--{name.replace('_', '-')}", getattr(config, name)
        if value and config.task not in tasks:
            raise UserError(
                f"{flag} {value}: is for --task {' or '.join(tasks)}; name the task too"
            )
    if config.task == "toy" and config.data and Path(config.data).is_file():
        raise UserError(f"--data {config.data}: a file is for --task csv; name the task too")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU on this machine; leave the flag out")


def evaluate(config: EvalConfig) -> dict:
    """Evaluate as configured, write metrics.json and report.html, print a table.

    Returns what metrics.json holds. Raises UserError: no such checkpoint or data, too many unusable
    videos, an unwritable --out, a model that yields NaN.
    """
    if config.compare:
        return compare_results(config)
    started = time.perf_counter()
    check_flags(config)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = open_checkpoint(config.checkpoint, device)
    beside = checkpoint.path.parent if config.checkpoint else Path("runs")
    if config.task == "search":
        return search_folder(checkpoint, config, Path(config.out or beside / "search"))

    task, sizes = TASKS[config.task](config), checkpoint.model.config
    frames = f"{sizes.num_frames} frames of {sizes.image_size} px"
    print(f"{checkpoint.path}: step {checkpoint.step}, {frames}, on {device}")
    if odd := task.split.describe_captions():
        print(odd)
    out = Path(config.out or beside / f"eval-{config.task}-{config.split}")
    make_folder(out)  # fail before the work, not after it

    results = measure(config, checkpoint, task)
    record = make_record(config, checkpoint, task, results, device)

    with write_whole(out / "metrics.json") as unfinished:
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    tagged = Path(config.cache) / "knowledge"
    write_report(out / "report.html", record, results, cache=tagged, seed=config.seed)

    print(format_table(record))
    seconds = time.perf_counter() - started
    print(f"{out / 'metrics.json'}, {out / 'report.html'} ({seconds:.0f} s)")
    return record


def open_checkpoint(path: str | None, device: str) -> Checkpoint:
    """Ours, CLIP's weights, or without a path those that ship."""
    if path is None:
        print(f"no --checkpoint: the toy model that comes with this repository, {SHIPPED}")
    elif is_clip(Path(path)):
        checkpoint = zero_shot(path)
        checkpoint.model.to(device)
        print(f"{checkpoint.path}: CLIP, frame by frame, never trained on videos")
        return checkpoint
    return load_checkpoint(path or SHIPPED, device)


def format_table(record: dict) -> str:
    """The record's metrics as lines of text."""
    lines = []
    if record["captions"]:
        lines += format_rows(rank_table(record))
    if record["questions"]:
        lines += format_rows(choice_table(record))
    note = f"; {record['note']}" if record["note"] else ""
    return "\n".join([*lines, f"{record['captions']} captions, {record['videos']} videos{note}"])


def format_rows(rows: list[list]) -> list[str]:
    """A table as lines of text: the first column to the left, numbers to the right."""
    lines = []
    for first, *others in rows:
        cells = [f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in others]
        lines.append(f"{first:24s}" + "".join(cell.rjust(10) for cell in cells))
    return lines


# ---- two results side by side --------------------------------------------------------------------


def read_record(path: str) -> dict:
    """metrics.json of a folder, or that file itself. Raises UserError where it cannot be used."""
    file = Path(path, "metrics.json") if Path(path).is_dir() else Path(path)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        outcomes = {name: np.array(o.split(), float) for name, o in record["outcomes"].items()}
        return record | dict(outcomes=outcomes, path=str(file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--compare {path}: holds no metrics.json with the outcome of each query "
            f"({type(error).__name__}); evaluate its checkpoint with eval.py, and name that --out"
        ) from error


def compare_results(config: EvalConfig) -> dict:
    """`--compare A B`: print a table, write a page. Returns {metric: [A, B, B − A, low, high, …]}.

    B − A is taken query by query; low … high is the 95 % interval of its mean (`bootstrap`). It
    covers the choice of queries, not the seed of a training. Then come the queries that count more
    in A, and in B. Raises UserError where A and B did not answer the same queries.
    """
    one, two = (read_record(path) for path in config.compare)
    if one["queries_sha256"] != two["queries_sha256"]:
        raise UserError(
            f"--compare: {one['path']} ({one['captions']} captions, {one['questions']} questions) "
            f"and {two['path']} ({two['captions']}, {two['questions']}) did not answer the same "
            "queries; evaluate both on the same task and videos"
        )

    theirs, compared = values_per_query(two["outcomes"]), {}
    for name, values in values_per_query(one["outcomes"]).items():
        if name in theirs:  # one of them may lack the dual softmax
            gain = theirs[name] - values
            means = (values.mean(), theirs[name].mean(), gain.mean())
            alone = (int((gain < 0).sum()), int((gain > 0).sum()))
            compared[name] = [*means, *bootstrap(gain), *alone]

    rows = [["percent", "A", "B", "B − A", "low", "high", "A alone", "B alone"]]
    rows += [[name, *row] for name, row in compared.items()]
    print("\n".join([f"A  {one['path']}", f"B  {two['path']}", *format_rows(rows)]))

    page = Path(config.out or "runs/compare") / "report.html"
    render("compare.html", page, title="A and B", rows=rows, runs=[one, two])
    print(page)
    return compared


def main():
    config = parse_config(EvalConfig)
    keep_freed_memory()
    # --json: what is printed on the way goes to stderr
    with contextlib.redirect_stdout(sys.stderr if config.json else sys.stdout):
        record = evaluate(config)
    if config.json:
        print(json.dumps(record, default=vars))


if __name__ == "__main__":
    run(main)
