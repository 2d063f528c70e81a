"""Train CLOP: one loop, top to bottom, on a laptop or on many GPUs.

    python train.py                              # embedded toy world, no data and no GPU needed: minutes on two cores
    python train.py --dataset csv --data train.csv --val-data val.csv --preset small --out runs/mine
    python train.py --init FOLDER --encoder-lr 1e-6 …   # from CLIP's weights: docs/finetune.md
    python train.py --gpus 8 …                   # eight processes, one a GPU; --procs 2: two on a CPU
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py …    # four machines

1. data         captions → knowledge → concept vocabulary, tokenizer; videos → frame cache (decoded once)
2. model        preset or --init, optimizer; a run that was interrupted goes on from the newest checkpoint in --out
3. loop         batch → embeddings → loss → step, a line every --log-every steps,
                validation and checkpoint every --eval-every
4. the end      curves.png; for the toy world also the test gallery, metrics.json and report.html

Everything that is drawn at random (batch order, frames) is a pure function of (seed, epoch, sample): a resumed run sees
what it would have seen, on any number of processes. The same command starts and resumes; a folder that holds a run with
other settings or other data is refused, never overwritten. Killed at any moment, a run loses the steps since its newest
checkpoint and takes them again, on the same CPU to the same bits. SIGTERM and SIGINT (Ctrl-C) write one first, at the
next step, and end with status 0 and 130; before the first step there is nothing to save, and they end as usual.

Large batches on small memory (--chunk): the contrastive loss needs all embeddings at once, but not all activations. So,
as in GradCache (arXiv 2101.06983): embed the batch chunk by chunk without a graph; take the loss of all, and its
gradient with respect to the embeddings; embed each chunk again, now with a graph, and feed it its part of that
gradient. The same gradient, one more forward pass of the encoders. It holds because no pair sees another one inside the
encoders (no batch norm) and both passes agree (no dropout).

Output in --out: log.jsonl (runlog.py), step-*.safetensors, best.safetensors (on validation), curves.png.
"""

import contextlib
import hashlib
import itertools
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from datasets import toyworld
from training.checkpoint import list_checkpoints, resume_checkpoint, save_checkpoint
from training.clip import is_new, layer_of, read_clip
from cli import UserError, give_back_memory, keep_freed_memory, parse_config, run
from concepts import ConceptVocab, concept_vectors, extract_many
from data import KnowledgeBatchSampler, PairDataset, keep_decodable, open_cache, prefetch, prepare_video
from datasets.published import DATASETS, load_split
from training.processes import Ranks, StopSignals, launch
from eval import EvalConfig, evaluate, evaluate_retrieval, machine_facts
from losses import LossConfig, clop_loss
from model import CLOP, MAX_LOGIT_SCALE, build_config
from training.log import Log, plot_curves
from captions.tokenizer import Tokenizer


Trainable = Literal["toy", "csv", "msrvtt", "msrvtt-7k", "msrvtt-full", "msvd", "didemo", "lsmdc", "webvid", "cc3m",
                    "webvid+cc3m"]


