"""Sound files from outside, of any format: what they are, what is wrong with their headers, and who decodes them.

libsndfile decodes first, from a header that is mended where programs are known to write wrong ones; what it cannot read goes
to PyAV or to an ffmpeg on the path, where there is one.
"""

import codecs
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

# needs: soundfile
from common.config import UserError
from common.samples import BadFile
from mp3_frames import count_frames

# fmt: off
SNDFILE_ENDINGS = (".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aif", ".aiff",
                   ".aifc", ".caf", ".au", ".snd")
FFMPEG_ENDINGS = (".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".aac", ".wma", ".webm", ".weba", ".mka", ".mkv", ".avi", ".3gp",
                  ".amr", ".ac3", ".ape", ".wv", ".tta", ".mpg")
# fmt: on
AUDIO_ENDINGS = SNDFILE_ENDINGS + FFMPEG_ENDINGS
LOWEST_HERTZ = 4000  # Hz; below it no voice is in the file, if its header is right
HIGHEST_HERTZ = 768000
MOST_CHANNELS = 64
AT_ONCE = 2**17  # numbers that are decoded at once, of all channels together

# What a file that is no sound begins with -> what to call it.
STRANGERS = {
    b"version https://git-lfs": "a Git LFS pointer, git lfs pull fetches the sound",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<?xml": "XML text",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "an archive, unpack it",
    b"Rar!": "an archive, unpack it",
    b"7z\xbc\xaf": "an archive, unpack it",
    b"\x1f\x8b": "an archive, unpack it",
}


@dataclass
class Stream:
    """A file while it is decoded. blocks: float32 (n, channels), 1.0 is full scale; told: samples that its header promises.

    cut: whether its end is missing, for certain.
    """

    rate: int
    channels: int
    blocks: Iterator[np.ndarray]
    told: int | None = None
    cut: bool = False


def is_audio(name: str) -> bool:
    """Whether a file of this name (or path) should hold sound."""
    return os.path.splitext(name)[1].lower() in AUDIO_ENDINGS


def check_file(path: Path) -> None:
    """BadFile for what is no regular file (a pipe would be waited for, for ever), is empty, or is known not to be sound."""
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        raise BadFile("link to a file that is not there" if os.path.islink(path) else "file that is not there") from None
    if stat.S_ISDIR(facts.st_mode):
        raise BadFile("folder, not a file")
    if not stat.S_ISREG(facts.st_mode):
        raise BadFile("neither a file nor a folder, but a pipe or a device")
    if not facts.st_size:
        raise BadFile("empty file, 0 bytes")
    with open(path, "rb") as file:
        head = file.read(512)
    if what := stranger(head):
        raise BadFile(f"not sound, {what}")


def stranger(head: bytes) -> str:
    """What a file is that begins with `head` and is known to be no sound; "" for others."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, what in STRANGERS.items():
        if head.startswith(mark) or text.startswith(mark):
            return what
    if not head.strip(b"\0"):
        return "nothing but zeros, as a download that failed leaves"
    coding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        letters = codecs.getincrementaldecoder(coding)().decode(head)  # whose last letter may be cut
    except UnicodeDecodeError:
        return ""
    return "text" if len(head) > 16 and all(letter in "\ufeff\t\n\r" or letter.isprintable() for letter in letters) else ""


def check_recording(rate: int, channels: int) -> None:
    """BadFile for numbers of a header that no recording has, before anything is allocated by them."""
    if not LOWEST_HERTZ <= rate <= HIGHEST_HERTZ:
        raise BadFile(f"impossible header, a sample rate of {rate} Hz")
    if not 1 <= channels <= MOST_CHANNELS:
        raise BadFile(f"impossible header, {channels} channels")


# ---- libsndfile --------------------------------------------------------------------------------------------------------


@contextmanager
def open_sndfile(path: Path):
    """A Stream by libsndfile. BadFile where the file is to blame; UserError where the library is."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise UserError(f"sound files need soundfile with libsndfile: pip install soundfile ({error})") from None
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(open(path, "rb"))
            mended, told = mend_header(raw)
            cut = lacks_pages(raw)
            file = stack.enter_context(soundfile.SoundFile(mended))
        except soundfile.LibsndfileError as error:
            raise BadFile(f"no sound that can be decoded, {error.error_string.rstrip('.')}") from error
        except (TypeError, AttributeError, NotImplementedError) as error:
            version = soundfile.__version__
            raise UserError(
                f"soundfile {version} does not work here, whatever the file ({type(error).__name__}: {error})"
            ) from error
        check_recording(file.samplerate, file.channels)
        if told is None and file.format in ("FLAC", "W64", "CAF", "AU") and 0 < file.frames < 2**40:
            told = file.frames  # of mp3 and ogg it is an estimate
        yield Stream(file.samplerate, file.channels, sndfile_blocks(file), told, cut)


