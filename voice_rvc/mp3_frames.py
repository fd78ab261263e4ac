"""How long an mp3 is: its frames, counted by their own headers (ISO 11172-3, 13818-3)."""

import struct
from typing import NamedTuple

RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by the version's bits: MPEG 1, 2, 2.5
# kbit/s by (MPEG 1?, layer); index 0 (free format) and 15 are no frame that could be followed
BITRATES = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class Counted(NamedTuple):
    """samples: of all frames together; header: what must stand before the bytes from `start` on for decoders to know it."""

    samples: int
    header: bytes
    start: int


def parse_frame(content: bytes, place: int) -> tuple[int, int, int] | None:
    """(bytes, samples, offset of its data behind the side information) of the frame at `place`; None where there is none."""
    if place + 4 > len(content) or content[place] != 0xFF or content[place + 1] & 0xE0 != 0xE0:
        return None
    version, layer = content[place + 1] >> 3 & 3, 4 - (content[place + 1] >> 1 & 3)
    bits, rate = content[place + 2] >> 4, content[place + 2] >> 2 & 3
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3:
        return None
    kilobits, hertz, padding = BITRATES[version == 3, layer][bits], RATES[version][rate], content[place + 2] >> 1 & 1
    if layer == 1:
        return (12000 * kilobits // hertz + padding) * 4, 384, 4
    samples = 576 if layer == 3 and version != 3 else 1152
    mono = content[place + 3] >> 6 == 3
    side = {(True, True): 17, (True, False): 32, (False, True): 9, (False, False): 17}[version == 3, mono]
    return samples * 125 * kilobits // hertz + padding, samples, 4 + side


def count_frames(content: bytes) -> Counted | None:
    """The frames of an mp3, whatever stands between and around them; None for what has no two frames in a row.

    Decoders believe a first frame that counts the others (Xing, Info), and without one guess from the bitrate of the first, and
    stop there: of a variable rate, or of two files in one, the rest would be lost. So a frame that counts them right is made.
    """
    frames, place = [], 0
    if content[:3] == b"ID3" and len(content) > 10:
        place = 10 + sum((content[6 + i] & 127) << 7 * (3 - i) for i in range(4))
    while 0 <= place < len(content):
        frame = parse_frame(content, place)
        follows = frame and (frames or parse_frame(content, place + frame[0]))  # a first frame is believed with a second
        if follows and place + frame[0] <= len(content):
            frames.append((place, *frame))
            place += frame[0]
        else:
            place = content.find(b"\xff", place + 1)
    if not frames:
        return None
    start, size, _, data = frames[0]
    first = content[start : start + size]
    told = None
    if first[data : data + 4] in (b"Xing", b"Info"):
        flags, told = struct.unpack(">II", first[data + 4 : data + 12]) if len(first) >= data + 12 else (0, 0)
        frames = frames[1:]
        told = told if flags & 1 else None
    samples = sum(frame[2] for frame in frames)
    if frames and told and told > len(frames):  # the end of the file is missing
        return Counted(told * frames[0][2], b"", 0)
    if not frames or told == len(frames) or first[1] >> 1 & 3 != 1:  # layers 1 and 2 have no such frame
        return Counted(samples, b"", 0)
    return Counted(samples, counting_frame(first, len(frames)), frames[0][0])


def counting_frame(first: bytes, frames: int) -> bytes:
    """A silent frame as the first one is, of the highest bitrate, that says how many follow."""
    header = bytes([0xFF, first[1] | 1, 0xE0 | first[2] & 0x0C, first[3]])  # no checksum, no padding
    size, _, data = parse_frame(header, 0)
    return (header + bytes(data - 4) + b"Xing" + struct.pack(">II", 1, frames)).ljust(size, b"\0")
