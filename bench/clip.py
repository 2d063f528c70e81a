"""A training step of CLIP's towers here and in `transformers`, and the tokenizers, side by side in
one run.

    python -m bench.clip                          # base shapes, two layers a tower: a minute or two
                                                  on a CPU
    python -m bench.clip --layers 12 --batch 32   # the whole of ViT-B/16, for a GPU

Both get the same pictures, captions and weights (ours are theirs, through clip.py), the same
precision, PyTorch's scaled-dot-product attention and the same loss; a step is forward + backward +
AdamW. `transformers` has no video: its frames are B·T images whose features are averaged. So the
fair row is "space only", the very same function of the very same parameters; "with time" has our
attention along time on top, a third more parameters in each block of the video tower. They take
turns, medians count; on a CPU of processor seconds. Our last block runs its MLP only on the token
that is read: 8/12 of a block's products saved, 33 % of all with two layers, 6 % with twelve. So few
layers flatter us.
"""

import importlib.util
import json
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from captions.tokenizer import Tokenizer
from cli import UserError, parse_config, run
from losses import info_nce
from model import CLOP, Block, SpaceTimeBlock, build_config
from training.clip import read_clip

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class BenchConfig:
    """Benchmark of model.py against transformers' CLIPModel, and of tokenizer.py against CLIP's
    tokenizers.
    """

    layers: int = 2  # of each tower
    batch: int = 4  # videos
    frames: str = "1,4"  # T, by commas
    length: int = 32  # text tokens
    rounds: int = 5  # of which the median counts
    captions: int = 5000  # for the tokenizers; 0: leave them out


class SpaceOnly(SpaceTimeBlock):
    """A block whose time path is taken out: what is left is CLIP's own."""

    def forward(self, x, read=...):
        return Block.forward(self, x.flatten(0, 1), read=read).unflatten(0, x.shape[:2])


def hugging_face(sizes):
    """transformers' CLIPModel of these sizes, random."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "transformers: not installed, and it is what we compare with; pip install "
            "transformers==5.23.0"
        )
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(
        CLIPConfig(
            vision_config=dict(
                hidden_size=sizes.video_width,
                intermediate_size=4 * sizes.video_width,
                num_hidden_layers=sizes.video_layers,
                num_attention_heads=sizes.video_heads,
                image_size=sizes.image_size,
                patch_size=sizes.patch_size,
            ),
            text_config=dict(
                hidden_size=sizes.text_width,
                intermediate_size=4 * sizes.text_width,
                num_hidden_layers=sizes.text_layers,
                num_attention_heads=sizes.text_heads,
                vocab_size=sizes.vocab_size,
            ),
            projection_dim=sizes.embed_dim,
            attn_implementation="sdpa",
        )
    )


def read_weights(theirs):
    """Their weights under our names, by way of a file."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return read_clip(folder)


