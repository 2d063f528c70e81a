"""How good is a model? Embed a gallery, measure, and write one JSON and one page that say it all.

A *task* is a gallery with captions, or questions, and a protocol: the toy world, one's own videos, or a published data
set as its authors split it (datasets.py). The checkpoint brings weights, tokenizer and concepts; metrics.py defines the
numbers; every video is decoded once (video.FrameCache).

    python eval.py --task toy                                               # the model that ships, toy test gallery
    python eval.py --task toy --checkpoint runs/toy                         # newest checkpoint of a run
    python eval.py --task csv --checkpoint runs/mine --data FILE.csv        # your own videos and captions
    python eval.py --task msrvtt --checkpoint runs/9k --data-root FOLDER    # 1k-A; the others: see datasets.py
    python eval.py --task search --checkpoint runs/mine --videos DIR        # find your own videos: search.py

writes metrics.json (every metric, counts, protocol, weights, versions) and report.html (see report.py) into --out.
A result on a set with missing or broken videos, or on another number of them than the protocol has, says so itself:
"N of M videos: not comparable"; one whose checkpoint was trained on the videos it is asked about, too.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch

from datasets import toyworld
from training.checkpoint import Checkpoint, load_checkpoint
from cli import UserError, keep_freed_memory, parse_config, run
from knowledge import extract_many
from data import keep_decodable, open_cache, load_videos, prefetch, prepare_video
from datasets.published import DATASETS, load_msrvtt_mc, load_questions, load_split
from videos.cache import FrameCache
from metrics import (dual_softmax_metrics, multiple_choice_accuracy, retrieval_metrics_from_embeddings, retrieval_ranks,
                     similarity, summarize_ranks, to_grid)
from report.page import DIRECTIONS, Results, write_report
from search.query import search_folder
from datasets.split import Question, Split

# ---- embeddings: fp32 on every device, so that a number does not depend on the machine -------------------------------

BATCH_PIXELS = 2**21  # 256 toy videos or 5 of preset base: small batches cost more in threads that wait for each other
BATCH_TEXTS = 256


@torch.inference_mode()
def embed_texts(model, tokenizer, captions: Sequence[str]) -> torch.Tensor:
    """text_emb [n_text, E], float32 on the CPU. Equal captions are encoded once, so that they are equal here too."""
    device = model.logit_scale.device
    distinct = sorted(set(captions), key=lambda caption: (len(caption), caption))  # like lengths need little padding
    parts = []
    for i in range(0, len(distinct), BATCH_TEXTS):
        tokens, text_mask = tokenizer.encode_batch(distinct[i:i + BATCH_TEXTS], model.config.text_length)     # [B, L]
        parts.append(model.encode_text(tokens.to(device), text_mask.to(device)).cpu())
    place = {caption: i for i, caption in enumerate(distinct)}
    return torch.cat(parts)[[place[caption] for caption in captions]]


@torch.inference_mode()
def embed_videos(model, cache: FrameCache, paths: Sequence[str],
                 window: tuple[float, float | None] = (0.0, None)) -> torch.Tensor:
    """video_emb [n_video, E], float32 on the CPU, of uniform frames of the seconds `window` of each.

    Raises VideoError if one is broken.
    """
    device, num_frames = model.logit_scale.device, model.config.num_frames
    batch_size = max(1, BATCH_PIXELS // (num_frames * cache.size**2))
    batches = [list(paths[i:i + batch_size]) for i in range(0, len(paths), batch_size)]
    frames = prefetch(lambda batch: load_videos(cache, batch, num_frames, window=window), batches)
    return torch.cat([model.encode_video(prepare_video(video.to(device))).cpu() for video in frames])


def embed_split(model, tokenizer, split: Split, cache: FrameCache) -> tuple[torch.Tensor, torch.Tensor]:
    """(text_emb [n_text, E], video_emb [n_video, E]) of all captions and videos of a split, float32 on the CPU."""
    return embed_texts(model, tokenizer, split.captions), embed_videos(model, cache, split.video_paths, split.window)


def evaluate_retrieval(model, tokenizer, split: Split, cache: FrameCache) -> dict[str, float]:
    """Retrieval metrics of a split whose videos all decode: what a training run wants every N steps.

    The model has neither dropout nor batch statistics, so that it is the same in training and evaluation mode.
    """
    return retrieval_metrics_from_embeddings(*embed_split(model, tokenizer, split, cache), split.video_of_caption)


# ---- tasks -----------------------------------------------------------------------------------------------------------


TaskName = Literal["toy", "csv", "msrvtt", "msrvtt-full", "msvd", "didemo", "lsmdc", "msrvtt-mc", "search"]
SHIPPED = Path(__file__).parent / "weights" / "toy.safetensors"  # by the README's first command; fp16, weights only


@dataclass
class EvalConfig:
    """Evaluate a checkpoint: retrieval, multiple choice where the task has it; writes metrics.json and report.html."""

    checkpoint: str | None = None           # file, or a run's folder (its newest); None: the one that ships
    task: TaskName = "toy"                  # toy: embedded; csv: your own, --data; search: --videos; else --data-root
    data_root: str | None = None            # annotations and videos of a published data set, see datasets.py
    data: str | None = None                 # csv: file with video, caption; msrvtt-mc: questions; toy: its folder
    split: Literal["val", "test"] = "test"  # which gallery, where there are several
    dsl: bool = False                       # also the dual softmax over the whole query set, under its own names
    out: str | None = None                  # for the results (None: eval-TASK-SPLIT beside the checkpoint or in runs)
    sim_out: str | None = None              # npz file for embeddings and similarities
    cache: str = "cache"                    # decoded frames, toy world
    max_broken: float = 0.05                # share of unusable videos that stops the evaluation
    videos: str | None = None               # search: folder of your videos (the page: search/ beside the checkpoint)
    query: str | None = None                # search: what to look for (default: asked for, one a line)
    top: int = 10                           # search: how many videos to show
    window: float = 8.0                     # search: seconds of a video that are embedded at once (inf: all)
    index: str | None = None                # search: folder of the index (default: CACHE/index/…)
    seed: int = 0                           # of the examples drawn for the report
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one


@dataclass
class Task:
    """What is asked: a gallery with its captions, perhaps questions, and the protocol in words."""

    protocol: str
    split: Split
    questions: list[Question] = field(default_factory=list)
    official: dict[str, int] = field(default_factory=dict)  # how many "videos", "captions", "questions" there should be
    doubt: str = ""                                         # why its numbers would not be comparable


def load_toy(config: EvalConfig, checkpoint: Checkpoint) -> Task:
    """The toy world's gallery and its questions; the world is rendered if it is not there yet."""
    folder = Path(config.data) if config.data else toyworld.generate(Path(config.cache) / "toy")
    protocol = ("Toy world: compositions that training never shows; one caption a video, all videos of the split as "
                "gallery. Multiple choice among captions that differ in one noun, one verb or the direction.")
    return Task(protocol, load_split("toy", folder, config.split), load_questions(folder / f"{config.split}_mc.jsonl"))