@dataclass
class TrainConfig:
    """Train CLOP on videos with captions. Without any flag: the embedded toy world, on whatever this machine has."""

    dataset: Trainable = "toy"               # toy: rendered by toyworld.py; csv: your own, --data; else see --data-root
    data_root: str | None = None             # folder of a published data set, see datasets.py
    data: str | None = None                  # csv or jsonl with video, caption; paths below --data-root, else beside it
    val_data: str | None = None              # the same for validation; without it there is none
    out: str = "runs/toy"                    # log, checkpoints, plots
    cache: str = "cache"                     # decoded frames, extracted knowledge, toy world
    preset: Literal["toy", "small", "base"] = "toy"  # size of the model, see model.py
    init: str | None = None                  # weights of a CLIP: sizes, tokenizer follow from them, not from --preset
    image_size: int | None = None            # H = W of a frame, pixels; None: the preset's, or that of --init
    seed: int = 0                            # of weights, batch order and frames
    # optimisation
    steps: int = 1200                        # optimizer steps
    batch_size: int = 128                    # pairs in the global batch, over all processes
    drop_last: bool = True                   # leave out what is left of an epoch after its last full batch
    accumulate: int = 1                      # batches per optimizer step (each with its own negatives)
    chunk: int = 0                           # pairs that a process encodes at a time, same negatives; 0 = all
    lr: float = 1e-3                         # peak learning rate
    encoder_lr: float | None = None          # --init: peak rate of CLIP's weights, --lr of what is new; None: --lr
    layer_decay: float = 1.0                 # --init: … times this for each layer that lies deeper below the top
    freeze: int | None = None                # --init: CLIP's embeddings and the first N blocks of each tower stay put
    warmup: int = 60                         # steps of linear warm-up; then cosine to zero
    weight_decay: float = 0.1                # of matrices only
    grad_clip: float = 1.0                   # largest gradient norm
    num_frames: str = "4,8"                  # T, frames of a video; several: an equal share of the steps each, in order
    # CLOP
    skp_weight: float = 0.5                  # SKP: weight of the concept prediction (more: nouns; less: R@1, LOG.md)
    beta: float = 1.0                        # KCL: how much shared knowledge raises a negative's logit
    hard_k: int = 0                          # KCL: hardest negatives in a second InfoNCE
    hard_weight: float = 0.0                 # KCL: weight of that second InfoNCE
    guided_share: float = 0.5                # KCL: share of a batch that is sampled by knowledge
    guided_from: float = 0.6                 # … after this share of the steps (earlier it buys nothing, LOG.md)
    group_size: int = 4                      # … in groups of so many
    mask_false_negatives: bool = True        # KCL: same video, knowledge or text is never a negative
    # machine
    gpus: int = 0                            # start this many processes, one a GPU; 0 = this process alone
    procs: int = 0                           # start this many processes on the CPU; 0 = this process alone
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    compile: bool = False                    # torch.compile the model
    checkpointing: bool = False              # recompute activations in the backward pass
    workers: int = 2                         # processes that decode and tag before training
    # rhythm
    log_every: int = 20                      # steps
    eval_every: int = 240                    # steps between validations, each with a checkpoint
    keep: int = 2                            # newest checkpoints that stay; 0 = all
    skip_nonfinite: int = 3                  # steps in a row that may be left out for a loss or gradient of NaN or inf
    max_broken: float = 0.05                 # share of unreadable videos that stops the run
    test: bool = True                        # toy: at the end, evaluate on the test gallery

# fields that change no result: a run may go on with others
FREE = ("out", "cache", "gpus", "procs", "workers", "chunk", "log_every", "eval_every", "keep", "skip_nonfinite",
        "checkpointing", "compile", "max_broken", "test")


def main():
    config = parse_config(TrainConfig)
    keep_freed_memory()
    if config.gpus and config.procs:
        raise UserError(f"--gpus {config.gpus} --procs {config.procs}: processes on GPUs or on the CPU, not both")
    if config.gpus > torch.cuda.device_count():
        raise UserError(f"--gpus {config.gpus}: this machine has {torch.cuda.device_count()} GPU(s); lower it, or "
                        "leave it out for a CPU (--procs for several processes there)")
    processes = config.gpus or config.procs
    if processes and "LOCAL_RANK" not in os.environ:
        sys.exit(launch(processes))
    ranks = Ranks.join(cpu=config.procs > 0)
    with ranks.explain_lost_rank():
        stopped_by = train(config, ranks)
    ranks.leave()
    sys.exit(130 if stopped_by == signal.SIGINT else 0)


