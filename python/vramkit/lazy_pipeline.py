"""`LazyPipeline`: a pipeline that is loaded at its first use, and let go of by a policy.

It stands on `VRAMEfficientModelManager`, whose handles, leases and events it passes on: a call
holds its part, so that nothing is unloaded under it, and a handle that is kept holds no memory.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .bnb_config import is_config, read_config
from .managed import ManagerEvent
from .model_manager import VRAMEfficientModelManager
from .precision import PrecisionMode
from .sizes import format_size

if TYPE_CHECKING:
    import torch

    from .convert import Progress
    from .parts import Islands, PartPrecision, Prepared

Loader = Callable[..., Any]
WHOLE = "pipeline"
KEEP = ("loaded", "call")


class LazyPipeline:
    """Loads a pipeline, or its parts one at a time, when it is used.

    Args:
        loader: Returns the pipeline: a module, or any object that holds modules. Or a dict of such
            loaders by part; then `run` says how the parts work together. A loader that takes
            `progress` or `device` is given them by keyword.
        run: With parts: called as ``run(pipe, *args, **kwargs)`` by a call of the pipeline. It uses
            ``pipe.<part>``, which loads that part, after unloading others for room.
        precision: One for all (a precision, format or `BitsAndBytesConfig`), or by part: names of
            loaders, or of modules within what a loader returns ("vae"), "" for the others. None:
            as loaded.
        device: Where parts are moved once converted. None: where the loader puts them.
        budget: Bytes that the weights of loaded parts may take, GiB or text such as "6 GB".
        resident: How many parts may be loaded at once; None: all that the budget holds.
        keep: "loaded" until `unload`; "call" until a call ends; or seconds without a call.
        islands, skip: As for `vramkit.parts.prepare`.
        progress: True for a bar, or a function of (bytes done, bytes in all, name), given to
            loaders that take one.
        verbose: Print a line when a part has been loaded or unloaded.

    Attributes that a pipeline does not have itself are those of the loaded object: reading one
    loads it. Modules, and objects that hold some, come as handles; one that is used after its part
    was unloaded raises StaleHandleError. Thread-safe: parts load once, and calls may overlap.

    >>> pipe = LazyPipeline(lambda: torch.nn.Linear(8, 4), precision="bf16")
    >>> pipe.is_loaded, pipe(torch.ones(8, dtype=torch.bfloat16)).shape, pipe.is_loaded
    (False, torch.Size([4]), True)
    >>> pipe.unload()
    72
    """

    def __init__(
        self,
        loader: Loader | Mapping[str, Loader],
        *,
        run: Callable[..., Any] | None = None,
        precision: PartPrecision = None,
        device: str | torch.device | None = None,
        budget: int | float | str | None = None,
        resident: int | None = None,
        keep: str | float = "loaded",
        islands: Islands = "auto",
        skip: Iterable[str] = (),
        progress: bool | Progress = False,
        verbose: bool = False,
    ) -> None:
        loaders = dict(loader) if isinstance(loader, Mapping) else {WHOLE: loader}
        if not loaders:
            raise ValueError("a lazy pipeline needs at least one loader")
        if isinstance(loader, Mapping) and run is not None and not callable(run):
            raise TypeError(f"run must be callable, not {run!r}")
        taken = [name for name in loaders if hasattr(type(self), name)]
        if isinstance(loader, Mapping) and taken:
            raise ValueError(f"a part cannot be called {taken[0]!r}: the pipeline has that itself")
        self._keep = _policy(keep)
        self._parted = isinstance(loader, Mapping)
        self._run = run
        self._precision: Any = _checked(precision)
        self._islands, self._skip = islands, tuple(skip)
        self._progress = progress
        self._prepared: dict[str, Prepared] = {}
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._running = 0
        count = len(loaders) if resident is None else resident
        self._manager = VRAMEfficientModelManager(budget=budget, device=device, max_resident=count)
        for name, function in loaders.items():
            self._manager.register(
                name, self._with_arguments(name, function), prepare=self._preparer(name)
            )
        if verbose:
            self._manager.on(_say)

    # What is there

    @property
    def is_loaded(self) -> bool:
        """Whether any part is in memory."""
        return bool(self._manager.loaded_models())

    @property
    def parts(self) -> list[str]:
        """Names of the parts; of a pipeline with one loader, "pipeline"."""
        return self._manager.names()

    def loaded_parts(self) -> dict[str, int]:
        """Bytes of the weights of each part in memory."""
        return self._manager.loaded_models()

    def prepared(self, part: str = WHOLE) -> Prepared | None:
        """What the latest load of a part was converted to; None before the first."""
        return self._prepared.get(part)

    @property
    def device(self) -> Any:
        """Where parts are moved at loads to come."""
        return self._manager.device

    def on(
        self,
        event: str | Callable[[ManagerEvent], object],
        callback: Callable[[ManagerEvent], object] | None = None,
    ) -> Callable[[], None]:
        """Observe loading, loaded, evicting, evicted, failed: as the manager's `on`."""
        return self._manager.on(event, callback)

    # Loading and unloading

    def load(self, part: str | None = None) -> Any:
        """Load now what a use would load; returns a handle (of the part, or the only one)."""
        return self._manager.get(part or self._only("load"))

    def lease(self, part: str | None = None) -> AbstractContextManager[Any]:
        """The loaded object itself, which stays for the length of the with block."""
        return self._manager.lease(part or self._only("lease"))

    def unload(self, *, timeout: float | None = None) -> int:
        """Unload all parts once their use has ended; returns the bytes that were really freed.

        Storages are watched while they go. A warning says so where something else still refers to
        some of them (a tensor that was taken out, a module that was leased and kept).
        """
        self._stop_timer()
        held = sum(self._manager.loaded_models().values())
        freed = self._manager.unload_all_models(timeout=timeout)
        if freed < held:
            warnings.warn(
                f"{format_size(held - freed)} of {format_size(held)} are still referred to after "
                "unloading, and not free; let go of tensors and modules taken out of the pipeline",
                RuntimeWarning,
                stacklevel=2,
            )
        return freed

    def to(self, *targets: Any, device: Any = None, dtype: Any = None) -> LazyPipeline:
        """Set the device, the precision, or both, for loads to come; what is loaded is unloaded.

        As a module's `to`: devices and dtypes (or precisions) in any order. Returns the pipeline.
        Raises ValueError or TypeError for what is neither; nothing has changed then.
        """
        import torch

        precision = None if dtype is None else parse_dtype(dtype)
        place = None if device is None else torch.device(device)
        for target in targets:
            if isinstance(target, (torch.dtype, PrecisionMode)):
                precision = parse_dtype(target)
            elif isinstance(target, (torch.device, int)):
                place = torch.device(target)
            elif isinstance(target, str) and target.lower() in {m.value for m in PrecisionMode}:
                precision = PrecisionMode.parse(target)
            else:
                place = _device(target)
        with self._lock:
            moved = place is not None and place != self._manager.device
            if moved or (precision is not None and precision != self._precision):
                self.unload()
            if place is not None:
                self._manager.device = place
            if precision is not None:
                self._precision = precision
        return self

    # Use

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Load what is needed and run; then keep it, or not, as the policy says."""
        with self._use():
            if self._parted:
                if self._run is None:
                    raise TypeError(
                        "this pipeline has parts but no run=, which says how they work together: "
                        f"call the parts ({', '.join(self.parts)})"
                    )
                return self._run(self, *args, **kwargs)
            with self._manager.lease(WHOLE) as loaded, self._around(loaded):
                return loaded(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_manager" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        if self._parted:
            if name not in self.parts:
                raise AttributeError(
                    f"no part is called {name!r}; the parts are: {', '.join(self.parts)}"
                )
            return self._manager.get(name)
        found = getattr(self._manager.get(WHOLE), name)
        return self._method(name) if isinstance(found, types.FunctionType) else found

    def _method(self, name: str) -> Callable[..., Any]:
        """A method of the loaded object that counts as a call of the pipeline."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._use(), self._manager.lease(WHOLE) as loaded, self._around(loaded):
                result = getattr(loaded, name)(*args, **kwargs)
                return self if result is loaded else result

        call.__name__ = call.__qualname__ = name
        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise AttributeError(
                f"setting {name!r} would be lost when the pipeline is unloaded; set it in the "
                "loader, or for this load: with pipe.lease() as loaded: loaded."
                f"{name} = …"
            )
        object.__setattr__(self, name, value)

    def __enter__(self) -> LazyPipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.unload()

    def __repr__(self) -> str:
        there = self.loaded_parts()
        words = ", ".join(f"{n} {format_size(b)}" for n, b in there.items()) or "nothing loaded"
        return f"<{type(self).__name__} of {', '.join(self.parts)}: {words}>"

    def _around(self, loaded: Any) -> AbstractContextManager[Any]:
        """What surrounds a call of the whole pipeline."""
        return contextlib.nullcontext()

    def _only(self, what: str) -> str:
        if self._parted:
            raise TypeError(f"{what}(part): this pipeline has parts: {', '.join(self.parts)}")
        return WHOLE

    def _with_arguments(self, name: str, function: Loader) -> Callable[[], Any]:
        if not callable(function):
            raise TypeError(f"the loader of {name!r} must be callable, not {function!r}")
        taken = _keywords(function)
        owner = weakref.ref(self)

        def load() -> Any:
            pipeline = owner()
            assert pipeline is not None
            given = {"progress": pipeline._progress, "device": pipeline._manager.device}
            return function(**{key: given[key] for key in given if key in taken})

        return load

    def _preparer(self, name: str) -> Callable[..., object]:
        owner = weakref.ref(self)

        def convert(loaded: Any, _mode: PrecisionMode, device: Any) -> None:
            from .parts import prepare

            pipeline = owner()
            assert pipeline is not None
            pipeline._prepared[name] = prepare(
                loaded,
                pipeline._precision_of(name),
                device,
                islands=pipeline._islands,
                skip=pipeline._skip,
            )

        return convert

    def _precision_of(self, name: str) -> Any:
        """By loader where the pipeline has several, else what was given."""
        wanted = self._precision
        if not self._parted or is_config(wanted) or not isinstance(wanted, Mapping):
            return wanted
        return wanted.get(name, wanted.get(""))

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        with self._lock:
            self._running += 1
            self._stop_timer()
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                last = self._running == 0
            if last and self._keep == 0:
                self._let_go()
            elif last and math.isfinite(self._keep):
                self._start_timer()

    def _let_go(self) -> None:
        """Unload what is not in use; what is (by another thread) stays for its own end."""
        self._manager.unload_idle_models()

    def _start_timer(self) -> None:
        owner = weakref.ref(self)

        def fire() -> None:
            pipeline = owner()
            if pipeline is not None and pipeline._running == 0:
                pipeline._let_go()

        with self._lock:
            self._stop_timer()
            self._timer = threading.Timer(self._keep, fire)
            self._timer.daemon = True
            self._timer.start()

    def _stop_timer(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None


def parse_dtype(value: Any) -> PrecisionMode:
    """The precision that a torch dtype, a dtype's name or a precision's name means.

    >>> parse_dtype(torch.bfloat16), parse_dtype("float16"), parse_dtype("NF4")
    (<PrecisionMode.BF16: 'bf16'>, <PrecisionMode.FP16: 'fp16'>, <PrecisionMode.NF4: 'nf4'>)

    Raises ValueError for anything else; nothing becomes fp32 in silence.
    """
    names = {
        "float32": "fp32",
        "float": "fp32",
        "float16": "fp16",
        "half": "fp16",
        "bfloat16": "bf16",
        "float8_e4m3fn": "fp8",
        "float8_e5m2": "fp8_e5m2",
    }
    text = value.value if isinstance(value, PrecisionMode) else str(value).strip().lower()
    try:
        if text.startswith("torch."):
            return PrecisionMode.parse(names[text.removeprefix("torch.")])
        return PrecisionMode.parse(names.get(text, text))
    except (KeyError, ValueError):
        known = ", ".join((*(m.value for m in PrecisionMode), *names))
        raise ValueError(f"dtype {value!r} is not one of: {known}") from None


def _policy(keep: str | float) -> float:
    """Seconds without a call after which to unload: 0 for "call", infinity for "loaded"."""
    if keep == "loaded":
        return math.inf
    if keep == "call":
        return 0.0
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not keep > 0:
        raise ValueError(f"keep is 'loaded', 'call', or seconds above 0, not {keep!r}")
    return float(keep)


def _checked(precision: Any) -> Any:
    """The precision as given, if it can be one; so that mistakes show before anything is loaded."""
    from .formats import get_format

    if is_config(precision):
        read_config(precision)
    elif isinstance(precision, Mapping):
        for value in precision.values():
            _checked(value)
    elif (isinstance(precision, str) and precision.strip().lower() != PrecisionMode.FP32) or (
        precision is not None and not isinstance(precision, str)
    ):
        get_format(precision)
    return precision


def _device(target: Any) -> torch.device:
    import torch

    try:
        return torch.device(target)
    except (RuntimeError, TypeError):
        raise ValueError(f"{target!r} is neither a device, a dtype nor a precision") from None


def _keywords(function: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _say(event: ManagerEvent) -> None:
    if event.kind == "loaded":
        print(f"{event.name}: {format_size(event.bytes)} loaded in {event.seconds:.1f} s")
    elif event.kind == "evicted":
        print(f"{event.name}: unloaded, {format_size(event.bytes)} freed")
    elif event.kind == "failed":
        print(f"{event.name}: not loaded: {event.error}")
