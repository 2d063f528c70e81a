"""Train CLOP: one loop, top to bottom, on a laptop or on many GPUs.

    python train.py                         # embedded toy world, no data, no GPU: minutes
    python train.py --dataset csv --data train.csv --val-data val.csv --preset small --out runs/mine
    python train.py --init FOLDER --encoder-lr 1e-6 …   # from CLIP's weights: docs/finetune.md
    python train.py --gpus 8 …              # eight processes, one per GPU; --procs 2: two on a CPU
    torchrun --nnodes 4 --nproc-per-node 8 … train.py …                # four machines

1. data         captions -> knowledge -> concept vocabulary, tokenizer; videos -> frame cache
2. model        preset or --init, optimizer; an interrupted run goes on from its newest checkpoint
3. loop         batch -> embeddings -> loss -> step; now and then a log line, a validation, a save
4. the end      curves.png; for the toy world also the test gallery, metrics.json and report.html

The same command starts and resumes. Everything that is drawn at random (batch order, frames) is a
pure function of (seed, epoch, sample), so a resumed run sees what it would have seen, on any number
of processes. From a fifth of the steps on batches are planned by what the model mixes up then
(training/mining.py); the plan is in the checkpoint. Killed at any moment, a run loses the steps
since its newest checkpoint and takes them again, on the same CPU to the same bits. SIGTERM and
Ctrl-C save one first, at the next step. A folder that holds a run with other settings or other data
is refused, never overwritten.

Output in --out: log.jsonl, step-*.safetensors, best.safetensors (on validation), curves.png.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while importing: no traceback

import contextlib
import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from captions.tokenizer import Tokenizer
from cli import (
    UserError,
    check_ranges,
    give_back_memory,
    keep_freed_memory,
    make_folder,
    parse_config,
    run,
)
from data import (
    Job,
    KnowledgeBatchSampler,
    PairDataset,
    check_broken,
    keep_decodable,
    open_cache,
    prepare_video,
    read_batches,
)
from datasets import toyworld
from datasets.published import DATASETS, load_split
from datasets.shards import load_shards
from datasets.split import Split, TrainedOn
from datasets.tasks import Task
from eval import EvalConfig, evaluate, evaluate_retrieval, machine_facts
from knowledge import ConceptVocab, Knowledge, concept_vectors, extract_many
from losses import LossConfig, clop_loss
from model import CLOP, MAX_LOGIT_SCALE, ModelConfig, build_config
from training.checkpoint import Checkpoint, resume_checkpoint
from training.clip import Pretrained, is_new, read_pretrained
from training.log import plot_curves
from training.mining import mine
from training.muon import Muon
from training.processes import Ranks, StopSignals, launch
from training.run import Run

GRAD_CLIP = 1.0  # largest gradient norm
MINE_EVERY = 100  # steps: what the model mixes up changes


# the groups of --help


@dataclass
class MethodFlags(LossConfig):
    skp_weight: float = 0.5  # SKP: weight of the concept prediction
    beta: float = 0.0  # KCL: how much shared knowledge raises a negative's logit; did not help
    mask_false_negatives: bool = True  # KCL: same video, knowledge or text is never a negative
    text_negatives: float = 1.0  # KCL: random captions without their video, a pair
    guided_share: float = 1.0  # KCL: share of a batch in groups that the model mixes up …
    guided_from: float = 0.2  # … after this share of the steps …
    group_size: int = 8  # … of so many each


@dataclass
class DataFlags:
    dataset: str = "toy"  # toy: rendered here; csv: your own, --data; msrvtt, msvd, …: --data-root
    data_root: str | None = None  # folder of a published data set: docs/benchmarks.md
    videos_root: str | None = None  # where videos are that are not there; csv: paths are below it
    data: str | None = None  # csv, jsonl or json: video, caption
    val_data: str | None = None  # the same for validation; without it there is none
    cache: str = "cache"  # decoded frames, extracted knowledge, toy world
    cache_gb: float = 64.0  # for decoded frames; what does not fit is decoded while training
    max_broken: float = 0.05  # share of unusable videos that stops the run
    workers: int = 2  # processes of a rank that read, decode and tag


@dataclass
class ModelFlags:
    preset: Literal["toy", "small", "base"] = "toy"  # size of the model, see model.py
    init: str | None = None  # weights of a CLIP, or a run: sizes and tokenizer follow from them
    image_size: int | None = None  # H = W of a frame, pixels; None: the preset's, or that of --init
    num_frames: str = "4,4,8"  # T, frames of a video; several: an equal share of the steps each


@dataclass
class OptimizerFlags:
    seed: int = 0  # of weights, batch order and frames
    steps: int = 750  # optimizer steps
    batch_size: int = 128  # pairs in the global batch, over all processes
    chunk: int = 0  # pairs that a process encodes at a time, same negatives; 0 = all
    lr: float = 3e-3  # peak learning rate of AdamW
    muon_lr: float = 0.02  # that of Muon: the blocks' matrices; 0, and --init: all by AdamW
    encoder_lr: float | None = None  # --init: peak rate of its weights, --lr of what is new
    warmup: int = 60  # steps of linear warm-up; then cosine to zero
    weight_decay: float = 0.1  # of matrices only


@dataclass
class MachineFlags:
    gpus: int = 0  # start this many processes, one per GPU; 0 = this process alone
    procs: int = 0  # start this many processes on the CPU; 0 = this process alone
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    compile: bool = False  # torch.compile the model
    checkpointing: bool = False  # recompute activations in the backward pass


@dataclass
class OutputFlags:
    out: str = "runs/toy"  # log, checkpoints, plots
    log_every: int = 20  # steps
    eval_every: int = 150  # steps between validations, each with a checkpoint
    keep: int = 2  # newest checkpoints that stay; 0 = all
    test: bool = True  # toy: at the end, evaluate on the test gallery


@dataclass
class TrainConfig(MethodFlags, DataFlags, ModelFlags, OptimizerFlags, MachineFlags, OutputFlags):
    """Train CLOP on videos with captions. Without any flag: the toy world, on what is here."""

    # fields that change no result: a run may go on with others
    FREE: ClassVar[set[str]] = {
        "out", "cache", "cache_gb", "gpus", "procs", "workers", "chunk", "log_every", "eval_every",
        "keep", "checkpointing", "compile", "max_broken", "test", "videos_root",
    }  # fmt: skip


def main():
    config = parse_config(TrainConfig)
    check_config(config)
    keep_freed_memory()
    processes = config.gpus or config.procs
    if processes and "LOCAL_RANK" not in os.environ:
        sys.exit(launch(processes))

    ranks = Ranks.join(cpu=config.procs > 0)
    with ranks.explain_lost_rank():
        stopped_by = train(config, ranks)
    ranks.leave()
    sys.exit(130 if stopped_by == signal.SIGINT else 0)


def train(config: TrainConfig, ranks: Ranks | None = None) -> int:
    """The whole run. Returns 0 at its end, or the number of the signal that stopped it."""
    ranks = ranks or Ranks.join()
    make_folder(Path(config.out))  # fail before the work, not after it

    # ---- 1. data: captions -> knowledge and tokens, videos -> frames -----------------------------
    with ranks.first_goes_first():  # it renders, decodes and tags; the others find it in the cache
        resumed = resume_checkpoint(config.out, repair=ranks.is_first)
        data = load_data(config, resumed, ranks)
    give_back_memory()  # reading took ten times what stays

    # ---- 2. model and optimizer ------------------------------------------------------------------
    model = build_model(config, data).to(ranks.device)
    optimizers = build_optimizers(model, config)
    run = Run(config, ranks, model, optimizers, data)
    if resumed:
        run.resume(resumed)
    run.open_log(machine_facts(ranks.device.type))
    towers = DistributedDataParallel(model) if ranks.world_size > 1 else model
    towers = torch.compile(towers) if config.compile else towers

    # ---- 3. the loop -----------------------------------------------------------------------------
    idf = torch.from_numpy(data.vocab.idf).to(ranks.device)
    batches = read_epochs(config, ranks, run)
    with StopSignals(ranks) as signals, contextlib.closing(batches):
        while run.step < config.steps:
            batch = run.next_batch(batches)
            if config.beta:
                batch["knowledge"] = concept_vectors(batch["concepts"], idf)  # κ: dot products

            lr = learning_rate(run.step, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["scale"]
            parts = backward(towers, model.logit_scale, batch, config)
            parts["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
            parts = ranks.mean_of(parts)  # the same numbers on all ranks: all decide alike
            if math.isfinite(parts["loss"] + parts["grad_norm"]):
                for optimizer in optimizers:
                    optimizer.step()
                model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
                run.progress["skipped_in_a_row"] = 0
            else:
                run.skip_step(parts)
            model.zero_grad(set_to_none=True)
            run.count_step()

            stopped_by = ranks.agree(signals.received)
            is_last = run.step == config.steps or stopped_by
            if run.step % config.log_every == 0 or is_last:
                run.log_step(parts, lr)
            if run.step % config.eval_every == 0 or is_last:
                metrics = None
                if ranks.is_first and data.val_split and not stopped_by:
                    cache = data.samples.cache
                    metrics = evaluate_retrieval(model, data.tokenizer, data.val_split, cache)
                run.save(metrics)
            if stopped_by:
                how = f"stopped by {signal.Signals(stopped_by).name} after step {run.step}"
                run.say(f"{how}; the same command goes on from {run.saved}")
                return stopped_by

    # ---- 4. the end ------------------------------------------------------------------------------
    if ranks.is_first:
        log, curves = run.out / "log.jsonl", run.out / "curves.png"
        plot_curves(log, curves)
        print(f"{run.saved}, {log}, {curves}")
        data.print_broken()
        if config.dataset == "toy" and config.test:
            evaluate(EvalConfig(checkpoint=str(run.saved), out=config.out, cache=config.cache))
    return 0


# ---- 1. data -------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a run is trained on: samples, how they meet, and what reads them."""

    train_split: Split
    val_split: Split | None
    tokenizer: Tokenizer
    vocab: ConceptVocab
    samples: PairDataset
    sampler: KnowledgeBatchSampler
    sizes: ModelConfig  # of the model
    init: Pretrained | None  # the weights of --init, on the first start
    trained_on: TrainedOn  # these videos, and those of --init
    val_note: str  # why validation would not be comparable

    def fingerprint(self) -> str:
        """Of the captions, and of which are of one video: other ones would give other batches."""
        digest, between = hashlib.sha256(), ""
        for caption in self.train_split.captions:  # one by one: joined, millions take 400 MB
            digest.update((between + caption).encode("utf-8", "surrogatepass"))
            between = "\n"
        digest.update(self.train_split.video_of_caption.tobytes())
        return digest.hexdigest()[:16]

    def print_broken(self) -> None:
        for split in (self.train_split, self.val_split):
            if split and split.broken:
                print(split.describe_broken())