def sndfile_blocks(file) -> Iterator[np.ndarray]:
    """The blocks of an open SoundFile, to where its decoder ends."""
    import soundfile

    try:
        while True:
            # into an array of ours: soundfile would cut what it makes itself to .frames
            block = file.read(out=np.empty((max(1, AT_ONCE // file.channels), file.channels), np.float32))
            if len(block):
                yield block
            else:
                return
    except soundfile.LibsndfileError as error:
        raise BadFile(f"damaged file, {error.error_string.rstrip('.')}") from error


class Mended:
    """A binary file that reads as `head` and then as `file` from byte `start` on; what soundfile needs of a file, no more."""

    def __init__(self, file, head: bytes, start: int):
        self.file, self.head, self.start, self.place = file, head, start, 0
        self.size = len(head) + max(0, os.fstat(file.fileno()).st_size - start)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = max(0, offset + (0, self.place, self.size)[whence])
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, size: int = -1) -> bytes:
        size = self.size if size < 0 else size
        content = self.head[self.place : self.place + size]
        if len(content) < size:
            self.file.seek(self.start + max(0, self.place - len(self.head)))
            content += self.file.read(size - len(content))
        self.place += len(content)
        return content

    def readinto(self, buffer) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def mend_header(file):
    """(the file, or its Mended form where the header lies about its length; samples that the header promises, or None)."""
    head = file.read(4096)
    file.seek(0)
    chunk = head.find(b"COMM")  # the chunk of AIFF that counts samples: libsndfile gives what is there, and does not tell
    if head[:4] == b"FORM" and 0 < chunk < len(head) - 14:
        return file, struct.unpack(">I", head[chunk + 10 : chunk + 14])[0] or None
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return mend_wave(file)
    if head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1] & 0xE0 == 0xE0):
        counted = count_frames(file.read())
        file.seek(0)
        if counted:
            return Mended(file, counted.header, counted.start) if counted.header else file, counted.samples
    return file, None


def lacks_pages(file) -> bool:
    """Whether a file is Ogg and libsndfile misses some of it: its last page is not there, or it is a chain.

    In a chain of streams, as recorders of radio leave them, one that begins follows others' sound: libsndfile ends before it.
    """
    size, place, sounding, chained, flags = file.seek(0, os.SEEK_END), 0, False, False, 4
    while place + 27 <= size:
        file.seek(place)
        page = file.read(27 + 255)  # its header: "OggS", version, flags, ..., the number of segments, the bytes of each
        if page[:4] != b"OggS":
            break
        flags = page[5]  # 2: a stream's first page; 4: its last
        chained, sounding = chained or bool(sounding and flags & 2), sounding or not flags & 2
        place += 27 + page[26] + sum(page[27 : 27 + page[26]])
    file.seek(0)
    return place > 0 and (chained or place > size or not flags & 4)


def mend_wave(file):
    """mend_header for RIFF, RF64 and BW64: sizes of 0 and FFFFFFFF, as streams and crashed recorders leave them, are measured.

    What follows the sound (LIST, id3) is kept out of it where the size of the data can be believed.
    """
    size = os.fstat(file.fileno()).st_size
    place, fmt, long_size, told = 12, b"", None, None
    while place + 8 <= size:
        file.seek(place)
        tag, length = struct.unpack("<4sI", file.read(8))
        if tag == b"ds64":
            long_size = struct.unpack("<Q", file.read(16)[8:])[0]
        elif tag == b"fmt ":
            fmt = file.read(min(length, 64))
        elif tag == b"data":
            break
        place += 8 + length + length % 2
    if len(fmt) < 16 or place + 8 > size:
        file.seek(0)
        return file, None
    start, there = place + 8, size - place - 8
    length = long_size if length == 0xFFFFFFFF and long_size else length
    if (length == 0 and not is_chunk_list(file, start, size)) or (length > there and length >= 0x7FFFF000):
        length = there  # nobody knew it when the header was written
    channels, rate, _, align, _ = struct.unpack("<HIIHH", fmt[2:16])
    check_recording(rate, channels)
    told = length // align if align else None
    length = min(length, there, 2**32 - 65536)
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", length)
    return Mended(file, b"RIFF" + struct.pack("<I", min(len(body) + length, 2**32 - 1)) + body, start), told


def is_chunk_list(file, place: int, size: int) -> bool:
    """Whether a file holds nothing but well-formed chunks of RIFF from `place` on: then what is before was really empty."""
    while place + 8 <= size:
        file.seek(place)
        tag, length = struct.unpack("<4sI", file.read(8))
        if not tag.decode("latin-1").isprintable() or not tag.strip() or place + 8 + length > size:
            return False
        place += 8 + length + length % 2
    return size - place < 8


# ---- PyAV and ffmpeg ---------------------------------------------------------------------------------------------------


@contextmanager
def open_av(path: Path):
    """A Stream by PyAV, the first sound of whatever container. BadFile; ImportError where there is no PyAV."""
    import av

    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            if not container.streams.audio:
                raise BadFile("no sound in it, only pictures or text")
            frames = (frame for packet in container.demux(audio=0) for frame in decode_packet(packet))
            first = next(frames, None)  # only what is decoded says how it is: of HE-AAC a header has half the rate
            if first is None:
                raise BadFile("file without a single sample")
            rate, channels = first.sample_rate, first.layout.nb_channels
            check_recording(rate, channels)
            yield Stream(rate, channels, av_blocks(chain([first], frames), av.AudioResampler("flt", first.layout, rate)))
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(f"no sound that can be decoded, {error}") from error


def av_blocks(frames: Iterator, resampler) -> Iterator[np.ndarray]:
    for frame in chain(frames, [None]):  # None: what the resampler still holds
        if frame is not None:
            frame.pts = None  # a gap in its times is no fault of the sound
        for out in resampler.resample(frame):
            yield out.to_ndarray().reshape(-1, out.layout.nb_channels)


def decode_packet(packet) -> list:
    """The frames of a packet; none of a damaged one, which is no reason to lose what follows."""
    import av

    try:
        return packet.decode()
    except av.InvalidDataError:
        return []


@contextmanager
def open_ffmpeg(path: Path):
    """A Stream by the ffmpeg program, through a pipe of AU, whose header stands before any length is known."""
    program = shutil.which("ffmpeg")
    if not program:
        raise ImportError("ffmpeg")
    command = [program, "-nostdin", "-v", "error", "-i", f"file:{os.path.abspath(path)}", "-map", "0:a:0", "-f", "au"]
    with subprocess.Popen([*command, "-c:a", "pcm_f32be", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            head = process.stdout.read(24)
            if len(head) < 24 or head[:4] != b".snd":
                process.kill()
                reason = process.stderr.read(2000).decode(errors="replace").strip().splitlines() or ["nothing came out of ffmpeg"]
                raise BadFile(f"no sound that can be decoded, {reason[-1]}")
            start, _, _, rate, channels = struct.unpack(">IIIII", head[4:])
            process.stdout.read(start - 24)
            check_recording(rate, channels)
            yield Stream(rate, channels, ffmpeg_blocks(process.stdout, channels))
        finally:
            process.kill()


def ffmpeg_blocks(pipe, channels: int) -> Iterator[np.ndarray]:
    width = 4 * channels
    while content := pipe.read(AT_ONCE // channels * width):
        content = content[: len(content) // width * width]
        yield np.frombuffer(content, ">f4").reshape(-1, channels).astype(np.float32)


# Name -> what opens a file as a Stream, a context manager; the first is asked first.
DECODERS = {"libsndfile": open_sndfile, "PyAV": open_av, "ffmpeg": open_ffmpeg}
