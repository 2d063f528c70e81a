"""Train CLOP: one loop, top to bottom, on a laptop or on many GPUs.

    python train.py                              # embedded toy world, no data and no GPU needed: minutes on two cores
    python train.py --dataset csv --data train.csv --val-data val.csv --preset small --out runs/mine
    python train.py --gpus 8 …                   # eight processes, one a GPU (torchrun train.py … works as well)

1. data         captions → knowledge → concept vocabulary, tokenizer; videos → frame cache (decoded once)
2. model        preset, optimizer; a run that was interrupted goes on from the newest checkpoint in --out
3. loop         batch → embeddings → loss → step, a line every --log-every steps,
                validation and checkpoint every --eval-every
4. the end      curves.png; for the toy world also the test gallery, metrics.json and report.html

Everything that is drawn at random (batch order, frames) is a pure function of (seed, epoch, sample): a resumed run sees
what it would have seen. The same command starts and resumes; a folder that holds a run with other settings is refused,
never overwritten.

Output in --out: log.jsonl (first line: settings, versions, commit, hardware; then a line a logged step),
step-*.safetensors, curves.png.
"""

import itertools
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import toyworld
from checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from cli import UserError, give_back_memory, parse_config, run
from data import KnowledgeBatchSampler, PairDataset, keep_decodable, open_cache, prefetch, prepare_video
from datasets import DATASETS, load_split
from eval import EvalConfig, evaluate, evaluate_retrieval, machine_facts
from knowledge import ConceptVocab, concept_vectors, extract_many, meaning_ids
from losses import LossConfig, clop_loss
from model import CLOP, PRESETS, build_config
from tokenizer import Tokenizer


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
    seed: int = 0                            # of weights, batch order and frames
    # optimisation
    steps: int = 1150                        # optimizer steps
    batch_size: int = 128                    # pairs in the global batch, over all processes
    accumulate: int = 1                      # batches per optimizer step (each with its own negatives)
    lr: float = 1e-3                         # peak learning rate
    warmup: int = 60                         # steps of linear warm-up; then cosine to zero
    weight_decay: float = 0.1                # of matrices only
    grad_clip: float = 1.0                   # largest gradient norm
    num_frames: int = 8                      # T, frames of a video that the model sees
    frames_curriculum: str | None = None     # begin with fewer: 1,4,8 = a third of the steps each; ends with num_frames
    # CLOP
    skp_weight: float = 1.0                  # SKP: weight of the concept prediction
    beta: float = 1.0                        # KCL: how much shared knowledge raises a negative's logit
    hard_k: int = 0                          # KCL: hardest negatives in a second InfoNCE
    hard_weight: float = 0.0                 # KCL: weight of that second InfoNCE
    guided_share: float = 0.75               # KCL: share of a batch that is sampled by knowledge
    guided_from: float = 0.3                 # … after this share of the steps (earlier it slows learning, LOG.md)
    mask_false_negatives: bool = True        # KCL: same video, knowledge or text is never a negative
    # machine
    gpus: int = 0                            # start this many processes, one a GPU; 0 = this process alone
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    compile: bool = False                    # torch.compile the model
    checkpointing: bool = False              # recompute activations in the backward pass
    workers: int = 2                         # processes that decode and tag before training
    # rhythm
    log_every: int = 20                      # steps
    eval_every: int = 230                    # steps between validations, each with a checkpoint
    max_broken: float = 0.05                 # share of unreadable videos that stops the run
    test: bool = True                        # toy: at the end, evaluate on the test gallery


def main():
    config = parse_config(TrainConfig)
    if config.gpus and "LOCAL_RANK" not in os.environ:
        launch(config.gpus)
    train(config)


def launch(processes: int):
    """Replace this process by `processes` copies of the command, started by torch.distributed.run."""
    if processes > torch.cuda.device_count():
        raise UserError(f"--gpus {processes}: this machine has {torch.cuda.device_count()} GPU(s); "
                        "lower it, or leave it out for a CPU")
    arguments = ["--standalone", f"--nproc-per-node={processes}", *sys.argv]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *arguments])