def load_data(config: TrainConfig, resumed: Checkpoint | None, ranks: Ranks) -> Data:
    """Captions become tokens and knowledge, videos become frames on disk."""
    started = time.perf_counter()
    folder, show = Path(config.cache), ranks.is_first
    train_split, val_split = load_splits(config, show)
    sizes, tokenizer, init = starting_point(config, resumed)

    # knowledge first: it takes minutes where decoding takes hours, and may be a reason to stop
    tagging = dict(workers=config.workers, cache=folder / "knowledge", progress=show)
    knowledge = extract_many(train_split.captions, **tagging)
    vocab = resumed.concept_vocab if resumed else ConceptVocab.build(knowledge)
    check_captions(train_split, knowledge, vocab, config, show)

    num_videos = len(train_split.video_paths) + len(val_split.video_paths if val_split else ())
    room = dict(gigabytes=config.cache_gb, num_videos=num_videos)
    cache = open_cache(folder / "frames", sizes, **room)
    check_broken(train_split, config.max_broken)
    validation = Task("", val_split)
    decoding = dict(max_broken=config.max_broken, workers=config.workers, progress=show)
    if cache.share == 1:
        decodable = keep_decodable(train_split, cache, **decoding)
        if len(decodable.captions) < len(train_split.captions):
            row = {caption: i for i, caption in enumerate(train_split.captions)}
            kept = [row[caption] for caption in decodable.captions]
            knowledge = Knowledge(knowledge.names, knowledge.held[kept])
            vocab = resumed.concept_vocab if resumed else ConceptVocab.build(knowledge)
        train_split = decodable
    elif show:
        print(
            f"frame cache {cache.folder}: {cache.share:.0%} of {num_videos} videos fit into "
            f"--cache-gb {config.cache_gb:g}; the others are decoded while training"
        )
    if val_split and ranks.is_first:  # which validates
        val_split = keep_decodable(val_split, cache, **decoding)

    trained_on = TrainedOn.of(config.dataset, train_split)
    if source := resumed or init:
        trained_on = source.trained_on | trained_on
    val_note = validation.count(val_split, trained_on)[1] if val_split else ""

    tokenizer = tokenizer or Tokenizer.train(train_split.captions, sizes.vocab_size)
    samples = PairDataset(
        train_split, cache, tokenizer, vocab, knowledge, text_length=sizes.text_length
    )
    sampler = KnowledgeBatchSampler(
        samples.held,
        samples.video_id,
        batch_size=config.batch_size,
        seed=config.seed,
        guided_share=config.guided_share,
        group_size=config.group_size,
        text_negatives=config.text_negatives,
    )
    if show:
        counts = f"{len(samples)} captions of {len(train_split.video_paths)} videos"
        seconds = time.perf_counter() - started
        print(f"{counts}, {len(vocab)} concepts; ready after {seconds:.0f} s", flush=True)
    read_by = (tokenizer, vocab, samples, sampler, sizes, init)
    return Data(train_split, val_split, *read_by, trained_on, val_note)


