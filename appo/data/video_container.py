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
    """The missing end of the file, such as "2,539 of 5,078 bytes are there"; None where none is known."""
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


SEGMENT, CLUSTER = 0x18538067, 0x1F43B675
# What stands in a segment and in a cluster, by the numbers of the Matroska specification (RFC 9559).
ELEMENTS = {
    SEGMENT, CLUSTER, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367,
    0xE7, 0xA7, 0xAB, 0xA3, 0xA0, 0xEC, 0xBF,
}  # fmt: skip


def _element(file: BinaryIO, place: int) -> tuple[int | None, int | None, int]:
    """(number, size of the content or None, place of the content) of the EBML element at ``place``.

    The size is None where it is not known (live recordings), the number is None where nothing whole stands there.
    """
    file.seek(place)
    data = file.read(12)
    width = 9 - data[0].bit_length() if data and data[0] else 99
    if width > 4 or len(data) <= width:
        return None, None, place
    lengths = 9 - data[width].bit_length() if data[width] else 99
    if lengths > 8 or len(data) < width + lengths:
        return None, None, place
    length = int.from_bytes(data[width : width + lengths], "big") & ((1 << 7 * lengths) - 1)
    known = length != (1 << 7 * lengths) - 1
    return int.from_bytes(data[:width], "big"), length if known else None, place + width + lengths


def _matroska(file: BinaryIO, size: int) -> str | None:
    """Matroska and WebM: the header, then a segment, which gives its size unless it was written to a pipe."""
    _, header, start = _element(file, 0)
    place = start + (header or 0)
    while place < size:
        number, length, start = _element(file, place)
        if number is None:
            return "it ends within the header of an element" if size - place < 12 else None
        if number == SEGMENT and length is not None:
            return _declared(start + length, size)
        if number not in ELEMENTS:
            return None
        place = start if number in (SEGMENT, CLUSTER) else start + (length or 0)
    return _declared(place, size)


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
    """GIF: a header, extensions and pictures, each a chain of blocks that ends with an empty one, and a trailer."""
    file.seek(0)
    data = file.read()

    def colours(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    try:
        place = 13 + colours(data[10])
        while data[place] != 0x3B:
            if data[place] == 0x2C:
                place += 11 + colours(data[place + 9])  # descriptor, colours, size of codes
            elif data[place] == 0x21:
                place += 2
            else:
                return None
            while data[place]:
                place += data[place] + 1
            place += 1
    except IndexError:
        return "the trailer is missing"
    return None


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
