"""Two towers that meet in one space: a space-time ViT for the video, a causal transformer for text.

    video  [B, T, C, H, W] ── VideoEncoder ──> video_emb [B, E] ─┐  unit vectors; their dot product
    tokens [B, L]          ── TextEncoder  ──> text_emb  [B, E] ─┘  is the cosine

Where does time enter a ViT? Attention over all T·P patches of a video at once would cost (T·P)².
Each block here divides it (TimeSformer, arXiv 2102.05095). First every patch looks along time, at
*its own place* in the other frames. Then, frame by frame, every patch looks at the other patches of
its frame. The products that dominate grow linearly with T, and any T works.

    x ── + time_attn(x)  T tokens, for each of the P + 1 places  <- its output starts at zero
      ── + attn(x)       P + 1 tokens, for each frame            <- CLIP's own block from here on
      ── + mlp(x)

The temporal projection and the time embedding start at zero. So a fresh model *is* the image ViT
applied to each frame, and the video embedding is the mean over frames of its class tokens:
pretrained image weights stay intact (the idea of Frozen in Time, arXiv 2104.00650). The towers are
CLIP's to the letter (arXiv 2103.00020: pre-norm, class token, learned positions, text pooled at the
end-of-text token), so that CLIP's weights fit; `quick_gelu` is its activation.

Small models trained from scratch on a CPU take liberties that CLIP does not: `frames_per_patch` > 1
makes a patch a little cuboid of several frames (a *tubelet*, ViViT, arXiv 2103.15691), which
divides the tokens and lets the very first layer see motion; convolutions cut the patches
(`conv_stem`); and the exact GELU, which PyTorch fuses on a CPU.

Simplified: no dropout (contrastive batches regularise, and ranks stay reproducible), no relative
positions.

    python model.py          # the presets, their sizes, and a forward pass
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.utils.checkpoint import checkpoint

from cli import run

MAX_LOGIT_SCALE = math.log(100)  # CLIP's clamp: logits beyond 100 only make the softmax overflow


@dataclass
class ModelConfig:
    """Sizes of both towers. The default is CLIP ViT-B/16."""

    image_size: int = 224  # H = W of a frame, pixels
    patch_size: int = 16  # pixels
    frames_per_patch: int = 1  # frames that one patch covers (2 = tubelets)
    conv_stem: bool = False  # patches by strided 3×3 convolutions instead of CLIP's one linear map
    num_frames: int = 8  # T that the time embedding is sized for; any other T is interpolated
    video_width: int = 768
    video_layers: int = 12
    video_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_length: int = 77  # L at most, both special tokens included
    vocab_size: int = 49408
    embed_dim: int = 512  # E
    num_concepts: int = 0  # K of the SKP head; 0 = no head
    quick_gelu: bool = False  # x·sigmoid(1.702 x), as OpenAI's weights were trained with


# fmt: off
PRESETS = {
    "toy": dict(
        image_size=32, patch_size=8, frames_per_patch=2, conv_stem=True,
        video_width=128, video_layers=3, video_heads=4,
        text_width=128, text_layers=3, text_heads=4, text_length=32, vocab_size=1024, embed_dim=256,
    ),
    "small": dict(
        image_size=112, patch_size=16,
        video_width=384, video_layers=8, video_heads=6,
        text_width=256, text_layers=6, text_heads=4, text_length=48, vocab_size=8192, embed_dim=256,
    ),
    "base": dict(),  # ViT-B/16 and CLIP's 12-layer text transformer, 224 px
}
# fmt: on


def build_config(preset: str, **overrides) -> ModelConfig:
    """The sizes of `preset` ("toy", "small", "base"), with single fields replaced."""
    assert preset in PRESETS, f"no preset {preset!r}; there are {sorted(PRESETS)}"
    return ModelConfig(**PRESETS[preset] | overrides)


class QuickGELU(nn.Module):
    def forward(self, x):
        # = x·sigmoid(1.702 x), but the backward pass keeps one tensor instead of two
        return F.silu(1.702 * x).mul_(1 / 1.702)


class Attention(nn.Module):
    """Multi-head self-attention over the last but one axis: [N, S, D] -> [N, S, D]."""

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        qkv = self.qkv(x)
        if x.shape[1] == 1:  # attention to itself alone: its own value
            return self.out(qkv[..., -x.shape[2] :])
        q, k, v = rearrange(qkv, "n s (qkv h d) -> qkv n h s d", qkv=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(rearrange(x, "n h s d -> n s (h d)"))


class Block(nn.Module):
    """A pre-norm transformer block, CLIP's: attention, then an MLP four times as wide."""

    def __init__(self, width: int, heads: int, quick_gelu: bool, causal: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        activation = QuickGELU() if quick_gelu else nn.GELU()
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width)
        )

    def forward(self, x, read=...):
        """`read` indexes what the caller will look at: only that goes through the MLP."""
        x = (x + self.attn(self.norm1(x)))[read]
        return x + self.mlp(self.norm2(x))