def check_captions(split: Split, knowledge: Knowledge, vocab, config, show: bool) -> None:
    """Say what is odd about the captions. Raise UserError where no two share a concept."""
    without = int((np.diff(knowledge.held.indptr) == 0).sum())
    odd = split.describe_captions()
    if show and (odd or without):
        odd = odd or f"{len(split.captions)} captions"
        print(f"{odd}; {without} without a noun or verb (only English is read)", flush=True)
    if not len(vocab) and (config.skp_weight or config.beta):
        raise UserError(
            f"--dataset {config.dataset}: no two of its {len(split.captions)} captions share a "
            "noun or verb; train without knowledge: --skp-weight 0 --beta 0"
        )


def starting_point(config: TrainConfig, resumed: Checkpoint | None) -> tuple:
    """(sizes of the model, tokenizer or None: to be trained, weights of --init or None).

    A resumed run has its own, and never needs --init again.
    """
    last = num_frames(config)[-1]
    if resumed:
        return resumed.model.config, resumed.tokenizer, None
    if config.init:
        found = read_pretrained(config.init, num_frames=last, image_size=config.image_size)
        return found.sizes, found.tokenizer, found

    sizes = build_config(config.preset, num_frames=last)
    sizes = replace(sizes, image_size=config.image_size or sizes.image_size)
    if sizes.image_size % sizes.patch_size:
        raise UserError(
            f"--image-size {sizes.image_size}: not a multiple of the preset's patches of "
            f"{sizes.patch_size} pixels"
        )
    return sizes, None, None