def load_csv(config: EvalConfig, checkpoint: Checkpoint) -> Task:
    """The videos and captions of a file."""
    if not config.data:
        raise UserError("--task csv: needs --data FILE, a csv or jsonl file with the columns video and caption")
    protocol = (f"Own data ({Path(config.data).name}): every caption is a query against all videos of the file; a "
                "video takes the best rank of its captions.")
    return Task(protocol, load_split("csv", config.data, config.split, root=config.data_root))


def load_published(config: EvalConfig, checkpoint: Checkpoint) -> Task:
    """A published data set: its questions if it asks any, else its gallery."""
    if not config.data_root:
        raise UserError(f"--task {config.task}: needs --data-root FOLDER with its annotation files and videos")
    known, official, questions = DATASETS[config.task], {}, []
    if config.split not in known.videos:
        load_split(config.task, config.data_root, config.split)  # raises, and says why there is none
    if config.task == "msrvtt-mc":
        questions, split = load_msrvtt_mc(Path(config.data_root), config.data), Split.from_pairs([])
        official["questions"] = known.videos[config.split]
    else:
        split, captions = load_split(config.task, config.data_root, config.split), known.captions.get(config.split)
        official = dict(videos=known.videos[config.split], captions=captions)
    # the 9k list holds 1,990 of the 2,990 videos of the full test split
    seen = checkpoint.config.get("dataset") == "msrvtt" and config.task in ("msrvtt-full", "msrvtt-mc")
    doubt = "the checkpoint was trained on MSR-VTT's 9k list, which holds 1,990 of these videos: not comparable"
    return Task(known.protocol, split, questions, {name: count for name, count in official.items() if count},
                doubt if seen else "")


TASKS = {"toy": load_toy, "csv": load_csv,  # a task is one function
         **dict.fromkeys(("msrvtt", "msrvtt-full", "msvd", "didemo", "lsmdc", "msrvtt-mc"), load_published)}


