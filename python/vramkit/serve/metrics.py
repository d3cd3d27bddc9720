"""The server's counters, in a registry of its own, as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Every measure that `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vramkit_requests", "Answers, by path and status", ("path", "status"), registry=registry
        )
        self.rejected = Counter(
            "vramkit_rejected",
            "Requests turned away: queue_full, no_turn, too_large",
            ("reason",),
            registry=registry,
        )
        self.failures = Counter(
            "vramkit_synthesis_failures", "Syntheses that crashed", registry=registry
        )
        self.seconds = Histogram(
            "vramkit_synthesis_seconds", "Of one request", buckets=_SECONDS, registry=registry
        )
        self.audio_seconds = Counter("vramkit_audio_seconds", "Sound made", registry=registry)
        self.characters = Counter("vramkit_characters", "Text spoken", registry=registry)
        self.running = Gauge("vramkit_running", "Requests that synthesize", registry=registry)
        self.waiting = Gauge("vramkit_waiting", "Requests in the queue", registry=registry)
        self.cleanups = Counter(
            "vramkit_cleanups", "By kind: memory, device_cache", ("kind",), registry=registry
        )
        self.memory = Gauge(
            "vramkit_memory_bytes",
            "By kind: cpu, gpu_allocated, gpu_reserved",
            ("kind",),
            registry=registry,
        )
        self.weights = Gauge("vramkit_weights_bytes", "Of the model", registry=registry)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
