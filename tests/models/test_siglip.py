"""Our towers against transformers' `SiglipModel`, read from disk and written back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pinclip.errors import CheckpointError, ConfigError
from pinclip.models.fusion import FusionConfig
from pinclip.models.pinclip import PinCLIP
from pinclip.models.siglip import read_siglip, save_siglip, siglip_state_dict

transformers = pytest.importorskip("transformers")

SHAPES = {
    # Widths of the towers that do not agree, a head width (12) no kernel likes, an odd grid.
    "tiny": {
        "vision": {
            "hidden_size": 36,
            "intermediate_size": 50,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
        },
        "images": {"image_size": 20, "patch_size": 4},
        "text": {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "vocabulary": {"vocab_size": 99, "max_position_embeddings": 16, "projection_size": 36},
    },
    # SigLIP 2 keeps the architecture and takes Gemma's vocabulary.
    "SigLIP 2": {
        "vision": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "images": {"image_size": 32, "patch_size": 16},
        "text": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "vocabulary": {"vocab_size": 256000, "max_position_embeddings": 64},
    },
    # Base, patch 16, 224 pixels, but for the vocabulary: 180 M weights.
    "base": {"vision": {}, "images": {}, "text": {}, "vocabulary": {"vocab_size": 1000}},
}


def siglip_model(shape, stir):
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    config = transformers.SiglipConfig(
        vision_config={**sizes["vision"], **sizes["images"]},
        text_config={**sizes["text"], **sizes["vocabulary"]},
    )
    model = transformers.SiglipModel(config).eval()
    stir(model)
    return model


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, tmp_path_factory, stir):
    """(transformers' model, the folder it is saved in)."""
    model = siglip_model(request.param, stir)
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    yield model, folder
    shutil.rmtree(folder)


@pytest.fixture
def tiny_folder(tmp_path, stir):
    siglip_model("tiny", stir).save_pretrained(tmp_path)
    return tmp_path


def inputs(model, lengths):
    """Two images and texts padded to the full length with token 1, plus the mask."""
    generator = torch.Generator().manual_seed(1)
    vision, text = model.config.vision_config, model.config.text_config
    images = torch.randn(len(lengths), 3, vision.image_size, vision.image_size, generator=generator)
    width = text.max_position_embeddings
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(2, text.vocab_size, (len(lengths), width), generator=generator)
    return images, torch.where(mask, tokens, 1), mask.long()


@torch.no_grad()
def test_outputs_equal_transformers(saved):
    theirs, folder = saved
    lengths = [theirs.config.text_config.max_position_embeddings, 5]
    images, tokens, mask = inputs(theirs, lengths)
    plain = theirs(input_ids=tokens, pixel_values=images)
    masked = theirs(input_ids=tokens, pixel_values=images, attention_mask=mask)
    assert (plain.text_embeds - masked.text_embeds).abs().max() > 1e-3, "the mask changes nothing"

    ours = PinCLIP.from_siglip(folder).eval()
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(ours.encode_image(images), plain.image_embeds, **close)
    torch.testing.assert_close(ours.encode_text(tokens), plain.text_embeds, **close)
    # As trained: the lengths tell the fusion what is padding, the tower still attends to it.
    embeddings = ours(images, tokens, token_lengths=lengths)
    torch.testing.assert_close(embeddings.image, plain.image_embeds, **close)
    torch.testing.assert_close(embeddings.text, plain.text_embeds, **close)
    assert embeddings.fused.shape == plain.image_embeds.shape
    del ours, embeddings
    ours = PinCLIP.from_siglip(folder, attend_padding=False).eval()
    torch.testing.assert_close(ours.encode_text(tokens, lengths), masked.text_embeds, **close)


@torch.no_grad()
def test_written_back_it_is_the_same_model(tiny_folder, tmp_path):
    checkpoint = read_siglip(tiny_folder)
    model = PinCLIP.from_siglip(tiny_folder, FusionConfig(width=16, heads=2, depth=1))
    original = load_file(tiny_folder / "model.safetensors")
    written = siglip_state_dict(model.image_tower, model.text_tower)
    assert written.keys() | {"logit_scale", "logit_bias"} == original.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, original[name]), name

    out = tmp_path / "written"
    save_siglip(
        out,
        model.image_tower,
        model.text_tower,
        logit_scale=checkpoint.logit_scale,
        logit_bias=checkpoint.logit_bias,
    )
    theirs = transformers.SiglipModel.from_pretrained(out).eval()
    assert theirs.logit_scale == original["logit_scale"] and theirs.logit_bias == original["logit_bias"]
    images, tokens, _ = inputs(theirs, [16, 3])
    output = theirs(input_ids=tokens, pixel_values=images)
    torch.testing.assert_close(model.encode_image(images), output.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode_text(tokens), output.text_embeds, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "image, message",
    [
        ({"funnel": [1]}, "image.funnel"),
        ({"funnel": [], "pool": "mean"}, 'image.pool = "mean"'),
        ({"funnel": []}, "an embed_dim that is not the image tower's width"),
        ({"funnel": [], "width": 12}, 'text.pool = "mean"'),
    ],
)
def test_what_siglip_lacks_cannot_be_written(tiny, tmp_path, image, message):
    model = tiny(image=image)
    with pytest.raises(ConfigError, match=f"a SiglipModel cannot have {message}"):
        save_siglip(tmp_path / "out", model.image_tower, model.text_tower, logit_scale=0.0, logit_bias=0.0)
    assert not (tmp_path / "out").exists()


