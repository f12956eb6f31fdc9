"""Real data that installed packages carry, as shards: ``bundled://digits/train``.

``digits`` are scikit-learn's 1,797 scans of handwritten digits (8x8, 10 classes; Alpaydin and Kaynak, UCI, 1998) with a
fixed, stratified held-out part of 360; ``co2`` is statsmodels' weekly atmospheric CO2 at Mauna Loa (1958 to 2001;
Keeling and Whorf) with its last 208 weeks held out. Both are built once per host, below ``$DLTRAIN_CACHE``.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dltrain import storage
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError, nearest

SEASON = 52
HELD_OUT_WEEKS = 208
CONTEXT_WEEKS = 260


def build(name: str, url: str) -> list[str]:
    """Write the parts of a bundled data set below ``url``; returns their URLs."""
    if name not in _BUILDERS:
        raise UserError(f"there is no bundled data set {name!r}; {nearest(name, _BUILDERS)}")
    return _BUILDERS[name](url)


def materialise(url: str) -> str:
    """A URL that can be read: ``bundled://NAME/PART`` is built in the cache if need be, others are left as they are."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme != "bundled":
        return url
    name, _, part = rest.partition("/")
    target = cache_folder() / name
    if not target.is_dir():
        _build_once(name, target)
    if not (target / part / "manifest.json").is_file():
        raise UserError(f"{url} has no such part; {nearest(part, [p.name for p in target.iterdir()])}")
    return str(target / part)


def cache_folder() -> Path:
    """Where bundled data sets are built: ``$DLTRAIN_CACHE`` or ``~/.cache/dltrain``."""
    return Path(os.environ.get("DLTRAIN_CACHE", "~/.cache/dltrain")).expanduser()


def _build_once(name: str, target: Path) -> None:
    """Build beside the target and rename: of ranks that come at once, one wins and the others use its work."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}."))
    except OSError as error:
        raise UserError(f"cannot write to {target.parent} ({error.strerror}); set DLTRAIN_CACHE to a folder") from None
    try:
        build(name, str(temporary))
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build_digits(url: str) -> list[str]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError("the digits need scikit-learn: pip install 'dltrain[examples]'") from None
    digits = load_digits()
    train, held_out = train_test_split(
        np.arange(len(digits.target)), test_size=360, random_state=0, stratify=digits.target
    )
    parts = []
    for part, rows in (("train", np.sort(train)), ("heldout", np.sort(held_out))):
        facts = {"classes": [str(label) for label in range(10)], "source": "sklearn.datasets.load_digits"}
        with ShardWriter(storage.join(url, part), samples_per_shard=128, facts=facts) as writer:
            for row in rows:
                pixels = np.round(digits.images[row] * (255 / 16)).astype(np.uint8)
                writer.write(f"{row:04d}", {"png": _png(pixels), "cls": str(digits.target[row]).encode()})
        parts.append(storage.join(url, part))
    return parts


def _build_co2(url: str) -> list[str]:
    try:
        from statsmodels.datasets import co2
    except ImportError:
        raise UserError("the CO2 series needs statsmodels: pip install 'dltrain[examples]'") from None
    series = co2.load_pandas().data["co2"].interpolate().to_numpy(dtype=np.float64)
    past = series[:-HELD_OUT_WEEKS]
    scale = {
        "mean": float(past.mean()),
        "deviation": float(past.std()),
        "seasonal_error": float(np.abs(past[SEASON:] - past[:-SEASON]).mean()),
    }
    facts = {"season": SEASON, "series": {"co2": scale}, "source": "statsmodels.datasets.co2"}
    parts = []
    for part, values in (("train", past), ("heldout", series[-HELD_OUT_WEEKS - CONTEXT_WEEKS :])):
        with ShardWriter(storage.join(url, part), facts={**facts, "context": CONTEXT_WEEKS}) as writer:
            writer.write("co2", {"npy": _npy(values.astype(np.float32))})
        parts.append(storage.join(url, part))
    return parts


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _npy(values: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


_BUILDERS: dict[str, Callable[[str], list[str]]] = {"digits": _build_digits, "co2": _build_co2}
