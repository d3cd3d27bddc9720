"""The frozen zoo of the suite `estimate`: models and shapes, chosen before the estimator was tuned.

Nothing here may be changed to please a figure. Small random configurations of real architectures,
with shapes as they are used: every call takes well under two seconds. A case with `generate` is a
generation loop of that many new tokens, greedy, by the model's own `generate()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any] | tuple[Any, ...]
Built = tuple[nn.Module, Inputs]


@dataclass(frozen=True)
class Case:
    """One model at one shape: what builds it, and what kind of memory dominates it."""

    name: str
    kind: str  # attention, convolution, recurrent, dense or generation
    package: str
    build: Callable[[], Built]
    generate: int = 0


CASES: list[Case] = []


def _add(
    name: str, kind: str, build: Callable[[], Built], package: str = "torch", generate: int = 0
) -> None:
    CASES.append(Case(name, kind, package, build, generate))


def _ids(batch: int, length: int, vocabulary: int = 1000) -> Tensor:
    return torch.randint(3, vocabulary, (batch, length))


# --- plain torch ---------------------------------------------------------------------------------


def _mlp() -> Built:
    model = nn.Sequential(
        nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512), nn.LayerNorm(512), nn.Linear(512, 10)
    )
    return model, (torch.randn(300, 512),)


class _Norms(nn.Module):
    """Reductions and sorting over the whole input, in several dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x - x.mean(dim=(0, 2), keepdim=True)) / x.std(dim=1, keepdim=True)
        top = torch.topk(y, 5, dim=-1).values
        order = y.sort(dim=-1).values.cumsum(-1)
        return torch.logsumexp(order, 1) + y.softmax(1).amax(1) + top.sum((1, 2), keepdim=True)[0]


def _encoder_layer(norm_first: bool, shape: tuple[int, ...]) -> Built:
    layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), (torch.randn(shape),)


def _transformer() -> Built:
    model = nn.Transformer(256, 4, 2, 2, 1024, batch_first=True)
    return model, (torch.randn(3, 70, 256), torch.randn(3, 41, 256))


def _recurrent(cls: type[nn.Module], *args: Any, shape: tuple[int, ...], **options: Any) -> Built:
    return cls(*args, **options), (torch.randn(shape),)


class _Cells(nn.Module):
    """A decoder that steps a GRU cell and an LSTM cell by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRUCell(128, 256), nn.LSTMCell(256, 192)
        self.out = nn.Linear(192, 80)

    def forward(self, x: Tensor) -> Tensor:
        h, state, steps = None, None, []
        for t in range(x.shape[1]):
            h = self.gru(x[:, t], h)
            state = self.lstm(h, state)
            steps.append(self.out(state[0]))
        return torch.stack(steps, 1)


class _Speech(nn.Module):
    """Convolutions over time, then a bidirectional LSTM: a recognizer's usual shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv1d(80, 256, 5, 2, 2), nn.ReLU(), nn.Conv1d(256, 256, 5, 2, 2), nn.ReLU()
        )
        self.rnn = nn.LSTM(256, 320, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(640, 500)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.conv(x).transpose(1, 2))
        return self.head(y).log_softmax(-1)


def _convolutions() -> Built:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(64, 128, 3, padding=1), nn.GroupNorm(16, 128), nn.SiLU(),
        nn.Conv2d(128, 128, 5, padding=4, dilation=2, groups=4), nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip
    return model, (torch.randn(2, 3, 190, 220),)


class _LSDBlock(nn.Sequential):
    def __init__(self, a: int, b: int) -> None:
        layers: list[nn.Module] = []
        for i in range(4):
            layers += [nn.Conv2d(a if i == 0 else b, b, 3, padding=1), nn.BatchNorm2d(b),
                       nn.SiLU(), nn.Dropout2d(0.1)]  # fmt: skip
        super().__init__(*layers)


