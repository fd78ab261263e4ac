"""Any sound file as mono floats: containers, headers that lie, channels, levels, damage; and the numbers that must be right."""

import os
import struct
import sys

import numpy as np
import pytest
import soundfile
from conftest import VOICE, use_task

from common.config import UserError
from common.samples import BadFile

TASK = VOICE
use_task(TASK)

from audio import DECODERS, open_audio, read_audio, read_blocks, resample, write_wave  # noqa: E402

RATE = 16000
TIME = np.arange(2 * RATE) / RATE
VOWEL = 0.4 * np.sin(2 * np.pi * 220 * TIME) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * TIME))  # (32000,), a tone in syllables


def wave_file(path, samples=VOWEL, tag=b"RIFF", riff=None, data=None, fmt=None, before=b"", after=b"", keep=None):
    """A 16-bit wav written by hand: riff and data are what its header says of the lengths, `keep` the bytes that there are."""
    content = np.round(np.asarray(samples) * 32767).astype("<i2").tobytes()
    fmt = fmt or struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
    body = b"WAVE" + before + b"fmt " + struct.pack("<I", len(fmt)) + fmt
    body += b"data" + struct.pack("<I", len(content) if data is None else data) + content[:keep] + after
    path.write_bytes(tag + struct.pack("<I", len(body) if riff is None else riff) + body)
    return path


def check_vowel(sound, tolerance=0.005, seconds=2.0, within=0.0):
    assert abs(len(sound.wave) / sound.rate - seconds) <= within + 1e-6
    assert sound.wave.dtype == np.float32 and sound.wave.ndim == 1
    assert np.sqrt(np.mean(sound.wave.astype(float) ** 2)) == pytest.approx(np.sqrt(np.mean(VOWEL**2)), rel=max(0.01, tolerance))
    spectrum = np.abs(np.fft.rfft(sound.wave))
    assert spectrum.argmax() * sound.rate / len(sound.wave) == pytest.approx(220, abs=1)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_each_kind_of_sample_is_the_same_sound(tmp_path, subtype):
    soundfile.write(tmp_path / "a.wav", VOWEL, RATE, subtype=subtype)
    sound = read_audio(tmp_path / "a.wav")
    check_vowel(sound, 0.02)
    assert abs(sound.wave.mean()) < 0.005 and not sound.notes


@pytest.mark.parametrize("name, form, subtype", [
    ("a.flac", "FLAC", "PCM_24"), ("a.ogg", "OGG", "VORBIS"), ("a.opus", "OGG", "OPUS"), ("a.aiff", "AIFF", "PCM_16"),
    ("a.caf", "CAF", "PCM_16"), ("a.w64", "W64", "PCM_16"), ("a.au", "AU", "PCM_16"), ("a.mp3", "MP3", None),
    ("named wrongly.wav", "FLAC", "PCM_16"),
])  # fmt: skip
def test_each_container_is_read_to_its_end(tmp_path, name, form, subtype):
    soundfile.write(tmp_path / name, VOWEL, RATE, format=form, subtype=subtype)
    check_vowel(read_audio(tmp_path / name), 0.05, within=0.1)


UNKNOWN = {"riff": 0xFFFFFFFF, "data": 0xFFFFFFFF}
LONG_SIZES = b"ds64" + struct.pack("<IQQQI", 28, 64068, 64000, 32000, 0)
EXTENSIBLE = struct.pack("<HHIIHHHHIH", 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 4, 1) + bytes.fromhex(
    "000000001000800000aa00389b71"
)


@pytest.mark.parametrize("lie", [
    UNKNOWN, {"riff": 0, "data": 0}, {"riff": 0}, {"riff": 36, "data": 0}, {"data": 0x7FFFF000}, {"fmt": EXTENSIBLE},
    UNKNOWN | {"tag": b"BW64", "before": LONG_SIZES}, UNKNOWN | {"tag": b"RF64", "before": LONG_SIZES},
    {"before": b"bext" + struct.pack("<I", 602) + bytes(602), "after": b"LIST\x0f\0\0\0INFOINAM\x03\0\0\0ab\0\0"},
    {"before": b"junk\x03\0\0\0abc\0"},
])  # fmt: skip
def test_a_header_that_lies_about_lengths_costs_no_sound_and_adds_none(tmp_path, lie):
    sound = read_audio(wave_file(tmp_path / "a.wav", **lie))
    check_vowel(sound)
    assert not sound.notes and np.abs(sound.wave - VOWEL).max() < 1e-3


def test_chunks_after_no_sound_are_not_taken_for_sound(tmp_path):
    with pytest.raises(BadFile, match="without a single sample"):
        read_audio(wave_file(tmp_path / "a.wav", [], after=b"LIST\x10\0\0\0INFOINAM\x04\0\0\0abc\0"))


