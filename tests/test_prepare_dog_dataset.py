"""scripts/prepare_dog_dataset.py: a download that survives breaks, archives that mean harm, splits that are fair and repeat."""

import gzip
import hashlib
import io
import os
import random
import re
import shutil
import socket
import sys
import tarfile
import threading
import time
from collections import Counter
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, Child, run_script
from PIL import Image

from common import config
from common.config import cli
from common.samples import Faults

sys.path.insert(0, str(ROOT / "scripts"))
import prepare_dog_dataset as dogs

COUNTS = {
    "n02085620-Chihuahua": 40,
    "n02088364-beagle": 20,
    "n02089078-black-and-tan_coonhound": 10,
    "n02106662-German_shepherd": 20,
}
NAMES = ["beagle", "black_and_tan_coonhound", "chihuahua", "german_shepherd"]
SPLITS = ("train", "val", "test")
COMMENTS = cache(config.field_comments)  # reading the settings' comments takes longer than most of these runs


@cache
def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    """Member name -> content, of a small archive like the real one."""
    names = [f"Images/{breed}/{breed[:9]}_{100 + i}.jpg" for breed, many in COUNTS.items() for i in range(many)]
    return {name: jpeg(number) for number, name in enumerate(names)}


def tar_of(members: dict, *extra: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return file.getvalue()


TAR = tar_of(pictures())


def put(folder: Path, data: bytes = TAR) -> Path:
    """Puts images.tar where --no-download looks for it."""
    (folder / "downloads").mkdir(parents=True)
    (folder / "downloads" / "images.tar").write_bytes(data)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    files = [p for split in SPLITS for p in (folder / split).rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def sizes(folder: Path) -> dict[str, Counter]:
    """Split -> class -> number of pictures."""
    return {split: Counter(name.split("/")[1] for name in tree(folder) if name.startswith(f"{split}/")) for split in SPLITS}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(dogs, "WAITS", (0, 0, 0))
    monkeypatch.setattr(config, "field_comments", COMMENTS)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def prepare(capsys):
    """Runs the script in this process: its exit code, stdout and stderr."""

    def run(folder, *flags, expect=0):
        try:
            cli(dogs.main, ["--output_dir", str(folder), *map(str, flags)])
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        text = capsys.readouterr()
        assert code == expect, f"{code}\n{text.out}\n{text.err}"
        if expect == 2:
            assert re.fullmatch(r"error: [^\n]+\n", text.err), text.err
        return SimpleNamespace(out=text.out, err=text.err)

    return run


@pytest.fixture
def make(prepare, tmp_path):
    """A tree of all four breeds from an archive put there by hand: its folder."""

    def run(*flags, data=TAR, name="dogs"):
        folder = put(tmp_path / name, data)
        prepare(folder, "--no-download", "--num_classes", 4, *flags)
        return folder

    return run


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        remote = self.server.remote
        asked = self.headers["Range"] if remote.ranges else None
        remote.asked.append(self.headers["Range"])
        first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if first > len(remote.data):
            self.send_response(416)
            self.end_headers()
            return
        self.send_response(206 if asked else 200)
        if remote.etag:
            self.send_header("ETag", remote.etag)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(remote.data) - 1}/{len(remote.data)}")
        self.send_header("Content-Length", str(len(remote.data) - first))
        self.end_headers()
        many = remote.dies.pop(0) if remote.dies else len(remote.data)
        part = remote.data[first : first + many]
        self.wfile.write(part)
        remote.sent += len(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def remote():
    """A server of one file: dies says after how many bytes it closes each connection, ranges whether it knows of Range."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.remote = SimpleNamespace(data=TAR, etag='"one"', ranges=True, dies=[], asked=[], sent=0)
    server.remote.url = f"http://127.0.0.1:{server.server_port}/images.tar"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.remote
    server.shutdown()
    thread.join()
    server.server_close()


# The whole way ---------------------------------------------------------------------------------------------------------


def test_the_whole_way_as_a_user_goes_it(tmp_path, remote):
    folder = tmp_path / "dogs"
    flags = ["--output_dir", folder, "--num_classes", 3, "--url", remote.url]
    done = run_script(ROOT, "scripts/prepare_dog_dataset.py", *flags)
    assert sizes(folder) == {
        "train": {"beagle": 16, "black_and_tan_coonhound": 8, "chihuahua": 32},
        "val": {"beagle": 2, "black_and_tan_coonhound": 1, "chihuahua": 4},
        "test": {"beagle": 2, "black_and_tan_coonhound": 1, "chihuahua": 4},
    }
    given = {(Path(name).parent.name, Path(name).name): data for name, data in pictures().items()}
    plain = {"n02085620-Chihuahua": "chihuahua", "n02088364-beagle": "beagle"}
    plain["n02089078-black-and-tan_coonhound"] = "black_and_tan_coonhound"
    want = {(plain[breed], file): data for (breed, file), data in given.items() if breed in plain}
    assert {tuple(name.split("/")[1:]): data for name, data in tree(folder).items()} == want, "all pictures, bit by bit"
    assert (folder / "classes.txt").read_text() == "beagle\nblack_and_tan_coonhound\nchihuahua\n"
    readme = (folder / "README.md").read_text()
    for fact in (remote.url, hashlib.sha256(TAR).hexdigest(), "8:1:1", "seed 0", "ImageNet", "CLIP", f"--url {remote.url}"):
        assert fact in readme
    assert re.search(r"\| chihuahua +\| +32 \| +4 \| +4 \|", readme) and "Nothing." in readme
    assert re.search(r"\| together +\| +56 \| +7 \| +7 \|", done.stdout)
    assert "4 breeds and 90 pictures" in done.stdout, "that this is not the official archive is said"
    assert {p.name for p in folder.iterdir()} == {*dogs.TREE, "downloads"}, "nothing else is left"
    assert {p.name for p in (folder / "downloads").iterdir()} == {"images.tar", "images.tar.json"}
    assert (folder / "downloads" / "images.tar").read_bytes() == TAR

    again = run_script(ROOT, "scripts/prepare_dog_dataset.py", *flags)
    assert "nothing to do" in again.stdout and len(remote.asked) == 1


def test_the_classification_task_reads_the_tree(make):
    from common.vision.labelled import read_dataset

    faults = Faults()
    splits, classes, layout = read_dataset(make(), 0, faults)
    assert classes == NAMES and layout == "folders" and not faults.found
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 72, "val": 9, "test": 9}


# The split -------------------------------------------------------------------------------------------------------------


def test_the_split_depends_on_seed_and_name_alone(make):
    shuffled = list(pictures().items())
    random.Random(1).shuffle(shuffled)
    one, other = make(name="one"), make(name="two", data=tar_of(dict(shuffled)))
    assert tree(one) == tree(other)
    assert (one / "classes.txt").read_bytes() == (other / "classes.txt").read_bytes()
    elsewhere = make("--seed", 1, name="three")
    assert sizes(elsewhere) == sizes(one) and set(tree(elsewhere)) != set(tree(one))
    alone = make("--breeds", "beagle", name="four")
    mine = {name: data for name, data in tree(one).items() if "/beagle/" in name}
    assert tree(alone) == mine, "other breeds play no part"


@pytest.mark.parametrize(
    "split, want",
    [
        ("7:2:1", (28, 8, 4)),
        ("80:10:10", (32, 4, 4)),
        ("0.5:0.25:0.25", (20, 10, 10)),
        ("9:1:0", (36, 4, 0)),
        ("99:1:1", (38, 1, 1)),
    ],
)
def test_shares(make, split, want):
    folder = make("--split", split, "--breeds", "chihuahua")
    assert tuple(sizes(folder)[name]["chihuahua"] for name in SPLITS) == want
    assert (folder / "test").exists() == (want[2] > 0)


@pytest.mark.parametrize(
    "shares, many", [((0.01, 0.01, 0.98), 3), ((0.01, 0.98, 0.01), 3), ((0.1, 0.45, 0.45), 4), ((0.8, 0.1, 0.1), 3)]
)
def test_each_split_gets_a_picture(shares, many):
    names = [f"{i}.jpg" for i in range(many)]
    parts = dogs.split_breed("beagle", names, shares, 0)
    assert all(parts.values()) and sorted(sum(parts.values(), [])) == names


def test_too_few_pictures_for_the_splits(prepare, tmp_path):
    few = {name: data for name, data in pictures().items() if "beagle" in name or name.endswith(("_100.jpg", "_101.jpg"))}
    error = prepare(put(tmp_path / "dogs", tar_of(few)), "--no-download", "--num_classes", 4, expect=2).err
    assert "black_and_tan_coonhound has 2" in error
    assert not (tmp_path / "dogs" / "train").exists()


@pytest.mark.parametrize("split", ["8:1", "8:1:1:1", "a:b:c", "8:-1:1", "0:1:1", "8:0:2", "nan:1:1", "inf:1:1", "", "8:1:nan"])
def test_a_bad_split_is_refused(prepare, tmp_path, split):
    assert "--split" in prepare(tmp_path / "dogs", "--split", split, expect=2).err


# The breeds ------------------------------------------------------------------------------------------------------------


def test_breeds_by_name(make):
    folder = make("--breeds", "German-Shepherd, black AND tan_coonhound")
    assert set(sizes(folder)["train"]) == {"german_shepherd", "black_and_tan_coonhound"}
    assert (folder / "classes.txt").read_text().split() == ["black_and_tan_coonhound", "german_shepherd"]


def test_an_unknown_breed_gets_the_closest(prepare, tmp_path):
    error = prepare(put(tmp_path / "dogs"), "--no-download", "--breeds", "beagle,german_sheperd", expect=2).err
    assert "'german_sheperd'" in error and "did you mean german_shepherd?" in error
    assert not (tmp_path / "dogs" / "train").exists()


@pytest.mark.parametrize("many", [0, -1, 121])
def test_num_classes_out_of_range(prepare, tmp_path, many):
    assert "1 to 120" in prepare(tmp_path / "dogs", "--num_classes", many, expect=2).err


def test_more_classes_than_the_archive_has(prepare, tmp_path):
    assert "has 4 breeds" in prepare(put(tmp_path / "dogs"), "--no-download", "--num_classes", 5, expect=2).err


def test_two_breeds_of_one_name(prepare, tmp_path):
    members = pictures() | {"Images/n00000001-Beagle/a.jpg": jpeg(1000)}
    error = prepare(put(tmp_path / "dogs", tar_of(members)), "--no-download", expect=2).err
    assert "n00000001-Beagle" in error and "n02088364-beagle" in error


def test_official_names():
    names = ["Maltese_dog", "black-and-tan_coonhound", "dhole", "Norwich_terrier", "EntleBucher", "Greater_Swiss_Mountain_dog"]
    settings = dogs.DogsConfig(num_classes=len(names))
    classes = dogs.choose_breeds(settings, [f"n{i:08}-{name}" for i, name in enumerate(names)])
    assert list(classes) == sorted(name.lower().replace("-", "_") for name in names)


# Pictures --------------------------------------------------------------------------------------------------------------


def test_an_unreadable_picture_is_named_and_left_out(prepare, tmp_path):
    members = pictures()
    members["Images/n02088364-beagle/n02088364_100.jpg"] = jpeg(500)[:300]  # cut off
    members["Images/n02088364-beagle/n02088364_101.jpg"] = b"no picture"
    folder = put(tmp_path / "dogs", tar_of(members))
    done = prepare(folder, "--no-download", "--num_classes", 1)
    for text in (done.out, (folder / "README.md").read_text()):
        assert "beagle/n02088364_100.jpg" in text and "beagle/n02088364_101.jpg" in text
    assert "left out" in done.out and len(tree(folder)) == 18
    assert not any(name.endswith(("_100.jpg", "_101.jpg")) for name in tree(folder))


def test_a_content_comes_once(prepare, tmp_path):
    members = pictures()
    for i in range(8):  # without care, some of these would land in val or test
        members[f"Images/n02088364-beagle/z{i}.jpg"] = members["Images/n02088364-beagle/n02088364_100.jpg"]
    members["Images/n02088364-beagle/both.jpg"] = members["Images/n02085620-Chihuahua/both.jpg"] = jpeg(2000)
    folder = put(tmp_path / "dogs", tar_of(dict(reversed(members.items()))))
    done = prepare(folder, "--no-download", "--num_classes", 4)
    files = tree(folder)
    assert len(files) == len(set(files.values())) == 90
    assert [Path(n).name for n, data in files.items() if data == jpeg(40)] == ["n02088364_100.jpg"], "the first by name stays"
    assert "beagle/z0.jpg" in done.out and "beagle/z7.jpg" in done.out
    assert "several breeds" in done.out and "beagle/both.jpg = chihuahua/both.jpg" in done.out
    assert jpeg(2000) not in files.values(), "nobody knows its breed"


# Archives that are damaged, or mean harm -------------------------------------------------------------------------------


def info(name: str, **facts) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for key, value in facts.items():
        setattr(member, key, value)
    return member


HARMFUL = {
    "up": info("Images/n02088364-beagle/../../../../evil.jpg"),
    "up on windows": info("Images\\..\\..\\evil.jpg"),
    "absolute": info("/tmp/evil_of_test_prepare_dog_dataset.jpg"),
    "drive": info("C:/evil.jpg"),
    "symlink": info("Images/n02088364-beagle/x.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "folder link": info("Images/n02088364-beagle", type=tarfile.SYMTYPE, linkname="/tmp"),
    "hard link": info("Images/n02088364-beagle/x.jpg", type=tarfile.LNKTYPE, linkname="../../../secret"),
    "device": info("Images/n02088364-beagle/x.jpg", type=tarfile.CHRTYPE),
    "pipe": info("Images/n02088364-beagle/x.jpg", type=tarfile.FIFOTYPE),
    "control characters": info("Images/../\x1b[2Jevil"),
}


@pytest.mark.parametrize("member", HARMFUL.values(), ids=HARMFUL)
def test_harmful_members_are_named_and_the_archive_is_refused(prepare, tmp_path, member):
    folder = put(tmp_path / "box" / "dogs", tar_of(pictures(), member))
    error = prepare(folder, "--no-download", expect=2).err
    assert repr(member.name) in error and "refused" in error and "\x1b" not in error
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == ["box/dogs/downloads/images.tar"]
    assert not Path("/tmp/evil_of_test_prepare_dog_dataset.jpg").exists()


def test_members_too_large_of_negative_size_and_twice(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(dogs, "MAX_PICTURE", 3000)
    data = tar_of(pictures() | {"Images/n02088364-beagle/large.jpg": bytes(3001)})
    assert "beagle/large.jpg" in prepare(put(tmp_path / "one", data), "--no-download", expect=2).err
    head = bytearray(info("Images/n02088364-beagle/back.jpg").tobuf(tarfile.GNU_FORMAT))
    head[124:136] = tarfile.itn(-512, 12, tarfile.GNU_FORMAT)  # tarfile would come back to this header for ever
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    error = prepare(put(tmp_path / "two", bytes(head) + TAR), "--no-download", expect=2).err
    assert "back.jpg" in error and "-512" in error and not (tmp_path / "two" / "train").exists()
    again = io.BytesIO(TAR)
    with tarfile.open(fileobj=again, mode="a") as tar:
        tar.addfile(info("Images/n02088364-beagle/n02088364_100.jpg"))
    error = prepare(put(tmp_path / "three", again.getvalue()), "--no-download", expect=2).err
    assert "n02088364_100.jpg' twice" in error


def test_files_that_are_no_pictures_of_breeds_are_passed_over(make):
    strange = {"Images/README": b"x", "Images/n02088364-beagle/._a.jpg": b"x", "setup.py": b"x", "Images/beagle/a.jpg": jpeg(1)}
    strange |= {"Images/n02088364-beagle/deep/a.jpg": jpeg(1), "Images/n02088364-beagle/a.exe": b"x"}
    assert tree(make(data=tar_of(strange | pictures()), name="one")) == tree(make(name="two"))


def broken_header() -> bytes:
    data = bytearray(TAR)
    middle = TAR.index(b"Images/n02089078")  # a header in the middle: tarfile takes it for the end and says nothing
    data[middle : middle + 20] = b"?" * 20
    return bytes(data)


DAMAGED = {
    "not a tar": b"<html>please log in</html>" * 100,
    "empty": b"",
    "cut in a picture": TAR[: len(TAR) // 2 + 100],
    "cut between two": TAR[: TAR.index(b"Images/n02089078")],
    "header in the middle": broken_header(),
    "compressed": gzip.compress(TAR),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_named_with_what_to_do(prepare, tmp_path, data):
    folder = put(tmp_path / "dogs", data)
    error = prepare(folder, "--no-download", expect=2).err
    assert str(folder / "downloads" / "images.tar") in error and "delete it and run again" in error
    assert not (folder / "train").exists()


def test_an_archive_of_something_else(prepare, tmp_path):
    error = prepare(put(tmp_path / "dogs", tar_of({"cats/1.jpg": jpeg(1)})), "--no-download", expect=2).err
    assert "Images/<breed>" in error


# The download ----------------------------------------------------------------------------------------------------------


def test_a_broken_download_goes_on(prepare, tmp_path, remote):
    remote.dies = [70_000, 30_000]
    done = prepare(tmp_path / "dogs", "--url", remote.url, "--num_classes", 4)
    assert remote.asked == [None, "bytes=70000-", "bytes=100000-"]
    assert remote.sent == len(TAR)
    assert (tmp_path / "dogs" / "downloads" / "images.tar").read_bytes() == TAR
    assert "trying again" in done.out and len(tree(tmp_path / "dogs")) == 90


def test_a_killed_download_goes_on_in_the_next_run(prepare, tmp_path, remote):
    remote.dies = [50_000, 0, 0, 0]
    error = prepare(tmp_path / "dogs", "--url", remote.url, expect=2).err
    downloads = tmp_path / "dogs" / "downloads"
    assert "images.tar.part stays" in error and "--no-download" in error and len(remote.asked) == 4
    assert (downloads / "images.tar.part").read_bytes() == TAR[:50_000] and not (downloads / "images.tar").exists()
    assert not (tmp_path / "dogs" / "train").exists()
    prepare(tmp_path / "dogs", "--url", remote.url, "--num_classes", 4)
    assert remote.asked[-1] == "bytes=50000-" and remote.sent == len(TAR)
    assert (downloads / "images.tar").read_bytes() == TAR


def test_a_server_without_ranges_starts_again(prepare, tmp_path, remote):
    remote.ranges, remote.dies = False, [70_000]
    prepare(tmp_path / "dogs", "--url", remote.url, "--num_classes", 4)
    assert remote.asked == [None, "bytes=70000-"] and remote.sent == 70_000 + len(TAR)
    assert (tmp_path / "dogs" / "downloads" / "images.tar").read_bytes() == TAR


@pytest.mark.parametrize("change", ["etag", "size", "shorter", "address"])
def test_parts_of_two_files_are_not_glued_together(prepare, tmp_path, remote, change):
    folder, url = tmp_path / "dogs", remote.url
    remote.dies = [70_000, 0, 0, 0]
    prepare(folder, "--url", url, expect=2)
    others = list(pictures().items())[::-1]
    new = tar_of(dict(others))
    assert len(new) == len(TAR) and new[70_000:] != TAR[70_000:]
    if change == "etag":
        remote.etag = '"two"'
    elif change == "size":
        remote.etag, new = None, tar_of(dict(others) | {"Images/more": bytes(30_000)})
    elif change == "shorter":
        remote.etag, new = None, tar_of(dict(others[:20]))
        assert len(new) < 70_000
    else:
        remote.etag, url = None, url.replace("images.tar", "other/images.tar")
    remote.data = new
    prepare(folder, "--url", url, "--num_classes", 1)
    assert (folder / "downloads" / "images.tar").read_bytes() == new


def test_a_server_that_says_no(prepare, tmp_path):
    class Missing(Handler):
        def do_GET(self):
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Missing)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    error = prepare(tmp_path / "dogs", "--url", f"http://127.0.0.1:{server.server_port}/images.tar", expect=2).err
    server.shutdown()
    server.server_close()
    assert "404" in error and not list((tmp_path / "dogs" / "downloads").iterdir())


def test_what_comes_is_checked_before_it_gets_its_name(prepare, tmp_path, remote):
    remote.data = TAR[: len(TAR) // 2]  # as long as announced, and yet no whole archive
    error = prepare(tmp_path / "dogs", "--url", remote.url, expect=2).err
    assert "images.tar.part" in error and "delete it" in error
    assert not (tmp_path / "dogs" / "downloads" / "images.tar").exists()


def test_sha256(prepare, tmp_path, remote):
    right, wrong = hashlib.sha256(TAR).hexdigest(), "0" * 64
    error = prepare(tmp_path / "dogs", "--url", remote.url, "--sha256", wrong, expect=2).err
    assert right in error and not (tmp_path / "dogs" / "downloads" / "images.tar").exists()
    flags = ("--url", remote.url, "--num_classes", 4, "--sha256")
    prepare(tmp_path / "dogs", *flags, right.upper())
    assert len(remote.asked) == 1, "what was complete is not loaded again"
    assert "nothing to do" in prepare(tmp_path / "dogs", *flags, right).out
    assert "sha256" in prepare(tmp_path / "dogs", *flags, wrong, expect=2).err
    assert "--sha256" in prepare(tmp_path / "new", "--sha256", "12ab", expect=2).err


def test_what_comes_from_the_official_page_must_be_the_official_file(prepare, tmp_path, remote, monkeypatch):
    monkeypatch.setattr(dogs, "PAGE", remote.url.removesuffix("images.tar"))
    flags = (tmp_path / "dogs", "--url", remote.url, "--num_classes", 4)
    assert f"expected {dogs.DIGEST}" in prepare(*flags, expect=2).err and not (tmp_path / "dogs" / "train").exists()
    monkeypatch.setattr(dogs, "DIGEST", hashlib.sha256(TAR).hexdigest())
    prepare(*flags)


def test_one_process_at_a_time(prepare, tmp_path):
    folder = put(tmp_path / "dogs")
    child = Child(lambda: (dogs.hold(folder), (tmp_path / "held").touch(), time.sleep(30)), log=tmp_path / "log.txt")
    try:
        child.wait_for((tmp_path / "held").exists)
        assert "another process is preparing" in prepare(folder, "--no-download", "--num_classes", 4, expect=2).err
    finally:
        child.kill(9)
        child.wait()
    prepare(folder, "--no-download", "--num_classes", 4)


def test_a_whole_part_of_another_address_is_not_taken(prepare, tmp_path, remote):
    prepare(tmp_path / "dogs", "--url", remote.url, "--sha256", "0" * 64, expect=2)
    remote.data = tar_of(dict(reversed(pictures().items())))
    prepare(tmp_path / "dogs", "--url", remote.url + "?other", "--num_classes", 4)
    assert (tmp_path / "dogs" / "downloads" / "images.tar").read_bytes() == remote.data != TAR


def test_offline_as_a_user(tmp_path):
    started = time.monotonic()
    flags = ["--output_dir", tmp_path / "dogs", "--url", "http://127.0.0.1:1/images.tar"]
    done = run_script(ROOT, "scripts/prepare_dog_dataset.py", *flags, expect=2, env={"no_proxy": "127.0.0.1"})
    assert time.monotonic() - started < 10
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert [p.name for p in (tmp_path / "dogs").iterdir()] == ["downloads"]
    for step in (dogs.PAGE, str(tmp_path / "dogs" / "downloads" / "images.tar"), "--no-download"):
        assert step in done.stderr


def test_a_server_that_stays_silent(prepare, tmp_path, monkeypatch):
    assert dogs.PATIENCE < 10
    monkeypatch.setattr(dogs, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        error = prepare(tmp_path / "dogs", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}/images.tar", expect=2).err
    assert time.monotonic() - started < 3 and "--no-download" in error


def test_a_name_server_that_stays_silent(prepare, tmp_path, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(dogs, "PATIENCE", 0.5)
    monkeypatch.setattr(dogs, "urlopen", lambda *_, **__: over.wait(8))  # heeds no time limit
    started = time.monotonic()
    error = prepare(tmp_path / "dogs", expect=2).err
    over.set()
    assert time.monotonic() - started < 3 and "no answer" in error


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/images.tar", "images.tar"])
def test_only_http_addresses(prepare, tmp_path, url):
    assert "http" in prepare(tmp_path / "dogs", "--url", url, expect=2).err


def test_no_download_without_the_file(prepare, tmp_path):
    error = prepare(tmp_path / "dogs", "--no-download", expect=2).err
    assert str(tmp_path / "dogs" / "downloads" / "images.tar") in error and dogs.PAGE in error


def test_an_archive_from_another_address_is_not_taken(prepare, tmp_path, remote):
    prepare(tmp_path / "dogs", "--url", remote.url, "--num_classes", 4)
    other = remote.url + "?other"
    error = prepare(tmp_path / "dogs", "--url", other, "--num_classes", 4, "--overwrite", expect=2).err
    assert remote.url in error and other in error


def test_too_little_disk_space(prepare, tmp_path, monkeypatch, remote):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=dogs.SPARE + len(TAR) - 1))
    assert "disk space" in prepare(tmp_path / "dogs", "--url", remote.url, expect=2).err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=dogs.SPARE + len(TAR)))
    prepare(tmp_path / "dogs", "--url", remote.url, "--num_classes", 4)


# A second run ----------------------------------------------------------------------------------------------------------


def test_a_second_run(make, prepare):
    folder = make()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    shutil.rmtree(folder / "downloads")
    assert "nothing to do" in prepare(folder, "--no-download", "--num_classes", 4, "--split", "80:10:10").out
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in before.items() if p.exists() and p != folder)
    for flags, named in ([["--seed", 1], "seed"], [["--split", "7:2:1"], "split"], [["--breeds", "beagle"], "breeds"]):
        error = prepare(folder, "--no-download", "--num_classes", 4, *flags, expect=2).err
        assert f"another {named}" in error and "--overwrite" in error and "--output_dir" in error
    put(folder)
    prepare(folder, "--no-download", "--breeds", "beagle", "--overwrite")
    assert set(sizes(folder)["train"]) == {"beagle"} and (folder / "classes.txt").read_text() == "beagle\n"


def test_an_overwrite_that_fails_leaves_the_old_tree(make, prepare):
    folder = make()
    before = tree(folder)
    (folder / "downloads" / "images.tar").write_bytes(b"damaged")
    prepare(folder, "--no-download", "--seed", 1, "--overwrite", expect=2)
    assert tree(folder) == before


@pytest.mark.parametrize("name", ["train", "README.md"])
def test_what_others_made_is_not_touched(prepare, tmp_path, name):
    folder = put(tmp_path / "dogs")
    (folder / name).mkdir()
    error = prepare(folder, "--no-download", "--overwrite", expect=2).err
    assert "not touched" in error and (folder / name).is_dir()


def test_an_output_dir_that_cannot_be(prepare, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in prepare(tmp_path / "file", expect=2).err


def test_a_killed_run_leaves_no_half_tree(make, prepare, monkeypatch):
    flags = ("--no-download", "--breeds", "beagle", "--overwrite", "--seed")
    folder, replace = make(*flags, 1), os.replace
    trees = [tree(folder)]
    prepare(folder, *flags, 0)
    trees.append(tree(folder))
    for allowed in range(len(dogs.TREE) * 2):  # renames before it is killed: first the old parts away, then the new ones in
        calls = []

        def killed(source, target, allowed=allowed, calls=calls):
            if Path(target).name in dogs.TREE:
                calls.append(target)
                if len(calls) > allowed:
                    raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
        prepare(folder, *flags, 1, expect=130)
        monkeypatch.setattr(os, "replace", replace)
        if (folder / "train").exists():
            assert tree(folder) in trees and all((folder / name).exists() for name in dogs.TREE)
        prepare(folder, *flags, 0)
        assert tree(folder) == trees[1] and {p.name for p in folder.iterdir()} == {*dogs.TREE, "downloads"}


# --validate ------------------------------------------------------------------------------------------------------------


def test_a_sound_tree_is_fine(make, prepare):
    done = prepare(make(), "--validate")
    assert "fine" in done.out and re.search(r"\| german_shepherd +\| +16 \| +2 \| +2 \|", done.out)
    assert "warning" in done.out and "chihuahua 32 and black_and_tan_coonhound 8" in done.out, "imbalance is no fault"


def test_balanced_classes_are_not_warned_of(make, prepare):
    assert "warning" not in prepare(make("--breeds", "beagle,chihuahua"), "--validate").out


def test_faults_are_named_and_end_with_code_1(make, prepare):
    folder = make()
    train = sorted((folder / "train" / "beagle").iterdir())
    val = sorted((folder / "val" / "german_shepherd").iterdir())

    def fault(*words):
        out = prepare(folder, "--validate", expect=1).out
        assert len(re.findall("^fault: ", out, re.MULTILINE)) == 1, out
        line = next(line for line in out.splitlines() if line.startswith("fault: "))
        assert all(word in line for word in words), line

    good = train[0].read_bytes()
    train[0].write_bytes(good[:300])
    fault("unreadable", f"train/beagle/{train[0].name}")
    train[0].write_bytes(good)

    leak = folder / "test" / "beagle" / "leak.jpg"
    leak.write_bytes(good)
    fault("two splits", f"train/beagle/{train[0].name} = test/beagle/leak.jpg")
    leak.unlink()

    for path in val:
        path.rename(folder / path.name)
    fault("without pictures", "val/german_shepherd")
    (folder / "val" / "german_shepherd").rmdir()
    fault("without pictures", "val/german_shepherd")
    (folder / "val" / "german_shepherd").mkdir()
    for path in val:
        (folder / path.name).rename(path)

    loose = folder / "val" / "loose.jpg"
    loose.write_bytes(jpeg(3000))
    fault("outside the class folders", "val/loose.jpg")
    loose.unlink()

    listed = (folder / "classes.txt").read_text()
    (folder / "classes.txt").write_text(listed.replace("beagle", "poodle"))
    fault("classes.txt", "beagle", "poodle")
    (folder / "classes.txt").write_text("\n".join(NAMES[::-1]))
    fault("classes.txt", "sorted")
    (folder / "classes.txt").write_text(listed)
    assert "fine" in prepare(folder, "--validate").out


def test_a_tree_that_another_tool_made(tmp_path, prepare):
    for number, split in enumerate(("train", "validation")):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (number * 99, ord(name), 0)).save(tmp_path / split / name / "1.png")
    out = prepare(tmp_path, "--validate").out
    assert "there is no test" in out and "there is no classes.txt" in out and "fine" in out


def test_validate_without_a_tree(tmp_path, prepare):
    assert "no folder" in prepare(tmp_path / "none", "--validate", expect=2).err
    (tmp_path / "train").mkdir()
    assert "val/" in prepare(tmp_path, "--validate", expect=2).err
    (tmp_path / "val").mkdir()
    assert "no class folders" in prepare(tmp_path, "--validate", expect=2).err


# --demo ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_is_sound(tmp_path, prepare):
    folder = tmp_path / "demo"
    run_script(ROOT, "scripts/prepare_dog_dataset.py", "--demo", "--output_dir", folder)
    out = prepare(folder, "--validate").out
    assert "fine" in out and "warning" not in out
    classes = (folder / "classes.txt").read_text().split()
    assert len(classes) == 8 and "dotted_borzel" in classes
    assert {split: len(list((folder / split).glob("*/*.png"))) for split in SPLITS} == {"train": 320, "val": 320, "test": 320}
    readme = (folder / "README.md").read_text()
    assert "ynthetic" in readme and "dotted_borzel" in readme and "Stanford" not in readme
    assert "nothing to do" in prepare(folder, "--demo").out
    assert "another demo" in prepare(folder, "--no-download", expect=2).err