def load_splits(config: TrainConfig, show: bool) -> tuple[Split, Split | None]:
    """The training split; the validation split, or None where there is none."""
    name, root, videos = config.dataset, config.data_root, config.videos_root
    if name == "shards":
        if not config.data:
            raise UserError('--dataset shards: needs --data "FOLDER/{00000..00099}.tar"')
        how = dict(index=Path(config.cache) / "shards", workers=config.workers, progress=show)
        val = load_shards(config.val_data, **how) if config.val_data else None
        return load_shards(config.data, **how), val

    if name == "csv":
        if not config.data:
            raise UserError("--dataset csv: needs --data FILE, with the columns video and caption")
        places, val = dict(videos_root=videos or root), config.val_data
        train_split = load_split("csv", config.data, **places)
        return train_split, load_split("csv", val, "val", **places) if val else None

    if name == "toy":
        folder = Path(config.cache) / "toy"
        root = toyworld.generate(folder, splits=("train", "val"), workers=config.workers)
    if not root:
        raise UserError(f"--dataset {name}: needs --data-root FOLDER with annotations and videos")
    train_split = load_split(name, root, videos_root=videos)
    # MSR-VTT 1k-A has no validation split: the last checkpoint is the result
    has_val = "val" in DATASETS[name].videos
    return train_split, load_split(name, root, "val", videos_root=videos) if has_val else None