class _VideoUNet(nn.Module):
    """A convolutional U-Net with skips and attention at its lowest scale (16 heads)."""

    def __init__(self, base: int = 32) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            _LSDBlock(a, b) for a, b in ((3, base), (base, 2 * base), (2 * base, 4 * base))
        )
        self.attention = nn.MultiheadAttention(4 * base, 16, batch_first=True)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, 2) for a, b in ((4 * base, 2 * base), (2 * base, base))
        )
        self.merge = nn.ModuleList(
            _LSDBlock(a, b) for a, b in ((4 * base, 2 * base), (2 * base, base))
        )
        self.out = nn.Conv2d(base, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = nn.functional.avg_pool2d(x, 2) if len(skips) < 3 else x
        flat = x.flatten(2).transpose(1, 2)
        flat = flat + self.attention(flat, flat, flat)[0]
        x = flat.transpose(1, 2).reshape(x.shape)
        for up, merge, skip in zip(self.up, self.merge, skips[1::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.out(x)


def _vocoder() -> Built:
    model = nn.Sequential(
        nn.Conv1d(80, 256, 7, padding=3), nn.LeakyReLU(0.1),
        nn.ConvTranspose1d(256, 128, 16, 8, 4), nn.LeakyReLU(0.1),
        nn.Conv1d(128, 128, 3, padding=6, dilation=6), nn.LeakyReLU(0.1),
        nn.ConvTranspose1d(128, 64, 16, 8, 4), nn.LeakyReLU(0.1),
        nn.Conv1d(64, 1, 7, padding=3), nn.Tanh(),
    )  # fmt: skip
    return model, (torch.randn(2, 80, 130),)


def _video() -> Built:
    model = nn.Sequential(
        nn.Conv3d(3, 48, 3, (1, 2, 2), 1), nn.ReLU(),
        nn.Conv3d(48, 64, 3, padding=1), nn.ReLU(), nn.ConvTranspose3d(64, 3, 4, 2, 1),
    )  # fmt: skip
    return model, (torch.randn(1, 3, 7, 60, 68),)


class _Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.bags = nn.Embedding(3000, 256), nn.EmbeddingBag(3000, 256)
        self.rnn = nn.GRU(256, 256, 2, bidirectional=True)
        self.score = nn.Bilinear(512, 256, 40)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.rnn(self.words(ids).transpose(0, 1))
        return self.score(out[-1], self.bags(ids))


_add("mlp", "dense", _mlp)
_add("reductions and sorting", "dense", lambda: (_Norms(), (torch.randn(9, 250, 333),)))
_add("encoder, post-norm", "attention", lambda: _encoder_layer(False, (3, 111, 256)))
_add("encoder, pre-norm, long", "attention", lambda: _encoder_layer(True, (1, 700, 256)))
_add("encoder and decoder", "attention", _transformer)
_add("lstm, 2 layers", "recurrent", lambda: _recurrent(
    nn.LSTM, 128, 256, 2, shape=(4, 90, 128), batch_first=True))  # fmt: skip
_add("lstm, projected, bidirectional", "recurrent", lambda: _recurrent(
    nn.LSTM, 96, 256, 2, shape=(60, 3, 96), proj_size=64, bidirectional=True))  # fmt: skip
_add("gru, 3 layers", "recurrent", lambda: _recurrent(
    nn.GRU, 200, 160, 3, shape=(2, 75, 200), batch_first=True))  # fmt: skip
_add("elman net", "recurrent", lambda: _recurrent(
    nn.RNN, 64, 300, 2, shape=(110, 5, 64), nonlinearity="relu"))  # fmt: skip
_add("recurrent cells by hand", "recurrent", lambda: (_Cells(), (torch.randn(6, 35, 128),)))
_add("speech: convolutions and lstm", "recurrent", lambda: (_Speech(), (torch.randn(2, 80, 420),)))
_add("tagger: gru, bags, bilinear", "recurrent", lambda: (_Tagger(), (_ids(5, 47, 3000),)))
_add("convolutions", "convolution", _convolutions)
_add("video u-net", "convolution", lambda: (_VideoUNet(), (torch.randn(1, 3, 72, 88),)))
_add("video u-net, batch of 5", "convolution", lambda: (_VideoUNet(), (torch.randn(5, 3, 40, 40),)))
_add("vocoder", "convolution", _vocoder)
_add("3-D convolutions", "convolution", _video)

# --- transformers --------------------------------------------------------------------------------

_DECODER: dict[str, Any] = {
    "vocab_size": 4000, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 3,
    "num_attention_heads": 5, "num_key_value_heads": 5, "max_position_embeddings": 2048,
}  # fmt: skip


def _text(
    model: str, config: str, inputs: Callable[[], dict[str, Any]], dtype: torch.dtype | None = None,
    **options: Any,
) -> Callable[[], Built]:  # fmt: skip
    def build() -> Built:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**options))
        if dtype is not None:
            made = made.to(dtype)
        return made, inputs()

    return build


def _hf(name: str, kind: str, build: Callable[[], Built], generate: int = 0) -> None:
    _add(name, kind, build, "transformers", generate)


_BERT: dict[str, Any] = {
    "vocab_size": 3000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip
_hf("bert, padded batch", "attention", _text(
    "BertModel", "BertConfig",
    lambda: {"input_ids": _ids(6, 130), "attention_mask": torch.arange(130) < torch.tensor(
        [[130], [90], [128], [40], [77], [12]])}, **_BERT))  # fmt: skip
_hf("bert, bfloat16, no mask", "attention", _text(
    "BertModel", "BertConfig", lambda: {"input_ids": _ids(2, 300)}, torch.bfloat16,
    **_BERT))  # fmt: skip
_hf("deberta", "attention", _text(
    "DebertaV2Model", "DebertaV2Config", lambda: {"input_ids": _ids(2, 90)},
    relative_attention=True,
    pos_att_type=["p2c", "c2p"], position_buckets=64, norm_rel_ebd="layer_norm",
    share_att_key=True, **_BERT))  # fmt: skip
_hf("llama", "attention", _text(
    "LlamaForCausalLM", "LlamaConfig", lambda: {"input_ids": _ids(2, 333), "use_cache": False},
    **_DECODER))  # fmt: skip
_hf("llama, bfloat16, cache, batch", "attention", _text(
    "LlamaForCausalLM", "LlamaConfig", lambda: {"input_ids": _ids(4, 120)}, torch.bfloat16,
    **_DECODER))  # fmt: skip
_hf("llama, eager attention", "attention", _text(
    "LlamaForCausalLM", "LlamaConfig", lambda: {"input_ids": _ids(1, 400)},
    attn_implementation="eager", **_DECODER))  # fmt: skip
_hf("qwen3, grouped heads", "attention", _text(
    "Qwen3ForCausalLM", "Qwen3Config", lambda: {"input_ids": _ids(2, 210)},
    **(_DECODER | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 40}),
))  # fmt: skip
_hf("gemma2, soft caps", "attention", _text(
    "Gemma2ForCausalLM", "Gemma2Config", lambda: {"input_ids": _ids(1, 260)},
    **(_DECODER | {"head_dim": 64})))  # fmt: skip
_hf("gpt2", "attention", _text(
    "GPT2LMHeadModel", "GPT2Config", lambda: {"input_ids": _ids(3, 150)}, vocab_size=5000,
    n_embd=256, n_layer=3, n_head=8))  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": 2000, "d_model": 256, "d_kv": 64, "d_ff": 768, "num_layers": 3, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_hf("t5", "attention", _text(
    "T5ForConditionalGeneration", "T5Config",
    lambda: {"input_ids": _ids(2, 140), "decoder_input_ids": _ids(2, 37)}, **_T5))  # fmt: skip
