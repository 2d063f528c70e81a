"""training/clip.py: CLIP's weights give CLIP's embeddings, and every tensor is accounted for.

The references are the libraries themselves, randomly initialised: nothing is downloaded. open_clip
imports torchvision for its pictures' transforms only, which are not used here, so an empty stand-in
takes its place.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from cli import UserError
from eval import EvalConfig, evaluate
from model import CLOP, MAX_LOGIT_SCALE, build_config
from train import TrainConfig
from training import clip
from training.checkpoint import load_checkpoint
from training.clip import (
    OPENAI_SIZES,
    interpolate_places,
    is_new,
    read_clip,
    read_pretrained,
    resize,
)

ROOT = Path(__file__).parent.parent
NO_TRANSFORMERS = (
    "transformers, the reference, is not installed (pip install -r requirements-test.txt)"
)
EXACT = dict(atol=1e-5, rtol=0)  # of unit vectors
VISION = dict(
    hidden_size=48,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=518,
    max_position_embeddings=20,
    bos_token_id=516,
    eos_token_id=517,
)
MERGES = ["d o", "do g</w>", "a n", "t h"]  # with 512 bytes, start and end: 518 tokens


def shaken(model):
    """Every parameter random, biases and norms too: a swapped pair would show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * (0.1 if p.ndim else 0.5)
    return model.eval()


def hugging_face(act="quick_gelu", vision=VISION, text=TEXT, embed_dim=24):
    transformers = pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    torch.manual_seed(0)
    return shaken(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config=vision | dict(hidden_act=act),
                text_config=text | dict(hidden_act=act),
                projection_dim=embed_dim,
            )
        )
    )


@pytest.fixture(scope="session")
def open_clip():
    pytest.importorskip(
        "transformers", reason=NO_TRANSFORMERS
    )  # before the stand-in: it looks for torchvision
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip(
            "open_clip, the reference, is not installed "
            "(pip install --no-deps open-clip-torch==3.3.0)"
        )
    if importlib.util.find_spec("torchvision") is None:
        for name, wanted in {
            "torchvision": "",
            "torchvision.ops": "",
            "torchvision.ops.misc": "FrozenBatchNorm2d",
            "torchvision.transforms.functional": "",
            "torchvision.transforms": "Normalize Compose RandomResizedCrop InterpolationMode "
            "ToTensor Resize CenterCrop ColorJitter Grayscale functional",
        }.items():
            sys.modules[name] = types.ModuleType(name)
            for thing in wanted.split():
                setattr(sys.modules[name], thing, type(thing, (), dict(BICUBIC=0, BILINEAR=0)))
    import open_clip

    yield open_clip
    for name in [
        name
        for name in sys.modules
        if name.startswith("torchvision") and sys.modules[name].__spec__ is None
    ]:
        del sys.modules[name]


def small_open_clip(open_clip, quick_gelu):
    torch.manual_seed(0)
    return shaken(
        open_clip.CLIP(
            24,
            open_clip.CLIPVisionCfg(layers=3, width=128, patch_size=8, image_size=32),
            open_clip.CLIPTextCfg(context_length=20, vocab_size=518, width=64, heads=1, layers=2),
            quick_gelu=quick_gelu,
        )
    )


def ours_from(path, **other):
    found = resize(read_clip(path, num_frames=other.get("num_frames", 8)), other.get("image_size"))
    model = CLOP(found.sizes).eval()
    assert all(map(is_new, found.load_into(model)))
    return model


def texts_of_all_lengths(length, vocab_size):
    """tokens, text_mask [length - 1, length]: one text of each length from 2 (only start and end)
    on.
    """
    tokens = torch.randint(1, vocab_size - 2, (length - 1, length))
    tokens[:, 0] = vocab_size - 2
    ends = torch.arange(1, length)
    tokens[torch.arange(length - 1), ends] = vocab_size - 1
    text_mask = torch.arange(length) <= ends[:, None]
    return tokens.masked_fill(~text_mask, 0), text_mask


def unit(x):
    x = getattr(x, "pooler_output", x)  # transformers 5 wraps it
    return x / x.norm(dim=-1, keepdim=True)


# ---- parity --------------------------------------------------------------------------------------


B32 = dict(
    vision=dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=12,
        image_size=224,
        patch_size=32,
    ),
    text=dict(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=1000,
        max_position_embeddings=77,
        bos_token_id=998,
        eos_token_id=999,
    ),
    embed_dim=512,
)


