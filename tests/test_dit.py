"""DiT: keys, shapes and counts of the public checkpoints; the function against an independent float64 rendering."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from difffit_fast import DiT, DiT_models
from difffit_fast.models import dit as dit_module
from difffit_fast.models.dit import label_dropout, sincos_pos_embed, timestep_embedding, unpatchify

SMALL = dict(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=7)

# Parameters with the position table, at 256 and 512 pixels.
COUNTS = {
    "DiT-XL/2": (675_129_632, 676_014_368),
    "DiT-XL/4": (675_074_432, 675_295_616),
    "DiT-XL/8": (675_683_072, 675_738_368),
    "DiT-L/2": (458_102_816, 458_889_248),
    "DiT-L/4": (458_053_760, None),
    "DiT-L/8": (458_594_816, None),
    "DiT-B/2": (130_512_416, 131_102_240),
    "DiT-B/4": (130_475_648, None),
    "DiT-B/8": (130_881_536, None),
    "DiT-S/2": (32_963_360, 33_258_272),
    "DiT-S/4": (32_945_024, None),
    "DiT-S/8": (33_148_160, None),
}


def random_dit(seed: int = 0, **overrides) -> DiT:
    """A small DiT whose every trainable parameter is random: adaLN-Zero would hide mistakes behind zeros."""
    torch.manual_seed(seed)
    model = DiT(**{**SMALL, **overrides})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def batch(model: DiT, n: int = 4, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, model.in_channels, model.input_size, model.input_size, generator=g)
    t = torch.randint(0, 1000, (n,), generator=g)
    y = torch.randint(0, model.num_classes, (n,), generator=g)
    return x, t, y


def public_shapes(size: int, p: int, c: int, d: int, depth: int, classes: int, mlp: int = 4) -> dict[str, tuple]:
    """The published key layout, written out by hand."""
    tokens, out = (size // p) ** 2, p * p * 2 * c
    shapes = {
        "pos_embed": (1, tokens, d),
        "x_embedder.proj.weight": (d, c, p, p),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (classes + 1, d),
        "final_layer.linear.weight": (out, d),
        "final_layer.linear.bias": (out,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    linears = dict(
        [("attn.qkv", (3 * d, d)), ("attn.proj", (d, d)), ("mlp.fc1", (mlp * d, d)), ("mlp.fc2", (d, mlp * d))]
        + [("adaLN_modulation.1", (6 * d, d))]
    )
    for i in range(depth):
        for name, shape in linears.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return shapes


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_sizes(name):
    with torch.device("meta"):
        for side, expected in zip((32, 64), COUNTS[name], strict=True):
            if expected is None:
                continue
            model = DiT_models[name](input_size=side)
            assert sum(p.numel() for p in model.parameters()) == expected
    patch = int(name[-1])
    d, depth = model.hidden_size, model.depth
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == public_shapes(side if expected else 32, patch, 4, d, depth, 1000)
    assert len(shapes) == 10 * depth + 12
    factory = getattr(dit_module, name.replace("-", "_").replace("/", "_"))
    assert factory is DiT_models[name]


def test_state_dict_of_the_public_layout_loads_strictly():
    model = DiT(**SMALL)
    public = {key: torch.randn(shape) for key, shape in public_shapes(8, 2, 4, 48, 2, 7).items()}
    model.load_state_dict(public, strict=True)
    assert torch.equal(model.blocks[1].attn.qkv.weight, public["blocks.1.attn.qkv.weight"])
    assert not list(model.buffers())
    assert not model.pos_embed.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "pos_embed")


def test_attributes_and_config():
    model = DiT(**SMALL, learn_sigma=False, class_dropout_prob=0.0)
    assert model.x_embedder.patch_size == (2, 2) and model.x_embedder.num_patches == 16
    assert model.out_channels == model.in_channels == 4
    assert model.y_embedder.embedding_table.num_embeddings == 7
    again = DiT(**model.config)
    assert again.config == model.config and model.config["learn_sigma"] is False and len(model.config) == 10


def test_initialisation():
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=96, depth=2, num_heads=4, num_classes=200)
    x, t, y = batch(model)
    assert model.eval()(x, t, y).abs().max() == 0  # adaLN-Zero and a zero final layer
    assert abs(model.y_embedder.embedding_table.weight.std().item() - 0.02) < 1e-3
    assert abs(model.t_embedder.mlp[2].weight.std().item() - 0.02) < 1e-3
    bound = math.sqrt(6 / (96 + 4 * 4))  # xavier on the flattened patch
    assert 0.9 * bound < model.x_embedder.proj.weight.abs().max() <= bound
    bound = math.sqrt(6 / (96 + 3 * 96))
    assert 0.99 * bound < model.blocks[0].attn.qkv.weight.abs().max() <= bound
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert all(p.abs().max() == 0 for p in biases)


# ------------------------------------------------------------------------------------------------ the function


def numpy_dit(model: DiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """DiT once more in float64 NumPy, image by image and head by head, from the state dict alone."""
    w = {key: value.detach().double().numpy() for key, value in model.state_dict().items()}
    d, heads, p, size = model.hidden_size, model.num_heads, model.patch_size, model.input_size
    side = size // p

    def linear(name, v):
        return v @ w[name + ".weight"].T + w[name + ".bias"]

    def silu(v):
        return v / (1 + np.exp(-v))

    def norm(v):
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)

    def gelu(v):
        return 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    outputs = []
    for image, step, label in zip(x.double().numpy(), t.tolist(), y.tolist(), strict=True):
        tokens = np.zeros((side * side, d))
        for i in range(side):
            for j in range(side):
                patch = image[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
                tokens[i * side + j] = np.einsum("cab,dcab->d", patch, w["x_embedder.proj.weight"])
        tokens += w["x_embedder.proj.bias"] + w["pos_embed"][0]
        angles = [step * 10000 ** (-k / 128) for k in range(128)]
        features = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", features)))
        c = c + w["y_embedder.embedding_table.weight"][label]
        for i in range(model.depth):
            mod = linear(f"blocks.{i}.adaLN_modulation.1", silu(c)).reshape(6, d)
            qkv = linear(f"blocks.{i}.attn.qkv", norm(tokens) * (1 + mod[1]) + mod[0]).reshape(-1, 3, heads, d // heads)
            mixed = np.zeros((side * side, d))
            for h in range(heads):
                q, k, v = qkv[:, 0, h], qkv[:, 1, h], qkv[:, 2, h]
                scores = np.exp(q @ k.T / math.sqrt(d // heads))
                mixed[:, h * (d // heads) : (h + 1) * (d // heads)] = scores / scores.sum(1, keepdims=True) @ v
            tokens = tokens + mod[2] * linear(f"blocks.{i}.attn.proj", mixed)
            hidden = gelu(linear(f"blocks.{i}.mlp.fc1", norm(tokens) * (1 + mod[4]) + mod[3]))
            tokens = tokens + mod[5] * linear(f"blocks.{i}.mlp.fc2", hidden)
        shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).reshape(2, d)
        out = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift).reshape(side, side, p, p, -1)
        outputs.append(out.transpose(4, 0, 2, 1, 3).reshape(-1, size, size))
    return np.stack(outputs)


@pytest.mark.parametrize("overrides", [{}, dict(patch_size=4, in_channels=3, learn_sigma=False, num_heads=3)])
def test_function_against_numpy(overrides):
    model = random_dit(**overrides).double().eval()
    x, t, y = batch(model)
    truth = numpy_dit(model, x, t, y)
    error = np.abs(model(x, t, y).detach().numpy() - truth).max() / np.abs(truth).max()
    assert error < 1e-4  # the timestep features are float32 in every precision, as in the public code
    assert np.abs(model.float()(x, t, y).detach().numpy() - truth).max() / np.abs(truth).max() < 1e-4


def test_float_timesteps_and_other_dtypes():
    model = random_dit().eval()
    x, t, y = batch(model)
    out = model(x, t, y)
    assert torch.equal(model(x, t.float(), y), out)
    assert torch.equal(model(x, t, y.int()), out)
    assert not torch.equal(model(x, t + 0.5, y), out)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x, t, y) - out).abs().max() < 0.05 * out.abs().max()
    half = model.to(torch.bfloat16)(x, t, y)
    assert half.dtype == torch.bfloat16 and (half - out).abs().max() < 0.1 * out.abs().max()
    empty = model(x[:0], t[:0], y[:0])
    assert empty.shape == (0, 8, 8, 8)


def test_compiles_without_a_graph_break():
    model = random_dit().eval()
    x, t, y = batch(model)
    y[2:] = model.num_classes

    def both(*inputs):
        return model(*inputs), model.forward_with_cfg(*inputs, 4.0)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(x, t, y), both(x, t, y), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x, t, y).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    for count in (3, 2):  # labels are dropped at random, and the number of images varies
        assert len(compiled(x[:count], t[:count], y[:count])) == count


# --------------------------------------------------------------------------------------------- fixed embeddings


def test_timestep_embedding():
    t = torch.tensor([0.0, 0.25, 999.0])
    freqs = np.exp(-math.log(10000) * np.arange(128) / 128)
    angles = t.double().numpy()[:, None] * freqs
    truth = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    features = timestep_embedding(t)
    assert features.shape == (3, 256) and features.dtype == torch.float32
    np.testing.assert_allclose(features.numpy(), truth, atol=1e-4)
    assert timestep_embedding(t, 7).shape == (3, 7) and timestep_embedding(t, 7)[:, -1].abs().max() == 0


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_sincos_pos_embed(scale):
    n, dim = 5, 24
    table = sincos_pos_embed(dim, n, scale).view(n, n, dim)
    for row in range(n):
        for column in range(n):
            parts = []
            for position in (column, row):
                angles = [position * scale / 10000 ** (k / 6) for k in range(6)]
                parts += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(table[row, column].numpy(), parts, atol=1e-6)
    # at half the scale every second patch of a doubled grid sits where a patch of the small grid was
    double = sincos_pos_embed(dim, 2 * n, 0.5).view(2 * n, 2 * n, dim)
    torch.testing.assert_close(double[::2, ::2].reshape(n * n, dim), sincos_pos_embed(dim, n))


def test_sincos_pos_embed_against_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    theirs = embeddings.get_2d_sincos_pos_embed(64, 6, base_size=6, output_type="pt")
    torch.testing.assert_close(sincos_pos_embed(64, 6), theirs.float(), rtol=0, atol=1e-6)


def test_unpatchify_inverts_patches():
    image = torch.randn(2, 3, 8, 8)
    tokens = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, 4, 48)
    assert torch.equal(unpatchify(tokens, 4, 3), image)


# ------------------------------------------------------------------------------------------- labels and guidance


def test_label_dropout():
    y = torch.arange(2000) % 7
    dropped = label_dropout(y, 0.25, 7, generator=torch.Generator().manual_seed(0))
    share = (dropped == 7).float().mean().item()
    assert abs(share - 0.25) < 0.03 and torch.equal(dropped[dropped != 7], y[dropped != 7])
    again = label_dropout(y, 0.25, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped, again)
    forced = label_dropout(y[:4], 0.9, 7, force_drop_ids=torch.tensor([0, 1, 0, 1]))
    assert forced.tolist() == [0, 7, 2, 7]


def test_labels_are_dropped_in_training_only():
    model = random_dit(class_dropout_prob=0.5)
    table = model.y_embedder.embedding_table.weight
    y = torch.arange(7)
    assert torch.equal(model.y_embedder(y, False), table[:7])
    g = torch.Generator().manual_seed(3)
    rows = model.y_embedder(y.repeat(50), True, generator=g)
    null = (rows == table[7]).all(1)
    assert 100 < null.sum() < 250
    forced = model.y_embedder(y[:2], False, force_drop_ids=torch.tensor([1, 0]))
    assert torch.equal(forced, table[[7, 1]])


@pytest.mark.parametrize("cfg_channels, guided", [("first3", 3), ("all", 4), (2, 2)])
def test_guidance(cfg_channels, guided):
    model = random_dit().eval()
    x, t, y = batch(model, n=3)
    null = torch.full_like(y, model.num_classes)
    doubled = torch.cat([x, torch.randn_like(x)]), t.repeat(2), torch.cat([y, null])
    out = model.forward_with_cfg(*doubled, 2.5, cfg_channels)
    cond, uncond = model(x, t, y), model(x, t, null)
    eps = uncond[:, :guided] + 2.5 * (cond[:, :guided] - uncond[:, :guided])
    torch.testing.assert_close(out[:3, :guided], eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[3:, :guided], eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[:, guided:], torch.cat([cond, uncond])[:, guided:], rtol=1e-4, atol=1e-5)


def test_guidance_default_is_the_public_one():
    model = random_dit().eval()
    x, t, y = batch(model)
    y[2:] = model.num_classes
    x[2:], t[2:] = x[:2], t[:2]
    assert torch.equal(model.forward_with_cfg(x, t, y, 4.0), model.forward_with_cfg(x, t, y, 4.0, "first3"))
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 1.0)[:2], model(x, t, y)[:2], rtol=1e-4, atol=1e-5)
    assert random_dit(in_channels=1).forward_with_cfg(x[:, :1], t, y, 2.0).shape == (4, 2, 8, 8)


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(num_heads=5), "hidden_size must be divisible by num_heads, got 48 and 5"),
        (dict(hidden_size=46, num_heads=2), "divisible by 4"),
        (dict(input_size=9), "input_size must be divisible by patch_size, got 9 and 2"),
        (dict(num_classes=0), "num_classes must be at least 1, got 0"),
        (dict(depth=-1), "depth must be at least 0"),
        (dict(class_dropout_prob=1.5), "class_dropout_prob must be in 0..1, got 1.5"),
    ],
)
def test_constructor_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        DiT(**{**SMALL, **overrides})


def test_input_errors():
    model = random_dit().eval()
    x, t, y = batch(model)
    for bad in (x[:, :3], x[..., :6], x[0], torch.randn(4, 4, 8, 10)):
        with pytest.raises(ValueError, match=r"x must have the shape \(N, 4, 8, 8\), got"):
            model(bad, t, y)
    with pytest.raises(ValueError, match=r"t and y must have the shape \(4,\), got \(3,\)"):
        model(x, t[:3], y)
    with pytest.raises(ValueError, match="integer class labels"):
        model(x, t, y.float())
    for label in (8, -1):
        with pytest.raises(ValueError, match=r"class labels must be in 0\.\.6, the null class is 7"):
            model(x, t, torch.tensor([0, label, 1, 2]))
    with pytest.raises(ValueError, match="cfg_channels must be"):
        model.forward_with_cfg(x, t, y, 2.0, 5)
    with pytest.raises(ValueError, match="doubled batch"):
        model.forward_with_cfg(x[:3], t[:3], y[:3], 2.0)


def test_no_null_class_no_guidance():
    model = random_dit(class_dropout_prob=0.0).eval()
    x, t, y = batch(model)
    with pytest.raises(ValueError, match="class_dropout_prob=0"):
        model.forward_with_cfg(x, t, y, 2.0)
    with pytest.raises(ValueError, match="there is no null class"):
        model(x, t, torch.full_like(y, 7))
    with pytest.raises(ValueError, match="no null class"):
        model.y_embedder(y, False, force_drop_ids=torch.ones_like(y))
    assert model.train()(x, t, y).shape == (4, 8, 8, 8)
