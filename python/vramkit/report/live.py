"""A view in a notebook that renews itself while an offloaded model works."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..offload.report import Seen


class Watch:
    """Shows a session's figures until it is stopped, or the session ends.

    A thread looks every `interval` seconds, and sends something only if a block was called or
    copied since. It holds neither the session nor the model.
    """

    def __init__(self, session: Seen, interval: float) -> None:
        if not interval > 0:
            raise ValueError(f"a view is renewed every so many seconds, not every {interval}")
        self._session = weakref.ref(session)
        self._interval = interval
        self._ended = threading.Event()
        self._show = _output()
        self._thread = threading.Thread(target=self._run, name="vramkit-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more news; what was shown last stays. May be called again."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def running(self) -> bool:
        """Whether news are still shown."""
        return self._thread.is_alive()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _run(self) -> None:
        seen: Any = None
        while True:
            last = self._ended.is_set()
            session = self._session()
            if session is None or session._offloaded() is None:
                break
            raw = session.engine.stats()
            now = raw.acquires, raw.loads, raw.limit, raw.committed
            if now != seen:
                seen = now
                self._show(_page(session))
            del session, raw
            if last:
                return
            self._ended.wait(self._interval)
        self._show("<p>the offloading has ended</p>")


def _page(session: Seen) -> str:
    report = session.stats()
    streamed = [block for block in report.blocks if not block.resident]
    used = report.committed / report.limit if report.limit else 0.0
    bar = f'<progress style="width:20em" max="1" value="{used:.4f}"></progress>'
    hits = f"{report.hits / report.acquires:.0%} hits" if report.acquires else "no call yet"
    head = f"{len(streamed)} of {len(report.blocks)} blocks streamed, {hits}"
    return f"<p>{bar} {escape(head)}</p>{report._repr_html_()}"


def _output() -> Callable[[str], None]:
    """Where a page goes: a widget where there is ipywidgets, else a display that is updated."""
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import HTML, display
    except ImportError as error:
        raise ImportError(
            "the live view needs IPython, which is not installed: pip install ipython"
        ) from error
    if get_ipython() is None:
        raise RuntimeError(
            "the live view shows itself in a notebook or in IPython, and neither is running; "
            "print(session.stats()) works everywhere"
        )
    try:
        import ipywidgets
    except ImportError:
        handle = display(HTML(""), display_id=True)
        return lambda text: handle.update(HTML(text))
    widget = ipywidgets.HTML()
    display(widget)
    return lambda text: setattr(widget, "value", text)
