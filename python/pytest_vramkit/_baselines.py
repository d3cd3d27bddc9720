"""Figures of quality held against those of an earlier run, which are kept in files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

Better = Literal["lower", "higher", "equal"]
_BETTER = ("lower", "higher", "equal")
_FIELDS = {"value", "rel", "abs", "better"}


class Baselines:
    """The baseline file of one test: figures by name, each with its tolerance."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def path_for(node: Any, folder: str) -> Path:
        """FOLDER/test_file/test_name.json beside the test's file; a class and parameters count."""
        name = node.nodeid.partition("::")[2]
        safe = re.sub(r"[^\w.=+-]+", "_", name).strip("_")
        return node.path.parent / folder / node.path.stem / f"{safe}.json"

    def read(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What the file holds; {} where there is none. Fails the test where it is broken."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            pytest.fail(f"{self.path} is no JSON: {error}", pytrace=False)
        if not _is_valid(data):
            pytest.fail(
                f"{self.path} is no baseline file: expected "
                '{"name": {"figure": {"value": 1.0, "rel": 0.05, "abs": 0, "better": "lower"}}}',
                pytrace=False,
            )
        return dict(data)

    def write(self, data: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Put the file in place, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _is_valid(data: Any) -> bool:
    if not isinstance(data, dict):
        return False
    for figures in data.values():
        if not isinstance(figures, dict):
            return False
        for row in figures.values():
            if not isinstance(row, dict) or set(row) != _FIELDS or row["better"] not in _BETTER:
                return False
            numbers = (row["value"], row["rel"], row["abs"])
            if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
                return False
    return True


class QualityRegression:
    """What the fixture `quality_regression` is: called with figures, it compares and remembers."""

    def __init__(self, baselines: Baselines, *, update: bool) -> None:
        self._baselines = baselines
        self._update = update
        self._known = baselines.read()
        self._seen: dict[str, dict[str, dict[str, Any]]] = {}

    @property
    def path(self) -> Path:
        """The baseline file."""
        return self._baselines.path

    def __call__(
        self,
        figures: Any,
        *,
        rel: float = 0.05,
        abs: float = 0.0,
        better: Better | Mapping[str, Better] = "equal",
        name: str = "quality",
    ) -> None:
        """Hold figures against the baseline.

        Args:
            figures: Numbers (or tensors of one) by name; or what `vramkit.compare` returns, of
                which relative_l2, cosine and sqnr_db are taken, each with its direction.
            rel: Tolerance as a part of the baseline, `abs`: and in absolute terms; the larger
                counts. They are written with a new figure; from then on the file's count.
            better: "lower": a figure may fall as far as it likes; "higher": rise; "equal": neither.
                One for all, or by name.
            name: Tells several calls in one test apart.

        Fails the test where there is no baseline, where one is passed, where figures are missing
        or new, and for a figure that is not finite. With --vramkit-update the file is written
        instead when the test has passed; tolerances that were changed by hand stay.
        """
        if name in self._seen:
            raise ValueError(f"{name!r} was already compared in this test: give another name=")
        if rel < 0 or abs < 0 or not (math.isfinite(rel) and math.isfinite(abs)):
            raise ValueError(f"tolerances are finite and not negative: rel {rel}, abs {abs}")
        values, directions = _numbers(figures, better)
        bad = [key for key, value in values.items() if not math.isfinite(value)]
        if bad:
            pytest.fail(
                f"not finite: {', '.join(f'{key} = {values[key]}' for key in bad)}", pytrace=False
            )
        known = self._known.get(name, {})
        self._seen[name] = {
            key: {
                "value": value,
                "rel": known.get(key, {}).get("rel", rel),
                "abs": known.get(key, {}).get("abs", abs),
                "better": known.get(key, {}).get("better", directions[key]),
            }
            for key, value in values.items()
        }
        if self._update:
            return
        if name not in self._known:
            pytest.fail(
                f"no baseline for {name!r} in {self.path}: run with --vramkit-update once, and "
                "keep the file with the tests",
                pytrace=False,
            )
        lines = [_judged(key, value, known.get(key)) for key, value in values.items()]
        lines += [f"{key}: in the baseline, and not given" for key in known if key not in values]
        wrong = [line for line in lines if line]
        if wrong:
            text = "\n  ".join(wrong)
            pytest.fail(
                f"{name} left its baseline ({self.path}):\n  {text}\n"
                "run with --vramkit-update if that is meant",
                pytrace=False,
            )

    def finish(self) -> bool:
        """Write the file, in update mode and where it changes; whether that was so."""
        if not self._update or not self._seen or self._seen == self._known:
            return False
        self._baselines.write(self._seen)
        return True


def _judged(key: str, value: float, row: dict[str, Any] | None) -> str:
    """What is wrong with a figure; "" if nothing."""
    if row is None:
        return f"{key}: {value:.6g}, which the baseline does not have"
    base, room = row["value"], max(row["abs"], row["rel"] * abs(row["value"]))
    room *= 1 + 1e-9  # what rounding the difference may add
    off = value - base
    kept = {"lower": off <= room, "higher": off >= -room, "equal": abs(off) <= room}
    if kept[row["better"]]:
        return ""
    part = f" ({off / abs(base):+.1%})" if base else ""
    return f"{key}: {value:.6g}, baseline {base:.6g}{part}, tolerance {room:.3g}"


def _numbers(figures: Any, better: Any) -> tuple[dict[str, float], dict[str, str]]:
    if isinstance(figures, Mapping):
        values = {str(key): float(value) for key, value in figures.items()}
        ways = {key: better if isinstance(better, str) else better.get(key, "equal")
                for key in values}  # fmt: skip
    elif hasattr(figures, "relative_l2") and hasattr(figures, "sqnr_db"):
        ways = {"relative_l2": "lower", "cosine": "higher", "sqnr_db": "higher"}
        values = {key: float(getattr(figures, key)) for key in ways}
    else:
        raise TypeError(
            "figures are numbers by name, or what vramkit.compare returns; got "
            f"{type(figures).__name__}"
        )
    if not values:
        raise ValueError("there are no figures to compare")
    unknown = [way for way in ways.values() if way not in _BETTER]
    if unknown:
        raise ValueError(f"better is one of {', '.join(_BETTER)}; not {unknown[0]!r}")
    return values, ways
