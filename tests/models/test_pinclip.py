"""The whole model: against a plain composition in fp64, missing modalities, independence of the batch."""

import math

import pytest
import torch
import torch.nn.functional as F

from pinclip.models.pinclip import PinCLIP, PinCLIPConfig


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)


def softmax_attention(q, k, v, heads):
    """q [Nq, D], k, v [N, D] of one sequence, one head after the other."""
    parts = []
    for qh, kh, vh in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1)):
        parts.append(torch.softmax(qh @ kh.T / math.sqrt(qh.shape[1]), 1) @ vh)
    return torch.cat(parts, 1)


def self_attention(p, name, x, heads):
    mixed = softmax_attention(*linear(p, f"{name}.qkv_proj", x).chunk(3, 1), heads)
    return linear(p, f"{name}.out_proj", mixed)


def mlp(p, name, x):
    return linear(p, f"{name}.fc2", F.gelu(linear(p, f"{name}.fc1", x), approximate="tanh"))


def block(p, name, x, heads):
    x = x + self_attention(p, f"{name}.self_attn", norm(p, f"{name}.layer_norm1", x), heads)
    return x + mlp(p, f"{name}.mlp", norm(p, f"{name}.layer_norm2", x))


def plain_image(p, config, image):
    """One image -> (unit vector, stages)."""
    size = config.patch_size
    patches = [
        (p["image_tower.embeddings.patch_embedding.weight"] * image[:, y : y + size, x : x + size]).sum(
            (1, 2, 3)
        )
        for y in range(0, config.image_size, size)
        for x in range(0, config.image_size, size)
    ]
    x = torch.stack(patches) + p["image_tower.embeddings.patch_embedding.bias"]
    x = x + p["image_tower.embeddings.position_embedding.weight"]
    stages, grid = [], config.grid
    for i in range(config.depth):
        if i in config.funnel:
            stages.append(x)
            x = F.avg_pool2d(x.T.reshape(1, -1, grid, grid), 2).flatten(2)[0].T
            grid //= 2
        x = block(p, f"image_tower.encoder.layers.{i}", x, config.heads)
    x = norm(p, "image_tower.post_layernorm", x)
    stages.append(x)
    if config.pool == "mean":
        h = x.mean(0, keepdim=True)
    else:
        head = "image_tower.head"
        weights = p[f"{head}.attention.in_proj_weight"].chunk(3)
        biases = p[f"{head}.attention.in_proj_bias"].chunk(3)
        sources = (p[f"{head}.probe"][0], x, x)
        qkv = (F.linear(source, w, b) for source, w, b in zip(sources, weights, biases))
        h = linear(p, f"{head}.attention.out_proj", softmax_attention(*qkv, config.heads))
        h = h + mlp(p, f"{head}.mlp", norm(p, f"{head}.layernorm", h))
    return F.normalize(linear(p, "image_tower.projection", h)[0], dim=0), stages


def plain_text(p, config, tokens):
    """The real tokens of one text -> (unit vector, tokens)."""
    x = p["text_tower.embeddings.token_embedding.weight"][tokens]
    x = x + p["text_tower.embeddings.position_embedding.weight"][: len(tokens)]
    for i in range(config.depth):
        x = block(p, f"text_tower.encoder.layers.{i}", x, config.heads)
    x = norm(p, "text_tower.final_layer_norm", x)
    return F.normalize(linear(p, "text_tower.head", x.mean(0)), dim=0), x


def plain_pin(p, config, image, tokens):
    """(image, text, fused) of one pin; `p` maps names to tensors, `image` or `tokens` may be None."""
    zero = p["fusion.projection.bias"].new_zeros(config.embed_dim)
    image_vector, text_vector = zero, zero
    e = "fusion.embeddings"
    types = p[f"{e}.type_embedding"]
    rows = [p[f"{e}.fusion_tokens"] + types[0]]
    if image is not None:
        image_vector, stages = plain_image(p, config.image, image)
        if config.fusion.image_stages == "last":
            stages = stages[-1:]
        stages = [norm(p, f"{e}.stage_norms.{i}", s) for i, s in enumerate(stages[:-1])] + stages[-1:]
        projected = torch.cat([linear(p, f"{e}.image_projections.{i}", s) for i, s in enumerate(stages)])
        rows.append(projected + types[1] + p[f"{e}.image_position"])
    if tokens is not None:
        text_vector, states = plain_text(p, config.text, tokens)
        projected = linear(p, f"{e}.text_projection", states)
        rows.append(projected + types[2] + p[f"{e}.text_position"][: len(tokens)])
    if image is None and tokens is None:
        return zero, zero, zero
    x = normed = norm(p, e, torch.cat(rows))
    for i in range(config.fusion.depth):
        layer = f"fusion.layers.{i}"
        for part in ("attention", "mlp"):
            if part == "attention":
                y = self_attention(p, f"{layer}.self_attn", normed, config.fusion.heads)
            else:
                y = mlp(p, f"{layer}.mlp", normed)
            gate = p[f"{layer}.{part}_residual.gate"]
            x = x + (torch.tanh(gate) if config.fusion.gate == "tanh" else gate) * y
            normed = norm(p, f"{layer}.{part}_residual", x)
    fused = linear(p, "fusion.projection", normed[: config.fusion.fusion_tokens].flatten())
    if config.fusion.residual:
        w = p["fusion.residual_weight"]
        fused = fused + w[0] * image_vector + w[1] * text_vector
    return image_vector, text_vector, F.normalize(fused, dim=0)


