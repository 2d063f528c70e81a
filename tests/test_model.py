"""model.py: a fresh model is an image ViT, any T works, the towers are CLIP's to the letter."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from model import CLOP, ConvStem, build_config

ROOT = Path(__file__).parent.parent


def tiny(**overrides):
    torch.manual_seed(0)
    sizes = dict(image_size=16, patch_size=8, conv_stem=False, num_frames=4, embed_dim=16)
    sizes |= dict(video_width=32, video_layers=2, video_heads=2)
    sizes |= dict(text_width=32, text_layers=2, text_heads=2, text_length=12, vocab_size=50)
    return CLOP(build_config("toy", **sizes | overrides)).eval()


@pytest.mark.parametrize("frames_per_patch", [1, 2])
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8])
def test_any_number_of_frames(T, frames_per_patch):
    model = tiny(frames_per_patch=frames_per_patch)
    video = torch.randn(3, T, 3, 16, 16)
    emb = model.encode_video(video)
    assert emb.shape == (3, 16)
    torch.testing.assert_close(emb.norm(dim=1), torch.ones(3))
    if T % frames_per_patch:  # the last frame is repeated
        longer = torch.cat([video, video[:, -1:]], dim=1)
        torch.testing.assert_close(emb, model.encode_video(longer))


def test_a_fresh_model_is_the_image_vit_and_a_trained_one_sees_the_order_of_frames():
    model, video = tiny(frames_per_patch=1), torch.randn(2, 4, 3, 16, 16)
    alone = torch.stack([model.video(video[:, t : t + 1]) for t in range(4)])  # [T, B, E]
    torch.testing.assert_close(model.video(video), alone.mean(0))

    for block in model.video.blocks:
        nn.init.normal_(block.time_attn.out.weight)
    nn.init.normal_(model.video.time_embed)
    backwards = model.encode_video(video.flip(1))
    assert (model.encode_video(video) - backwards).abs().max() > 1e-3


@pytest.mark.parametrize("patch_size", [4, 16])
def test_conv_stem_gives_one_vector_per_patch(patch_size):
    stem, frames = ConvStem(2, patch_size, 32), torch.zeros(2, 2, 3, 32, 48)
    before = stem(frames)
    num_patches = 32 * 48 // patch_size**2
    assert before.shape == (2, num_patches, 32)
    frames[0, 1, :, -1, -1] = 5  # the last pixel moves the last patch
    moved = (stem(frames) - before).abs().amax(dim=(0, 2))
    assert moved.argmax() == num_patches - 1


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
    gradients = []
    for on in (False, True):
        model = tiny(num_concepts=5).train()
        model.use_checkpointing(on)
        torch.manual_seed(1)
        video, tokens = torch.randn(2, 4, 3, 16, 16), torch.randint(0, 50, (2, 6))
        video_emb, text_emb, *logits = model(video, tokens, torch.ones(2, 6, dtype=torch.bool))
        ((video_emb * text_emb).sum() + sum(logits).sum()).backward()
        named = model.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})

    assert gradients[0].keys() == dict(model.named_parameters()).keys() - {"logit_scale"}
    torch.testing.assert_close(gradients[0], gradients[1])


def test_concept_heads_change_no_other_weight():
    with_heads, without = tiny(num_concepts=5).state_dict(), tiny().state_dict()
    assert all("concept_head" in name for name in with_heads.keys() - without.keys())
    assert all((with_heads[name] == value).all() for name, value in without.items())


def test_demo_runs():
    done = subprocess.run([sys.executable, "model.py"], cwd=ROOT, capture_output=True, text=True)
    assert all(preset in done.stdout for preset in ("toy", "small", "base")), done.stderr