_hf("t5, bfloat16", "attention", _text(
    "T5ForConditionalGeneration", "T5Config",
    lambda: {"input_ids": _ids(3, 200), "decoder_input_ids": _ids(3, 20)}, torch.bfloat16,
    **_T5))  # fmt: skip
_WHISPER: dict[str, Any] = {
    "d_model": 256, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024,
    "vocab_size": 2000, "max_source_positions": 300, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_hf("whisper", "convolution", _text(
    "WhisperForConditionalGeneration", "WhisperConfig",
    lambda: {"input_features": torch.randn(2, 80, 600), "decoder_input_ids": _ids(2, 30)},
    **_WHISPER))  # fmt: skip
_hf("wav2vec2", "convolution", _text(
    "Wav2Vec2Model", "Wav2Vec2Config", lambda: {"input_values": torch.randn(2, 9000)},
    hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024,
    conv_dim=(256,) * 4, conv_stride=(5, 2, 2, 2), conv_kernel=(10, 3, 3, 2),
    num_conv_pos_embeddings=32, num_conv_pos_embedding_groups=4))  # fmt: skip
_hf("encodec", "recurrent", _text(
    "EncodecModel", "EncodecConfig", lambda: {"input_values": torch.randn(1, 1, 12000)},
    num_filters=32, hidden_size=128, codebook_dim=128))  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 1024,
}  # fmt: skip
_hf("vit", "attention", _text(
    "ViTModel", "ViTConfig", lambda: {"pixel_values": torch.randn(3, 3, 160, 160)}, image_size=160,
    patch_size=16, **_VISION))  # fmt: skip