def test_a_cut_file_gives_what_is_there_and_says_so(tmp_path):
    sound = read_audio(wave_file(tmp_path / "a.wav", keep=40000))
    assert len(sound.wave) == 20000 and sound.notes == ["file with a part missing, 1.2 of 2.0 s"]
    for name in ("b.flac", "b.ogg", "b.aiff"):
        soundfile.write(tmp_path / name, np.tile(VOWEL, 9), RATE)
        assert not read_audio(tmp_path / name).notes
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        sound = read_audio(tmp_path / name)
        assert 4 < len(sound.wave) / RATE < 10 and sound.notes[0].startswith("file with a part missing")


def without_count(path, mode="VARIABLE"):
    """(the first frame of an mp3 that begins loudly, which tells decoders how many there are; the others)."""
    noise = np.random.default_rng(0).standard_normal(len(VOWEL)).clip(-3, 3) * 0.1
    soundfile.write(path, np.where(TIME > 0.7, 0, VOWEL + noise), RATE, format="MP3", bitrate_mode=mode, compression_level=0.3)
    content = path.read_bytes()
    second = next(place for place in range(100, len(content)) if content[place : place + 2] == content[:2])
    return content[:second], content[second:]


def test_a_variable_rate_mp3_is_read_whole(tmp_path):
    first, rest = without_count(tmp_path / "a.mp3")
    (tmp_path / "b.mp3").write_bytes(rest)
    assert soundfile.info(tmp_path / "b.mp3").duration < 1.5  # what a decoder believes alone
    sound = read_audio(tmp_path / "b.mp3")
    assert 2 <= len(sound.wave) / RATE < 2.15 and not sound.notes and sound.facts["decoder"] == "libsndfile"
    tagged = b"ID3\x04\0\0\0\0\x02\0" + bytes(256)
    (tmp_path / "two.mp3").write_bytes(tagged + first + rest + tagged + first + rest + b"TAG" + bytes(125))
    assert 4 <= len(read_audio(tmp_path / "two.mp3").wave) / RATE < 4.3
    (tmp_path / "cut.mp3").write_bytes((first + rest)[: len(rest) // 2])
    assert read_audio(tmp_path / "cut.mp3").notes[0].startswith("file with a part missing")


@pytest.mark.parametrize("content, fault", [
    (b"", "empty file"), (b"<!DOCTYPE html><html>", "a web page"), (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
    (b"\x89PNG\r\n\x1a\n" + bytes(99), "a picture"), (b'{"error": "not found"}', "text"), (bytes(500), "nothing but zeros"),
    (b"PK\x03\x04" + bytes(99), "an archive"), (np.random.default_rng(1).bytes(5000), "no sound that can be decoded"),
    (b"RIFF\0\0\0\0WAVE", "no sound that can be decoded"),
])  # fmt: skip
def test_what_is_no_sound_is_called_what_it_is(tmp_path, content, fault):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(BadFile, match=fault):
        read_audio(tmp_path / "a.wav")


def test_text_in_any_alphabet_is_no_sound(tmp_path):
    for coding in ("utf-8", "utf-16"):
        (tmp_path / "a.wav").write_bytes(("1\r\n00:00:01,000 --> 00:00:02,000\r\nGrüß Gott, 声音\r\n" * 40).encode(coding))
        with pytest.raises(BadFile, match="not sound, text"):
            read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("code, channels, rate, bits", [
    (1, 1, 0, 16), (1, 0, RATE, 16), (1, 65535, RATE, 16), (1, 1, 1, 16), (1, 1, 2**32 - 1, 16), (1, 1, RATE, 0),
    (0x7777, 1, RATE, 16),
])  # fmt: skip
def test_an_impossible_header_is_named_before_anything_is_allocated(tmp_path, code, channels, rate, bits):
    fmt = struct.pack("<HHIIHH", code, channels, rate, rate * 2 % 2**32, 2, bits)
    with pytest.raises(BadFile, match="impossible header|no sound that can be decoded"):
        read_audio(wave_file(tmp_path / "a.wav", fmt=fmt))


def test_pipes_folders_and_dead_links_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "mic.wav")
    (tmp_path / "gone.wav").symlink_to("nowhere")
    (tmp_path / "folder.wav").mkdir()
    for name, fault in (
        ("mic", "pipe"),
        ("gone", "link to a file that is not there"),
        ("folder", "folder"),
        ("none", "not there"),
    ):
        with pytest.raises(BadFile, match=fault):
            read_audio(tmp_path / f"{name}.wav")


SILENT = np.zeros_like(VOWEL)
FIRST, SECOND = np.where(TIME < 1, VOWEL, 0), np.where(TIME >= 1, VOWEL, 0)


@pytest.mark.parametrize("channels, expected, note", [
    ([VOWEL, VOWEL], VOWEL, ""), ([VOWEL, -VOWEL], VOWEL, "opposite phase"), ([VOWEL, -0.98 * VOWEL], VOWEL, "opposite phase"),
    ([SILENT, VOWEL], VOWEL, "some channels only"), ([SILENT, SILENT, VOWEL / 5, *[SILENT] * 3], VOWEL / 5, "number 3 of 6"),
    ([VOWEL, FIRST - SECOND], VOWEL, "opposite phase"), ([FIRST, SECOND], VOWEL / 2, ""),
    ([VOWEL, VOWEL * np.nan], VOWEL, "number 1 of 2"),
])  # fmt: skip
def test_channels_become_one_without_losing_the_voice(tmp_path, channels, expected, note):
    soundfile.write(tmp_path / "a.wav", np.stack(channels, axis=1), RATE, subtype="FLOAT")
    sound = read_audio(tmp_path / "a.wav")
    assert sound.channels == len(channels) and np.abs(sound.wave - expected).max() < 0.001
    assert note in "; ".join(sound.notes) and bool(note) == bool(sound.notes)


def test_a_delayed_channel_takes_no_partials_and_a_rumbling_one_is_not_the_voice(tmp_path):
    delay = RATE // 440  # half a period of 220 Hz
    late = np.concatenate([np.zeros(delay), VOWEL[:-delay]])
    rumble = 0.9 * np.sin(2 * np.pi * 40 * np.arange(len(VOWEL)) / RATE)
    for channels, chosen, gain in (([VOWEL, late], 0, 1), ([rumble, VOWEL / 4, 0 * VOWEL], 1, 0.25)):
        soundfile.write(tmp_path / "a.wav", np.stack(channels, axis=1), RATE, subtype="FLOAT")
        sound = read_audio(tmp_path / "a.wav")
        assert np.abs(sound.wave - gain * VOWEL).max() < 0.001 and f"number {chosen + 1} of" in sound.notes[0]


def test_levels_and_faulty_numbers_are_mended_and_said(tmp_path):
    def reread(wave):
        soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
        return read_audio(tmp_path / "a.wav")

    loud = reread(VOWEL * 8)
    assert np.allclose(loud.wave * loud.facts["scale"], VOWEL * 8, atol=1e-5) and np.abs(loud.wave).max() == 1
    assert "peak above full scale" in loud.notes[0]
    assert np.allclose(reread(VOWEL * 32767).wave, loud.wave, atol=1e-5)
    offset = reread(VOWEL + 0.3)
    assert np.abs(offset.wave - VOWEL).max() < 0.01 and offset.notes == ["offset (DC), taken out, 0.3"]
    for fault in (np.nan, np.inf, -np.inf, 1e30):
        broken = VOWEL.copy()
        broken[[0, 5000, *range(8000, 8010), -1]] = fault
        sound = reread(broken)
        assert np.abs(sound.wave - VOWEL).max() < 0.05 and sound.facts["mended"] == 13 and sound.facts["scale"] == 1
        assert "mended, 13" in sound.notes[0]
    with pytest.raises(BadFile, match="no numbers"):
        reread(VOWEL * np.nan)


def test_blocks_are_the_whole_in_pieces_whatever_the_decoder_gives(tmp_path, monkeypatch):
    monkeypatch.setattr("audio.KEPT_NUMBERS", 1000)  # so that the second pass decodes again
    monkeypatch.setattr("audio_files.AT_ONCE", 777)
    broken = np.stack([VOWEL * 3 + 0.2, -VOWEL * 3], axis=1)
    broken[3000:3100] = np.nan
    soundfile.write(tmp_path / "a.wav", broken, RATE, subtype="FLOAT")
    whole = read_audio(tmp_path / "a.wav").wave
    pieces = [sound.wave for sound in read_blocks(tmp_path / "a.wav", 0.3)]
    assert {len(piece) for piece in pieces[:-1]} == {4800} and np.array_equal(np.concatenate(pieces), whole)
    monkeypatch.undo()
    assert np.array_equal(read_audio(tmp_path / "a.wav").wave, whole)


def test_a_long_file_takes_no_memory_for_its_length(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr("audio.KEPT_NUMBERS", 2**18)
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 8000, 1, "PCM_16") as file:
        for _ in range(20):
            file.write(np.tile(VOWEL, 5))
    tracemalloc.start()
    samples = sum(len(sound.wave) for sound in read_blocks(tmp_path / "a.flac", 10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert samples == 100 * len(VOWEL) and peak < 4 * samples / 2


def m4a(path):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(VOWEL[None].astype(np.float32), format="fltp", layout="mono")
        frame.rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


def test_a_chain_of_ogg_streams_is_read_whole_or_said_to_be_short(tmp_path, monkeypatch):
    pytest.importorskip("av")
    soundfile.write(tmp_path / "one.ogg", VOWEL, RATE, format="OGG", subtype="VORBIS")
    (tmp_path / "two.ogg").write_bytes(2 * (tmp_path / "one.ogg").read_bytes())
    assert not read_audio(tmp_path / "one.ogg").notes
    assert abs(len(read_audio(tmp_path / "two.ogg").wave) / RATE - 4) < 0.05
    monkeypatch.delitem(DECODERS, "PyAV")
    assert "part missing" in read_audio(tmp_path / "two.ogg").notes[0]


def test_what_libsndfile_cannot_read_goes_to_pyav(tmp_path):
    sound = read_audio(m4a(tmp_path / "memo.m4a"))
    check_vowel(sound, 0.1, within=0.13)
    assert sound.facts["decoder"] == "PyAV"


def test_without_pyav_an_ffmpeg_on_the_path_reads_it_or_the_message_names_both(tmp_path, monkeypatch):
    memo = m4a(tmp_path / "-memo ;$x.m4a")
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadFile, match="no sound that can be decoded.*pip install av.*ffmpeg"):
        read_audio(memo)
    program = tmp_path / "ffmpeg"
    program.write_text(  # what ffmpeg writes for this command: AU, its length unknown
        f"#!{sys.executable}\nimport struct, sys, math\nassert sys.argv[5] == {f'file:{memo}'!r}, sys.argv\n"
        "out = sys.stdout.buffer\nout.write(b'.snd' + struct.pack('>IIIII', 24, 0xFFFFFFFF, 6, 16000, 2))\n"
        "for n in range(32000):\n    value = 0.2 * math.sin(2 * math.pi * 220 * n / 16000)\n"
        "    out.write(struct.pack('>ff', value, value))\n"
    )
    program.chmod(0o755)
    sound = read_audio(memo)
    assert (len(sound.wave), sound.rate, sound.channels, sound.facts["decoder"]) == (32000, 16000, 2, "ffmpeg")
    assert np.abs(sound.wave - 0.2 * np.sin(2 * np.pi * 220 * TIME)).max() < 1e-5
    program.write_text(f"#!{sys.executable}\nimport sys\nprint('moov atom not found', file=sys.stderr)\nsys.exit(1)\n")
    with pytest.raises(BadFile):
        read_audio(memo)


def test_a_fault_of_the_library_is_not_put_on_the_file(tmp_path, monkeypatch):
    def broken(*_):
        raise TypeError("mode must be 'r'")

    monkeypatch.setattr(soundfile, "SoundFile", broken)
    with pytest.raises(UserError, match="soundfile .* does not work here, whatever the file"):
        read_audio(wave_file(tmp_path / "a.wav"))


@pytest.mark.parametrize("rate, new_rate", [(16000, 40000), (44100, 16000), (48000, 40000), (8000, 48000), (96000, 32000)])
def test_resampling_keeps_length_time_and_level_up_to_the_edge(rate, new_rate):
    time = np.arange(rate) / rate
    edge = 0.45 * min(rate, new_rate)
    for frequency in (100, edge / 2, edge):
        tone = np.sin(2 * np.pi * frequency * time)
        made = resample(tone, rate, new_rate)
        wanted = np.sin(2 * np.pi * frequency * np.arange(new_rate) / new_rate)
        inner = slice(new_rate // 10, -new_rate // 10)
        assert len(made) == new_rate and np.abs(made - wanted)[inner].max() < 0.03


def test_writing_never_wraps_and_leaves_nothing_half_done(tmp_path):
    path = tmp_path / ("long name " * 24 + ".wav")
    assert write_wave(path, VOWEL, RATE) == 1.0
    assert np.abs(read_audio(path).wave - VOWEL).max() < 1e-4
    assert write_wave(path, VOWEL * 5, 40000) == pytest.approx(1 / (5 * np.abs(VOWEL).max()))
    sound = read_audio(path)
    assert sound.rate == 40000 and np.corrcoef(sound.wave, VOWEL)[0, 1] > 0.9999 and np.abs(sound.wave).max() <= 1
    with pytest.raises(ValueError, match="NaN"):
        write_wave(path, VOWEL * np.nan, RATE)
    assert os.listdir(tmp_path) == [path.name] and len(read_audio(path).wave) == len(VOWEL)
    assert open_audio(path).seconds == pytest.approx(len(VOWEL) / 40000)
