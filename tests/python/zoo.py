"""A zoo of architectures with small random configurations, for tests of coverage and plumbing.

Each entry builds a module in evaluation mode and one call's inputs. Widths are realistic enough
that norms and biases weigh what they weigh in real models. Weights are random: nothing here says
anything about quality.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any] | tuple[Any, ...]


@dataclass
class Species:
    """One architecture: which package it needs, and how to build it with one call's inputs."""

    name: str
    package: str
    build: Callable[[], tuple[nn.Module, Inputs]]


ZOO: dict[str, Species] = {}


def species(name: str, package: str = "torch") -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        ZOO[name] = Species(name, package, build)
        return build

    return register


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's first tensor for `inputs`."""
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    for key in ("logits", "image_embeds", "last_hidden_state", "sample", "audio_values"):
        if getattr(out, key, None) is not None:
            return getattr(out, key)  # type: ignore[no-any-return]
    while not isinstance(out, Tensor):
        out = out[0]
    return out


def tokens(count: int = 1000, length: int = 12) -> Tensor:
    return torch.randint(3, count, (2, length))


def text(name: str, model_class: str, config_class: str, **options: Any) -> None:
    """A language model of transformers."""

    def build() -> tuple[nn.Module, Inputs]:
        import transformers

        config = getattr(transformers, config_class)(**options)
        model = getattr(transformers, model_class)(config)
        ids = tokens()
        inputs = {"input_ids": ids}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, :5]
        return model, inputs

    ZOO[name] = Species(name, "transformers", build)


_DECODER = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
text("llama", "LlamaForCausalLM", "LlamaConfig", **_DECODER)
text("llama, tied", "LlamaForCausalLM", "LlamaConfig", **_DECODER, tie_word_embeddings=True)
text("qwen3", "Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=64)
text("gemma2", "Gemma2ForCausalLM", "Gemma2Config", **_DECODER, head_dim=64)
text("mixtral", "MixtralForCausalLM", "MixtralConfig", **_DECODER, num_local_experts=4)
text("qwen3 moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_DECODER, **_EXPERTS, head_dim=64)
text(
    "qwen2 moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", **_DECODER, **_EXPERTS,
    shared_expert_intermediate_size=256,
)  # fmt: skip
text(
    "gpt-oss", "GptOssForCausalLM", "GptOssConfig", **(_DECODER | {"intermediate_size": 256}),
    num_local_experts=4, num_experts_per_tok=2, head_dim=64,
)  # fmt: skip
text(
    "bert", "BertModel", "BertConfig", vocab_size=1000, hidden_size=256, intermediate_size=1024,
    num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
)  # fmt: skip
text(
    "t5", "T5ForConditionalGeneration", "T5Config", vocab_size=1000, d_model=256, d_kv=64,
    d_ff=512, num_layers=2, num_heads=4, decoder_start_token_id=0,
)  # fmt: skip
text("gpt2", "GPT2LMHeadModel", "GPT2Config", vocab_size=1000, n_embd=256, n_layer=2, n_head=4)
text(
    "mamba", "MambaForCausalLM", "MambaConfig", vocab_size=2000, hidden_size=512,
    num_hidden_layers=2,
)  # fmt: skip


@species("whisper", "transformers")
def whisper() -> tuple[nn.Module, Inputs]:
    import transformers

    config = transformers.WhisperConfig(
        d_model=256, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=1024, decoder_ffn_dim=1024, vocab_size=1000,
        max_source_positions=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(1, 80, 100), "decoder_input_ids": tokens()[:1, :4]}
    return transformers.WhisperForConditionalGeneration(config), inputs


@species("wav2vec2, weight norm", "transformers")
def wav2vec2() -> tuple[nn.Module, Inputs]:
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024,
        conv_dim=(256,) * 3, conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3),
        num_conv_pos_embeddings=32, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config), {"input_values": torch.randn(1, 4000)}


@species("encodec, weight norm and lstm", "transformers")
def encodec() -> tuple[nn.Module, Inputs]:
    import transformers

    config = transformers.EncodecConfig(num_filters=32, hidden_size=128, codebook_dim=128)
    return transformers.EncodecModel(config), {"input_values": torch.randn(1, 1, 3200)}


@species("vit", "transformers")
def vit() -> tuple[nn.Module, Inputs]:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=1024,
        image_size=64, patch_size=8,
    )  # fmt: skip
    return transformers.ViTModel(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


@species("clip", "transformers")
def clip() -> tuple[nn.Module, Inputs]:
    import transformers

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 1000, "num_hidden_layers": 2, "eos_token_id": 2},
        vision_config={**sizes, "num_hidden_layers": 2, "image_size": 64, "patch_size": 8},
    )
    model = transformers.CLIPModel(config)
    return model, {"input_ids": tokens(), "pixel_values": torch.randn(1, 3, 64, 64)}