def train(config: TrainConfig, ranks: Ranks | None = None) -> int:
    """The whole run. Returns 0 at its end, or the number of the signal that stopped it (after a checkpoint)."""
    ranks = ranks or Ranks.join()
    device, out, say = ranks.device, Path(config.out), print if ranks.is_first else lambda *args: None
    bf16 = device.type == "cuda" if config.precision == "auto" else config.precision == "bf16"
    stages = frames_stages(config)           # T of each share of the steps; the last is the model's
    make_folder(out)  # fail before the work, not after it

    # ---- 1. data: captions -> knowledge and tokens, videos -> frames -------------------------------------------------
    started = time.perf_counter()
    with ranks.first_goes_first():  # it renders, decodes and tags; the others find all of it in the cache
        train_split, val_split = load_data(config)
        resumed = resume_checkpoint(out, repair=ranks.is_first)
        clip, sizes, tokenizer = starting_point(config, resumed, stages[-1])
        cache = open_cache(Path(config.cache) / "frames", sizes)
        usable = dict(cache=cache, max_broken=config.max_broken, workers=config.workers, progress=ranks.is_first)
        train_split, val_split = (split and keep_decodable(split, **usable) for split in (train_split, val_split))
        progress = dict(data=fingerprint(train_split), best=None, skipped=0, skipped_in_a_row=0)
        if resumed:
            check_same_run(resumed, config, progress, out)
            progress = resumed.progress
        knowledge = extract_many(train_split.captions, workers=config.workers, cache=Path(config.cache) / "knowledge",
                                 progress=ranks.is_first)
        vocab = resumed.concept_vocab if resumed else ConceptVocab.build(knowledge)
        tokenizer = tokenizer or Tokenizer.train(train_split.captions, sizes.vocab_size)
    dataset = PairDataset(train_split, cache, tokenizer, vocab, knowledge, length=sizes.text_length)
    del knowledge  # the dataset has the ids; the names of all that millions of captions mention need not stay
    give_back_memory()  # reading them took ten times what stays
    sampler = KnowledgeBatchSampler(
        dataset.concept_sets, vocab.word_idf, dataset.video_of_sample, dataset.meaning_id, batch_size=config.batch_size,
        seed=config.seed, drop_last=config.drop_last, rank=ranks.rank, world_size=ranks.world_size,
        guided_share=config.guided_share, guided_from=round(config.guided_from * config.steps * config.accumulate),
        group_size=config.group_size)
    idf = torch.from_numpy(vocab.idf).to(device)
    say(f"{len(dataset)} captions of {len(train_split.video_paths)} videos, {len(vocab)} concepts, "
        f"{tokenizer.vocab_size} tokens; ready after {time.perf_counter() - started:.0f} s")

    # ---- 2. model and optimizer --------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    num_concepts = len(vocab) if config.skp_weight else 0
    model = CLOP(replace(sizes, vocab_size=tokenizer.vocab_size, num_concepts=num_concepts)).to(device)
    if num_concepts:
        model.init_concept_bias(torch.from_numpy(vocab.log_odds))
    model.use_checkpointing(config.checkpointing)
    if clip:
        new = clip.load_into(model)
        say(f"{clip.describe()}; newly made: {len(new)} tensors (time path, concept head)")
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.98), eps=1e-6, fused=True)
    step = 0
    if resumed:
        step = resumed.step
        model.load_state_dict(resumed.model.state_dict())
        restore_optimizer(optimizer, model, resumed.training)
        say(f"{resumed.path}: goes on from step {step} of {config.steps}")
    towers = DistributedDataParallel(model) if ranks.world_size > 1 else model
    towers = torch.compile(towers) if config.compile else towers
    weights = LossConfig(skp_weight=config.skp_weight, beta=config.beta, hard_k=config.hard_k,
                         hard_weight=config.hard_weight, mask_false_negatives=config.mask_false_negatives)

    # ---- 3. the loop -------------------------------------------------------------------------------------------------
    if ranks.is_first:
        log = Log(out / "log.jsonl", step)
        log.write(dict(config=asdict(config), world_size=ranks.world_size,
                       parameters=sum(p.numel() for p in model.parameters()), **machine_facts(device.type),
                       resumed_at=step))
    saved, stopped_by = resumed.path if resumed else None, 0
    jobs = ((frames_at(number // config.accumulate, stages, config.steps), epoch, indices, size)
            for number, epoch, indices, size in endless_batches(sampler, start=step * config.accumulate))
    batches = prefetch(lambda job: (dataset.batch(job[2], num_frames=job[0], seed=config.seed, epoch=job[1]), job[3]),
                       jobs)
    data_time, logged_step, clock = 0.0, step, time.perf_counter()
    with StopSignals(ranks) as signals:
        while step < config.steps and not stopped_by:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config) * group["scale"]
            totals = 0.0
            for micro in range(config.accumulate):
                waited = time.perf_counter()
                batch, batch_size = next(batches)
                batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
                data_time += time.perf_counter() - waited

                def loss_of(video_emb, text_emb, concept_logits, logit_scale):
                    loss, parts = clop_loss(
                        video_emb, text_emb, logit_scale, weights, batch_size=batch_size,
                        concept_logits=concept_logits, concepts=batch["concepts"],
                        knowledge=concept_vectors(batch["concepts"], idf) if config.beta else None,
                        signature=torch.stack([batch["video_id"], batch["meaning_id"]], dim=1))
                    return loss / config.accumulate, {"loss": loss.detach(), **parts}

                parts = backward(towers, model.logit_scale, batch, loss_of, chunk=config.chunk, bf16=bf16,
                                 sync=micro == config.accumulate - 1)
                totals = totals + torch.stack([*parts.values()]) / config.accumulate
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            # one number from each rank for each question, so that all ranks get the same answers
            asked = totals.new_tensor([signals.received == signal.SIGINT, signals.received == signal.SIGTERM])
            *values, grad_norm, by_int, by_term = ranks.mean(torch.cat([totals, grad_norm[None], asked])).tolist()
            sums = dict(zip(parts, values))
            stopped_by = signal.SIGINT if by_int else signal.SIGTERM if by_term else 0
            if math.isfinite(sums["loss"] + grad_norm):
                optimizer.step()
                model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)  # beyond it there is no gradient to come back by
                progress["skipped_in_a_row"] = 0
            else:
                progress["skipped"] += 1
                progress["skipped_in_a_row"] += 1
                what = f"step {step + 1}: loss {sums['loss']} with gradient norm {grad_norm} is not finite"
                if progress["skipped_in_a_row"] > config.skip_nonfinite:
                    ranks.fail(f"{what}, after {config.skip_nonfinite} skipped steps; the last good checkpoint is "
                               f"{saved or 'none, this run saved none yet'}; lower --lr or raise --warmup")
                say(f"{what}: skipped, the weights stay as they are")
            optimizer.zero_grad(set_to_none=True)
            step += 1

            if ranks.is_first and (step % config.log_every == 0 or step == config.steps or stopped_by):
                seconds = (time.perf_counter() - clock) / (step - logged_step)
                log.step(step, config, sums, scale=model.logit_scale.exp().item(), grad_norm=grad_norm,
                         lr=learning_rate(step - 1, config), skipped=progress["skipped"], step_s=seconds,
                         data_s=data_time / (step - logged_step))
                data_time, logged_step, clock = 0.0, step, time.perf_counter()
            if step % config.eval_every == 0 or step == config.steps or stopped_by:
                paused = time.perf_counter()
                if ranks.is_first:
                    contents = dict(model=model, tokenizer=tokenizer, concept_vocab=vocab, config=asdict(config),
                                    step=step, progress=progress)
                    if val_split and not stopped_by:
                        score = log.validation(step, evaluate_retrieval(model, tokenizer, val_split, cache))
                        if progress["best"] is None or score > progress["best"]:
                            progress["best"] = score
                            save_checkpoint(out / "best.safetensors", **contents)
                    saved = out / f"step-{step:06d}.safetensors"
                    log.flush_to_disk()
                    save_checkpoint(saved, **contents, training=optimizer_tensors(optimizer, model))
                    for old in list_checkpoints(out)[:-config.keep]:
                        old.unlink()
                ranks.wait()
                clock += time.perf_counter() - paused

    # ---- 4. the end --------------------------------------------------------------------------------------------------
    if stopped_by:
        say(f"stopped by {signal.Signals(stopped_by).name} after step {step}; the same command goes on from {saved}")
        return stopped_by
    if ranks.is_first:
        plot_curves(out / "log.jsonl", out / "curves.png")
        say(f"{saved}, {out / 'log.jsonl'}, {out / 'curves.png'}")
        for split in filter(None, (train_split, val_split)):
            print(split.describe_broken(), end="\n" * bool(split.broken))
        if config.dataset == "toy" and config.test:
            evaluate(EvalConfig(checkpoint=str(saved), task="toy", out=str(out), cache=config.cache))
    return 0