@pytest.mark.parametrize(
    "sizes",
    [dict(act="quick_gelu"), dict(act="gelu"), dict(act="quick_gelu", **B32)],
    ids=["QuickGELU", "GELU", "two layers of ViT-B/32"],
)
@torch.inference_mode()
def test_embeddings_equal_transformers(tmp_path, sizes):
    theirs = hugging_face(**sizes)
    theirs.save_pretrained(tmp_path)
    ours = ours_from(tmp_path)
    pixels, side = 3, theirs.config.vision_config.image_size
    frames = torch.randn(2, 3, pixels, side, side)  # [B, T, C, H, W]
    features = torch.stack(
        [getattr(x, "pooler_output", x) for x in (theirs.get_image_features(f) for f in frames)]
    )
    for t in range(3):
        torch.testing.assert_close(
            ours.encode_video(frames[:, t : t + 1]), unit(features[:, t]), **EXACT
        )
    torch.testing.assert_close(
        ours.encode_video(frames), unit(features.mean(1)), **EXACT
    )  # not yet unit: mean
    text = theirs.config.text_config
    tokens, text_mask = texts_of_all_lengths(text.max_position_embeddings, text.vocab_size)
    expected = unit(theirs.get_text_features(tokens))
    torch.testing.assert_close(ours.encode_text(tokens, text_mask), expected, **EXACT)
    torch.testing.assert_close(
        unit(theirs.get_text_features(tokens, text_mask.long())), expected, **EXACT
    )
    short = text_mask.sum(1).max() // 2
    torch.testing.assert_close(
        ours.encode_text(tokens[:3, :short], text_mask[:3, :short]), expected[:3], **EXACT
    )
    assert ours.logit_scale == theirs.logit_scale.clamp(max=MAX_LOGIT_SCALE)


@pytest.mark.parametrize("quick_gelu", [True, False])
@torch.inference_mode()
def test_embeddings_equal_open_clip(tmp_path, open_clip, quick_gelu):
    theirs = small_open_clip(open_clip, quick_gelu)
    torch.save(
        dict(epoch=3, state_dict={f"module.{name}": t for name, t in theirs.state_dict().items()}),
        tmp_path / "epoch_3.pt",
    )  # as its runs save
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps(
            dict(
                model_cfg=dict(
                    quick_gelu=quick_gelu, vision_cfg=dict(width=128), text_cfg=dict(heads=1)
                )
            )
        )
    )
    ours, frames = ours_from(tmp_path / "epoch_3.pt"), torch.randn(2, 3, 3, 32, 32)
    assert ours.config.quick_gelu == quick_gelu and (
        ours.config.video_heads,
        ours.config.text_heads,
    ) == (2, 1)
    features = torch.stack([theirs.encode_image(clip_frames) for clip_frames in frames])
    torch.testing.assert_close(ours.encode_video(frames[:, :1]), unit(features[:, 0]), **EXACT)
    torch.testing.assert_close(ours.encode_video(frames), unit(features.mean(1)), **EXACT)
    tokens, text_mask = texts_of_all_lengths(20, 518)
    torch.testing.assert_close(
        ours.encode_text(tokens, text_mask), unit(theirs.encode_text(tokens)), **EXACT
    )


@torch.inference_mode()
def test_places_are_stretched_as_in_transformers(tmp_path):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    for side in (16, 48):
        frames = torch.randn(2, 1, 3, side, side)
        expected = theirs.get_image_features(frames[:, 0], interpolate_pos_encoding=True)
        torch.testing.assert_close(
            ours_from(tmp_path, image_size=side).encode_video(frames), unit(expected), **EXACT
        )
    places = torch.randn(17, 5)
    assert interpolate_places(places, 4).equal(places) and interpolate_places(places, 7).shape == (
        50,
        5,
    )


# ---- layouts and sizes ---------------------------------------------------------------------------

