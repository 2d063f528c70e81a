"""How good is a model? Ranks, ties, R@K; multiple choice; one JSON and one page that say it all.

Retrieval asks one question many times: among all videos, at which place does the right one stand? With sim
[n_text, n_video] (row = caption, column = video) each caption ranks its row, text to video (t2v), and each video ranks
its column (v2t):

    rank = 1 + (wrong candidates that score strictly better) + ½ (wrong candidates that tie)
    R@K  = percent of queries with rank ≤ K          MdR, MnR = median and mean rank (1 is best)

Three details make or break the number:
- *Ties.* A tie counts half, so a model that scores everything alike gets the middle rank: chance, as it should.
  (Counting only the strictly better ones would give it R@1 = 100.) A rank may thus be 1.5, which is no hit for R@1.
- *Several captions a video.* Each caption is a t2v query of its own. In v2t a video takes the best rank that any of its
  captions reaches; its other captions never compete. A video without captions asks nothing but stays in the gallery.
- *What equal means.* Floating-point sums depend on their order, so one pair may score differently in two tiles of the
  same product. `similarity` rounds embeddings to 26 binary places and multiplies in fp64, where such sums have no
  rounding error at all: a score is then a number, not an accident of tile, thread or machine, and equal embeddings tie
  exactly. It is also nearer to the true product than fp32 would be, for about twice the time.

Counting half the ties makes one formula of it, since (1 + sign(x)) / 2 is 1 above zero, ½ at zero, 0 below:

    rank = 1 + Σ_wrong (1 + sign(s_wrong − s_right)) / 2

A sum over candidates can be taken tile by tile: 100,000 captions × 100,000 videos need no matrix of 80 GB.

Multiple choice asks which of five captions fits a video; tied options share the point: a constant model gets chance.

    python eval.py --checkpoint runs/toy --task toy                         # newest checkpoint of a run, toy gallery
    python eval.py --checkpoint runs/mine --task csv --data FILE.csv        # your own videos and captions
    python eval.py --checkpoint runs/9k --task msrvtt --data-root FOLDER    # 1k-A; the others: see datasets.py

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

import toyworld
from checkpoint import Checkpoint, load_checkpoint
from cli import UserError, parse_config, run
from data import keep_decodable, load_videos, prefetch, prepare_video
from datasets import DATASETS, load_msrvtt_mc, load_questions, load_split
from knowledge import extract_many
from report import DIRECTIONS, Results, write_report
from splits import Question, Split
from video import FrameCache

# ---- ranks -----------------------------------------------------------------------------------------------------------


def _to_grid(emb) -> torch.Tensor:
    """[N, E] -> float64, rounded to 2^-26 of the longest row, so that fp64 sums of products are exact in any order:

    products are multiples of 2^-52 and every partial sum stays below 2 (Cauchy-Schwarz), which 53 bits hold.
    """
    emb = torch.as_tensor(emb).detach().double()
    longest = emb.norm(dim=1).max().clamp(min=1e-30)
    unit = 2.0 ** torch.floor(torch.log2(longest) + 0.6)  # a power of two: dividing by it loses nothing
    return torch.round(emb / unit * 2**26) / 2**26 * unit


def _check_finite(scores, what: str):
    if not torch.isfinite(scores).all():
        raise UserError(f"{what}: NaN or infinity inside; the model has diverged or its checkpoint is damaged")


def similarity(text_emb, video_emb) -> torch.Tensor:
    """sim [n_text, n_video], float64: dot products of embeddings [n, E], exact after rounding to 26 binary places."""
    return _to_grid(text_emb) @ _to_grid(video_emb).T


def _ranks(scores, positive, video_of_text, n_video: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(t2v [n_text], v2t [videos with captions]), float64: a rank may end in .5.

    scores(rows, columns) yields one float64 tile of sim; positive [n_text] are the scores of the right pairs.
    """
    n_text, device = len(positive), positive.device
    best = torch.full((n_video,), -torch.inf, dtype=torch.float64, device=device)
    best.scatter_reduce_(0, video_of_text, positive, "amax")          # a video is as good as its best caption
    above = torch.zeros(n_text, dtype=torch.float64, device=device)   # Σ sign over all candidates, right ones too
    below = torch.zeros(n_video, dtype=torch.float64, device=device)
    for i in range(0, n_text, chunk):
        for j in range(0, n_video, chunk):
            rows, columns = slice(i, i + chunk), slice(j, j + chunk)
            tile = scores(rows, columns)                              # [≤ chunk, ≤ chunk]
            above[rows] += (tile - positive[rows, None]).sign_().sum(1)
            below[columns] += (tile - best[columns]).sign_().sum(0)
    # take the right candidates out again: one of a caption, of a video all its captions
    own = torch.zeros_like(best).index_add_(0, video_of_text, (1 + (positive - best[video_of_text]).sign()) / 2)
    t2v = 1 + (n_video + above) / 2 - 0.5
    v2t = 1 + (n_text + below) / 2 - own
    return t2v.cpu().numpy(), v2t[best > -torch.inf].cpu().numpy()