def measure(model, tokenizer, task: Task, cache: FrameCache, *, max_broken: float = 0.05,
            dsl: bool = False) -> tuple[dict, Results]:
    """({metric: value}, what it was computed from): retrieval if the task has captions, accuracy if it has questions.

    Unusable videos are left out and listed in the results' split. dsl: also `dual_softmax_metrics`. Raises UserError
    where more than the share `max_broken` of the videos cannot be used.
    """
    # every video once: first those of the gallery, then those that only a question asks about
    paths = list(dict.fromkeys([*task.split.video_paths, *(question.video for question in task.questions)]))
    window = task.split.window
    usable = keep_decodable(Split(paths, [], np.zeros(0, np.int64), window=window), cache, max_broken=max_broken)
    split = task.split.without(usable.broken)
    questions = [question for question in task.questions if question.video not in usable.broken]
    if not split.captions and not questions:
        raise UserError(f"no caption is left whose video decodes; the first: {next(iter(usable.broken.values()))}")
    if len({len(question.options) for question in questions}) > 1:
        raise UserError("the questions have different numbers of options: their accuracies cannot be averaged")

    texts = [*split.captions, *(option for question in questions for option in question.options)]
    text_emb, option_emb = embed_texts(model, tokenizer, texts).tensor_split([len(split.captions)])
    video_emb = embed_videos(model, cache, usable.video_paths, window)
    place = {path: i for i, path in enumerate(usable.video_paths)}
    asked_emb = video_emb[torch.tensor([place[question.video] for question in questions], dtype=torch.long)]
    video_emb = video_emb[:len(split.video_paths)]                                           # [n_video, E]

    metrics, ranks, option_scores = {}, (np.zeros(0), np.zeros(0)), np.zeros((0, 0))
    if split.captions:
        ranks = retrieval_ranks(text_emb, video_emb, split.video_of_caption)
        metrics |= summarize_ranks(*ranks)
    if dsl:
        if not 0 < len(text_emb) * len(video_emb) <= MATRIX_LIMIT:
            raise UserError(f"--dsl: {len(text_emb):,} captions × {len(video_emb):,} videos; it needs all similarities "
                            f"at once, so between 1 and {MATRIX_LIMIT:,} of them; leave it out")
        metrics |= dual_softmax_metrics(similarity(text_emb, video_emb), split.video_of_caption,
                                        model.logit_scale.exp().item())
    if questions:
        option_emb = to_grid(option_emb).unflatten(0, (len(questions), -1))                 # [n, options, E]
        option_scores = (option_emb * to_grid(asked_emb)[:, None]).sum(-1).numpy()          # [n, options]
        metrics |= multiple_choice_accuracy(option_scores, [question.answer for question in questions],
                                            [question.kind for question in questions])
    return metrics, Results(split, text_emb.numpy(), video_emb.numpy(), *ranks, questions, option_scores)


MATRIX_LIMIT = 2**28  # entries of a similarity matrix that is held or saved as a whole: 2 GiB


def save_similarities(path: str | Path, results: Results) -> None:
    """Write an npz file with what the metrics were computed from; nothing in it needs pickle.

    text_emb [n_text, E], video_emb [n_video, E] float32; sim [n_text, n_video] float64, row = caption, column = video,
    which gives exactly the reported numbers (`retrieval_metrics`); video_of_text [n_text] int64; videos [n_video] and
    captions [n_text], each a JSON list in one string; option_scores [questions, options], answers [questions]. Above
    MATRIX_LIMIT entries sim is left out, which is printed: `similarity(text_emb, video_emb)` gives any part of it.
    Without captions there is no sim, and text_emb, video_emb are empty.
    """
    parts = dict(text_emb=results.text_emb, video_emb=results.video_emb, video_of_text=results.split.video_of_caption,
                 videos=json.dumps([*results.split.video_paths]), captions=json.dumps([*results.split.captions]),
                 option_scores=results.option_scores, answers=np.array([q.answer for q in results.questions], np.int64))
    entries = len(results.text_emb) * len(results.video_emb)
    if 0 < entries <= MATRIX_LIMIT:
        parts["sim"] = similarity(results.text_emb, results.video_emb).numpy()
    elif entries:
        print(f"{path}: without sim, whose {entries:,} entries take {8 * entries / 2**30:.0f} GiB; it is "
              "similarity(text_emb, video_emb), of any rows and columns")
    with open(path, "wb") as file:  # given a name, numpy would append .npz to it
        np.savez(file, **parts)


# ---- the record ------------------------------------------------------------------------------------------------------


