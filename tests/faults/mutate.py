"""Damage files by a seed: bytes, lengths, header numbers, JSON values, archives, whole files.

`mutate(folder, random)` damages one file of a folder and returns what it did. Files are recognised
by their first bytes: JSON, token files, .npy, zip, gzip and safetensors are also damaged by their
structure.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    255,
    65_535,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**60,
    2**63 - 1,
    -(2**31),
    -(2**63),
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    1.5,
    2.0,
    2**31,
    2**63,
    10**30,
    -0.0,
    "",
    "x",
    "1",
    "../x",
    "/x",
    "\ud800",
    [],
    {},
    [1],
    {"a": 1},
    [[]],
)
RAW_VALUES = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"[" * 3000 + b"]" * 3000,
    b'{"a":' * 2000 + b"1" + b"}" * 2000,
    b"1" * 5000,
    b"",
)
Damage = Callable[[bytes, random.Random], bytes]


def mutate(folder: Path, random: random.Random) -> str:
    """Damage one file below `folder`; return what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = random.choice(files)
    name = path.relative_to(folder).as_posix()
    if random.random() < 0.04:
        return f"{name}: {_whole_file(path, files, random)}"
    content = path.read_bytes()
    kinds = _inside(content)
    damage = random.choice(kinds) if kinds and random.random() < 0.6 else random.choice(BYTES)
    done = damage.__name__.strip("_")
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        try:
            content = damage(content, random)
        except Exception:  # damaged beyond what this damage understands: it stays as it is
            break
    path.write_bytes(content)
    return f"{name}: {done}"


def _whole_file(path: Path, files: list[Path], random: random.Random) -> str:
    what = random.choice(("gone", "a folder", "another file", "empty", "a hole of a terabyte"))
    if what == "another file":
        shutil.copyfile(random.choice(files), path.with_name("copy"))
        path.with_name("copy").replace(path)
        return what
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what != "gone":
        with open(path, "wb") as file:
            file.truncate(1 << 40 if what.startswith("a hole") else 0)
    return what


# Bytes


def flip(content: bytes, random: random.Random) -> bytes:
    out = bytearray(content or b"\0")
    for _ in range(random.choice((1, 1, 2, 8))):
        out[random.randrange(len(out))] ^= 1 << random.randrange(8)
    return bytes(out)


def set_byte(content: bytes, random: random.Random) -> bytes:
    out = bytearray(content or b"\0")
    out[random.randrange(len(out))] = random.choice(b'\x00\xff\x7f\x80\n\r ,:"-{}[]0#')
    return bytes(out)


def cut(content: bytes, random: random.Random) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def cut_out(content: bytes, random: random.Random) -> bytes:
    first = random.randrange(len(content) + 1)
    return content[:first] + content[first + random.choice((1, 2, 4, 8, 64)) :]


def twice(content: bytes, random: random.Random) -> bytes:
    first = random.randrange(len(content) + 1)
    part = content[first : first + random.choice((1, 8, 64, 4096))]
    return content[:first] + part * random.choice((2, 2, 1000)) + content[first + len(part) :]


