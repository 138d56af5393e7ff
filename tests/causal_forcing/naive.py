"""The model written a second time, slowly: float64, one frame list per layer, nothing cached that could be derived.

An oracle must not share code with what it checks: this file imports nothing of the engine and takes only the weights.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F


class NaiveTransformer:
    """One forward pass of latent frames, each with its own timestep, against explicitly given past frames."""

    def __init__(self, transformer):
        config = transformer.config
        self.dim, self.heads, self.layers = config.dim, config.num_heads, config.num_layers
        self.freq_dim, self.eps = config.freq_dim, config.eps
        self.w = {name: tensor.double() for name, tensor in transformer.state_dict().items()}

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def mlp(self, name, x, activation):
        return self.linear(f"{name}.2", activation(self.linear(f"{name}.0", x)))

    def norm(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def heads_of(self, name, x, *, rms):
        """Return ``[L, H, D]`` of tokens ``[L, dim]``."""
        y = self.linear(name, x)
        if rms:
            y = y / (y.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.w[f"{name[:-1]}norm_{name[-1]}.weight"]
        return y.view(-1, self.heads, self.dim // self.heads)

    def text(self, embeds):
        return self.mlp("text_embedding", embeds[0].double(), gelu)

    def time(self, timestep):
        half = self.freq_dim // 2
        angles = torch.tensor([timestep * 10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
        embedded = self.mlp("time_embedding", torch.cat([angles.cos(), angles.sin()]), F.silu)
        return embedded, self.linear("time_projection.1", F.silu(embedded)).view(6, self.dim)

    def tokens(self, frame):
        """Return ``[L, dim]`` of one latent frame ``[16, h, w]``, a patch at a time."""
        kernel, bias = self.w["patch_embedding.weight"][:, :, 0], self.w["patch_embedding.bias"]
        rows = range(0, frame.shape[1], 2)
        patches = [frame[:, y : y + 2, x : x + 2] for y in rows for x in range(0, frame.shape[2], 2)]
        return torch.stack([(kernel * patch).sum((1, 2, 3)) + bias for patch in patches])

    def latents(self, patches, height, width):
        """Return ``[16, h, w]`` of one frame's head outputs ``[L, 64]``."""
        out = torch.empty(16, height, width, dtype=torch.float64)
        for i, patch in enumerate(patches):
            y, x = divmod(i, width // 2)
            out[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = patch.view(2, 2, 16).permute(2, 0, 1)
        return out

    def rope(self, x, position, width):
        """Return one frame's heads ``[L, H, D]`` rotated to a latent frame position."""
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns(position, x.shape[0], width // 2, pairs.shape[-1])).flatten(-2)

    def forward(self, latents, timesteps, embeds, positions, visible):
        """Return velocities ``[1, 16, F, h, w]`` and, per layer, each frame's un-rotated key and value ``[L, H, D]``.

        Args:
            latents: ``[1, 16, F, h, w]``.
            timesteps: One per frame.
            embeds: One prompt embedding per frame, ``[1, text_len, text_dim]``.
            positions: One per frame, for the queries.
            visible: ``visible(layer, frame, keys, values)`` gives the (key, value, position) of every frame that frame
                number ``frame`` of this call may see, where ``keys[i]`` and ``values[i]`` are those of frame ``i`` of
                this call.
        """
        _, _, frames, height, width = latents.shape
        x = [self.tokens(latents[0, :, i].double()) for i in range(frames)]
        times = [self.time(t) for t in timesteps]
        texts = [self.text(e) for e in embeds]
        memory = []
        for layer in range(self.layers):
            block = f"blocks.{layer}"
            mods = [self.w[f"{block}.modulation"][0] + projected for _, projected in times]
            y = [self.norm(x[i]) * (1 + mods[i][1]) + mods[i][0] for i in range(frames)]
            keys = [self.heads_of(f"{block}.self_attn.k", f, rms=True) for f in y]
            values = [self.heads_of(f"{block}.self_attn.v", f, rms=False) for f in y]
            memory.append((keys, values))
            for i in range(frames):
                q = self.rope(self.heads_of(f"{block}.self_attn.q", y[i], rms=True), positions[i], width)
                seen = visible(layer, i, keys, values)
                k = torch.cat([self.rope(key, position, width) for key, _, position in seen])
                v = torch.cat([value for _, value, _ in seen])
                x[i] = x[i] + self.linear(f"{block}.self_attn.o", attend(q, k, v)) * mods[i][2]
                x[i] = x[i] + self.cross(block, x[i], texts[i])
                z = self.norm(x[i]) * (1 + mods[i][4]) + mods[i][3]
                x[i] = x[i] + self.mlp(f"{block}.ffn", z, gelu) * mods[i][5]
        out = []
        for i in range(frames):
            shift, scale = self.w["head.modulation"][0] + times[i][0]
            patches = self.linear("head.head", self.norm(x[i]) * (1 + scale) + shift)
            out.append(self.latents(patches, height, width))
        return torch.stack(out, dim=1)[None], memory

    def cross(self, block, x, text):
        y = self.norm(x) * self.w[f"{block}.norm3.weight"] + self.w[f"{block}.norm3.bias"]
        q = self.heads_of(f"{block}.cross_attn.q", y, rms=True)
        k = self.heads_of(f"{block}.cross_attn.k", text, rms=True)
        v = self.heads_of(f"{block}.cross_attn.v", text, rms=False)
        return self.linear(f"{block}.cross_attn.o", attend(q, k, v))


class NaiveStream:
    """A stream that never forgets: it keeps every frame's keys and values and selects which ones a chunk may see."""

    def __init__(self, transformer, *, window, sink, relative, noise, steps, first_steps):
        self.model = NaiveTransformer(transformer)
        self.window, self.sink, self.relative = window, sink, relative
        self.noise, self.steps, self.first_steps = noise, steps, first_steps
        self.frames = []  # per frame, per layer: (un-rotated key, value)

    def generate(self, chunk, shape, embeds):
        x = self.noise(chunk, 0, shape).double()
        levels = [sigma_of(step) for step in (self.first_steps if chunk == 0 else self.steps)]
        for draw, sigma in enumerate(levels, start=1):
            timestep = float(torch.tensor(1000 * sigma, dtype=torch.float32))
            velocity, _ = self.forward(x, timestep, embeds)
            x = x - sigma * velocity
            if draw < len(levels):
                x = (1 - levels[draw]) * x + levels[draw] * self.noise(chunk, draw, shape).double()
        self.write(x, embeds)
        return x

    def write(self, latents, embeds):
        _, memory = self.forward(latents, 0.0, embeds)
        for i in range(latents.shape[2]):
            self.frames.append([(keys[i], values[i]) for keys, values in memory])

    def forward(self, latents, timestep, embeds):
        count, start = latents.shape[2], len(self.frames)
        end = start + count
        sink, rolling = self.held(end)
        shift = rolling.start - len(sink) if self.relative and len(sink) == self.sink else 0

        def visible(layer, _frame, keys, values):
            frames = [frame[layer] for frame in self.frames] + list(zip(keys, values, strict=True))
            return [(*frames[p], p + shift) for p in sink] + [(*frames[p], p) for p in rolling]

        return self.model.forward(latents, [timestep] * count, [embeds] * count, range(start, end), visible)

    def held(self, end):
        """Return which frames a chunk that ends before frame ``end`` sees: the sink, and the newest others."""
        sink = range(min(self.sink, end))
        return sink, range(max(len(sink), end - (self.window - self.sink)), end)


def attend(q, k, v):
    """Return ``[Lq, H * D]`` of heads ``[L, H, D]``."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@lru_cache(maxsize=4096)
def turns(position, tokens, columns, pairs):
    """Return unit complex numbers ``[L, 1, pairs]``: what each pair of each token of a frame is turned by."""
    spatial = pairs // 3
    angles = [
        [
            place * 10000.0 ** (-j / count)
            for place, count in ((position, pairs - 2 * spatial), (i // columns, spatial), (i % columns, spatial))
            for j in range(count)
        ]
        for i in range(tokens)
    ]
    angle = torch.tensor(angles, dtype=torch.float64)[:, None]
    return torch.complex(angle.cos(), angle.sin())


def sigma_of(step):
    """Return the noise level of an unwarped step, shift 5 of step / 1000, as the float32 the reference tabulates."""
    return float(torch.tensor(5 * (step / 1000) / (1 + 4 * (step / 1000)), dtype=torch.float32))


def slerp_by_hand(a, b, t):
    """Row by row in float64, no vector arithmetic shared with the code."""
    out = torch.zeros_like(a, dtype=torch.float64)
    for row in range(a.shape[1]):
        x, y = a[0, row].double(), b[0, row].double()
        lengths = float(x.norm()) * float(y.norm())
        angle = math.acos(float(x @ y) / lengths) if lengths else math.pi / 2
        share = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
        out[0, row] = share[0] * x + share[1] * y
    return out