def machine_facts(device: str) -> dict:
    """{versions, commit, hardware, date}: where, when and with what a number was made."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.check_output(git, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a git checkout"
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                    opencv=cv2.__version__)
    return dict(versions=versions, commit=commit, date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                hardware=torch.cuda.get_device_name() if device == "cuda" else cpu)


DSL_PROTOCOL = (" Metrics named dsl_ use the dual softmax over the whole query set: they compare only with others that "
                "do.")


def make_record(config: EvalConfig, checkpoint: Checkpoint, task: Task, metrics, results: Results, device: str) -> dict:
    """What metrics.json holds: every metric by its name, and all that is needed to compare it with another."""
    split, sizes, unusable = results.split, checkpoint.model.config, results.split.broken
    missing = sum(not os.path.exists(path) for path in unusable)
    listed = dict(videos=len({*task.split.video_paths, *(question.video for question in task.questions)}),
                  captions=len(task.split.captions), questions=len(task.questions))
    counts = dict(videos=listed["videos"] - len(unusable), captions=len(split.captions),
                  questions=len(results.questions))
    official = dict(videos=listed["videos"]) | task.official
    short = [f"{counts[name]:,} of {count:,} {name}" for name, count in official.items() if counts[name] != count]
    why = [f"{count} {what}" for count, what in ((missing, "missing"), (len(unusable) - missing, "broken")) if count]
    why += [f"the files list {listed[name]:,} {name}" for name, count in official.items() if listed[name] != count]
    note = f"{', '.join(short)}: not comparable ({', '.join(why)})" if short else ""
    protocol = task.protocol + DSL_PROTOCOL * config.dsl
    return dict(
        task=config.task, split=config.split, protocol=protocol, **metrics,
        note="; ".join(filter(None, (note, task.doubt))), **counts, official=task.official,
        missing=missing, broken=len(unusable) - missing, unusable=unusable,
        checkpoint=str(checkpoint.path), checkpoint_sha256=checkpoint.sha256, step=checkpoint.step,
        frames=sizes.num_frames, image_size=sizes.image_size, text_length=sizes.text_length, window=list(split.window),
        trained_on=checkpoint.config.get("dataset"), logit_scale=checkpoint.model.logit_scale.exp().item(),
        training_seed=checkpoint.config.get("seed"), seed=config.seed, **machine_facts(device))


def evaluate(config: EvalConfig) -> dict:
    """Evaluate as configured, write metrics.json and report.html, print a table; returns what metrics.json holds.

    Raises UserError: no such checkpoint or data, too many unusable videos, unwritable --out, a model that yields NaN.
    """
    started = time.perf_counter()
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU on this machine; leave the flag out")
    if config.checkpoint is None:
        print(f"no --checkpoint: the toy model that comes with this repository, {SHIPPED}")
    checkpoint = load_checkpoint(config.checkpoint or SHIPPED, device)
    beside = checkpoint.path.parent if config.checkpoint else Path("runs")
    if config.task == "search":
        return search_folder(checkpoint, config.videos, config.query, top=config.top, window=config.window,
                             index=config.index, cache=config.cache,
                             out=Path(config.out) if config.out else beside / "search")
    sizes, task = checkpoint.model.config, TASKS[config.task](config, checkpoint)
    print(f"{checkpoint.path}: step {checkpoint.step}, {sizes.num_frames} frames of {sizes.image_size} px, on {device}")
    out = Path(config.out) if config.out else beside / f"eval-{config.task}-{config.split}"
    cache = open_cache(Path(config.cache) / "frames", sizes)
    try:
        out.mkdir(parents=True, exist_ok=True)  # fail before the work, not after it
        metrics, results = measure(checkpoint.model, checkpoint.tokenizer, task, cache, max_broken=config.max_broken,
                                   dsl=config.dsl)
        record = make_record(config, checkpoint, task, metrics, results, device)
        (out / "metrics.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if config.sim_out:
            save_similarities(config.sim_out, results)
        knowledge = extract_many(results.split.captions)
        write_report(out / "report.html", record, results, knowledge, checkpoint.concept_vocab, seed=config.seed)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror}); choose another --out or "
                        "--sim-out") from error
    print(format_table(record))
    print(f"{out / 'metrics.json'}, {out / 'report.html'} ({time.perf_counter() - started:.0f} s)")
    return record


def format_table(record: dict) -> str:
    """The record's metrics as lines of text."""
    columns = ("R@1", "R@5", "R@10", "MdR", "MnR")
    lines = [f"{'':19s}" + "".join(f"{column:>8s}" for column in columns)] if record["captions"] else []
    for name, way in DIRECTIONS.items():
        if f"{way}_R@1" in record:
            lines.append(f"{name:19s}" + "".join(f"{record[f'{way}_{column}']:8.1f}" for column in columns))
    if record["questions"]:
        kinds = ", ".join(f"{name.removeprefix('mc_accuracy_')} {value:.1f}" for name, value in record.items()
                          if name.startswith("mc_accuracy_"))
        lines.append(f"multiple choice {record['mc_accuracy']:.1f} %{f' ({kinds})' if kinds else ''} of "
                     f"{record['questions']} questions")
    note = f"; {record['note']}" if record["note"] else ""
    return "\n".join([*lines, f"{record['captions']} captions, {record['videos']} videos{note}"])


def main():
    config = parse_config(EvalConfig)
    keep_freed_memory()
    evaluate(config)


if __name__ == "__main__":
    run(main)