def swap(content: bytes, random: random.Random) -> bytes:
    a, b, c = sorted(random.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def more(content: bytes, random: random.Random) -> bytes:
    first = random.randrange(len(content) + 1)
    return content[:first] + random.randbytes(random.choice((1, 8, 100))) + content[first:]


def number(content: bytes, random: random.Random) -> bytes:
    """Replace a little-endian number by a notable one."""
    out, size = bytearray(content.ljust(8, b"\0")), random.choice((2, 4, 4, 8, 8))
    at = random.randrange(0, len(out) - size + 1)
    at -= at % size
    out[at : at + size] = (random.choice(NUMBERS) & (2 ** (8 * size) - 1)).to_bytes(size, "little")
    return bytes(out)


def digits(content: bytes, random: random.Random) -> bytes:
    """Replace a number in the text by a notable one."""
    places = [at for at, byte in enumerate(content[:100_000]) if 48 <= byte <= 57]
    if not places:
        return flip(content, random)
    first = last = random.choice(places)
    while last < len(content) and content[last : last + 1].isdigit():
        last += 1
    new = random.choice(
        (*map(str, NUMBERS), "nan", "inf", "1e39", "1.5", "x", "9" * 30, "1_0", "٣")
    )
    return content[:first] + new.encode() + content[last:]


BYTES: tuple[Damage, ...] = (flip, flip, set_byte, cut, cut_out, twice, swap, more, number, digits)


# JSON


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Yield (list or dict, key) of every value below the top."""
    out: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        inner = stack.pop()
        keys = (
            list(inner)
            if isinstance(inner, dict)
            else range(len(inner))
            if isinstance(inner, list)
            else ()
        )
        out += [(inner, key) for key in keys]
        stack += [inner[key] for key in keys]
    return out


def json_value(content: bytes, random: random.Random) -> bytes:
    """Change a value to another type; remove, repeat or rename a key; or write broken JSON."""
    top = json.loads(content)
    places = _places(top)
    if not places:
        return json.dumps(random.choice(VALUES)).encode()
    inside, key = random.choice(places)
    what = random.choice(("value", "value", "value", "raw", "gone", "renamed", "like"))
    if what == "value":
        inside[key] = random.choice(VALUES)
    elif what == "like" and isinstance(inside[key], int):
        inside[key] = random.choice((inside[key] + 1, inside[key] - 1, -inside[key], *NUMBERS))
    elif what == "gone":
        del inside[key]
    elif what == "renamed" and isinstance(inside, dict):
        inside[key + "x"] = inside.pop(key)
    else:
        inside[key] = "\0raw"
    text = json.dumps(top).encode()
    return text.replace(b'"\\u0000raw"', random.choice(RAW_VALUES))


def json_line(content: bytes, random: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = json_value(lines[at], random)
    return b"\n".join(lines)


# Containers


def token_header(content: bytes, random: random.Random) -> bytes:
    text = json_value(content[16 : 16 + struct.unpack("<I", content[12:16])[0]], random)
    if len(text) > 1008:
        return content[:16] + text[:1008] + content[1024:]
    return content[:12] + struct.pack("<I", len(text)) + text.ljust(1008) + content[1024:]


def tensor_header(content: bytes, random: random.Random) -> bytes:
    """Change the header of a safetensors file: shapes, dtypes, offsets, JSON in its metadata."""
    (size,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + size])
    inner = [key for key, value in head.get("__metadata__", {}).items() if value[:1] in ("{", "[")]
    if inner and random.random() < 0.6:
        key = random.choice(inner)
        head["__metadata__"][key] = json_value(head["__metadata__"][key].encode(), random).decode(
            "utf-8", "replace"
        )
        text = json.dumps(head).encode()
    else:
        text = json_value(content[8 : 8 + size], random)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def tensor_value(content: bytes, random: random.Random) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    return content[: 8 + size] + number(content[8 + size :], random)[: len(content) - 8 - size]


def array_header(content: bytes, random: random.Random) -> bytes:
    """Change dtype or shape in the header of an .npy."""
    size = struct.unpack("<H", content[8:10])[0]
    text = content[10 : 10 + size].decode("latin-1")
    kind = [
        "<f4",
        "<f8",
        "<i4",
        "<i8",
        "<u8",
        "|O",
        "|b1",
        "<c16",
        ">i8",
        "<U3",
        "|S3",
        "<M8[s]",
        "|V4",
        "<f2",
        "x",
    ]
    shape = (
        f"({', '.join(str(random.choice(NUMBERS)) for _ in range(random.randrange(4)))},)".replace(
            "(,)", "()"
        )
    )
    if random.random() < 0.5:
        text = _between(text, "'descr': ", ",", repr(random.choice(kind)))
    else:
        text = _between(text, "'shape': ", ")", shape[:-1])
    text = text.rstrip() + "\n"
    return (
        content[:8]
        + struct.pack("<H", len(text))
        + text.encode("latin-1", "replace")
        + content[10 + size :]
    )


def _between(text: str, before: str, after: str, new: str) -> str:
    first = text.index(before) + len(before)
    return text[:first] + new + text[text.index(after, first) :]


def array_value(content: bytes, random: random.Random) -> bytes:
    size = 10 + struct.unpack("<H", content[8:10])[0]
    return content[:size] + number(content[size:], random)[: len(content) - size]


def member(content: bytes, random: random.Random) -> bytes:
    """Damage, remove, repeat or swap a member of a zip file, compressed or not."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    at, other = random.randrange(len(parts)), random.randrange(len(parts))
    name, value = parts[at]
    what = random.choice(("inside", "inside", "inside", "gone", "swapped", "zeros"))
    if what == "inside":
        parts[at] = (
            name,
            random.choice((array_header, array_value, array_value, *BYTES))(value, random),
        )
    elif what == "gone":
        del parts[at]
    elif what == "swapped":
        parts[at], parts[other] = (name, parts[other][1]), (parts[other][0], value)
    else:
        parts[at] = (name, value[:128] + bytes(random.choice((100, 10**6))))
    out = io.BytesIO()
    with zipfile.ZipFile(
        out, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as archive:
        for name, value in parts:
            archive.writestr(name, value)
    return out.getvalue()


def packed(content: bytes, random: random.Random) -> bytes:
    """Damage the content of a gzip file."""
    inner = gzip.decompress(content)
    choice = json_line if inner[:1] == b"{" and random.random() < 0.7 else random.choice(BYTES)
    return gzip.compress(choice(inner, random), 1)


@cache
def _bomb(kind: bytes) -> bytes:
    return gzip.compress(kind * (1 << 20), 9) * 256  # members of one file


def bomb(content: bytes, random: random.Random) -> bytes:
    """Append 256 MB of one byte to a gzip file."""
    return content + _bomb(random.choice((b"\0", b"\n", b"7", b" ")))


def _inside(content: bytes) -> tuple[Damage, ...]:
    """Return the damages of the structure of this kind of file."""
    if content[:8] == b"XMKTOKEN":
        return (token_header,)
    if content[:6] == b"\x93NUMPY":
        return array_header, array_value
    if content[:2] == b"PK":
        return (member,)
    if content[:2] == b"\x1f\x8b":
        return (packed,) * 23 + (bomb,)  # a bomb takes a second
    if content[8:9] == b"{":
        return tensor_header, tensor_header, tensor_value
    if content[:1] in b'{["' and content:
        return (json_line,) if content.count(b"\n") > 1 and content[:2] != b"{\n" else (json_value,)
    return ()