def test_sharded_and_bf16_checkpoints(tiny_folder, stir):
    whole = read_siglip(tiny_folder)
    (tiny_folder / "model.safetensors").unlink()
    model = siglip_model("tiny", stir)
    model.save_pretrained(tiny_folder, max_shard_size="20KB")
    assert (tiny_folder / "model.safetensors.index.json").is_file()
    sharded = read_siglip(tiny_folder)
    for name, tensor in whole.image_state.items():
        assert torch.equal(tensor, sharded.image_state[name]), name

    first = next(iter(sorted(tiny_folder.glob("model-*.safetensors"))))
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name}: named by model.safetensors.index.json"):
        read_siglip(tiny_folder)

    for path in tiny_folder.glob("model*"):
        path.unlink()
    model.bfloat16().save_pretrained(tiny_folder)
    ours = PinCLIP.from_siglip(tiny_folder)
    weight = ours.image_tower.embeddings.patch_embedding.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.vision_model.embeddings.patch_embedding.weight.float())


def test_configuration_files_that_leave_out_the_defaults(tiny_folder):
    """The published ones do; every default must be transformers' own."""
    path = tiny_folder / "config.json"
    path.write_text('{"model_type": "siglip", "vision_config": {"image_size": [48, 48]}, "text_config": {}}')
    theirs = transformers.SiglipConfig()
    checkpoint = read_siglip(tiny_folder)
    image, text = checkpoint.image, checkpoint.text
    assert image.image_size == 48
    assert image.patch_size == theirs.vision_config.patch_size
    assert text.vocab_size == theirs.text_config.vocab_size
    assert text.max_length == theirs.text_config.max_position_embeddings
    for ours, config in ((image, theirs.vision_config), (text, theirs.text_config)):
        assert ours.width == config.hidden_size
        assert ours.depth == config.num_hidden_layers
        assert ours.heads == config.num_attention_heads
        assert ours.hidden_width == config.intermediate_size
        assert ours.layer_norm_eps == config.layer_norm_eps


@pytest.mark.parametrize(
    "room, change, message",
    [
        (None, {"model_type": "siglip2"}, "model_type is 'siglip2', only 'siglip' can be read"),
        ("vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act is 'gelu'"),
        ("vision_config", {"image_size": [20, 24]}, r"vision_config.image_size \[20, 24\] is not square"),
        ("vision_config", {"num_attention_heads": 5}, "width 36 is not a multiple of heads 5"),
        ("vision_config", {"vision_use_head": False}, "vision_use_head is False"),
        ("text_config", {"projection_size": 24}, "text_config.projection_size is 24, must be 36"),
        ("text_config", {"vocab_size": "many"}, "vocab_size .*many"),
        ("text_config", {"vocab_size": 98}, r"token_embedding.weight has shape \[99, 24\]"),
    ],
)
def test_configurations_that_do_not_fit_are_named(tiny_folder, room, change, message):
    path = tiny_folder / "config.json"
    config = json.loads(path.read_text())
    (config if room is None else config[room]).update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        PinCLIP.from_siglip(tiny_folder)


def _drop(name):
    return lambda state: state.pop(name)


def _put(name, shape):
    return lambda state: state.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    "edit, message",
    [
        (_drop("logit_bias"), "no weight logit_bias"),
        (_drop("vision_model.head.probe"), "no weight vision_model.head.probe"),
        (
            _drop("text_model.encoder.layers.1.self_attn.v_proj.bias"),
            "no weight text_model.encoder.layers.1.self_attn.v_proj.bias",
        ),
        (
            _drop("text_model.encoder.layers.1.self_attn.q_proj.bias"),
            "no weight text_model.encoder.layers.1.self_attn.q_proj.bias",
        ),
        (
            _put("vision_model.encoder.layers.0.self_attn.k_proj.weight", (36, 35)),
            r"layers.0.self_attn.*\[36, 35\]",
        ),
        (_put("text_model.extra", (1,)), "unexpected weight text_model.extra"),
        (_put("decoder.weight", (1,)), "unexpected weight decoder.weight: not a SiglipModel"),
    ],
)
def test_weights_that_do_not_fit_are_named(tiny_folder, edit, message):
    path = tiny_folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)
    with pytest.raises(CheckpointError, match=message):
        PinCLIP.from_siglip(tiny_folder)


def test_missing_and_damaged_files_are_named(tiny_folder):
    weights, config = tiny_folder / "model.safetensors", tiny_folder / "config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a readable safetensors file"):
        read_siglip(tiny_folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        read_siglip(tiny_folder)
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read as JSON"):
        read_siglip(tiny_folder)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"config.json: not there"):
        read_siglip(tiny_folder)


def test_old_checkpoints_with_position_ids(tiny_folder):
    path = tiny_folder / "model.safetensors"
    state = load_file(path)
    state["vision_model.embeddings.position_ids"] = torch.arange(25)[None]
    save_file(state, path)
    PinCLIP.from_siglip(tiny_folder)
