"""Seeded damage to files: bytes, the parts of a .safetensors header, entries of JSON; nothing in it knows what is read."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

STRANGE = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "0", "[]",
    "null", "\x00", "../../x", [], [[]], [1, "a", None], {}, {"a": {}}, [0] * 1000, "9" * 400,
)  # fmt: skip


def bytes_of(content: bytes, rng: random.Random) -> bytes:
    """Bits turned, pieces cut out, doubled, overwritten, or an end cut off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        # Files begin with what tells about the rest.
        place = rng.randrange(min(len(data), 4096)) if rng.random() < 0.7 else rng.randrange(len(data))
        length = min(len(data) - place, rng.choice((1, 2, 8, 100)))
        how = rng.randrange(6)
        if how == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[place : place + length]
        elif how == 2:
            data[place:place] = data[place : place + length]
        elif how == 3:
            data[place : place + length] = bytes(rng.randrange(256) for _ in range(length))
        elif how == 4:
            data[place : place + length] = rng.choice((b"\x00", b"\xff", b"9", b"{", b'"')) * length
        else:
            del data[place:]
    return bytes(data)


def json_of(value: Any, rng: random.Random) -> Any:
    """One entry, at any depth, dropped, doubled, or of another value."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ():
            places.append((inner, key))
            walk(inner[key])

    walk(value)
    if not places:
        return rng.choice(STRANGE)
    home, key = rng.choice(places)
    how = rng.randrange(4)
    if how == 0:
        del home[key]
    elif how == 1:
        home[key] = rng.choice(STRANGE)
    elif how == 2 and isinstance(home, dict):
        home[rng.choice((f"{key}x", f"blocks.99999999.{key}", "", "__metadata__", str(key).upper()))] = home.pop(key)
    else:
        home[key] = copy.deepcopy(rng.choice(places)[0]) if rng.random() < 0.5 else [home[key]]
    return value


def safetensors_of(content: bytes, rng: random.Random) -> bytes:
    """A damaged header, of the right length again, before the same data; JSON within its strings is damaged, too."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    strings = header.get("__metadata__", {})
    if strings and rng.random() < 0.6:
        key = rng.choice(sorted(strings))
        try:
            said = json.loads(strings[key])
        except ValueError:
            said = None
        if said is None or rng.random() < 0.2:
            strings[key] = str(rng.choice(STRANGE)).encode("utf-8", "replace").decode()
        else:
            strings[key] = json.dumps(json_of([said], rng))[1:-1]
    else:
        header = json_of(header, rng)
    text = json.dumps(header).encode()
    if rng.random() < 0.05:
        return struct.pack("<Q", rng.choice((0, 1, len(text) - 1, 2**40, 2**63 + 1))) + text + content[8 + length :]
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def outcome(action: Callable[[], Any], allowed: tuple[type[Exception], ...]) -> str:
    """ "fine", "refused", or what else was raised."""
    try:
        action()
    except allowed as error:
        return "refused" if str(error).strip() else f"refused without a word: {error!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"