@species("convnext", "transformers")
def convnext() -> tuple[nn.Module, Inputs]:
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[96, 192, 384, 768], depths=[1, 1, 2, 1])
    return transformers.ConvNextModel(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


@species("swin", "transformers")
def swin() -> tuple[nn.Module, Inputs]:
    import transformers

    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=96, depths=[1, 1, 2], num_heads=[3, 6, 12],
        window_size=4,
    )  # fmt: skip
    return transformers.SwinModel(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


def picture(name: str, timm_name: str, **options: Any) -> None:
    """An image model of timm."""

    def build() -> tuple[nn.Module, Inputs]:
        import timm

        size = options.get("img_size", 64)
        return timm.create_model(timm_name, **options), (torch.randn(1, 3, size, size),)

    ZOO[name] = Species(name, "timm", build)


picture("mobilenet v3", "mobilenetv3_large_100")
picture("resnet, standardized weights", "resnetv2_50", num_classes=100)
picture("efficientnet", "tf_efficientnet_b0")
picture("mlp mixer", "mixer_s32_224", img_size=64, num_classes=0)
picture("beit", "beit_base_patch16_224", img_size=64)


@species("unet 2d condition", "diffusers")
def unet() -> tuple[nn.Module, Inputs]:
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(128, 256), layers_per_block=1, cross_attention_dim=128,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 7, 128),
    }
    return model, inputs


@species("vae", "diffusers")
def vae() -> tuple[nn.Module, Inputs]:
    import diffusers

    model = diffusers.AutoencoderKL(
        block_out_channels=(128, 256), latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model, {"sample": torch.randn(1, 3, 32, 32)}


@species("qwen-image transformer", "diffusers")
def qwen_image() -> tuple[nn.Module, Inputs]:
    import diffusers

    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=64,
        num_attention_heads=4, joint_attention_dim=64, guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 7, 64),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }
    return model, inputs


@species("qwen-image vae", "diffusers")
def qwen_vae() -> tuple[nn.Module, Inputs]:
    import diffusers

    model = diffusers.AutoencoderKLQwenImage(
        base_dim=64, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return model, {"sample": torch.randn(1, 3, 1, 32, 32)}


@species("transformer encoder and decoder, fused in_proj")
def transformer() -> tuple[nn.Module, Inputs]:
    model = nn.Transformer(256, 4, 2, 2, 1024, batch_first=True)
    return model, (torch.randn(2, 9, 256), torch.randn(2, 5, 256))


@species("attention with keys and values of other widths")
def attention() -> tuple[nn.Module, Inputs]:
    model = nn.MultiheadAttention(256, 4, kdim=192, vdim=128, batch_first=True)
    return model, (torch.randn(2, 5, 256), torch.randn(2, 9, 192), torch.randn(2, 9, 128))


class Tagger(nn.Module):
    """Bags of words, a bidirectional LSTM and a bilinear scorer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, 256)
        self.bags = nn.EmbeddingBag(1000, 256)
        self.lstm = nn.LSTM(256, 256, 2, bidirectional=True, batch_first=True)
        self.score = nn.Bilinear(512, 256, 40)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.lstm(self.words(ids))
        made: Tensor = self.score(out[:, -1].contiguous(), self.bags(ids))
        return made


@species("lstm tagger with bags and a bilinear layer")
def tagger() -> tuple[nn.Module, Inputs]:
    return Tagger(), (tokens(),)


class Speller(nn.Module):
    """A GRU encoder, a GRUCell decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(100, 256)
        self.encoder = nn.GRU(256, 256, batch_first=True)
        self.decoder = nn.GRUCell(256, 256)
        self.out = nn.Linear(256, 100)

    def forward(self, ids: Tensor) -> Tensor:
        _, state = self.encoder(self.letters(ids))
        step, outputs = state[0], []
        for _ in range(3):
            step = self.decoder(torch.tanh(step), step)
            outputs.append(self.out(step))
        return torch.stack(outputs)


@species("gru speller with a cell")
def speller() -> tuple[nn.Module, Inputs]:
    return Speller(), (tokens(100),)


@species("vocoder, weight norm of both generations")
def vocoder() -> tuple[nn.Module, Inputs]:
    with_hooks = nn.utils.weight_norm
    new = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(
        new(nn.Conv1d(80, 256, 7, padding=3)),
        nn.LeakyReLU(0.1),
        new(nn.ConvTranspose1d(256, 128, 16, 8, 4)),
        nn.LeakyReLU(0.1),
        nn.utils.parametrizations.spectral_norm(nn.Conv1d(128, 128, 3, padding=2, dilation=2)),
        with_hooks(nn.Conv1d(128, 64, 7, padding=3)),
        nn.utils.spectral_norm(nn.Conv1d(64, 32, 7, padding=3)),
    )
    return model, (torch.randn(1, 80, 20),)


class AudioHead(nn.Module):
    """A stack of heads in one raw parameter, chosen by index, as music models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(256, 256)
        self.audio_head = nn.Parameter(torch.randn(7, 256, 1025) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 128, 256) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x + self.position[:, : x.shape[1]])
        return torch.stack([torch.matmul(x, self.audio_head[k]) for k in range(7)])


@species("raw parameters")
def raw() -> tuple[nn.Module, Inputs]:
    return AudioHead(), (torch.randn(2, 9, 256),)


class Video(nn.Module):
    """3-D convolutions up and down."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(3, 64, 3, 2, 1)
        self.middle = nn.Conv3d(64, 64, 3, padding="same", padding_mode="replicate")
        self.up = nn.ConvTranspose3d(64, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.up(torch.relu(self.middle(torch.relu(self.down(x)))))
        return made


@species("video convolutions")
def video() -> tuple[nn.Module, Inputs]:
    return Video(), (torch.randn(1, 3, 4, 16, 16),)