def pins_of(batch):
    """The batch as a list of (image or None, real tokens or None)."""
    pins = [[None, None] for _ in range(batch["batch_size"])]
    for image, row in zip(batch["images"], batch["image_rows"]):
        pins[row][0] = image
    for tokens, row, length in zip(batch["tokens"], batch["text_rows"], batch["token_lengths"]):
        pins[row][1] = tokens[:length]
    return pins


def cotangents(batch_size, width):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, batch_size, width, generator=generator, dtype=torch.float64)


VARIANTS = {
    "default": {},
    "last stage, tanh gates, no residual, one fusion token": {
        "fusion": {"image_stages": "last", "gate": "tanh", "residual": False, "fusion_tokens": 1}
    },
    "mean pool, two funnels, recomputed": {
        "image": {"pool": "mean", "funnel": [1, 2], "activation_checkpointing": True},
        "text": {"activation_checkpointing": True},
        "fusion": {"activation_checkpointing": True},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_every_gradient_equal_a_plain_composition(tiny, mixed, variant):
    model = tiny(**VARIANTS[variant]).double()
    weights = cotangents(6, 12)
    embeddings = model(**mixed)
    sum((w * e).sum() for w, e in zip(weights, embeddings)).backward()

    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = [
        torch.stack(v) for v in zip(*(plain_pin(copies, model.config, *pin) for pin in pins_of(mixed)))
    ]
    sum((w * e).sum() for w, e in zip(weights, expected)).backward()

    for actual, wanted in zip(embeddings, expected):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        wanted = copies[name].grad
        assert wanted is not None and parameter.grad is not None, f"{name} is dead"
        assert wanted.abs().max() > 1e-8, f"{name} has no gradient"
        torch.testing.assert_close(
            parameter.grad, wanted, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_pin_does_not_depend_on_its_companions(tiny, mixed):
    model = tiny()
    mixed["images"] = mixed["images"].float()
    together = model(**mixed)
    for row, (image, tokens) in enumerate(pins_of(mixed)):
        if image is None and tokens is None:
            continue
        alone = model(
            None if image is None else image[None],
            None if tokens is None else tokens[None],
        )
        for a, b in zip(together, alone):
            torch.testing.assert_close(a[row], b[0], rtol=0, atol=1e-5)


def test_padding_is_not_read(tiny, mixed):
    model = tiny().double()
    wide = {**mixed, "tokens": F.pad(mixed["tokens"], (0, 2), value=39)}
    for i, length in enumerate(wide["token_lengths"]):
        wide["tokens"][i, length:] = 39
    for a, b in zip(model(**mixed), model(**wide)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_missing_modality_is_zero_and_passes_no_gradient(tiny, mixed):
    model = tiny().double()
    mixed["images"].requires_grad_()
    embeddings = model(**mixed)
    norms = [e.norm(dim=1) for e in embeddings]
    for actual, wanted in zip(norms, ([1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1])):
        torch.testing.assert_close(actual, torch.tensor(wanted, dtype=torch.float64))
    # The rows that lack what is asked of them are all the loss reads.
    loss = embeddings.image[[2, 3, 5]].sum() + embeddings.text[[1, 3]].sum() + embeddings.fused[3].sum()
    loss.backward()
    assert mixed["images"].grad.abs().max() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.abs().max() == 0, name


@pytest.mark.parametrize("lacking", ["images", "tokens"])
def test_none_and_zero_rows_are_the_same(tiny, mixed, lacking):
    model = tiny().double()
    rows = {"images": "image_rows", "tokens": "text_rows"}[lacking]
    empty = {**mixed, lacking: mixed[lacking][:0], rows: []}
    if lacking == "tokens":
        empty["token_lengths"] = []
    none = {**empty, lacking: None}
    for a, b in zip(model(**empty), model(**none)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    # Zero rows run their tower all the same: ZeRO-3 needs every rank to touch every parameter.
    sum(e.sum() for e in model(**empty)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_encode_embed_and_prefix(tiny, mixed):
    model = tiny().double()
    embeddings = model(**mixed)
    torch.testing.assert_close(model.encode_image(mixed["images"]), embeddings.image[mixed["image_rows"]])
    encoded = model.encode_text(mixed["tokens"], mixed["token_lengths"])
    torch.testing.assert_close(encoded, embeddings.text[mixed["text_rows"]])
    short = model.embed(**mixed, dim=4)
    assert not short.fused.requires_grad
    torch.testing.assert_close(short.fused, F.normalize(embeddings.fused[:, :4], dim=1))
    torch.testing.assert_close(short.image, F.normalize(embeddings.image[:, :4], dim=1))


def test_bf16_weights_give_fp32_unit_vectors(tiny, mixed):
    model = tiny()
    mixed["images"] = mixed["images"].float()
    exact = model(**mixed)
    low = model.bfloat16()(**mixed)
    for a, b in zip(exact, low):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b.norm(dim=1), a.norm(dim=1), rtol=0, atol=1e-5)
        assert (a * b).sum(1)[a.norm(dim=1) > 0].min() > 0.99


def test_fused_starts_near_the_mean_of_image_and_text():
    torch.manual_seed(0)
    config = PinCLIPConfig.model_validate(
        {
            "image": {"image_size": 32, "patch_size": 8, "width": 64, "depth": 2, "heads": 2},
            "text": {"vocab_size": 50, "max_length": 8, "width": 64, "depth": 2, "heads": 2},
            "fusion": {"width": 64, "heads": 2},
            "embed_dim": 64,
        }
    )
    image, text, fused = PinCLIP(config)(torch.randn(8, 3, 32, 32), torch.randint(0, 50, (8, 5)))
    cosine = (fused * F.normalize(image + text, dim=1)).sum(1)
    assert cosine.min() > 0.85 and cosine.max() < 0.995


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_rows": [0, 1]}, "image_rows names 2 pins for 3 rows"),
        ({"image_rows": [0, 1, 1]}, "image_rows must be a list of different pins"),
        ({"text_rows": [5, 0, 2, 6]}, r"text_rows must be in \[0, 6\)"),
        ({"image_rows": None}, "image_rows is needed: 3 rows for 6 pins"),
        ({"images": None}, "image_rows names 3 pins, but their tensor is None"),
        ({"batch_size": None}, "batch_size must be given"),
        ({"token_lengths": [3, 7, 0, 4]}, "length 0 of text 2"),
        ({"token_lengths": [3, 8, 1, 4]}, "8"),
        ({"images": torch.zeros(3, 3, 16, 16)}, r"images must be \[B, 3, 32, 32\], got \[3, 3, 16, 16\]"),
        (
            {"tokens": torch.zeros(4, 12, dtype=torch.int64), "token_lengths": None},
            r"L in 1..9, got \[4, 12\]",
        ),
        ({"images": None, "tokens": None}, "both None"),
    ],
)
def test_wrong_batches_are_named(tiny, mixed, change, message):
    with pytest.raises(ValueError, match=message):
        tiny().double()(**{**mixed, **change})


@pytest.mark.parametrize(
    "key, change, message",
    [
        ("image", {"image_size": 30}, "image_size 30 is not a multiple of patch_size 4"),
        ("image", {"heads": 5}, "width 24 is not a multiple of heads 5"),
        ("image", {"funnel": [2, 1]}, "does not increase"),
        ("image", {"funnel": [3]}, "between 1 and depth - 1 = 2"),
        ("image", {"patch_size": 32}, "a grid of 1 patches cannot be halved 1 times"),
        ("image", {"width": "24"}, "valid integer"),
        ("text", {"attend_padding": True}, 'attend_padding needs pool = "last"'),
        ("fusion", {"depht": 2}, "depht"),
        ("dims", [4, 13], r"dims \(4, 13\) must increase and lie between 1 and embed_dim 12"),
        ("dims", [8, 4], r"dims \(8, 4\) must increase"),
    ],
)
def test_wrong_configurations_are_named(tiny, key, change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{key: change})