REAL = {  # preset of CLIP's paper: vision, text, embed_dim, parameters in all
    "base-patch32": (dict(patch_size=32), {}, 512, 151_277_313),
    "base-patch16": (dict(patch_size=16), {}, 512, 149_620_737),
    "large-patch14": (
        dict(
            patch_size=14,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
        ),
        dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        768,
        427_616_513,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_the_published_models_fit(tmp_path, monkeypatch, name):
    transformers = pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    vision, text, embed_dim, parameters = REAL[name]
    config = transformers.CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=embed_dim
    )
    with torch.device("meta"):
        tensors = transformers.CLIPModel(config).state_dict()
    tensors |= {
        f"{tower}_model.embeddings.position_ids": torch.zeros(1, 50) for tower in ("text", "vision")
    }
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(clip, "read_tensors", lambda path: (path / "model.safetensors", tensors))
    found = read_clip(tmp_path)
    sizes = found.sizes
    assert sum(t.numel() for t in found.weights.values()) == parameters
    assert (sizes.image_size, sizes.text_length, sizes.vocab_size, sizes.embed_dim) == (
        224,
        77,
        49408,
        embed_dim,
    )
    assert (sizes.video_heads, sizes.text_heads) == (
        sizes.video_width // 64,
        sizes.text_width // 64,
    )
    assert sizes.quick_gelu
    if name == "base-patch16":
        assert sizes == build_config("base", quick_gelu=True)


def openai_file(path, dtype=torch.float16, **changes):
    """The demo's small model under OpenAI's names, with the numbers that OpenAI's own files carry;
    the tensors.
    """
    torch.manual_seed(0)
    model = shaken(
        CLOP(
            build_config(
                "toy",
                conv_stem=False,
                frames_per_patch=1,
                video_heads=2,
                text_heads=2,
                video_layers=2,
                text_layers=2,
                vocab_size=518,
                text_length=20,
            )
        )
    )
    names = {ours: theirs for theirs, ours in clip.OPENAI.items()}
    tensors = {
        clip.rename(name, names): t.to(dtype)
        for name, t in model.state_dict().items()
        if not is_new(name)
    }
    tensors["visual.conv1.weight"] = tensors["visual.conv1.weight"].view(-1, 3, 8, 8)
    for name in ("visual.proj", "text_projection"):
        tensors[name] = tensors[name].T.contiguous()
    tensors |= {name: torch.tensor(1) for name in OPENAI_SIZES} | changes
    tensors = {name: t for name, t in tensors.items() if t is not None}
    save_file(tensors, path)
    return model


def test_openais_own_file_in_half_precision(tmp_path):
    path = tmp_path / "ViT.safetensors"
    model = openai_file(path, logit_scale=torch.tensor(4.6055, dtype=torch.float16))
    found = read_clip(path, num_frames=5)
    assert (
        found.sizes.quick_gelu
        and found.known_from == "OpenAI's own file"
        and "QuickGELU" in found.describe()
    )
    assert found.weights["logit_scale"] == torch.tensor(
        MAX_LOGIT_SCALE
    )  # above it no gradient would come back
    assert len(found.weights["video.place_embed"]) == 17 and found.sizes.num_frames == 5
    for name, t in found.weights.items():
        if name != "logit_scale":
            assert t.dtype == torch.float32 and t.equal(model.state_dict()[name].half().float()), (
                name
            )


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"visual.extra.weight": torch.zeros(2, 3)},
            r"unknown tensors visual.extra.weight \[2, 3\]",
        ),
        ({"ln_final.bias": None}, r"no tensor for text.norm_out.bias \[128\]"),
        (
            {"ln_final.bias": torch.zeros(5)},
            r"do not fit ln_final.bias \[5\], but text.norm_out.bias is \[128\]",
        ),
        (
            {"transformer.resblocks.1.mlp.c_fc.weight": torch.zeros(7, 128)},
            r"do not fit transf.*c_fc.weight \[7, 128\]",
        ),
        (
            {"visual.layer1.0.conv1.weight": torch.zeros(1)},
            "with a vision transformer: unknown tensors visual.layer1",
        ),
        ({"token_embedding.weight": None}, "text.token_embed.weight"),
        ({"visual.conv1.weight": None}, "not a CLIP with a vision transformer .it holds"),
        ({"vocab_size": None}, "nothing tells its heads and which GELU.*config.json"),
        (
            {"visual.conv1.weight": torch.zeros(100, 3, 8, 8)},
            "width of 100 cannot have 1 heads|do not fit",
        ),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path, changes, said):
    openai_file(tmp_path / "x.safetensors", **changes)
    with pytest.raises(UserError, match=said) as error:
        read_clip(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value) and "x.safetensors" in str(error.value)


def test_a_lost_part_of_queries_keys_values_is_named(tmp_path):
    hugging_face().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"unknown tensors .*layers.1.self_attn.q_proj.weight \[32, 32\]"
    ):
        read_clip(tmp_path)


