"""model.py: time leaves an image ViT unchanged at initialisation, any T works, CLIP's architecture to the letter."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import CLOP, PRESETS, Block, ConvStem, PatchEmbed, build_config

ROOT = Path(__file__).parent.parent


def tiny(**overrides):
    torch.manual_seed(0)
    sizes = dict(image_size=16, patch_size=8, conv_stem=False, video_width=32, video_layers=2, video_heads=2,
                 text_width=32, text_layers=2, text_heads=2, text_length=12, vocab_size=50, embed_dim=16, num_frames=4)
    return CLOP(build_config("toy", **sizes | overrides)).eval()


@pytest.mark.parametrize("frames_per_patch", [1, 2])
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8])
def test_any_number_of_frames(T, frames_per_patch):
    emb = tiny(frames_per_patch=frames_per_patch).encode_video(torch.randn(3, T, 3, 16, 16))
    assert emb.shape == (3, 16)
    torch.testing.assert_close(emb.norm(dim=1), torch.ones(3))


def test_fresh_model_is_the_image_vit_averaged_over_frames():
    model, video = tiny(frames_per_patch=1), torch.randn(2, 4, 3, 16, 16)
    frames = torch.stack([model.video(video[:, t:t + 1]) for t in range(4)])      # each frame on its own: [T, B, E]
    torch.testing.assert_close(model.video(video), frames.mean(0))


def test_trained_time_attention_sees_the_order_of_frames():
    model, video = tiny(frames_per_patch=1), torch.randn(2, 4, 3, 16, 16)
    for block in model.video.blocks:
        nn.init.normal_(block.time_attn.out.weight)
    nn.init.normal_(model.video.time_embed)
    assert (model.encode_video(video) - model.encode_video(video.flip(1))).abs().max() > 1e-3


def test_odd_frame_counts_repeat_the_last_frame():
    model, video = tiny(frames_per_patch=2), torch.randn(2, 3, 3, 16, 16)
    torch.testing.assert_close(model.encode_video(video), model.encode_video(torch.cat([video, video[:, -1:]], 1)))


def test_patch_embedding_equals_a_convolution():
    embed, frames = PatchEmbed(1, 8, 32), torch.randn(2, 1, 3, 16, 24)
    convolved = F.conv2d(frames[:, 0], embed.weight.view(32, 3, 8, 8), stride=8)             # [N, D, 2, 3]
    torch.testing.assert_close(embed(frames), convolved.flatten(2).mT, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size", [4, 16])
def test_conv_stem_gives_one_vector_a_patch(patch_size):
    stem, frames = ConvStem(2, patch_size, 32), torch.zeros(2, 2, 3, 32, 48)
    out = stem(frames)
    assert out.shape == (2, 32 * 48 // patch_size**2, 32)
    frames[0, 1, :, -1, -1] = 5                                                   # the last pixel moves the last patch
    assert (stem(frames) - out).abs().amax(dim=(0, 2)).argmax() == out.shape[1] - 1


def test_block_equals_pytorchs_own_pre_norm_layer():
    ours = Block(32, 4, quick_gelu=False)
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs.load_state_dict({
        "self_attn.in_proj_weight": ours.attn.qkv.weight, "self_attn.in_proj_bias": ours.attn.qkv.bias,
        "self_attn.out_proj.weight": ours.attn.out.weight, "self_attn.out_proj.bias": ours.attn.out.bias,
        "linear1.weight": ours.mlp[0].weight, "linear1.bias": ours.mlp[0].bias, "linear2.weight": ours.mlp[2].weight,
        "linear2.bias": ours.mlp[2].bias, "norm1.weight": ours.norm1.weight, "norm1.bias": ours.norm1.bias,
        "norm2.weight": ours.norm2.weight, "norm2.bias": ours.norm2.bias})
    causal = Block(32, 4, quick_gelu=False, causal=True)
    causal.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(causal(x), theirs(x, src_mask=mask, is_causal=True), atol=1e-5, rtol=1e-5)


def test_text_ignores_padding_and_what_follows_the_end():
    model = tiny()
    tokens = torch.tensor([[48, 3, 4, 49, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]]).bool()
    short = model.encode_text(tokens[:, :4], mask[:, :4])
    torch.testing.assert_close(model.encode_text(tokens, mask), short)
    tokens[0, 5] = 7
    torch.testing.assert_close(model.encode_text(tokens, mask), short)
    tokens[0, 1] = 7
    assert (model.encode_text(tokens, mask) - short).abs().max() > 1e-3


def test_checkpointing_changes_memory_not_gradients():
    grads = []
    for on in (False, True):
        model = tiny(num_concepts=5).train()
        model.use_checkpointing(on)
        torch.manual_seed(1)
        video_emb, text_emb, logits = model(torch.randn(2, 4, 3, 16, 16), torch.randint(0, 50, (2, 6)),
                                            torch.ones(2, 6, dtype=torch.bool))
        ((video_emb * text_emb).sum() + logits.sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == {name for name, _ in model.named_parameters()} - {"logit_scale"}
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


def test_a_concept_head_changes_no_other_weight():
    with_head, without = tiny(num_concepts=5).state_dict(), tiny().state_dict()
    assert with_head.keys() - without.keys() == {"concept_head.weight", "concept_head.bias"}
    assert all((with_head[name] == value).all() for name, value in without.items())


def test_base_preset_is_vit_b16_with_clips_text_tower():
    with torch.device("meta"):
        model = CLOP(build_config("base"))
    image = sum(p.numel() for name, p in model.video.named_parameters() if "time" not in name)
    text = sum(p.numel() for p in model.text.parameters())
    assert image == 86_192_640 and text == 63_428_096, (image, text)  # CLIP ViT-B/16: 149,620,737 with its logit scale
    assert image + text + 1 == 149_620_737


def test_every_preset_can_be_built():
    with torch.device("meta"):
        for preset in PRESETS:
            CLOP(build_config(preset, num_concepts=7))


def test_demo_runs():
    done = subprocess.run([sys.executable, "model.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "toy" in done.stdout, done.stderr