def num_frames(config: TrainConfig) -> list[int]:
    """T of each equal share of the steps.

    Few frames first: most of what a caption says, a few frames show, at a fraction of the cost
    (Frozen in Time, https://arxiv.org/abs/2104.00650).
    """
    words = config.num_frames.split(",")
    stages = [int(word) if word.strip().isdecimal() else 0 for word in words]
    if min(stages) < 1 or stages[-1] != max(stages):
        raise UserError(
            f"--num-frames {config.num_frames}: expected a number, or several with commas of which "
            "the last is the largest"
        )
    return stages


def frames_at(config: TrainConfig, step: int) -> int:
    """T at this step."""
    stages = num_frames(config)
    return stages[min(step * len(stages) // config.steps, len(stages) - 1)]


# ---- 2. model and optimizer ----------------------------------------------------------------------


def build_model(config: TrainConfig, data: Data) -> CLOP:
    """A fresh model, with the weights in it that --init names."""
    torch.manual_seed(config.seed)
    num_concepts = len(data.vocab) if config.skp_weight else 0
    sizes = replace(data.sizes, vocab_size=data.tokenizer.vocab_size, num_concepts=num_concepts)
    model = CLOP(sizes)
    if num_concepts:
        model.init_concept_bias(torch.from_numpy(data.vocab.log_odds))
    if data.init:
        new = data.init.load_into(model, data.vocab.names)
        print(f"{data.init.describe()}; newly made: {len(new)} tensors")
    model.use_checkpointing(config.checkpointing)
    return model


def build_optimizers(model: CLOP, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW; and Muon for the matrices of the blocks, where they are trained from scratch.

    Muon takes half of AdamW's steps (docs/LOG.md). Each group has its weight decay, and `scale`:
    its share of --lr.
    """
    groups: dict[tuple, list] = {}
    matrices = []
    for name, parameter in model.named_parameters():
        if config.muon_lr and not config.init and ".blocks." in name and parameter.ndim == 2:
            matrices.append(parameter)
            continue
        # biases, norms, logit_scale: decay would only pull them off their scale
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        is_from_clip = config.init and config.encoder_lr and not is_new(name)
        scale = config.encoder_lr / config.lr if is_from_clip else 1.0
        groups.setdefault((decay, scale), []).append(parameter)

    options = [
        dict(params=parameters, weight_decay=decay, scale=scale)
        for (decay, scale), parameters in groups.items()
    ]
    optimizers = [torch.optim.AdamW(options, betas=(0.9, 0.98), eps=1e-6, fused=True)]
    if matrices:
        options = [dict(params=matrices, scale=config.muon_lr / config.lr)]
        optimizers.append(Muon(options, weight_decay=config.weight_decay))
    return optimizers


# ---- 3. epochs -----------------------------------------------------------------------------------


class Epoch(NamedTuple):
    """Steps that are planned at once."""

    number: int
    first: int  # step
    end: int  # the step after the last
    is_guided: bool


def epoch_of(step: int, config: TrainConfig, num_batches: int) -> Epoch:
    """The epoch of a step. The first guided step begins a new one, and guided ones are short."""
    guided_from = round(config.guided_from * config.steps) if config.guided_share else config.steps
    is_guided = step >= guided_from
    begin, end, length = 0, guided_from, num_batches
    if is_guided:
        begin, end, length = guided_from, config.steps, min(num_batches, MINE_EVERY)

    count = (step - begin) // length
    first = begin + count * length
    number = count + (math.ceil(guided_from / num_batches) if is_guided else 0)
    return Epoch(number, first, min(first + length, end), is_guided)


def read_epochs(config: TrainConfig, ranks: Ranks, run: Run) -> Iterator[dict]:
    """The batches of this rank from the run's step on. What is planned is in `run.order`."""
    samples, sampler = run.data.samples, run.data.sampler
    reading = dict(seed=config.seed, workers=config.workers, max_broken=config.max_broken)

    def embed_samples(rows, place):
        """video_emb of these samples, the first at this place among those of all ranks."""
        T, size = frames_at(config, run.step), config.batch_size
        starts = range(0, len(rows), size)
        jobs = [Job(rows[i : i + size], rows[:0], place + i, 0, T) for i in starts]
        for batch in read_batches(samples, jobs, **reading):
            video = prepare_video(batch["video"].to(ranks.device))
            with autocast(config, ranks.device.type):
                video_emb = run.model.encode_video(video)
            yield video_emb

    def find_hardest(anchors, pool):
        return mine(run, embed_samples, anchors, pool)

    while run.step < config.steps:
        epoch = epoch_of(run.step, config, len(sampler))
        if run.step == epoch.first:  # else a resumed run has the plan
            mining = find_hardest if epoch.is_guided else None
            run.order = sampler.plan(epoch.number, epoch.end - epoch.first, mining)
        jobs = plan_batches(config, ranks, run.order, epoch, run.step)
        with contextlib.closing(read_batches(samples, jobs, **reading)) as batches:
            yield from batches


def plan_batches(
    config: TrainConfig, ranks: Ranks, order: np.ndarray, epoch: Epoch, first_step: int
) -> Iterator[Job]:
    """What this rank loads from the first step on, to the end of the epoch."""
    B = config.batch_size
    for step in range(first_step, epoch.end):
        samples, captions = np.split(order[step - epoch.first], [B])
        shares = np.array_split(samples, ranks.world_size)
        mine, alone = shares[ranks.rank], np.array_split(captions, ranks.world_size)[ranks.rank]
        first = (step - epoch.first) * B + sum(map(len, shares[: ranks.rank]))
        yield Job(mine, alone, first, epoch.number, frames_at(config, step))


# ---- 3. a step -----------------------------------------------------------------------------------


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def backward(towers, logit_scale, batch: dict, config: TrainConfig) -> dict[str, torch.Tensor]:
    """Add the gradient of one batch to the parameters; {name: detached part of the loss}."""
    if config.chunk and config.chunk < len(batch["video"]):
        return backward_in_chunks(towers, logit_scale, batch, config)
    outputs = embed(towers, batch, config)
    loss, parts = loss_of(outputs, logit_scale, batch, config)
    loss.backward()
    return parts


def embed(towers, batch: dict, config: TrainConfig) -> tuple:
    """(video_emb, text_emb, and the concept logits of both, or None)."""
    with autocast(config, batch["video"].device.type):
        return towers(prepare_video(batch["video"]), batch["tokens"], batch["text_mask"])


def autocast(config: TrainConfig, device: str) -> torch.autocast:
    """For the encoders."""
    return torch.autocast(device, torch.bfloat16, enabled=is_half(config, device))


def is_half(config: TrainConfig, device: str) -> bool:
    """Half precision for the products: bfloat16 in the encoders, float16 in the loss.

    Rows of unit length need no range of exponents, so float16's three more bits are free.
    """
    return device == "cuda" if config.precision == "auto" else config.precision == "bf16"


def loss_of(outputs: tuple, logit_scale, batch: dict, config: TrainConfig) -> tuple:
    """(loss of the whole batch, {name: detached part})."""
    video_emb, text_emb, *concept_logits = outputs
    loss, parts = clop_loss(
        video_emb,
        text_emb,
        logit_scale,
        config,
        knowledge=batch.get("knowledge"),
        signature=batch["signature"],
        concept_logits=concept_logits,
        concepts=batch["concepts"],
        video_concepts=batch["video_concepts"],
        batch_size=config.batch_size,
        num_captions=config.batch_size + round(config.text_negatives * config.batch_size),
        dtype=torch.float16 if is_half(config, video_emb.device.type) else None,
    )
    return loss, {"loss": loss.detach(), **parts}


def backward_in_chunks(towers, logit_scale, batch: dict, config: TrainConfig) -> dict:
    """`backward` with the activations of --chunk pairs at a time: GradCache, arXiv 2101.06983.

    The contrastive loss needs all embeddings at once, but not all activations. So embed the batch
    chunk by chunk without a graph. Take the loss of all, and its gradient with respect to the
    embeddings. Then embed each chunk again, now with a graph, and feed it its part of that
    gradient: the same gradient, for one more forward pass. It holds because no pair sees another
    one inside the encoders (no batch norm), and because both passes agree (no dropout).
    """
    count = math.ceil(len(batch["video"]) / config.chunk)
    split = [x.tensor_split(count) for x in batch.values()]
    chunks = [dict(zip(batch, parts)) for parts in zip(*split)]

    with torch.no_grad():
        embedded = [embed(towers, chunk, config) for chunk in chunks]
    columns = [torch.cat(parts) for parts in zip(*embedded) if parts[0] is not None]
    outputs = [column.requires_grad_() for column in columns]  # 2, or 4 with SKP
    scale = logit_scale.detach().requires_grad_()
    loss, parts = loss_of(outputs, scale, batch, config)
    *gradients, scale_gradient = torch.autograd.grad(loss, [*outputs, scale])
    gradients = [gradient.tensor_split(count) for gradient in gradients]

    for i, chunk in enumerate(chunks):
        is_last = chunk is chunks[-1]
        # DDP averages at the end of a backward pass, unless told not to
        waits = not is_last and isinstance(towers, DistributedDataParallel)
        with towers.no_sync() if waits else contextlib.nullcontext():
            again = [output for output in embed(towers, chunk, config) if output is not None]
            wanted = [parts_of[i] for parts_of in gradients]
            if is_last:
                again, wanted = [*again, logit_scale], [*wanted, scale_gradient]
            torch.autograd.backward(again, wanted)

    return parts


# ---- settings ------------------------------------------------------------------------------------


def check_config(config: TrainConfig) -> None:
    """Raise UserError for a value out of its range, before any work."""
    at_least = dict(
        steps=1, batch_size=2, group_size=2, seed=0, chunk=0, gpus=0, procs=0, workers=1, warmup=0,
        log_every=1, eval_every=1, keep=0, hard_k=0, hard_weight=0, skp_weight=0, beta=0,
        weight_decay=0, guided_share=0, guided_from=0, text_negatives=0, max_broken=0,
        cache_gb=0, lr=1e-12, encoder_lr=1e-12, muon_lr=0,
    )  # fmt: skip
    check_ranges(config, at_least, dict(guided_share=1, guided_from=1, max_broken=1))

    if config.encoder_lr and not config.init:
        raise UserError("--encoder-lr: is for pretrained weights; name some with --init")
    if config.gpus and config.procs:
        raise UserError(f"--gpus {config.gpus} --procs {config.procs}: GPUs or the CPU, not both")
    if config.gpus > torch.cuda.device_count():
        raise UserError(
            f"--gpus {config.gpus}: this machine has {torch.cuda.device_count()} GPU(s); lower it, "
            "or leave it out for a CPU (--procs for several processes there)"
        )


if __name__ == "__main__":
    run(main)