def backward(towers, logit_scale, batch: dict, loss_of, *, chunk: int, bf16: bool, sync: bool) -> dict:
    """Add the gradients of one batch to the parameters; {name: detached part of the loss}.

    loss_of(video_emb, text_emb, concept_logits, logit_scale) -> (loss, parts). Without `sync` ranks do not average yet.
    chunk > 0: by chunks, as the top of this file explains; the gradient is the same.
    """
    n = len(batch["tokens"])
    pieces = [slice(start, start + (chunk or n)) for start in range(0, n, chunk or n)]

    def encode(rows: slice):
        with torch.autocast(batch["video"].device.type, torch.bfloat16, enabled=bf16):
            return towers(prepare_video(batch["video"][rows]), batch["tokens"][rows], batch["text_mask"][rows])

    def averaging(now: bool):  # DDP averages at the end of a backward pass, unless told not to
        return contextlib.nullcontext() if now or not hasattr(towers, "no_sync") else towers.no_sync()

    if len(pieces) == 1:
        with averaging(sync):
            loss, parts = loss_of(*encode(pieces[0]), logit_scale)
            loss.backward()
        return parts
    with torch.no_grad():
        encoded = [torch.cat(x) if x[0] is not None else None for x in zip(*map(encode, pieces))]   # [n, …] each
    inputs = [x if x is None else x.detach().requires_grad_() for x in (*encoded, logit_scale)]
    loss, parts = loss_of(*inputs)
    *gradients, scale_gradient = torch.autograd.grad(loss, [x for x in inputs if x is not None])
    for rows in pieces:
        last = rows is pieces[-1]
        with averaging(sync and last):
            outputs = [x for x in encode(rows) if x is not None]
            torch.autograd.backward(outputs + [logit_scale] * last,
                                    [gradient[rows] for gradient in gradients] + [scale_gradient] * last)
    return parts


