"""Files that end early, told from what their container says of its own length.

FFmpeg reads such files up to where they end and reports nothing, so the sizes that containers declare are compared
with the size of the file here: boxes of MP4 and QuickTime, the Matroska segment, RIFF (AVI), the ASF header, packets of
MPEG-TS and MPEG-PS, the last tag of FLV, the trailer of GIF.
"""

import os
import struct
from collections.abc import Callable
from typing import BinaryIO


def shortage(path: str) -> str | None:
    """How the file ends early, such as "2,539 of 5,078 bytes are there"; None where nothing is known to be missing."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(512)
        for recognised, check in CHECKS:
            if recognised(head):
                return check(file, size)
    return None


def _declared(needed: int, size: int, slack: int = 0) -> str | None:
    """``slack``: bytes by which writers of the format are known to declare too many."""
    return None if needed - size <= slack else f"{size:,} of {needed:,} bytes are there"


def _boxes(file: BinaryIO, size: int) -> str | None:
    """MP4, QuickTime, 3GP: boxes of size (4 bytes, big-endian), type (4 bytes) and content, one after the other."""
    place, found = 0, set()
    while place + 8 <= size:
        file.seek(place)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if not kind.isascii() or not kind.decode("ascii").isprintable():
            break  # what follows the last box is nobody's
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        elif length == 0:  # up to the end of the file
            length = size - place
        if length < 8:
            break
        found.add(kind)
        place += length
    if place > size:
        return _declared(place, size)
    if b"mdat" in found and b"moov" not in found:
        return "the index (moov) that is written last is missing"
    return None


def _ebml_number(data: bytes, place: int, *, keep_marker: bool) -> tuple[int | None, int]:
    """(value, the place after it) of an EBML number of variable length; None is the reserved "unknown"."""
    width = 9 - data[place].bit_length() if place < len(data) and data[place] else 0
    raw = data[place : place + width]
    if width == 0 or len(raw) < width:
        return None, place
    value = int.from_bytes(raw, "big")
    if not keep_marker:
        value &= (1 << 7 * width) - 1
        if value == (1 << 7 * width) - 1:
            return None, place + width
    return value, place + width


def _matroska(file: BinaryIO, size: int) -> str | None:
    """Matroska and WebM: the header, then one segment whose size is known unless the file was written to a pipe."""
    file.seek(0)
    data = file.read(4096)
    place = 0
    while True:
        identifier, after = _ebml_number(data, place, keep_marker=True)
        length, start = _ebml_number(data, after, keep_marker=False)
        if identifier is None or length is None:
            return None
        if identifier == 0x18538067:
            return _declared(start + length, size)
        place = start + length


def _riff(file: BinaryIO, size: int) -> str | None:
    """AVI: a RIFF chunk, and more of them in files beyond 1 GB."""
    place = 0
    while place + 12 <= size:
        file.seek(place)
        header = file.read(12)
        length = int.from_bytes(header[4:8], "little")
        if header[:4] != b"RIFF" or length == 0:  # a length of 0: the writer did not come back to fill it in
            return None
        place += 8 + length + length % 2
    return _declared(place, size, slack=16)


def _asf(file: BinaryIO, size: int) -> str | None:
    """WMV: the size stands in the file properties object of the header."""
    file.seek(0)
    header = file.read(1 << 16)
    place = header.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    if place < 0 or len(header) < place + 96:
        return None
    broadcast = header[place + 88] & 1  # then the size is not valid
    return None if broadcast else _declared(int.from_bytes(header[place + 40 : place + 48], "little"), size)


def _transport(file: BinaryIO, size: int) -> str | None:
    """MPEG-TS: packets of 188 bytes; 192 with the time code of Blu-ray discs and camcorders in front."""
    file.seek(0)
    length = 188 if file.read(1) == b"G" else 192
    return f"the last packet has {size % length} of {length} bytes" if size % length else None


def _program(file: BinaryIO, size: int) -> str | None:
    """MPEG-PS (.mpg, .vob): packs of packets that give their length."""
    begin = max(0, size - (1 << 18))
    file.seek(begin)
    tail = file.read()
    place = tail.find(b"\0\0\1\xba")
    while 0 <= place < len(tail):
        kind = tail[place : place + 4]
        if len(kind) < 4:
            return "it ends within the header of a packet"
        if kind[:3] != b"\0\0\1":
            return None
        if kind[3] == 0xB9:  # end of program
            return None
        if kind[3] == 0xBA:
            if place + 14 > len(tail):
                return "it ends within the header of a pack"
            mpeg2 = tail[place + 4] >> 6 == 1
            place += 14 + (tail[place + 13] & 7) if mpeg2 else 12
        else:
            if place + 6 > len(tail):
                return "it ends within the header of a packet"
            place += 6 + int.from_bytes(tail[place + 4 : place + 6], "big")
    return _declared(begin + place, size) if place >= 0 else None


def _gif(file: BinaryIO, size: int) -> str | None:
    """GIF: blocks up to the trailer ";"."""
    file.seek(max(0, size - 512))
    return None if file.read().rstrip(b"\0\r\n").endswith(b";") else "the trailer is missing"


def _flv(file: BinaryIO, size: int) -> str | None:
    """FLV: most writers note the size of the file; every tag is followed by its own."""
    file.seek(0)
    head = file.read(1 << 14)
    noted = head.find(b"\0\x08filesize\0")  # a property of onMetaData: its name, then a double
    if noted >= 0 and len(head) >= noted + 19:
        return _declared(int(max(0.0, struct.unpack(">d", head[noted + 11 : noted + 19])[0])), size)
    file.seek(max(0, size - 4))
    length = int.from_bytes(file.read(4), "big")
    start = size - 4 - length
    if length >= 11 and start >= 9:
        file.seek(start)
        tag = file.read(4)
        if tag[0] & 0x1F in (8, 9, 18) and int.from_bytes(tag[1:4], "big") + 11 == length:
            return None
    return "it ends within a tag"


_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")

# Recognising a format by its first bytes, and the check of it.
CHECKS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO, int], str | None]], ...] = (
    (lambda head: head[4:8] in _BOXES, _boxes),
    (lambda head: head[:4] == b"\x1a\x45\xdf\xa3", _matroska),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ", _riff),
    (lambda head: head[:16] == bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), _asf),
    (lambda head: head[:1] == b"G" == head[188:189] or head[4:5] == b"G" == head[196:197], _transport),
    (lambda head: head[:4] == b"\0\0\1\xba", _program),
    (lambda head: head[:6] in (b"GIF87a", b"GIF89a"), _gif),
    (lambda head: head[:3] == b"FLV", _flv),
)
