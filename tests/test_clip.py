"""clip.py: CLIP's weights give CLIP's embeddings, every tensor is accounted for, and fine-tuning
treats them apart.

The references are the libraries themselves, randomly initialised: nothing is downloaded. open_clip
imports torchvision for its pictures' transforms only, which are not used here, so an empty stand-in
takes its place.
"""

import importlib.util
import json
import pickle
import sys
import types
import zipfile
from dataclasses import replace

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
    OPENAI,
    OPENAI_SIZES,
    is_new,
    read_clip,
    read_pretrained,
    rename,
    resize,
)

NO_TRANSFORMERS = "transformers is not installed (pip install -r requirements-test.txt)"
NO_OPEN_CLIP = "open_clip is not installed (pip install --no-deps open-clip-torch==3.3.0)"
MERGES = ["d o", "do g</w>", "a n", "t h"]  # with 512 bytes, start and end: 518 tokens


def assert_equal(ours, theirs):
    """Unit vectors."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def unit(x):
    x = getattr(x, "pooler_output", x)  # transformers 5 wraps it
    return x / x.norm(dim=-1, keepdim=True)


def shaken(model):
    """Every parameter random, biases and norms too: a swapped pair would show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * (0.1 if p.ndim else 0.5)
    return model.eval()


def tower(width, heads, layers, **other):
    """A tower's part of transformers' configuration."""
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads)
    return sizes | dict(num_hidden_layers=layers) | other


VISION = tower(48, 4, 3, image_size=32, patch_size=8)
TEXT = tower(32, 2, 2, vocab_size=518, bos_token_id=516, eos_token_id=517)
TEXT["max_position_embeddings"] = 20


def hugging_face(act="quick_gelu"):
    transformers = pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    torch.manual_seed(0)
    towers = dict(vision_config=VISION | dict(hidden_act=act))
    towers |= dict(text_config=TEXT | dict(hidden_act=act))
    return shaken(transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=24)))


STAND_INS = {
    "torchvision": "",
    "torchvision.ops": "",
    "torchvision.ops.misc": "FrozenBatchNorm2d",
    "torchvision.transforms.functional": "",
    "torchvision.transforms": "Normalize Compose RandomResizedCrop InterpolationMode ToTensor "
    "Resize CenterCrop ColorJitter Grayscale functional",
}


@pytest.fixture(scope="session")
def open_clip():
    # before the stand-in, since it looks for torchvision
    pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip(NO_OPEN_CLIP)
    made = {} if importlib.util.find_spec("torchvision") else STAND_INS
    for name, wanted in made.items():
        sys.modules[name] = types.ModuleType(name)
        for thing in wanted.split():
            setattr(sys.modules[name], thing, type(thing, (), dict(BICUBIC=0, BILINEAR=0)))
    import open_clip

    yield open_clip
    for name in made:
        del sys.modules[name]


def ours_from(path, image_size=None):
    found = resize(read_clip(path), image_size)
    model = CLOP(found.sizes).eval()
    assert all(map(is_new, found.load_into(model)))
    return model


def texts_of_all_lengths():
    """tokens, text_mask [19, 20]: a text of each length from 2 (start and end) on."""
    tokens = torch.randint(1, 516, (19, 20))
    tokens[:, 0] = 516
    ends = torch.arange(1, 20)
    tokens[torch.arange(19), ends] = 517
    text_mask = torch.arange(20) <= ends[:, None]
    return tokens.masked_fill(~text_mask, 0), text_mask


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.inference_mode()
def test_embeddings_equal_transformers(tmp_path, act):
    theirs = hugging_face(act)
    theirs.save_pretrained(tmp_path)
    ours = ours_from(tmp_path)
    assert ours.logit_scale == theirs.logit_scale.clamp(max=MAX_LOGIT_SCALE)

    frames = torch.randn(2, 3, 3, 32, 32)  # [B, T, C, H, W]
    features = [theirs.get_image_features(video) for video in frames]
    features = torch.stack([getattr(x, "pooler_output", x) for x in features])
    for t in range(3):
        assert_equal(ours.encode_video(frames[:, t : t + 1]), unit(features[:, t]))
    assert_equal(ours.encode_video(frames), unit(features.mean(1)))  # the mean is not unit yet

    tokens, text_mask = texts_of_all_lengths()
    expected = unit(theirs.get_text_features(tokens))
    assert_equal(ours.encode_text(tokens, text_mask), expected)
    assert_equal(ours.encode_text(tokens[:3, :10], text_mask[:3, :10]), expected[:3])

    for side in (16, 48):  # their places are stretched as ours
        frames = torch.randn(2, 1, 3, side, side)
        expected = theirs.get_image_features(frames[:, 0], interpolate_pos_encoding=True)
        assert_equal(ours_from(tmp_path, image_size=side).encode_video(frames), unit(expected))