def make_folder(out: Path):
    """Make the run's folder. Raises UserError where nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"{out}: cannot write there ({error.strerror}); choose another --out") from error


def load_data(config: TrainConfig):
    """(training split, validation split or None)."""
    if config.dataset == "toy":
        folder = toyworld.generate(Path(config.cache) / "toy", workers=config.workers)
        return load_split("toy", folder, "train"), load_split("toy", folder, "val")
    if config.dataset == "csv":
        if not config.data:
            raise UserError("--dataset csv: needs --data FILE, a csv or jsonl file with the columns video and caption")
        return (load_split("csv", config.data, root=config.data_root),
                load_split("csv", config.val_data, "val", root=config.data_root) if config.val_data else None)
    if not config.data_root:
        raise UserError(f"--dataset {config.dataset}: needs --data-root FOLDER with its annotation files and videos")
    has_val = "val" in DATASETS[config.dataset].videos  # MSR-VTT 1k-A has none: the last checkpoint is the result
    return (load_split(config.dataset, config.data_root),
            load_split(config.dataset, config.data_root, "val") if has_val else None)


def starting_point(config: TrainConfig, resumed, num_frames: int):
    """(CLIP's weights or None, sizes of the model, tokenizer or None: to be trained).

    A resumed run has its own, and never needs --init's file again.
    """
    if config.init is None and (config.encoder_lr, config.layer_decay, config.freeze) != (None, 1.0, None):
        raise UserError("--encoder-lr, --layer-decay, --freeze: treat pretrained weights apart; name some with --init")
    if resumed:
        return None, resumed.model.config, resumed.tokenizer
    clip = read_clip(config.init, num_frames=num_frames, image_size=config.image_size) if config.init else None
    if clip:
        return clip, clip.sizes, Tokenizer.from_clip(clip.path.parent, clip.sizes.vocab_size)
    sizes = build_config(config.preset, num_frames=num_frames)
    sizes = replace(sizes, image_size=config.image_size or sizes.image_size)
    if sizes.image_size % sizes.patch_size:
        raise UserError(f"--image-size {sizes.image_size}: not a multiple of the preset's patches of "
                        f"{sizes.patch_size} pixels")
    return None, sizes, None


def parameter_groups(model: CLOP, config: TrainConfig) -> list[dict]:
    """AdamW's groups, each with its weight decay and `scale`, its share of --lr; what --freeze names needs no gradient.

    Scale is 1 but for what CLIP brought: --encoder-lr / --lr × --layer-decay^(layers below the top of its tower).
    """
    groups: dict[tuple, list] = {}
    for name, p in model.named_parameters():
        scale = 1.0
        if config.init and not is_new(name):
            layer, top = layer_of(name, model.config)
            scale = (config.encoder_lr or config.lr) / config.lr * config.layer_decay ** (top - layer)
            p.requires_grad_(config.freeze is None or layer > config.freeze)
        # biases, norms, logit_scale: decay would only pull them off their scale
        groups.setdefault((config.weight_decay if p.ndim >= 2 else 0.0, scale), []).append(p)
    return [dict(params=params, weight_decay=decay, scale=scale) for (decay, scale), parameters in groups.items()
            if (params := [p for p in parameters if p.requires_grad])]


def fingerprint(split) -> str:
    """Of the captions, and of which of them are of one video: with others, the batches would not be those of before."""
    digest = hashlib.sha256("\n".join(split.captions).encode("utf-8", "surrogatepass"))
    digest.update(split.video_of_caption.tobytes())
    return digest.hexdigest()[:16]


def check_same_run(resumed, config: TrainConfig, progress: dict, out: Path):
    """A folder holds one run: raise UserError if its checkpoint comes of settings or data that change the result."""
    changed = [f"--{name.replace('_', '-')} {old} → {getattr(config, name, 'gone')}"
               for name, old in resumed.config.items() if name not in FREE and getattr(config, name, None) != old]
    if changed:
        raise UserError(f"{out}: holds a run with other settings ({', '.join(changed)}); "
                        "choose another --out, or delete the folder")
    if resumed.progress.get("data") != progress["data"]:
        raise UserError(f"{out}: holds a run on other captions or videos (has the data file changed, or are other "
                        "videos broken now?); restore them, choose another --out, or delete the folder")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def frames_stages(config: TrainConfig) -> list[int]:
    """T of each equal share of the steps, from --num-frames. Raises UserError where that is no such list.

    Few frames first: most of what a caption says, a few frames show, at a fraction of the cost (Frozen in Time,
    https://arxiv.org/abs/2104.00650).
    """
    stages = [int(stage) if stage.strip().isdecimal() else 0 for stage in str(config.num_frames).split(",")]
    if min(stages) < 1 or stages[-1] != max(stages) or len(stages) > config.steps:
        raise UserError(f"--num-frames {config.num_frames}: expected one number, or several with commas of which the "
                        f"last is the largest, and no more of them than --steps ({config.steps})")
    return stages


def frames_at(step: int, stages: list[int], steps: int) -> int:
    """T of this step; a batch that is read ahead beyond the last step has the last one's."""
    return stages[min(step, steps - 1) * len(stages) // steps]


def endless_batches(sampler, start: int):
    """(number, epoch, this rank's samples, size on all ranks) of batch `start`, `start` + 1, …: resuming skips, and
    replays nothing."""
    epoch, first = divmod(start, len(sampler))
    numbers = itertools.count(start)
    for epoch in itertools.count(epoch):
        for number, indices in enumerate(sampler.batches(epoch, first), first):
            yield next(numbers), epoch, indices, min(sampler.batch_size, sampler.size - number * sampler.batch_size)
        first = 0


def optimizer_tensors(optimizer, model) -> dict[str, torch.Tensor]:
    """{"<moment>.<parameter>": tensor}: AdamW's state under the parameters' names, so that order does not matter."""
    return {f"{moment}.{name}": value for name, p in model.named_parameters()
            for moment, value in optimizer.state[p].items()}


def restore_optimizer(optimizer, model, tensors):
    for name, p in model.named_parameters():
        found = {moment: tensors.get(f"{moment}.{name}") for moment in ("step", "exp_avg", "exp_avg_sq")}
        if found["step"] is not None:  # none yet: every step until now was skipped
            optimizer.state[p] = {moment: value.to(p.device if moment != "step" else "cpu")
                                  for moment, value in found.items()}


if __name__ == "__main__":
    run(main)