@pytest.mark.parametrize(
    "config, said",
    [
        ("{", "config.json: not the configuration"),
        ("[]", "config.json: not the configuration"),
        ('{"model_type": "bert"}', "config.json: not the configuration"),
        (
            '{"vision_config": {"hidden_act": "relu"}, "text_config": {}}',
            "hidden_act quick_gelu and relu",
        ),
        (
            '{"vision_config": {"hidden_act": "gelu"}, "text_config": {}}',
            "hidden_act gelu and quick_gelu",
        ),
        ('{"vision_config": {"layer_norm_eps": 1e-6}, "text_config": {}}', "layer_norm_eps 1e-06"),
        (
            '{"vision_config": {"num_attention_heads": 5}, "text_config": {}}',
            "width of 128 cannot have 5 heads",
        ),
        ('{"model_cfg": {"quick_gelu": true}}', None),
        (
            '{"vision_config": {}, "text_config": {"num_attention_heads": 2}}',
            "width of 128 cannot have 12 heads",
        ),
    ],
)
def test_configurations(tmp_path, config, said):
    openai_file(tmp_path / "x.safetensors", vocab_size=None)
    (tmp_path / "config.json").write_text(config)
    if said is None:
        assert read_clip(tmp_path / "x.safetensors").sizes.quick_gelu
        return
    with pytest.raises(UserError, match=said) as error:
        read_clip(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def test_unsafe_damaged_and_missing_files(tmp_path, capsys):
    def refused(path, said):
        with pytest.raises(UserError, match=said) as error:
            read_clip(path)
        assert "\n" not in str(error.value)

    path = tmp_path / "x.pt"
    refused(path, "no such file")
    refused(tmp_path, "holds none of model.safetensors")
    torch.save(dict(a=Evil()), path)
    refused(path, "more than tensors")
    assert "must never run" not in capsys.readouterr().out
    torch.save(dict(a=[1, 2]), path)
    refused(path, "other things than tensors")
    torch.save(torch.zeros(2), path)
    refused(path, "not a CLIP")
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "damaged")
    path.write_text("hello")
    refused(path, "damaged")
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    refused(path, "TorchScript.*safetensors.torch.save_file")
    (tmp_path / "x.safetensors").write_text("hello")
    refused(tmp_path / "x.safetensors", "damaged")


def test_image_size_must_fit_the_patches(tmp_path):
    openai_file(tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match="--image-size 20: not a multiple of the weights' patches of 8 pixels"
    ):
        read_pretrained(tmp_path / "x.safetensors", image_size=20)


# ---- fine-tuning ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with weights under OpenAI's names and CLIP's merges."""
    folder = tmp_path_factory.mktemp("weights")
    openai_file(folder / "clip.safetensors", dtype=torch.float32)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return folder


def settings(world, out, weights, **other):
    return TrainConfig(
        **dict(
            dataset="csv",
            data=str(world / "train.csv"),
            val_data=str(world / "val.csv"),
            out=str(out),
            cache=str(out.parent / "cache"),
            init=str(weights / "clip.safetensors"),
            steps=4,
            batch_size=16,
            num_frames="2",
            warmup=1,
            log_every=1,
            eval_every=2,
            workers=1,
            lr=1e-3,
            encoder_lr=1e-4,
        )
        | other
    )


def test_a_run_from_clip_needs_its_file_only_once(tiny_world, tmp_path, weights, capsys):
    config = settings(tiny_world, tmp_path / "run", weights, image_size=24)
    train.train(config)
    said = capsys.readouterr().out
    assert "OpenAI layout" in said and "newly made: 15 tensors" in said
    start, end = (
        read_pretrained(config.init, num_frames=2, image_size=24),
        load_checkpoint(config.out, training=True),
    )
    assert (
        end.model.config.image_size == 24
        and end.model.config.vocab_size == 518 == end.tokenizer.vocab_size
    )
    assert end.tokenizer.encode("dog than", 9) == [516, 513, *end.tokenizer.encode("than", 9)[1:]]
    for name, t in end.model.state_dict().items():
        if not is_new(name):
            assert 0 < (t - start.weights[name]).abs().max() < 2e-3, (
                name
            )  # CLIP's weights learn, slowly
        elif "weight" in name and "time_norm" not in name:
            assert t.abs().max() > 0, name  # so does what is new
    whole = end.sha256
    (tmp_path / "run" / "step-000004.safetensors").unlink()  # as if killed in step 3
    moved = weights.rename(weights.parent / "moved")
    try:
        train.train(config)
    finally:
        moved.rename(weights)
    assert load_checkpoint(config.out).sha256 == whole