def train(config: TrainConfig):
    rank, world_size, device = set_up_process()
    main_process, out = rank == 0, Path(config.out)
    say = print if main_process else (lambda *args, **kwargs: None)
    bf16 = device.type == "cuda" if config.precision == "auto" else config.precision == "bf16"
    if config.batch_size % world_size:
        raise UserError(f"--batch-size {config.batch_size}: not divisible by {world_size} processes; choose a multiple")

    stages = frames_stages(config)
    make_folder(out)  # fail before the work, not after it

    # ---- 1. data: captions -> knowledge and tokens, videos -> frames -------------------------------------------------
    started = time.perf_counter()
    if not main_process:
        dist.barrier()  # the first rank renders, decodes and tags; the others find all of it in the cache
    train_split, val_split = load_data(config)
    sizes = build_config(config.preset, num_frames=config.num_frames)
    cache = open_cache(Path(config.cache) / "frames", sizes)
    usable = dict(cache=cache, max_broken=config.max_broken, workers=config.workers, progress=main_process)
    train_split, val_split = (split and keep_decodable(split, **usable) for split in (train_split, val_split))
    knowledge = extract_many(train_split.captions, workers=config.workers, cache=Path(config.cache) / "knowledge",
                             progress=main_process)
    if main_process and world_size > 1:
        dist.barrier()
    resumed = load_checkpoint(out, training=True) if list_checkpoints(out) else None
    if resumed:
        check_same_run(resumed, config, out)
        tokenizer, vocab = resumed.tokenizer, resumed.concept_vocab
    else:
        tokenizer, vocab = Tokenizer.train(train_split.captions, sizes.vocab_size), ConceptVocab.build(knowledge)
    dataset = PairDataset(train_split, cache, tokenizer, vocab, knowledge, length=sizes.text_length)
    del knowledge  # the dataset has the ids; the names of all that millions of captions mention need not stay
    give_back_memory()  # reading them took ten times what stays
    guided_from = config.guided_from * config.steps * config.accumulate  # batches
    sampler = KnowledgeBatchSampler(
        dataset.concept_sets, vocab.idf, dataset.video_of_sample, dataset.meaning_id, batch_size=config.batch_size,
        seed=config.seed, drop_last=True, rank=rank, world_size=world_size,
        guided_share=lambda epoch: config.guided_share if epoch * len(sampler) >= guided_from else 0.0)
    idf = torch.from_numpy(vocab.idf).to(device)
    say(f"{len(dataset)} captions of {len(train_split.video_paths)} videos, {len(vocab)} concepts, "
        f"{tokenizer.vocab_size} tokens; ready after {time.perf_counter() - started:.0f} s")

    # ---- 2. model and optimizer --------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    num_concepts = len(vocab) if config.skp_weight else 0
    model = CLOP(replace(sizes, vocab_size=tokenizer.vocab_size, num_concepts=num_concepts)).to(device)
    model.use_checkpointing(config.checkpointing)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    # biases, norms, logit_scale: decay would only pull them off their scale
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=config.weight_decay),
                                   dict(params=others, weight_decay=0.0)], betas=(0.9, 0.98), eps=1e-6, fused=True)
    step = 0
    if resumed:
        step = resumed.step
        model.load_state_dict(resumed.model.state_dict())
        restore_optimizer(optimizer, model, resumed.training)
        say(f"{resumed.path}: goes on from step {step} of {config.steps}")
    towers = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    towers = torch.compile(towers) if config.compile else towers
    losses = LossConfig(skp_weight=config.skp_weight, beta=config.beta, hard_k=config.hard_k,
                        hard_weight=config.hard_weight, mask_false_negatives=config.mask_false_negatives)

    # ---- 3. the loop -------------------------------------------------------------------------------------------------
    log = Log(out / "log.jsonl") if main_process else None
    if main_process:
        log.write(dict(config=asdict(config), world_size=world_size,
                       parameters=sum(p.numel() for p in model.parameters()), **machine_facts(device.type),
                       resumed_at=step))
    saved = resumed.path if resumed else None
    jobs = ((frames_at(number // config.accumulate, stages, config.steps), epoch, indices)
            for number, epoch, indices in endless_batches(sampler, start=step * config.accumulate))
    batches = prefetch(lambda job: dataset.batch(job[2], num_frames=job[0], seed=config.seed, epoch=job[1]), jobs)
    data_time, logged_step, clock = 0.0, step, time.perf_counter()
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        sums: dict[str, float] = {}
        for micro in range(config.accumulate):
            waited = time.perf_counter()
            batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
            data_time += time.perf_counter() - waited
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                video_emb, text_emb, concept_logits = towers(
                    prepare_video(batch["video"]), batch["tokens"], batch["text_mask"])
            loss, parts = clop_loss(
                video_emb, text_emb, model.logit_scale, losses, concept_logits=concept_logits,
                concepts=batch["concepts"], knowledge=concept_vectors(batch["concepts"], idf) if config.beta else None,
                signature=torch.stack([batch["video_id"], batch["meaning_id"]], dim=1))
            (loss / config.accumulate).backward()
            for name, value in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, 0.0) + value.item() / config.accumulate
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        if not math.isfinite(sums["loss"] + grad_norm):
            raise UserError(f"step {step + 1}: loss {sums['loss']} with gradient norm {grad_norm} is not finite; "
                            f"the last good checkpoint is {saved or 'none, this run saved none yet'}; "
                            "lower --lr or raise --warmup")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        if main_process and (step % config.log_every == 0 or step == config.steps):
            seconds = (time.perf_counter() - clock) / (step - logged_step)
            log.step(step, config, sums, scale=model.logit_scale.exp().item(), grad_norm=grad_norm,
                     lr=learning_rate(step - 1, config), step_s=seconds, data_s=data_time / (step - logged_step))
            data_time, logged_step, clock = 0.0, step, time.perf_counter()
        if step % config.eval_every == 0 or step == config.steps:
            paused = time.perf_counter()
            if main_process:
                if val_split:
                    log.validation(step, evaluate_retrieval(model, tokenizer, val_split, cache))
                saved = out / f"step-{step:06d}.safetensors"
                save_checkpoint(saved, model, tokenizer, vocab, config=asdict(config), step=step,
                                training=optimizer_tensors(optimizer, model))
                for old in list_checkpoints(out)[:-2]:
                    old.unlink()
            clock += time.perf_counter() - paused

    # ---- 4. the end --------------------------------------------------------------------------------------------------
    if main_process:
        plot_curves(out / "log.jsonl", out / "curves.png")
        say(f"{saved}, {out / 'log.jsonl'}, {out / 'curves.png'}")
        for split in filter(None, (train_split, val_split)):
            print(split.describe_broken(), end="\n" * bool(split.broken))
        if config.dataset == "toy" and config.test:
            evaluate(EvalConfig(checkpoint=str(saved), task="toy", out=str(out), cache=config.cache))
    if dist.is_initialized():
        dist.destroy_process_group()


def set_up_process() -> tuple[int, int, torch.device]:
    """(rank, world_size, device); joins the process group if torchrun started us."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the first rank may decode for hours while the others wait
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24))
    return dist.get_rank(), dist.get_world_size(), device


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


def check_same_run(resumed, config: TrainConfig, out: Path):
    """A folder holds one run: raise UserError if its checkpoint was made with settings that change the result."""
    free = {"out", "cache", "gpus", "workers", "log_every", "eval_every",
            "checkpointing", "compile", "max_broken", "test"}
    changed = [f"--{name.replace('_', '-')} {old} → {getattr(config, name)}" for name, old in resumed.config.items()
               if name not in free and getattr(config, name) != old]
    if changed:
        raise UserError(f"{out}: holds a run with other settings ({', '.join(changed)}); "
                        "choose another --out, or delete the folder")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def frames_stages(config: TrainConfig) -> list[int]:
    """T of each equal share of the steps. Raises UserError where the curriculum is no such list.

    Few frames first: most of what a caption says, a single frame shows, at a fraction of the cost (Frozen in Time,
    https://arxiv.org/abs/2104.00650).
    """
    text = str(config.num_frames) if config.frames_curriculum is None else config.frames_curriculum
    stages = [int(stage) if stage.strip().isdecimal() else 0 for stage in text.split(",")]
    if min(stages) < 1 or stages[-1] != config.num_frames or len(stages) > config.steps:
        raise UserError(f"--frames-curriculum {text}: expected numbers of frames with commas, the last of them "
                        f"--num-frames ({config.num_frames}), and no more of them than --steps ({config.steps})")
    return stages


def frames_at(step: int, stages: list[int], steps: int) -> int:
    """T of this step; a batch that is read ahead beyond the last step has the last one's."""
    return stages[min(step, steps - 1) * len(stages) // steps]


def endless_batches(sampler, start: int):
    """(number, epoch, sample indices) of batch `start`, `start` + 1, … of the run: resuming skips, and replays
    nothing."""
    epoch, first = divmod(start, len(sampler))
    numbers = itertools.count(start)
    for epoch in itertools.count(epoch):
        for indices in sampler.batches(epoch, first):
            yield next(numbers), epoch, indices
        first = 0


def optimizer_tensors(optimizer, model) -> dict[str, torch.Tensor]:
    """{"<moment>.<parameter>": tensor}: AdamW's state under the parameters' names, so that order does not matter."""
    return {f"{moment}.{name}": value for name, p in model.named_parameters()
            for moment, value in optimizer.state[p].items()}


def restore_optimizer(optimizer, model, tensors):
    for name, p in model.named_parameters():
        optimizer.state[p] = {moment: tensors[f"{moment}.{name}"].to(p.device if moment != "step" else "cpu")
                              for moment in ("step", "exp_avg", "exp_avg_sq")}


class Log:
    """log.jsonl: one JSON object a line, and the same for people on stdout."""

    def __init__(self, path: Path):
        self.file = open(path, "a", encoding="utf-8")

    def write(self, entry: dict):
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def step(self, step, config: TrainConfig, sums, *, scale, grad_norm, lr, step_s, data_s):
        pairs_per_s = config.batch_size * config.accumulate / step_s
        self.write(dict(step=step, **sums, logit_scale=scale, grad_norm=grad_norm, lr=lr, pairs_per_s=pairs_per_s,
                        step_s=step_s, data_s=data_s))
        parts = " ".join(f"{name} {value:.3f}" for name, value in sums.items())
        left = (config.steps - step) * step_s
        print(f"step {step}/{config.steps}  {parts}  scale {scale:.1f}  grad {grad_norm:.2f}  lr {lr:.1e}  "
              f"{pairs_per_s:.0f} pairs/s  step {1000 * step_s:.0f} ms (data {1000 * data_s:.0f})  "
              f"{left / 60:.1f} min left", flush=True)

    def validation(self, step: int, metrics: dict):
        self.write(dict(step=step, validation=metrics))
        print(f"step {step}  validation: " + "  ".join(f"{name} {value:.1f}" for name, value in metrics.items()),
              flush=True)


def plot_curves(log_path: Path, picture: Path):
    """Loss parts, logit scale, speed and validation recall over steps -> a PNG."""
    import matplotlib  # here, not above: it takes a second to import, and only the end of a run draws

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in open(log_path, encoding="utf-8")]
    steps, checks = [x for x in lines if "loss" in x], [x for x in lines if "validation" in x]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")

    def draw(axis, title, entries, names, value):
        for name in names:
            points = [(x["step"], value(x)[name]) for x in entries if name in value(x)]
            if points:
                axis.plot(*zip(*points), label=name, linewidth=1.2)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)

    draw(axes[0, 0], "loss and its parts", steps, ("loss", "nce", "hard", "skp"), lambda x: x)
    draw(axes[0, 1], "validation recall, %", checks, ("t2v_R@1", "t2v_R@5", "v2t_R@1"), lambda x: x["validation"])
    draw(axes[1, 0], "logit scale and gradient norm", steps, ("logit_scale", "grad_norm"), lambda x: x)
    draw(axes[1, 1], "seconds a step, and of them waiting for data", steps, ("step_s", "data_s"), lambda x: x)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