def _check_pairs(video_of_text, n_text: int, n_video: int, device) -> torch.Tensor:
    video_of_text = torch.as_tensor(video_of_text, device=device).long()
    assert video_of_text.shape == (n_text,) and n_text, f"{tuple(video_of_text.shape)} indices for {n_text} captions"
    first, last = int(video_of_text.min()), int(video_of_text.max())
    assert 0 <= first and last < n_video, f"video_of_text runs from {first} to {last}, but there are {n_video} videos"
    return video_of_text


def retrieval_ranks(text_emb, video_emb, video_of_text, *, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (t2v [n_text], v2t [videos with captions]), 1-based, ties half, of embeddings [n_text, E], [n_video, E].

    Equals the ranks of `similarity(text_emb, video_emb)` for every `chunk`, in memory that grows with n, not n².
    Tiles of 1,024² stay in a CPU's cache: larger ones are slower. Raises UserError where an embedding is not finite.
    """
    text, video = _to_grid(text_emb), _to_grid(video_emb)
    _check_finite(text, "text embeddings")
    _check_finite(video, "video embeddings")
    video_of_text = _check_pairs(video_of_text, len(text), len(video), text.device)
    positive = torch.cat([(text[i:i + chunk] * video[video_of_text[i:i + chunk]]).sum(1)
                          for i in range(0, len(text), chunk)])
    return _ranks(lambda rows, columns: text[rows] @ video[columns].T, positive, video_of_text, len(video), chunk)


def summarize_ranks(t2v: np.ndarray, v2t: np.ndarray) -> dict[str, float]:
    """{"t2v_R@1": …, R@5, R@10 (percent), MdR, MnR, and the same for v2t}."""
    metrics = {}
    for direction, ranks in (("t2v", t2v), ("v2t", v2t)):
        for k in (1, 5, 10):
            metrics[f"{direction}_R@{k}"] = 100 * float(np.mean(ranks <= k))
        metrics[f"{direction}_MdR"] = float(np.median(ranks))
        metrics[f"{direction}_MnR"] = float(np.mean(ranks))
    return metrics


def retrieval_metrics(sim, video_of_text) -> dict[str, float]:
    """t2v_R@1, t2v_R@5, t2v_R@10, t2v_MdR, t2v_MnR and the same for v2t.

    sim [n_text, n_video], array or tensor: row = caption, column = video. video_of_text [n_text]: the column of each
    caption's video. R@K in percent counts ranks ≤ K; MdR, MnR 1-based. Raises UserError where sim is not finite.
    Protocol: with one caption a video MSR-VTT 1k-A's, with several MSVD's.
    """
    sim = sim.detach() if isinstance(sim, torch.Tensor) else torch.from_numpy(np.require(sim, requirements=["C", "W"]))
    assert sim.ndim == 2, f"sim has shape {tuple(sim.shape)}, not [n_text, n_video]"
    n_text, n_video = sim.shape
    video_of_text = _check_pairs(video_of_text, n_text, n_video, sim.device)

    def scores(rows, columns):
        tile = sim[rows, columns].double()
        _check_finite(tile, "sim")
        return tile

    positive = sim[torch.arange(n_text, device=sim.device), video_of_text].double()
    return summarize_ranks(*_ranks(scores, positive, video_of_text, n_video, chunk=1024))


def retrieval_metrics_from_embeddings(text_emb, video_emb, video_of_text, *, chunk: int = 1024) -> dict[str, float]:
    """Exactly `retrieval_metrics(similarity(text_emb, video_emb), video_of_text)`, without ever holding sim.

    text_emb [n_text, E], video_emb [n_video, E]; see `retrieval_ranks`.
    """
    return summarize_ranks(*retrieval_ranks(text_emb, video_emb, video_of_text, chunk=chunk))


def multiple_choice_accuracy(scores, answers, kinds: Sequence[str] | None = None) -> dict[str, float]:
    """{"mc_accuracy": percent, "mc_accuracy_KIND": …}: how often the right option scores highest.

    scores [n, options], answers [n]: the right option, kinds [n]. Options that tie for the best share the point.
    Raises UserError where a score is not finite.
    """
    scores, answers = torch.as_tensor(scores).double().cpu().numpy(), np.asarray(answers)
    assert scores.ndim == 2 and answers.shape == (len(scores),), f"{scores.shape} scores for {answers.shape} answers"
    _check_finite(torch.from_numpy(scores), "multiple choice")
    chosen = scores == scores.max(axis=1, keepdims=True)                             # [n, options]
    points = 100 * chosen[np.arange(len(scores)), answers] / chosen.sum(axis=1)      # [n]
    metrics = {"mc_accuracy": float(points.mean())}
    for kind in sorted({*(() if kinds is None else kinds)} - {""}):
        metrics[f"mc_accuracy_{kind}"] = float(points[np.array(kinds) == kind].mean())
    return metrics


def dual_softmax_metrics(sim, video_of_text, scale: float) -> dict[str, float]:
    """{"dsl_t2v_R@1": …} and so on: the metrics of `retrieval_metrics` after the dual softmax.

    Each score is multiplied by the share that its query has among *all* queries that want the same candidate,
    sim_ij · softmax_i(scale · sim_ij) for t2v, over j for v2t: a candidate that everybody wants is worth less. That
    uses the whole query set at once, which a search engine never sees: such numbers compare only with their like.
    As in the paper, a score below zero times a small share moves *up* (CLIP's are all above). sim [n_text, n_video]
    float64; scale: exp(logit_scale). Cheng et al., https://arxiv.org/abs/2109.04290
    """
    t2v = retrieval_metrics(sim * torch.softmax(scale * sim, dim=0), video_of_text)
    v2t = retrieval_metrics(sim * torch.softmax(scale * sim, dim=1), video_of_text)
    return {f"dsl_{name}": (t2v if name.startswith("t2v") else v2t)[name] for name in t2v}


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


TaskName = Literal["toy", "csv", "msrvtt", "msrvtt-full", "msvd", "didemo", "lsmdc", "msrvtt-mc"]


@dataclass
class EvalConfig:
    """Evaluate a checkpoint: retrieval, multiple choice where the task has it; writes metrics.json and report.html."""

    checkpoint: str = "runs/toy"            # checkpoint file, or folder of a run (its newest checkpoint)
    task: TaskName = "toy"                  # toy: the embedded world; csv: your own (--data); else see --data-root
    data_root: str | None = None            # annotations and videos of a published data set, see datasets.py
    data: str | None = None                 # csv: file with video, caption; msrvtt-mc: questions; toy: its folder
    split: Literal["val", "test"] = "test"  # which gallery, where there are several
    dsl: bool = False                       # also the dual softmax over the whole query set, under its own names
    out: str | None = None                  # folder for the results (default: eval-TASK-SPLIT beside the checkpoint)
    sim_out: str | None = None              # npz file for embeddings and similarities
    cache: str = "cache"                    # decoded frames, toy world
    max_broken: float = 0.05                # share of unusable videos that stops the evaluation
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

    texts = [*split.captions] + [option for question in questions for option in question.options]
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
        option_emb = _to_grid(option_emb).unflatten(0, (len(questions), -1))                 # [n, options, E]
        option_scores = (option_emb * _to_grid(asked_emb)[:, None]).sum(-1).numpy()          # [n, options]
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
    checkpoint = load_checkpoint(config.checkpoint, device)
    sizes, task = checkpoint.model.config, TASKS[config.task](config, checkpoint)
    print(f"{checkpoint.path}: step {checkpoint.step}, {sizes.num_frames} frames of {sizes.image_size} px, on {device}")
    out = Path(config.out) if config.out else checkpoint.path.parent / f"eval-{config.task}-{config.split}"
    cache = FrameCache(Path(config.cache) / "frames", size=sizes.image_size, num_frames=sizes.num_frames)
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
    evaluate(parse_config(EvalConfig))


if __name__ == "__main__":
    run(main)