def test_a_run_starts_from_a_run(tiny_world, tmp_path, weights, capsys):
    """Pre-training leads to fine-tuning: other frames and pictures, the same weights."""
    first = settings(tiny_world, tmp_path / "first", weights, init=None, encoder_lr=None)
    train.train(first)
    before = load_checkpoint(first.out)
    found = read_pretrained(first.out, num_frames=8, image_size=48)
    assert found.sizes.image_size == 48 and len(found.weights["video.time_embed"]) == 2
    model = CLOP(found.sizes)
    assert not found.load_into(model)  # without captions there is no SKP head
    for name, t in before.model.state_dict().items():
        if "_embed" not in name and not name.startswith("concept_head."):
            assert model.state_dict()[name].equal(t), name

    changes = dict(init=first.out, lr=1e-9, encoder_lr=None, num_frames="4")
    then = settings(tiny_world, tmp_path / "then", weights, **changes)
    train.train(then)
    after = load_checkpoint(then.out)
    assert "our layout" in capsys.readouterr().out
    assert after.tokenizer.tokens == before.tokenizer.tokens
    name = "text.blocks.0.mlp.0.weight"
    found = after.model.state_dict()[name]
    assert torch.allclose(found, before.model.state_dict()[name], atol=1e-6)


def test_clip_is_evaluated_as_it_is(tiny_world, tmp_path, weights, capsys):
    wanted = dict(task="csv", data=str(tiny_world / "test.csv"), cache=str(tmp_path / "cache"))
    record = evaluate(
        EvalConfig(
            checkpoint=str(weights / "clip.safetensors"), out=str(tmp_path / "out"), **wanted
        )
    )
    assert "never trained on videos" in capsys.readouterr().out
    assert record["step"] == 0 and record["trained_on"] is None and record["frames"] == 12
    found = read_clip(weights / "clip.safetensors")
    found.load_into(model := CLOP(found.sizes))
    assert record["logit_scale"] == pytest.approx(model.logit_scale.exp().item())


def groups_of(model, config):
    """{name: (scale, weight decay)} of the optimizer's groups."""
    groups = train.build_optimizer(model, config).param_groups
    found = {
        id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(found)
    return {name: found[id(p)] for name, p in model.named_parameters()}


def test_groups_have_their_own_learning_rates():
    model = CLOP(build_config("toy", conv_stem=False, num_concepts=3))
    found = groups_of(model, TrainConfig(init="x", lr=1e-3, encoder_lr=1e-4, weight_decay=0.2))
    expected = {
        "video.blocks.3.mlp.0.weight": (0.1, 0.2),
        "text.blocks.2.mlp.0.bias": (0.1, 0.0),
        "video.norm_out.weight": (0.1, 0.0),
        "text.project.weight": (0.1, 0.2),
        "logit_scale": (0.1, 0.0),
        "video.blocks.0.time_attn.out.weight": (1.0, 0.2),
        "video.time_embed": (1.0, 0.2),
        "concept_head.weight": (1.0, 0.2),
        "concept_head.bias": (1.0, 0.0),
    }
    for name, (scale, decay) in expected.items():
        assert found[name] == (pytest.approx(scale), decay), name


def test_without_init_all_parameters_are_alike():
    found = groups_of(CLOP(build_config("toy")), TrainConfig())
    assert set(found.values()) == {(1.0, 0.0), (1.0, 0.1)}


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(init=None, encoder_lr=None, image_size=20), "--image-size 20.*preset's"),
        (dict(init="nowhere"), "nowhere: no such file"),
        (dict(image_size=20), "--image-size 20.*weights' patches of 8"),
    ],
)
def test_mistakes_end_before_the_work(tiny_world, tmp_path, weights, changes, said):
    with pytest.raises(UserError, match=said):
        train.train(settings(tiny_world, tmp_path / "run", weights, **changes))
    assert not (tmp_path / "cache").exists()


def test_without_its_vocabulary_a_run_does_not_start(tiny_world, tmp_path, weights):
    openai_file(tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match="CLIP's vocabulary is not there; put its merges.txt"):
        train.train(settings(tiny_world, tmp_path / "run", tmp_path))


def test_a_preset_takes_another_image_size(tiny_world, tmp_path):
    train.train(
        TrainConfig(
            dataset="csv",
            data=str(tiny_world / "train.csv"),
            out=str(tmp_path / "run"),
            image_size=24,
            cache=str(tmp_path / "cache"),
            steps=1,
            batch_size=16,
            num_frames="2",
            workers=1,
        )
    )
    assert load_checkpoint(tmp_path / "run").model.config.image_size == 24