def bench_step(layers: int, batch: int, T: int, length: int, rounds: int, device: str):
    """Print throughputs of one step, in videos a second, and their ratios."""
    sizes = build_config(
        "base", quick_gelu=True, video_layers=layers, text_layers=layers, num_frames=T
    )
    torch.manual_seed(0)
    theirs = hugging_face(sizes)
    ours = {"space only": CLOP(sizes), "with time": CLOP(sizes)}
    weights = read_weights(theirs)
    for model in ours.values():
        weights.load_into(model)
    for block in ours["space only"].video.blocks:
        block.__class__ = SpaceOnly
        block.time_norm = block.time_attn = None
    ours["space only"].video.time_embed.requires_grad_(False)
    video = torch.randn(batch, T, 3, 224, 224, device=device)
    tokens = torch.randint(1, 49406, (batch, length), device=device)
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    text_mask = torch.ones_like(tokens, dtype=torch.bool)

    def ours_loss(model):
        video_emb, text_emb, *_ = model(video, tokens, text_mask)
        return info_nce(video_emb, text_emb, model.logit_scale)

    def theirs_loss(model):
        features = model.get_image_features(video.flatten(0, 1))
        image = getattr(features, "pooler_output", features).unflatten(0, (batch, T)).mean(1)
        features = model.get_text_features(tokens)
        text = getattr(features, "pooler_output", features)
        return info_nce(
            F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), model.logit_scale
        )

    models = {"transformers": (theirs, theirs_loss)} | {
        name: (model, ours_loss) for name, model in ours.items()
    }
    clock = (
        time.perf_counter if device == "cuda" else time.process_time
    )  # on a shared CPU, wall time says little
    losses, times = {}, {name: [] for name in models}
    optimizers = {}
    for name, (model, _) in models.items():
        model.to(device).train()
        optimizers[name] = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True
        )
    for turn in range(rounds + 1):
        for name, (model, loss_of) in models.items():
            start = clock()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = loss_of(model)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                times[name].append(clock() - start)
            else:
                losses[name] = loss.item()
    assert max(losses.values()) - min(losses.values()) < (0.05 if device == "cuda" else 1e-4), (
        losses
    )
    median = {name: statistics.median(values) for name, values in times.items()}
    for name in models:
        print(
            f"| {layers} | {batch} × {T} | {name} | {1000 * median[name]:.0f} | "
            f"{batch / median[name]:.2f} "
            f"| {median['transformers'] / median[name]:.2f} |",
            flush=True,
        )


def bench_tokenizers(count: int):
    """Print captions a second of ours, transformers' and open_clip's tokenizer, on the same
    captions, one thread.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None:
        print(
            "open_clip is not installed (pip install --no-deps open-clip-torch==3.3.0): no CLIP "
            "vocabulary to time"
        )
        return
    from transformers import CLIPTokenizer

    folder = Path(package.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    simple, ours = module.SimpleTokenizer(), Tokenizer.from_clip(folder, 49408)
    names = [*list(simple.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    fast = CLIPTokenizer(
        vocab={name: id for id, name in enumerate(names)}, merges=list(simple.bpe_ranks)
    )
    corpus = ROOT.parent / "shared" / "msrvtt_mini" / "MSRVTT_data.json"
    if corpus.is_file():
        sentences = json.loads(corpus.read_text(encoding="utf-8"))["sentences"]
        captions, what = [sentence["caption"] for sentence in sentences][:count], "MSR-VTT captions"
    else:
        captions, what = (
            [f"a man number {i} chases two dogs in the park" for i in range(count)],
            "made-up captions",
        )
    ways = {
        "ours": lambda: [ours.encode(caption, 77) for caption in captions],
        "transformers": lambda: fast(captions, truncation=True, max_length=77)["input_ids"],
        "open_clip, cold": lambda: [
            module.SimpleTokenizer.encode(simple, caption) for caption in captions
        ],
    }
    seconds = {}
    for name, way in ways.items():
        start, cpu = time.perf_counter(), time.process_time()
        way()
        seconds[name] = time.process_time() - cpu, time.perf_counter() - start
    start = time.process_time()
    ways["open_clip, cold"]()
    seconds["open_clip, all words seen"] = time.process_time() - start, 0
    print(
        f"\n{len(captions)} {what}\n\n| tokenizer | CPU s | captions a CPU second | ours is faster "
        "by |"
    )
    print("|---" * 4 + "|")
    for name, (cpu, _) in seconds.items():
        print(
            f"| {name} | {cpu:.2f} | {len(captions) / cpu:,.0f} | {cpu / seconds['ours'][0]:.1f} × "
            "|"
        )


def main():
    config = parse_config(BenchConfig)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    print(
        f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{'bf16 autocast' if device == 'cuda' else 'fp32'}, sdpa, base shapes, QuickGELU, L = "
        f"{config.length}\n"
    )
    print(
        "| layers | videos × frames | model | ms a step | videos a second | against transformers |"
    )
    print("|---" * 6 + "|")
    for T in map(int, config.frames.split(",")):
        bench_step(config.layers, config.batch, T, config.length, config.rounds, device)
    if config.captions:
        bench_tokenizers(config.captions)


if __name__ == "__main__":
    run(main)
