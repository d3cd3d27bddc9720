"""Small files that appear whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Put `text`, as UTF-8, in the place of the file at `path`, or raise OSError and leave it.

    Processes and threads may write the same path at once: the last one's text stays.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