_hf("vit, bfloat16", "attention", _text(
    "ViTModel", "ViTConfig",
    lambda: {"pixel_values": torch.randn(2, 3, 224, 224, dtype=torch.bfloat16)}, torch.bfloat16,
    image_size=224, patch_size=14, **_VISION))  # fmt: skip
_hf("clip", "attention", _text(
    "CLIPModel", "CLIPConfig",
    lambda: {"input_ids": _ids(4, 33), "pixel_values": torch.randn(3, 3, 128, 128)},
    text_config={**_VISION, "vocab_size": 2000, "eos_token_id": 2},
    vision_config={**_VISION, "image_size": 128, "patch_size": 16}))  # fmt: skip
_hf("convnext", "convolution", _text(
    "ConvNextModel", "ConvNextConfig", lambda: {"pixel_values": torch.randn(2, 3, 130, 98)},
    hidden_sizes=[96, 192, 384, 768], depths=[1, 1, 2, 1]))  # fmt: skip
_hf("swin", "attention", _text(
    "SwinModel", "SwinConfig", lambda: {"pixel_values": torch.randn(2, 3, 160, 160)},
    image_size=160, patch_size=4, embed_dim=96, depths=[1, 1, 2], num_heads=[3, 6, 12],
    window_size=5))  # fmt: skip
_hf("segformer", "convolution", _text(
    "SegformerModel", "SegformerConfig", lambda: {"pixel_values": torch.randn(1, 3, 192, 160)},
    depths=[1, 1, 1, 1]))  # fmt: skip
_hf("mamba", "recurrent", _text(
    "MambaForCausalLM", "MambaConfig", lambda: {"input_ids": _ids(2, 40), "use_cache": False},
    vocab_size=2000, hidden_size=256, num_hidden_layers=2))  # fmt: skip

_hf(
    "llama, 40 new tokens",
    "generation",
    _text("LlamaForCausalLM", "LlamaConfig", lambda: {"input_ids": _ids(2, 61)}, **_DECODER),
    40,
)
_hf("llama, bfloat16, long answer", "generation", _text(
    "LlamaForCausalLM", "LlamaConfig", lambda: {"input_ids": _ids(6, 9)}, torch.bfloat16,
    **_DECODER), 150)  # fmt: skip
_hf(
    "qwen3, 25 new tokens",
    "generation",
    _text(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        lambda: {"input_ids": _ids(1, 300)},
        **(_DECODER | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 40}),
    ),
    25,
)
_hf("gpt2, 60 new tokens", "generation", _text(
    "GPT2LMHeadModel", "GPT2Config", lambda: {"input_ids": _ids(4, 20)}, vocab_size=5000,
    n_embd=256, n_layer=3, n_head=8), 60)  # fmt: skip
_hf(
    "t5, 30 new tokens",
    "generation",
    _text("T5ForConditionalGeneration", "T5Config", lambda: {"input_ids": _ids(3, 77)}, **_T5),
    30,
)

# --- timm and torchvision ------------------------------------------------------------------------