class SpaceTimeBlock(Block):
    """Attention along time at each place, then the image block in each frame.

    [B, T, S, D] -> [B, T, S, D]
    """

    def __init__(self, width: int, heads: int, quick_gelu: bool):
        super().__init__(width, heads, quick_gelu)
        self.time_norm = nn.LayerNorm(width)
        self.time_attn = Attention(width, heads)

    def forward(self, x, read=...):
        B, T = x.shape[:2]
        along_time = self.time_attn(rearrange(self.time_norm(x), "b t s d -> (b s) t d"))
        x = x + rearrange(along_time, "(b s) t d -> b t s d", b=B)
        x = super().forward(rearrange(x, "b t s d -> (b t) s d"), read=read)
        return rearrange(x, "(b t) ... -> b t ...", t=T)


def run_blocks(blocks, x, read, *, recompute: bool):
    """x through all blocks; of the last one only what `read` indexes.

    recompute: keep no activations inside a block, but compute them again in the backward pass.
    """
    for block in blocks:
        place = read if block is blocks[-1] else ...
        if recompute and block.training:
            x = checkpoint(block, x, place, use_reentrant=False)
        else:
            x = block(x, place)
    return x


class PatchEmbed(nn.Linear):
    """CLIP's: each patch, f frames of p×p pixels, through one linear map.

    [N, f, C, H, W] -> [N, P, D]
    """

    def __init__(self, frames: int, patch_size: int, width: int):
        super().__init__(frames * 3 * patch_size**2, width, bias=False)
        self.patch_size = patch_size

    def forward(self, x):
        p = self.patch_size
        patches = rearrange(x, "n f c (h p1) (w p2) -> n (h w) (f c p1 p2)", p1=p, p2=p)
        return super().forward(patches)


class ConvStem(nn.Module):
    """log2(p) convolutions of stride 2, the channels doubling up to D.

    [N, f, C, H, W] -> [N, P, D]

    The last merges the f frames of a patch; those before it see single frames, so all share what
    they learn of shapes. Small models learn much sooner from overlapping, translated filters than
    from one cut (arXiv 2106.14881; docs/LOG.md).
    """

    def __init__(self, frames: int, patch_size: int, width: int):
        super().__init__()
        stages = int(math.log2(patch_size))
        assert 2**stages == patch_size > 2, (
            f"a convolutional stem halves the side: {patch_size=} must be a power of two from 4 on"
        )
        # channels after each stage: D/8, D/4, D/2, D for patches of 16 pixels
        widths = [width >> (stages - 1 - stage) for stage in range(stages)]
        layers = []
        for c_in, c_out in itertools.pairwise([3, *widths[:-1]]):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GELU()]
        self.each_frame = nn.Sequential(*layers)
        self.merge = nn.Conv2d(frames * widths[-2], width, 3, stride=2, padding=1)

    def forward(self, x):
        features = self.each_frame(rearrange(x, "n f c h w -> (n f) c h w"))
        merged = self.merge(rearrange(features, "(n f) d h w -> n (f d) h w", f=x.shape[1]))
        return rearrange(merged, "n d h w -> n (h w) d")


