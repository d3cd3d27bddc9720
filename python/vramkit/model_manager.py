"""`VRAMEfficientModelManager`: models that are loaded when asked for and unloaded when others are.

The bookkeeping (states, budget, leases, order of use) is the native ledger; this module holds the
objects and calls loaders and observers, with no lock held. `model_manager` is a manager that the
whole process may share, made at its first use:

    from vramkit.model_manager import model_manager
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .errors import BudgetError, StaleHandleError, VramkitError
from .hardware import (
    VramUsage,
    calculate_quality_difference,
    compute_dtype,
    configure_production_precision,
    get_optimal_precision,
    has_native_bf16,
    monitor_vram_usage,
    run_with_precision,
    setup_optimal_precision,
)
from .managed import (
    EVENTS,
    Component,
    Load,
    ManagerEvent,
    Prepare,
    known_bytes,
    known_call,
)
from .manager_config import read_config, write_config
from .precision import PrecisionMode
from .sizes import format_size, parse_size

if TYPE_CHECKING:
    import os

    import torch

    from .model_handle import ModelHandle

P3SAM, PARTFORMER = "p3sam", "partformer"


class VRAMEfficientModelManager:
    """Loads registered models on request, converted to a precision, and evicts others for room.

    Args:
        precision_mode: Precision of every component without one of its own.
        budget: Bytes that loaded weights may take: GiB as a number, or text such as "6 GB". None
            for no bound. Models go in the order of their last use.
        device: Where models are moved after conversion. None leaves them where their loader put
            them.
        config_path: A JSON file that keeps what `set_precision_mode` was told. If it is there, it
            wins over `precision_mode` and over the precisions given to `register`.
        max_resident: How many models may be in memory at once.
        aggressive_unloading: See the property of this name.

    Thread-safe. Observers and loaders run in the thread that caused them, with no lock held.

    >>> manager = VRAMEfficientModelManager("bf16")
    >>> manager.register("head", lambda: torch.nn.Linear(8, 4))
    >>> manager.get("head").weight.dtype
    torch.bfloat16
    >>> manager.unload_all_models()
    72
    """

    def __init__(
        self,
        precision_mode: PrecisionMode | str = PrecisionMode.FP32,
        *,
        budget: int | float | str | None = None,
        device: str | torch.device | None = None,
        config_path: str | os.PathLike[str] | None = None,
        max_resident: int = 1,
        aggressive_unloading: bool = False,
    ) -> None:
        from ._native import _core

        self._core = _core
        self._mode = PrecisionMode.parse(precision_mode)
        self._saved: dict[str, PrecisionMode] = {}
        self._config_path = config_path
        if config_path is not None:
            mode, self._saved = read_config(config_path)
            self._mode = mode or self._mode
        self._ledger = _core.Ledger(None if budget is None else parse_size(budget), max_resident)
        self._device = device
        self._lock = threading.RLock()
        self._components: dict[str, Component] = {}
        self._by_id: dict[int, Component] = {}
        self._next_id = 0
        self._observers: list[tuple[str | None, Callable[[ManagerEvent], object]]] = []
        self._max_resident = max_resident
        self._aggressive = False
        if aggressive_unloading:
            self.aggressive_unloading = True

    # Registration and settings

    def register(
        self,
        name: str,
        loader: Callable[[], Any],
        precision: PrecisionMode | str | None = None,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        inputs: Any = None,
        prepare: Prepare | None = None,
    ) -> None:
        """Make a model known by name; nothing is loaded.

        Args:
            name: What `get` will be called with. A name that is not loaded may be registered anew.
            loader: Returns the model: a module, or any object with modules in its attributes.
                It may declare its weights before they are loaded: `loader.checkpoint` (a path) or
                `loader.shapes` (shapes of floating-point weights by name).
            precision: Of this component; None for the manager's.
            checkpoint: A safetensors file or a folder with some, from which sizes are known before
                the first load. Its headers are read when sizes are asked for.
            inputs: Of an example call, tensors or shapes as for `vramkit.estimate`: what the call
                takes is then estimated too. A loader may declare them as `loader.inputs`.

        Raises TypeError or ValueError for bad arguments, and ValueError if the name is loaded.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"a component's name is text that is not empty, not {name!r}")
        if not callable(loader):
            raise TypeError(f"the loader of {name!r} must be callable, not {loader!r}")
        mode = None if precision is None else PrecisionMode.parse(precision)
        if checkpoint is None:
            checkpoint = getattr(loader, "checkpoint", None)
        if inputs is None:
            inputs = getattr(loader, "inputs", None)
        with self._lock:
            known = self._components.get(name)
            if known is not None:
                try:
                    self._ledger.remove(known.id)
                except ValueError as error:
                    raise ValueError(
                        f"{name!r} is in memory; call unload({name!r}) before it is registered anew"
                    ) from error
                del self._by_id[known.id]
            component = Component(
                self._next_id, name, loader, self._saved.get(name, mode), checkpoint, inputs=inputs
            )
            component.prepare = prepare
            self._next_id += 1
            self._ledger.add(component.id)
            self._components[name] = self._by_id[component.id] = component

    def names(self) -> list[str]:
        """Registered names, in the order of registration."""
        with self._lock:
            return list(self._components)

    def set_precision_mode(self, mode: PrecisionMode | str, component: str | None = None) -> None:
        """Set the precision of the manager, or of one component, for loads to come.

        A model in memory stays what it is until it is asked for by `get`, which then reloads it.
        Components with a precision of their own keep it when the manager's changes. The mode that
        is set already changes nothing. Raises ValueError for an unknown mode or component, and
        OSError if the configuration cannot be written; the old state then stays.
        """
        wanted = PrecisionMode.parse(mode)
        with self._lock:
            saved = dict(self._saved)
            if component is not None:
                found = self._find(component)
                if found.precision is wanted:
                    return
                saved[component] = wanted
            elif self._mode is wanted:
                return
            manager_mode = self._mode if component is not None else wanted
            if self._config_path is not None:
                write_config(self._config_path, manager_mode, saved)
            self._mode, self._saved = manager_mode, saved
            if component is not None:
                found.precision = wanted

    def get_precision_mode(self, component: str | None = None) -> PrecisionMode:
        """The precision of the manager's next loads, or of one component's."""
        with self._lock:
            return self._mode if component is None else self._mode_of(self._find(component))

    @property
    def precision_mode(self) -> PrecisionMode:
        """The manager's precision."""
        return self.get_precision_mode()

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of plain tensors at the manager's precision, after any fallback on its device."""
        return compute_dtype(self._mode, self._device)

    @property
    def device(self) -> str | torch.device | None:
        """Where models are moved after conversion, at loads to come."""
        return self._device

    @device.setter
    def device(self, device: str | torch.device | None) -> None:
        self._device = device

    @property
    def aggressive_unloading(self) -> bool:
        """Keep one model at most, and give torch's cached memory back after each call."""
        return self._aggressive

    @aggressive_unloading.setter
    def aggressive_unloading(self, wanted: bool) -> None:
        if wanted and self._ledger.max_resident > 1:
            self.unload_all_models()
        self._ledger.set_limits(self._ledger.budget, 1 if wanted else self._max_resident)
        self._aggressive = bool(wanted)

    def on(
        self,
        event: str | Callable[[ManagerEvent], object],
        callback: Callable[[ManagerEvent], object] | None = None,
    ) -> Callable[[], None]:
        """Call `callback` at an event: loading, loaded, evicting, evicted or failed.

        `on(callback)` observes all of them. Returns a function that ends the observation. An
        observer that raises is reported by a warning and stops nothing.
        """
        if callback is None:
            kind, function = None, event
        else:
            kind, function = event, callback
        if kind is not None and kind not in EVENTS:
            raise ValueError(f"unknown event {kind!r}; the events are: {', '.join(EVENTS)}")
        if not callable(function):
            raise TypeError(f"an observer must be callable, not {function!r}")
        entry = (kind, function)
        with self._lock:
            self._observers.append(entry)  # type: ignore[arg-type]

        def stop() -> None:
            with self._lock, contextlib.suppress(ValueError):
                self._observers.remove(entry)  # type: ignore[arg-type]

        return stop

    # Models

    def get(self, name: str, *, timeout: float | None = None) -> Any:
        """A handle to the model, which is loaded if it is not, or not in its precision.

        Others are evicted for room; the call waits for models in use, `timeout` seconds at most.
        Two threads that ask for the same model load it once. The handle stands for this load: after
        an eviction it raises StaleHandleError, and `get` gives a new one.

        Raises ValueError for an unknown name, BudgetError if the model cannot fit, TimeoutError,
        RuntimeError if the wait would never end, and whatever the loader raises.
        """
        return self._get(name, None, timeout)

    @contextlib.contextmanager
    def lease(
        self,
        name: str,
        *,
        precision: PrecisionMode | str | None = None,
        timeout: float | None = None,
    ) -> Iterator[Any]:
        """The model itself, loaded if need be, which stays for the length of the with block.

        With a `precision` it is loaded in that one, whatever is set.
        """
        mode = None if precision is None else PrecisionMode.parse(precision)
        while True:
            handle = self._get(name, mode, timeout)
            with contextlib.ExitStack() as stack:
                try:
                    model = stack.enter_context(handle._vramkit_source.lease())
                except StaleHandleError:
                    continue  # another thread evicted it in between
                yield model
                return

    def get_p3sam_model(self) -> Any:
        """`get("p3sam")`."""
        return self.get(P3SAM)

    def get_partformer_pipeline(self) -> Any:
        """`get("partformer")`."""
        return self.get(PARTFORMER)

    def unload(self, name: str, *, timeout: float | None = None) -> int:
        """Unload one model once its use has ended; returns the bytes really freed."""
        with self._lock:
            component = self._find(name)
        return self._evict(component, timeout)

    def unload_all_models(self, *, timeout: float | None = None) -> int:
        """Unload every model once its use has ended; returns the bytes really freed.

        Memory that something else still refers to (a tensor that was taken out of a model) is not
        freed and not counted.
        """
        with self._lock:
            components = list(self._components.values())
        return sum(self._evict(component, timeout) for component in components)

    def unload_idle_models(self) -> int:
        """Unload every model that is not in use now; returns the bytes really freed."""
        with self._lock:
            idle = [
                component
                for component in self._components.values()
                if self._ledger.entry(component.id).state == self._core.LedgerState.ready
            ]
        total = 0
        for component in idle:
            with contextlib.suppress(TimeoutError):  # taken into use in between
                total += self._evict(component, 0.0)
        return total

    def get_current_model_type(self) -> str | None:
        """Name of the model in memory that was used last; None if there is none."""
        with self._lock:
            resident = [
                entry
                for entry in self._ledger.snapshot()
                if entry.state in (self._core.LedgerState.ready, self._core.LedgerState.leased)
            ]
            if not resident:
                return None
            return self._by_id[max(resident, key=lambda entry: entry.last_use).id].name

    def loaded_models(self) -> dict[str, int]:
        """Bytes of the weights of each model in memory, by name."""
        with self._lock:
            return {
                c.name: c.storages.nbytes
                for c in self._components.values()
                if c.storages is not None
            }

    def get_memory_usage_estimate(self) -> dict[str, Any]:
        """What each component's weights take, or would take at its next load.

        Text under `current_precision`, `p3sam_estimate`, `partformer_estimate` and `note`. Numbers
        under `components`: by name {precision, weights_bytes, loaded, source}; `weights_bytes` is
        None where nothing says what the weights are. `loaded_bytes`: of all models in memory;
        `budget_bytes`: None without a budget.

        Where a component has example inputs, a call on them is estimated (`vramkit.estimate`):
        {activations_bytes, peak_bytes, interval_bytes} beside the weights, and under `call_source`
        where they come from. They are None, and it says why, where the model is not known before
        it is loaded or cannot be traced. What a loader takes while it loads is not known.
        """
        with self._lock:
            mode = self._mode
            components = {c.name: (c, self._mode_of(c)) for c in self._components.values()}
        sizes: dict[str, dict[str, Any]] = {}
        for name, (component, wanted) in components.items():
            nbytes, source = known_bytes(component, wanted, self._device)
            sizes[name] = {
                "precision": wanted.value,
                "weights_bytes": nbytes,
                "loaded": self._ledger.entry(component.id).generation == component.generation
                and component.storages is not None,
                "source": source,
                **known_call(component, wanted, self._device),
            }

        def text(name: str) -> str:
            if name not in sizes:
                return f"unknown: no loader is registered; call register({name!r}, loader)"
            known = sizes[name]
            if known["weights_bytes"] is None:
                return f"unknown: {known['source']}"
            size = format_size(known["weights_bytes"])
            words = f"{size} of weights in {known['precision']} ({known['source']})"
            if known["peak_bytes"] is not None:
                words += f"; {format_size(known['peak_bytes'])} at the peak of a call"
            return words

        note = "weights only: activations, workspaces and the CUDA context come on top"
        if any(known["peak_bytes"] is not None for known in sizes.values()):
            note = "weights, and the peak of a call where it is said; the CUDA context comes on top"

        return {
            "current_precision": mode.value,
            "p3sam_estimate": text(P3SAM),
            "partformer_estimate": text(PARTFORMER),
            "note": note,
            "components": sizes,
            "loaded_bytes": sum(self.loaded_models().values()),
            "budget_bytes": self._ledger.budget,
        }

    # What is below runs loaders, observers and waits with no lock held.

    def _find(self, name: str) -> Component:
        component = self._components.get(name)
        if component is None:
            known = ", ".join(self._components) or "none"
            raise ValueError(
                f"no model {name!r} is registered; call manager.register({name!r}, loader) first, "
                f"where loader() returns the model (registered: {known})"
            )
        return component

    def _mode_of(self, component: Component) -> PrecisionMode:
        return component.precision or self._mode

    def _get(self, name: str, mode: PrecisionMode | None, timeout: float | None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        action = self._core.AdmissionAction
        while True:
            with self._lock:
                component = self._find(name)
                wanted = mode or self._mode_of(component)
            if self._ledger.budget is not None:
                expected = known_bytes(component, wanted, self._device)[0]
                self._ledger.set_expected(component.id, expected or 0)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            with self._named_errors(name):
                admission = self._ledger.begin_load(component.id, left)
            if admission.action == action.timed_out:
                raise TimeoutError(
                    f"{name!r} was not loaded within {timeout} s: models in use are in its way"
                )
            if admission.action == action.load:
                handle = self._load(component, wanted, admission.victims)
            else:
                with self._lock:
                    current = component.generation == admission.generation
                    same = current and component.mode is wanted
                    handle = component.handle if same else None
                if current and not same:
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    self._evict(component, left, admission.generation)
            if handle is not None:
                return handle

    @contextlib.contextmanager
    def _named_errors(self, name: str) -> Iterator[None]:
        """The ledger's refusals in words that a caller knows: it has ids, not names."""
        try:
            yield
        except BudgetError as error:
            raise BudgetError(
                f"{name!r} takes {format_size(error.needed_bytes)} ({error.needed_bytes} bytes), "
                f"more than the manager's budget of {format_size(self._ledger.budget or 0)}; "
                "raise the budget, or set a smaller precision",
                error.needed_bytes,
            ) from None
        except (VramkitError, RuntimeError) as error:
            raise RuntimeError(
                f"waiting for {name!r} would never end: this thread is itself using or loading "
                "what has to go first, or waits for a thread that waits for it. Ask for "
                f"{name!r} outside of that use, or raise max_resident or the budget"
            ) from error

    def _load(
        self, component: Component, mode: PrecisionMode, victims: list[int]
    ) -> ModelHandle | None:
        """Load what the ledger has admitted. None if it is too large for the room."""
        from .model_handle import ModelHandle
        from .model_objects import Storages, apply_precision, shapes_of

        start = time.perf_counter()
        model = None
        try:
            self._drop(victims)
            self._emit(ManagerEvent("loading", component.name, mode))
            model = component.loader()
            if model is None:
                raise TypeError(f"the loader of {component.name!r} returned None, not a model")
            shapes = shapes_of(model)
            (component.prepare or apply_precision)(model, mode, self._device)
            storages = Storages.of(model)
        except BaseException as error:
            model = None  # the traceback keeps this frame, and must not keep the model
            self._ledger.fail_load(component.id)
            seconds = time.perf_counter() - start
            self._emit(ManagerEvent("failed", component.name, mode, seconds=seconds, error=error))
            raise
        # The lock makes the ledger's "ready" and the object appear to others at once.
        with self._lock:
            placement = self._ledger.finish_load(component.id, storages.nbytes)
            component.shapes = shapes
            component.measured[mode] = storages.nbytes
            component.model, component.storages, component.mode = model, storages, mode
            component.generation = placement.generation
            handle = None
            if placement.kept:
                source = Load(self, component, placement.generation)
                handle = component.handle = ModelHandle(source, type(model))
            model = None
        if handle is None:
            self._drop([component.id])
            return None
        self._drop(placement.victims)
        seconds = time.perf_counter() - start
        self._emit(
            ManagerEvent("loaded", component.name, mode, bytes=storages.nbytes, seconds=seconds)
        )
        return handle

    def _evict(self, component: Component, timeout: float | None, generation: int = 0) -> int:
        with self._named_errors(component.name):
            eviction = self._ledger.begin_evict(component.id, timeout, generation)
        if eviction == self._core.Ledger.Eviction.timed_out:
            raise TimeoutError(f"{component.name!r} is still in use after {timeout} s")
        if eviction == self._core.Ledger.Eviction.absent:
            return 0
        return self._drop([component.id])

    def _drop(self, ids: list[int]) -> int:
        """Let go of what the ledger has marked as evicting; returns the bytes really freed."""
        total = 0
        for id_ in ids:
            with self._lock:
                component = self._by_id[id_]
                storages, mode = component.storages, component.mode or self._mode_of(component)
            try:
                nbytes = storages.nbytes if storages is not None else 0
                self._emit(ManagerEvent("evicting", component.name, mode, bytes=nbytes))
            finally:
                with self._lock:
                    component.model = component.handle = component.storages = component.mode = None
                gc.collect()
                freed = storages.freed_bytes() if storages is not None else 0
                _release_cached_memory()
                self._ledger.finish_evict(id_)
            total += freed
            self._emit(ManagerEvent("evicted", component.name, mode, bytes=freed))
        return total

    def _emit(self, event: ManagerEvent) -> None:
        with self._lock:
            observers = [f for kind, f in self._observers if kind in (None, event.kind)]
        for observer in observers:
            try:
                observer(event)
            except Exception as error:
                warnings.warn(
                    f"an observer of {event.kind!r} raised {error!r}", RuntimeWarning, stacklevel=2
                )

    @contextlib.contextmanager
    def _leased(self, name: str, id_: int, generation: int) -> Iterator[Any]:
        if not self._ledger.acquire(id_, generation):
            raise StaleHandleError(
                f"{name!r} was unloaded after this handle was given out; call "
                f"manager.get({name!r}) for a new one, and keep names rather than handles"
            )
        try:
            yield self._by_id[id_].model
        finally:
            self._ledger.release(id_)
            if self._aggressive:
                _release_cached_memory()

    def _is_loaded(self, id_: int, generation: int) -> bool:
        with self._lock:
            component = self._by_id.get(id_)
            return (
                component is not None
                and component.handle is not None
                and component.generation == generation
            )


def _release_cached_memory() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


_global_lock = threading.Lock()


def __getattr__(name: str) -> Any:
    if name != "model_manager":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _global_lock:
        if name not in globals():
            globals()[name] = VRAMEfficientModelManager()
        return globals()[name]


__all__ = [
    "EVENTS",
    "ManagerEvent",
    "PrecisionMode",
    "StaleHandleError",
    "VRAMEfficientModelManager",
    "VramUsage",
    "calculate_quality_difference",
    "compute_dtype",
    "configure_production_precision",
    "get_optimal_precision",
    "has_native_bf16",
    "monitor_vram_usage",
    "run_with_precision",
    "setup_optimal_precision",
]