def _timm(name: str, shape: tuple[int, ...], **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        import timm

        return timm.create_model(name, **options), (torch.randn(shape),)

    return build


_add("resnet 50", "convolution", _timm("resnet50", (2, 3, 128, 160)), "timm")
_add("mobilenet v3", "convolution", _timm("mobilenetv3_large_100", (3, 3, 160, 160)), "timm")
_add("efficientnet b0", "convolution", _timm("tf_efficientnet_b0", (1, 3, 256, 208)), "timm")
_add("mlp mixer", "dense", _timm("mixer_s32_224", (2, 3, 192, 192), img_size=192), "timm")
_add("beit", "attention", _timm("beit_base_patch16_224", (1, 3, 128, 128), img_size=128), "timm")
_add("densenet", "convolution", _timm("densenet121", (1, 3, 144, 144)), "timm")


def _torchvision(name: str, shape: tuple[int, ...]) -> Callable[[], Built]:
    def build() -> Built:
        import torchvision

        return torchvision.models.get_model(name, weights=None), (torch.randn(shape),)

    return build


_add("resnet 18", "convolution", _torchvision("resnet18", (4, 3, 112, 112)), "torchvision")
_add("shufflenet", "convolution", _torchvision("shufflenet_v2_x1_0", (2, 3, 200, 168)),
     "torchvision")  # fmt: skip

# --- diffusers -----------------------------------------------------------------------------------


def _diffusers(
    name: str,
    inputs: Callable[[], dict[str, Any]],
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Callable[[], Built]:
    def build() -> Built:
        import diffusers

        model = getattr(diffusers, name)(**options)
        return (model if dtype is None else model.to(dtype)), inputs()

    return build


def _unet_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "sample": torch.randn(2, 4, 32, 40, dtype=dtype),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(2, 17, 128, dtype=dtype),
    }


_UNET: dict[str, Any] = {
    "sample_size": 32, "block_out_channels": (128, 256), "layers_per_block": 1,
    "cross_attention_dim": 128, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 3,
    "attention_head_dim": 64, "num_attention_heads": 4, "joint_attention_dim": 128,
    "guidance_embeds": False, "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
_VAE: dict[str, Any] = {
    "block_out_channels": (64, 128), "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def _qwen_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 18 * 14, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 33, 128, dtype=dtype),
        "encoder_hidden_states_mask": torch.ones(1, 33, dtype=torch.long),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_shapes": [[(1, 18, 14)]],
    }


_add("unet 2d condition", "convolution", _diffusers(
    "UNet2DConditionModel", _unet_inputs, **_UNET), "diffusers")  # fmt: skip
_add("unet 2d condition, bfloat16", "convolution", _diffusers(
    "UNet2DConditionModel", lambda: _unet_inputs(torch.bfloat16), torch.bfloat16, **_UNET),
    "diffusers")  # fmt: skip
_add("vae", "convolution", _diffusers(
    "AutoencoderKL", lambda: {"sample": torch.randn(1, 3, 96, 80)}, **_VAE),
    "diffusers")  # fmt: skip
_add("vae, bfloat16", "convolution", _diffusers(
    "AutoencoderKL", lambda: {"sample": torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)},
    torch.bfloat16, **_VAE), "diffusers")  # fmt: skip
_add("qwen-image transformer", "attention", _diffusers(
    "QwenImageTransformer2DModel", _qwen_inputs, **_QWEN), "diffusers")  # fmt: skip
_add("qwen-image transformer, bfloat16", "attention", _diffusers(
    "QwenImageTransformer2DModel", lambda: _qwen_inputs(torch.bfloat16), torch.bfloat16, **_QWEN),
    "diffusers")  # fmt: skip
_add("qwen-image vae", "convolution", _diffusers(
    "AutoencoderKLQwenImage", lambda: {"sample": torch.randn(1, 3, 1, 56, 64)}, base_dim=48,
    z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
    latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "diffusers")  # fmt: skip
_add("flux transformer", "attention", _diffusers(
    "FluxTransformer2DModel", lambda: {
        "hidden_states": torch.randn(1, 192, 16), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 40, 64), "pooled_projections": torch.randn(1, 64),
        "img_ids": torch.zeros(192, 3), "txt_ids": torch.zeros(40, 3)},
    patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=64,
    num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=64,
    axes_dims_rope=(16, 24, 24)), "diffusers")  # fmt: skip