@pytest.mark.parametrize("quick_gelu", [True, False])
@torch.inference_mode()
def test_embeddings_equal_open_clip(tmp_path, open_clip, quick_gelu):
    vision = open_clip.CLIPVisionCfg(layers=3, width=128, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=20, vocab_size=518, width=64, heads=1, layers=2)
    torch.manual_seed(0)
    theirs = shaken(open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu))
    # as its runs save
    state = {f"module.{name}": t for name, t in theirs.state_dict().items()}
    torch.save(dict(epoch=3, state_dict=state), tmp_path / "epoch_3.pt")
    towers = dict(vision_cfg=dict(width=128), text_cfg=dict(heads=1))
    config = json.dumps(dict(model_cfg=dict(quick_gelu=quick_gelu, **towers)))
    (tmp_path / "open_clip_config.json").write_text(config)

    ours = ours_from(tmp_path / "epoch_3.pt")
    sizes = ours.config
    assert (sizes.quick_gelu, sizes.video_heads, sizes.text_heads) == (quick_gelu, 2, 1)
    frames = torch.randn(2, 3, 3, 32, 32)
    features = torch.stack([theirs.encode_image(video) for video in frames])
    assert_equal(ours.encode_video(frames[:, :1]), unit(features[:, 0]))
    assert_equal(ours.encode_video(frames), unit(features.mean(1)))
    tokens, text_mask = texts_of_all_lengths()
    assert_equal(ours.encode_text(tokens, text_mask), unit(theirs.encode_text(tokens)))


# ---- layouts and sizes ---------------------------------------------------------------------------