class VideoEncoder(nn.Module):
    """video [B, T, C, H, W], normalised -> features [B, D]. Any T ≥ 1.

    `project` takes them to the joint space, [B, E].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.video_width
        self.frames_per_patch = config.frames_per_patch
        stem = ConvStem if config.conv_stem else PatchEmbed
        self.patch_embed = stem(config.frames_per_patch, config.patch_size, width)

        places = (config.image_size // config.patch_size) ** 2 + 1  # P patches and the class token
        steps = math.ceil(config.num_frames / config.frames_per_patch)
        self.class_embed = nn.Parameter(torch.empty(width))
        self.place_embed = nn.Parameter(torch.empty(places, width))
        self.time_embed = nn.Parameter(torch.zeros(steps, width))

        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            SpaceTimeBlock(width, config.video_heads, config.quick_gelu)
            for _ in range(config.video_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.embed_dim, bias=False)
        self.checkpointing = False

    def forward(self, video):
        # a last tubelet that is not full repeats the last frame
        short = -video.shape[1] % self.frames_per_patch
        if short:
            video = torch.cat([video, video[:, -1:].expand(-1, short, -1, -1, -1)], dim=1)

        B = len(video)
        x = rearrange(video, "b (t f) c h w -> (b t) f c h w", f=self.frames_per_patch)
        x = rearrange(self.patch_embed(x), "(b t) p d -> b t p d", b=B)  # [B, T', P, D]
        T = x.shape[1]

        # a class token in front of each frame's patches; where a token is, and when
        class_token = repeat(self.class_embed.to(x.dtype), "d -> b t 1 d", b=B, t=T)
        x = torch.cat([class_token, x], dim=2) + self.place_embed  # [B, T', P + 1, D]
        x = self.norm_in(x) + self.time_embedding(T)[:, None]

        class_tokens = (slice(None), 0)  # all that is read of the last block
        x = run_blocks(self.blocks, x, class_tokens, recompute=self.checkpointing)  # [B, T', D]
        return self.norm_out(x).mean(dim=1)  # mean over time: [B, D]

    def time_embedding(self, T: int):
        """[T, D]: the learned table, stretched or shrunk linearly to T steps."""
        if T == len(self.time_embed):
            return self.time_embed
        channels = self.time_embed.T[None]  # [1, D, steps]
        stretched = F.interpolate(channels, size=T, mode="linear", align_corners=False)
        return stretched[0].T


class TextEncoder(nn.Module):
    """tokens [B, L], text_mask [B, L] (1 = real token) -> features [B, D].

    `project` takes them to the joint space, [B, E].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.text_width
        self.token_embed = nn.Embedding(config.vocab_size, width)
        self.position_embed = nn.Parameter(torch.empty(config.text_length, width))
        self.blocks = nn.ModuleList(
            Block(width, config.text_heads, config.quick_gelu, causal=True)
            for _ in range(config.text_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.embed_dim, bias=False)
        self.checkpointing = False

    def forward(self, tokens, text_mask):
        B, L = tokens.shape
        assert L <= len(self.position_embed), f"{L} tokens, room for {len(self.position_embed)}"
        x = self.token_embed(tokens) + self.position_embed[:L]  # [B, L, D]

        # the end-of-text token has seen the whole caption: it is all that is read of the last block
        last = text_mask.sum(dim=1).long() - 1
        end_tokens = (torch.arange(B, device=x.device), last)
        x = run_blocks(self.blocks, x, end_tokens, recompute=self.checkpointing)  # [B, D]
        return self.norm_out(x)


def init_tower(tower, width: int, layers: int):
    """The blocks and the projection of a tower, as in CLIP."""
    shrink = (2 * layers) ** -0.5  # for all that is added to the residual stream
    for block in tower.blocks:
        has_time = isinstance(block, SpaceTimeBlock)
        for attn in (block.attn, block.time_attn if has_time else block.attn):
            nn.init.normal_(attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(attn.out.weight, std=width**-0.5 * shrink)
            nn.init.zeros_(attn.qkv.bias)
            nn.init.zeros_(attn.out.bias)

        nn.init.normal_(block.mlp[0].weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp[2].weight, std=width**-0.5 * shrink)
        nn.init.zeros_(block.mlp[0].bias)
        nn.init.zeros_(block.mlp[2].bias)
        if has_time:
            nn.init.zeros_(block.time_attn.out.weight)
    nn.init.normal_(tower.project.weight, std=width**-0.5)


class CLOP(nn.Module):
    """Both towers, the learned `logit_scale`, and SKP's heads on their features."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.video = VideoEncoder(config)
        self.text = TextEncoder(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.reset_parameters()

        # Paper: SKP "pulls together the latent representations of similar videos". We predict from
        # what the projection reads, not from what it makes: the E numbers that retrieval compares
        # need not hold all that a concept needs (docs/LOG.md). And from both towers: left alone,
        # that of the text reads a bag of words. The heads are drawn last: with and without
        # them, all else starts from the same weights.
        self.video_concept_head = self.text_concept_head = None
        if config.num_concepts:
            self.video_concept_head = nn.Linear(config.video_width, config.num_concepts)
            self.text_concept_head = nn.Linear(config.text_width, config.num_concepts)

    def reset_parameters(self):
        """As CLIP does: residual branches shrink with depth. The time path starts at zero."""
        video, text, config = self.video, self.text, self.config
        init_tower(video, config.video_width, config.video_layers)
        init_tower(text, config.text_width, config.text_layers)
        if isinstance(video.patch_embed, PatchEmbed):  # a ConvStem keeps PyTorch's (docs/LOG.md)
            nn.init.normal_(video.patch_embed.weight, std=0.02)
        nn.init.normal_(video.class_embed, std=config.video_width**-0.5)
        nn.init.normal_(video.place_embed, std=config.video_width**-0.5)
        nn.init.normal_(text.token_embed.weight, std=0.02)
        nn.init.normal_(text.position_embed, std=0.01)

    def use_checkpointing(self, on: bool = True):
        """Recompute activations in the backward pass: a third more time, one block's memory."""
        self.video.checkpointing = self.text.checkpointing = on

    def encode_video(self, video):
        """[B, T, C, H, W] float, normalised -> video_emb [B, E] fp32, unit norm."""
        return to_joint_space(self.video, self.video(video))

    def encode_text(self, tokens, text_mask):
        """[B, L] int64, [B, L] bool -> text_emb [B, E] fp32, unit norm."""
        return to_joint_space(self.text, self.text(tokens, text_mask))

    def init_concept_bias(self, log_odds):
        """SKP's heads before they have seen a video: log_odds [K] (ConceptVocab.log_odds)."""
        self.video_concept_head.bias.data.copy_(log_odds)
        self.text_concept_head.bias.data.copy_(log_odds)

    def forward(self, video, tokens, text_mask):
        """What the losses need: video_emb [B, E], text_emb [B', E], and SKP's concept logits
        [B, K], [B', K], or None without the heads.
        """
        video_features, text_features = self.video(video), self.text(tokens, text_mask)
        video_emb = to_joint_space(self.video, video_features)
        text_emb = to_joint_space(self.text, text_features)
        if self.video_concept_head is None:
            return video_emb, text_emb, None, None
        video_logits = self.video_concept_head(video_features)
        return video_emb, text_emb, video_logits, self.text_concept_head(text_features)


def to_joint_space(tower, features):
    """[B, D] of a tower -> [B, E] fp32, unit norm."""
    return F.normalize(tower.project(features).float(), dim=-1)


def main():
    for preset in PRESETS:
        model = CLOP(build_config(preset, num_concepts=1000))
        print(f"{preset:6s}", end="")
        for name, part in model.named_children():
            print(f" {name} {sum(p.numel() for p in part.parameters()) / 1e6:.1f} M", end="")
        print()
    model = CLOP(build_config("toy"))
    for T in (1, 3, 8):
        video_emb = model.encode_video(torch.randn(2, T, 3, 32, 32))
        print(f"T = {T}: video_emb", tuple(video_emb.shape))


if __name__ == "__main__":
    run(main)
