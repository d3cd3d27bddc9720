"""`QwenImage`: a pipeline of diffusers or DiffSynth in one of the documented modes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ..convert import Precision, candidates, convert, restore, storage_format
from ..errors import BudgetError
from ..layers import QuantizedLayer
from ..sizes import format_size, parse_size
from . import management
from .keep import KEEP
from .lora import BRANCHES, Adapter, LoraStack
from .modes import Mode, needed_bytes
from .parts import Parts, bytes_of, parts_of
from .sizes import ComponentBytes, converted_copy, precision_of
from .tiling import Tiling, apply_tiling, choose_tiling

Lora = str | os.PathLike[str] | Mapping[str, Tensor] | tuple[Any, float]


class QwenImage:
    """A Qwen-Image pipeline in less memory; what it does not have itself is the pipeline's.

    >>> pipe = vramkit.qwen_image.QwenImage(pipeline, "low_vram", vram_limit=8)   # doctest: +SKIP
    >>> image = pipe("a ghost in a library", num_inference_steps=8).images[0]     # doctest: +SKIP

    Args:
        pipeline: Of diffusers (QwenImagePipeline, QwenImageEditPipeline and its like) or DiffSynth,
            on the CPU, or any object with their attributes. It is changed in place.
        mode: "fp8", "fp8_fused", "low_vram", "low_vram_fused", or "original": as it is.
        lora: One LoRA or several: files or tensors, each alone or as (LoRA, scale).
        vram_limit, vram_buffer: GiB, or text with a unit. `low_vram` modes need a limit.
        precision: What "fp8" means: another precision for the transformer, "nf4" for example.
        keep: Layers that stay in 16 bit, as `vramkit.convert` takes them in `skip`;
            `measure_keep` finds a model's own.
        modulation: What modulation layers are stored in instead, "int8" for example.
        text_encoder, vae: Precisions for these; None: as loaded.
        backup_folder: Where a fused LoRA's weights from before are kept; None: in memory.

    A mode that cannot fit raises BudgetError with the bytes that it needs, before anything is
    changed; ValueError for an unknown mode, a fused one without LoRA, and for LoRA that does not
    belong to the model.
    """

    def __init__(
        self,
        pipeline: Any,
        mode: str | Mode = Mode.ORIGINAL,
        *,
        lora: Lora | Sequence[Lora] | None = None,
        vram_limit: int | float | str | None = None,
        vram_buffer: int | float | str = 0.5,
        precision: Precision = "fp8",
        keep: Sequence[str] = KEEP,
        modulation: Precision | None = None,
        text_encoder: Precision | None = None,
        vae: Precision | None = None,
        backup_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        parse = Mode.parse(mode)
        self._parts: Parts = parts_of(pipeline)
        self.pipeline = pipeline
        self.mode = Mode.ORIGINAL
        self.tiling: Tiling | None = None
        self._attends_in_fp8 = False
        self._tilings: dict[tuple[int, int, int], Tiling] = {}
        loaded: list[str] = []
        try:
            for one in _listed(lora):
                source, scale = one if isinstance(one, tuple) else (one, 1.0)
                loaded.append(self.loras.load(source, scale=scale).name)
            self.set_mode(
                parse,
                vram_limit=vram_limit,
                vram_buffer=vram_buffer,
                precision=precision,
                keep=keep,
                modulation=modulation,
                text_encoder=text_encoder,
                vae=vae,
                backup_folder=backup_folder,
            )
        except BaseException:
            if not self.loras.fused:
                for name in loaded:
                    self.loras.unload(name)
            raise

    def __getattr__(self, name: str) -> Any:
        if name in ("pipeline", "_parts"):  # not there yet, or a copy in the making
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    @property
    def transformer(self) -> nn.Module:
        """The denoising model, whatever the pipeline calls it."""
        return self._parts.transformer

    @property
    def loras(self) -> LoraStack:
        """The transformer's LoRA adapters."""
        return LoraStack.of(self._parts.transformer)

    # Modes

    def set_mode(
        self,
        mode: str | Mode,
        *,
        vram_limit: int | float | str | None = None,
        vram_buffer: int | float | str = 0.5,
        precision: Precision = "fp8",
        keep: Sequence[str] = KEEP,
        modulation: Precision | None = None,
        text_encoder: Precision | None = None,
        vae: Precision | None = None,
        backup_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """From the pipeline as it was loaded to a mode; arguments and errors as the class has."""
        chosen = Mode.parse(mode)
        if chosen is Mode.ORIGINAL:
            self._check_limit(chosen, {}, vram_limit, vram_buffer)
            if vram_limit is not None:
                self.enable_vram_management(vram_limit, vram_buffer)
            return
        if any(isinstance(m, QuantizedLayer) for m in self._parts.transformer.modules()):
            raise ValueError("the transformer is converted already; set a mode on plain weights")
        if self.loras.fused:
            raise ValueError("LoRA is fused into the plain weights: unfuse first")
        if chosen.fused and not self.loras.adapters:
            raise ValueError(
                f"{chosen} fuses LoRA into the weights first, and none is loaded; give lora=, or "
                f"choose {chosen.value.removesuffix('_fused')}"
            )
        if chosen.streams and vram_limit is None:
            raise ValueError(f"{chosen} keeps to a limit: give vram_limit")
        formats = self._formats(precision, keep, modulation, text_encoder, vae)
        self._check_limit(chosen, formats, vram_limit, vram_buffer)
        if chosen.fused:
            self.loras.fuse_into(formats[self._parts.name], backup_folder=backup_folder)
        for name, module in self._parts.components.items():
            there = {n: f for n, f in formats.get(name, {}).items() if not _stored(module, n)}
            if there:
                convert(module, there)
        self.mode = chosen
        if vram_limit is not None:
            self.enable_vram_management(vram_limit, vram_buffer)

    def _formats(
        self,
        precision: Precision,
        keep: Sequence[str],
        modulation: Precision | None,
        text_encoder: Precision | None,
        vae: Precision | None,
    ) -> dict[str, dict[str, Precision]]:
        """What each layer of each component is stored in."""
        kept = [*keep, f"*{BRANCHES}*"]
        made: dict[str, dict[str, Precision]] = {}
        layers: dict[str, Precision] = {}
        for candidate in candidates(self._parts.transformer, [f"*{BRANCHES}*"])[0]:
            chosen = precision_of(candidate.name, precision, kept, modulation)
            if chosen is not None:
                layers[candidate.name] = chosen
        made[self._parts.name] = layers
        for name, asked in (("text_encoder", text_encoder), ("vae", vae)):
            module = getattr(self._parts, name)
            if asked is not None:
                if module is None:
                    raise ValueError(f"this pipeline has no {name} to store in {asked}")
                storage_format(asked)
                made[name] = {c.name: asked for c in candidates(module)[0]}
        return made

    def needed_bytes(
        self,
        mode: str | Mode,
        *,
        precision: Precision = "fp8",
        keep: Sequence[str] = KEEP,
        modulation: Precision | None = None,
        text_encoder: Precision | None = None,
        vae: Precision | None = None,
    ) -> int:
        """Bytes of weights that a mode has in memory at one time at the least; changes nothing."""
        chosen = Mode.parse(mode)
        formats = {}
        if chosen is not Mode.ORIGINAL:
            formats = self._formats(precision, keep, modulation, text_encoder, vae)
        return self._needed(chosen, formats)

    def _needed(self, mode: Mode, formats: Mapping[str, Mapping[str, Precision]]) -> int:
        made = {}
        for name, module in self._parts.components.items():
            chosen = dict(formats.get(name, {}))
            made[name] = converted_copy(module, chosen) if chosen else module
        vae = made.pop("vae", None)
        stay = 0 if vae is None else bytes_of(vae)
        if mode.streams:
            return stay + management.least_room(made.values())
        largest = max((bytes_of(module) for module in made.values()), default=0)
        return needed_bytes(mode, ComponentBytes(0, largest, stay, 0))

    def _check_limit(
        self,
        mode: Mode,
        formats: Mapping[str, Mapping[str, Precision]],
        vram_limit: int | float | str | None,
        vram_buffer: int | float | str,
    ) -> None:
        if vram_limit is None:
            return
        limit, buffer = parse_size(vram_limit), parse_size(vram_buffer)
        needed = self._needed(mode, formats) + buffer
        if limit < needed or limit <= buffer:
            raise BudgetError(
                f"{mode} needs {format_size(needed)} ({needed} B) of which {format_size(buffer)} "
                f"are buffer, and the limit is {format_size(limit)}; nothing was changed",
                needed,
            )

    def restore(self, dtype: str | None = None) -> None:
        """Plain layers again, all in memory; the bits that were lost do not return.

        Raises ValueError while LoRA is fused: its backups are of the stored weights.
        """
        if self.loras.fused:
            raise ValueError("LoRA is fused: unfuse_lora first")
        self.disable_vram_management()
        for module in self._parts.components.values():
            restore(module, dtype)
        self.mode = Mode.ORIGINAL

    # Memory

    def enable_vram_management(
        self,
        vram_limit: int | float | str | None = None,
        vram_buffer: int | float | str = 0.5,
        auto_offload: bool = True,
        enable_dit_fp8_computation: bool = False,
        num_persistent_param_in_dit: int | None = None,
        **engine: Any,
    ) -> QwenImage:
        """See `vramkit.qwen_image.enable_vram_management`; returns this wrapper."""
        management.enable_vram_management(
            self.pipeline,
            vram_limit,
            vram_buffer,
            auto_offload,
            enable_dit_fp8_computation,
            num_persistent_param_in_dit,
            **engine,
        )
        return self

    def disable_vram_management(self) -> None:
        """All in memory again."""
        management.disable_vram_management(self.pipeline)

    @property
    def weights_bytes(self) -> dict[str, int]:
        """Bytes of each component's weights as they are stored, wherever they are."""
        return {name: bytes_of(module) for name, module in self._parts.components.items()}

    # LoRA, by DiffSynth's names and diffusers'

    def load_lora(self, *args: Any, **kwargs: Any) -> Adapter:
        """Put a LoRA beside the transformer's weights.

        `load_lora(source, scale=1.0, name=None)`; DiffSynth's `load_lora(pipe.dit, source,
        alpha=1)` means the same, its alpha being our scale. As `LoraStack.load` otherwise.
        """
        given = list(args)
        if given and isinstance(given[0], nn.Module):
            if given.pop(0) is not self._parts.transformer:
                raise ValueError("LoRA is loaded on this pipeline's transformer")
            if "alpha" in kwargs:
                kwargs["scale"] = kwargs.pop("alpha")
            if len(given) > 1:
                kwargs["scale"] = given.pop(1)
        if "lora_config" in kwargs:
            given.insert(0, kwargs.pop("lora_config"))
        if len(given) > 2:
            raise TypeError("load_lora takes the LoRA and its scale by position")
        if len(given) == 2:
            kwargs["scale"] = given.pop(1)
        source = given[0] if given else kwargs.pop("source")
        files = getattr(source, "files", None)
        if callable(files):
            found = files()
            if len(found) != 1:
                raise ValueError(f"a LoRA is one file; this config matches {len(found)}")
            source = found[0]
        return self.loras.load(source, **kwargs)

    def fuse_lora(self, *, backup_folder: str | os.PathLike[str] | None = None) -> list[str]:
        """Add the active LoRA to the weights as they are stored; see `LoraStack.fuse`."""
        return self.loras.fuse(backup_folder=backup_folder)

    def unfuse_lora(self) -> None:
        """The weights bit for bit as they would be without LoRA, which is beside them again."""
        self.loras.unfuse()

    def clear_lora(self) -> None:
        """No LoRA any more: the weights bit for bit as they would be without."""
        self.loras.clear()

    # The call

    def __call__(
        self,
        *args: Any,
        enable_fp8_attention: bool | Mapping[str, Any] = False,
        vae_tiling: bool | str = "auto",
        **kwargs: Any,
    ) -> Any:
        """The pipeline's own call, with two arguments more.

        Args:
            enable_fp8_attention: Attention's products in FP8 where the hardware has it; elsewhere
                exact attention and a warning. It stays on until a call does not ask for it. A
                mapping holds arguments of `vramkit.attention.enable_fp8_attention`.
            vae_tiling: True, False, or "auto": in tiles where the estimate says that a whole image
                would not fit beside the VAE within the limit (diffusers' pipelines; DiffSynth's
                have `tiled=`). `tiling` says what was chosen.
        """
        self._tile(vae_tiling, kwargs)
        self._switch_attention(enable_fp8_attention)
        return self.pipeline(*args, **kwargs)

    def _switch_attention(self, asked: bool | Mapping[str, Any]) -> None:
        """On at the first call that asks for it, off at the first that does not."""
        if bool(asked) == self._attends_in_fp8:
            return
        # `True` alone means the defaults; an empty mapping would mean no.
        options = dict(asked) if isinstance(asked, Mapping) else {}
        attention: Any = import_module("vramkit.attention")
        if asked:
            attention.enable_fp8_attention(self._parts.transformer, **options)
        else:
            attention.disable_fp8_attention(self._parts.transformer)
        self._attends_in_fp8 = bool(asked)

    def _tile(self, asked: bool | str, kwargs: dict[str, Any]) -> None:
        if asked not in (True, False, "auto"):
            raise ValueError(f"vae_tiling is True, False or 'auto', not {asked!r}")
        if asked == "auto" and "tiled" in kwargs:
            return
        if self._parts.diffsynth:
            if isinstance(asked, bool):
                kwargs["tiled"] = asked
            return
        vae: Any = self._parts.vae
        if vae is None or not hasattr(vae, "enable_tiling"):
            return
        if isinstance(asked, bool):
            self.tiling = None
            if asked:
                vae.enable_tiling()
            else:
                vae.disable_tiling()
            return
        room = self._room()
        height, width = self._image_size(kwargs)
        if room is None or height is None or width is None:
            return
        key = (height, width, room)
        if key not in self._tilings:
            # On a processor the limit bounds weights, and a call's own memory comes on top.
            strict = next(vae.parameters()).device.type != "cpu"
            self._tilings[key] = choose_tiling(vae, height, width, room, strict=strict)
        self.tiling = self._tilings[key]
        apply_tiling(vae, self.tiling)

    def _room(self) -> int | None:
        """What a limit leaves beside the VAE's weights while it decodes."""
        managed = getattr(self.pipeline, "vramkit_management", None)
        if managed is None or managed.limit_bytes is None:
            return None
        session = getattr(self.pipeline, "vramkit_session", None)
        if session is None:
            there = sum(self.weights_bytes.values())
        else:
            there = session.fixed_bytes
        return max(0, managed.limit_bytes - managed.buffer_bytes - int(there))

    def _image_size(self, kwargs: Mapping[str, Any]) -> tuple[int | None, int | None]:
        height, width = kwargs.get("height"), kwargs.get("width")
        if height is None and width is None:
            factor = getattr(self.pipeline, "vae_scale_factor", 8)
            side = getattr(self.pipeline, "default_sample_size", None)
            return (None, None) if side is None else (side * factor, side * factor)
        return height or width, width or height


def _listed(lora: Lora | Sequence[Lora] | None) -> list[Lora]:
    if lora is None:
        return []
    return list(lora) if isinstance(lora, list) else [lora]  # type: ignore[list-item]


def _stored(module: nn.Module, name: str) -> bool:
    layer = module.get_submodule(name) if name else module
    return isinstance(layer, QuantizedLayer)