REAL = {  # preset of CLIP's paper: vision, text, embed_dim, parameters in all
    "base-patch32": (dict(patch_size=32), {}, 512, 151_277_313),
    "base-patch16": (dict(patch_size=16), {}, 512, 149_620_737),
    "large-patch14": (tower(1024, 16, 24, patch_size=14), tower(768, 12, 12), 768, 427_616_513),
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
    for side in ("text", "vision"):  # their older files hold these
        tensors[f"{side}_model.embeddings.position_ids"] = torch.zeros(1, 50)
    config.save_pretrained(tmp_path)
    # tensors of this size have shapes, and no memory: no file can hold them
    monkeypatch.setattr(clip, "read_tensors", lambda path: (path / "model.safetensors", tensors))

    found = read_clip(tmp_path)
    s = found.sizes
    assert sum(t.numel() for t in found.weights.values()) == parameters and s.quick_gelu
    assert (s.image_size, s.text_length, s.vocab_size, s.embed_dim) == (224, 77, 49408, embed_dim)
    assert (s.video_heads, s.text_heads) == (s.video_width // 64, s.text_width // 64)
    assert name != "base-patch16" or s == build_config("base", quick_gelu=True)


def openai_file(path, dtype=torch.float16, **changes):
    """A small random model under OpenAI's names, with the numbers of OpenAI's own files.

    `changes` are tensors to add, or None to leave one out. Returns the model.
    """
    sizes = dict(video_layers=2, text_layers=2, video_heads=2, text_heads=2)
    sizes |= dict(conv_stem=False, frames_per_patch=1, vocab_size=518, text_length=20)
    torch.manual_seed(0)
    model = shaken(CLOP(build_config("toy", **sizes)))

    names = {ours: theirs for theirs, ours in OPENAI.items()}
    tensors = {
        rename(n, names): t.to(dtype) for n, t in model.state_dict().items() if not is_new(n)
    }
    tensors["visual.conv1.weight"] = tensors["visual.conv1.weight"].view(-1, 3, 8, 8)
    for name in ("visual.proj", "text_projection"):
        tensors[name] = tensors[name].T.contiguous()
    tensors |= {name: torch.tensor(1) for name in OPENAI_SIZES} | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, path)
    return model


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.safetensors"


def refused(path, said):
    """read_clip refuses the file with one line that says so."""
    with pytest.raises(UserError, match=said) as error:
        read_clip(path)
    assert "\n" not in str(error.value) and path.name in str(error.value)


def test_openais_own_file_in_half_precision(file):
    model = openai_file(file, logit_scale=torch.tensor(4.6055, dtype=torch.float16))
    found = read_clip(file, num_frames=5)
    assert found.sizes.quick_gelu and found.sizes.num_frames == 5
    assert found.known_from == "OpenAI's own file" and "QuickGELU" in found.describe()
    # above it no gradient would come back
    assert found.weights.pop("logit_scale") == torch.tensor(MAX_LOGIT_SCALE)
    for name, t in found.weights.items():
        expected = model.state_dict()[name].half().float()
        assert t.dtype == torch.float32 and t.equal(expected), name


def archive(tensors: dict, path):
    """A TorchScript archive of modules that hold these, as OpenAI's downloads are."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        module = root
        *folders, last = name.split(".")
        for folder in folders:
            if folder not in dict(module.named_children()):
                module.add_module(folder, torch.nn.Module())
            module = getattr(module, folder)
        module.register_buffer(last, tensor)
    torch.jit.script(root).save(path)


def test_openais_archives_are_read_without_their_program(file, monkeypatch):
    openai_file(file)
    tensors, path = load_file(file), file.with_name("ViT.pt")
    archive(tensors | {"visual.transformer.attn_mask": torch.zeros(3, 3)}, path)
    monkeypatch.setattr(torch.jit, "load", None)
    found, same = read_clip(path), read_clip(file)
    assert found.known_from == "OpenAI's own file" and found.sizes == same.sizes
    assert found.weights.keys() == same.weights.keys()
    assert all(t.equal(same.weights[name]) for name, t in found.weights.items())


class Writer(torch.nn.Module):
    """`torch.jit.load` of it writes a file."""

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self) -> bool:
        return self.training

    @torch.jit.export
    def __setstate__(self, training: bool) -> None:
        self.training = training
        torch.save(training, "written")


def test_what_an_archive_does_when_it_is_loaded_is_not_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Writer()).save("x.pt")
    refused(tmp_path / "x.pt", "more than tensors")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_an_archive_that_would_call_something_is_refused(tmp_path, capsys, member):
    whole, path = tmp_path / "whole.pt", tmp_path / "x.pt"
    archive({"a": torch.zeros(2)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            evil = pickle.dumps(Evil()) if name.endswith("data.pkl") else b""
            target.writestr(name, evil if name.endswith(member) else source.read(name))
    refused(path, "more than tensors")
    assert "must never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"visual.extra.weight": torch.zeros(2, 3)}, r"has visual.extra.weight \[2, 3\] where"),
        (
            {"ln_final.bias": torch.zeros(5)},
            r"has text.norm_out.bias \[5\] where it should have text.norm_out.bias \[128\]",
        ),
        ({"token_embedding.weight": None}, "not the tensors of a CLIP .*text.token_embed.weight"),
        ({"visual.class_embedding": None}, "not a CLIP with a vision transformer .it holds"),
        ({"vocab_size": None}, "nothing tells its heads and which GELU.*config.json"),
    ],
)
def test_every_tensor_is_accounted_for(file, changes, said):
    openai_file(file, **changes)
    refused(file, said)


def test_a_lost_part_of_queries_keys_values_is_named(tmp_path):
    hugging_face().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, path)
    refused(path, "not the tensors of a CLIP .*text.blocks.1.attn.k_proj.weight")


@pytest.mark.parametrize(
    "vision, text, said",
    [
        (dict(hidden_act="relu"), {}, "hidden_act relu and quick_gelu"),
        (dict(layer_norm_eps=1e-6), {}, "layer_norm_eps 1e-06"),
        (dict(num_attention_heads=5), {}, "width of 128 cannot have 5 heads"),
    ],
)
def test_configurations_of_other_models(file, vision, text, said):
    openai_file(file, vocab_size=None)
    config = json.dumps(dict(vision_config=vision, text_config=text))
    file.with_name("config.json").write_text(config)
    with pytest.raises(UserError, match=said):
        read_clip(file)


def test_a_configuration_tells_heads_and_gelu(file):
    openai_file(file, vocab_size=None)
    config = file.with_name("config.json")
    for content in ("{", "[]", '{"model_type": "bert"}'):
        config.write_text(content)
        with pytest.raises(UserError, match="config.json: not the configuration"):
            read_clip(file)
    config.write_text('{"model_cfg": {"quick_gelu": true}}')
    assert read_clip(file).sizes.quick_gelu


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def test_unsafe_damaged_and_missing_files(tmp_path, capsys):
    path = tmp_path / "x.pt"
    refused(path, "no such file")
    refused(tmp_path, "no step-.* of a run, and none of model.safetensors")
    for content in (dict(a=Evil()), dict(a=[1, 2]), torch.zeros(2)):
        torch.save(content, path)
        refused(path, "more than tensors")
    assert "must never run" not in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "damaged")
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_text("hello")
        refused(tmp_path / name, "damaged")


# ---- fine-tuning ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with weights under OpenAI's names and CLIP's merges."""
    folder = tmp_path_factory.mktemp("weights")
    openai_file(folder / "clip.safetensors", dtype=torch.float32)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return folder


def settings(world, out, **other):
    files = dict(dataset="csv", data=str(world / "train.csv"), val_data=str(world / "val.csv"))
    files |= dict(out=str(out), cache=str(out.parent / "cache"))
    sizes = dict(steps=4, batch_size=16, num_frames="2", warmup=1, eval_every=2, workers=1)
    return TrainConfig(**(files | sizes | other))


def from_clip(world, out, weights, **other):
    init = dict(init=str(weights / "clip.safetensors"), lr=1e-3, encoder_lr=1e-4)
    return settings(world, out, **(init | other))


def test_a_run_from_clip_needs_its_file_only_once(tiny_world, tmp_path, weights, capsys):
    config = from_clip(tiny_world, tmp_path / "run", weights, image_size=24)
    train.train(config)
    said = capsys.readouterr().out
    assert "OpenAI layout" in said and "newly made: 17 tensors" in said

    start = read_pretrained(config.init, num_frames=2, image_size=24)
    end = load_checkpoint(config.out, training=True)
    assert end.model.config.image_size == 24
    assert end.model.config.vocab_size == end.tokenizer.vocab_size == 518
    assert end.tokenizer.encode("dog than", 9) == [516, 513, *end.tokenizer.encode("than", 9)[1:]]
    for name, t in end.model.state_dict().items():
        if not is_new(name):  # CLIP's weights learn, slowly
            assert 0 < (t - start.weights[name]).abs().max() < 2e-3, name
        elif "weight" in name and "time_norm" not in name:
            assert t.abs().max() > 0, name  # so does what is new

    (tmp_path / "run" / "step-000004.safetensors").unlink()  # as if killed in step 3
    moved = weights.rename(weights.parent / "moved")
    try:
        train.train(config)
    finally:
        moved.rename(weights)
    assert load_checkpoint(config.out).sha256 == end.sha256


def test_a_run_starts_from_a_run(tiny_world, tmp_path, capsys):
    """Pre-training leads to fine-tuning: other frames and pictures, the same weights."""
    first = settings(tiny_world, tmp_path / "first", image_size=24)  # not the preset's
    train.train(first)
    before = load_checkpoint(first.out)
    assert before.model.config.image_size == 24
    weights = before.model.state_dict()
    found = read_pretrained(first.out, num_frames=8, image_size=48)
    assert found.sizes.image_size == 48 and len(found.weights["video.time_embed"]) == 4
    model = CLOP(found.sizes)
    assert not found.load_into(model)  # without captions there is no SKP head
    for name, t in model.state_dict().items():
        assert "_embed" in name or t.equal(weights[name]), name

    then = settings(tiny_world, tmp_path / "then", init=first.out, lr=1e-9, num_frames="4")
    train.train(then)
    after = load_checkpoint(then.out)
    said = capsys.readouterr().out
    assert "our layout" in said and "newly made: 0 tensors" in said
    assert after.tokenizer.tokens == before.tokenizer.tokens
    for name in ("text.blocks.0.mlp.0.weight", "text_concept_head.weight"):
        assert torch.allclose(after.model.state_dict()[name], weights[name], atol=1e-6)

    # other captions have other concepts: other heads
    other = CLOP(replace(found.sizes, num_concepts=before.model.config.num_concepts))
    names = before.concept_vocab.names
    assert len(found.load_into(other, names[::-1])) == 4  # two heads, each a matrix and a bias
    assert found.load_into(other, names) == []


def test_clip_is_evaluated_as_it_is(tiny_world, tmp_path, weights, capsys):
    path = weights / "clip.safetensors"
    files = dict(data=str(tiny_world / "test.csv"), cache=str(tmp_path / "cache"))
    wanted = EvalConfig(checkpoint=str(path), task="csv", out=str(tmp_path / "out"), **files)
    record = evaluate(wanted)
    assert "never trained on videos" in capsys.readouterr().out
    assert record["step"] == 0 and record["trained_on"] is None and record["frames"] == 12
    scale = read_clip(path).weights["logit_scale"].exp().item()
    assert record["logit_scale"] == pytest.approx(scale)
    for place in (path, weights):  # where a run is meant
        with pytest.raises(UserError, match="CLIP's weights are for --init"):
            load_checkpoint(place)


def test_groups_have_their_own_learning_rates():
    model = CLOP(build_config("toy", conv_stem=False, num_concepts=3))
    config = TrainConfig(init="x", lr=1e-3, encoder_lr=1e-4, weight_decay=0.2)
    (optimizer,) = train.build_optimizers(model, config)
    name_of, found = {p: name for name, p in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            found[name_of.pop(p)] = (pytest.approx(group["scale"]), group["weight_decay"])
    assert not name_of  # each is in one group
    expected = {
        "video.blocks.2.mlp.0.weight": (0.1, 0.2),
        "text.blocks.2.mlp.0.bias": (0.1, 0.0),
        "logit_scale": (0.1, 0.0),
        "video.blocks.0.time_attn.out.weight": (1.0, 0.2),
        "video_concept_head.bias": (1.0, 0.0),
    }
    assert {name: found[name] for name in expected} == expected


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
        train.train(from_clip(tiny_world, tmp_path / "run", weights, **changes))
    assert not (tmp_path / "cache").exists()
