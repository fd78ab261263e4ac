"""Makes a data set of dog breeds: downloads Stanford Dogs, picks breeds, splits them into train/, val/ and test/.

    python scripts/prepare_dog_dataset.py --output_dir data/dogs --num_classes 10       # 750 MB once; goes on if interrupted
    python scripts/prepare_dog_dataset.py --output_dir data/two --breeds chihuahua,german_shepherd
    python scripts/prepare_dog_dataset.py --output_dir data/dogs --no-download          # images.tar was put there by hand
    python scripts/prepare_dog_dataset.py --output_dir data/synthetic --demo            # synthetic pictures, no download
    python scripts/prepare_dog_dataset.py --output_dir data/dogs --validate             # checks any such tree

Writes train|val|test/<breed>/<name>.jpg, classes.txt, a README.md of what was done, and prepared.json, by which a second run
knows the first. Where a picture goes depends on --seed, --split and the names of its breed's pictures, on no machine and no
order of files. --validate ends with code 1 where it finds a fault.
"""

import difflib
import hashlib
import json
import math
import os
import queue
import re
import runpy
import shlex
import shutil
import sys
import tarfile
import threading
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from time import sleep
from typing import Annotated
from urllib.error import HTTPError
from urllib.request import Request, urlopen

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Range, Seed, UserError, check_ranges, cli, parse, project_root  # noqa: E402
from common.samples import Faults, split_folders, visible_entries  # noqa: E402
from common.vision.pictures import decode, is_picture, pictures_below  # noqa: E402

PAGE = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
DIGEST = "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58"  # sha256 of the official archive, 793,579,520 bytes
ALL_BREEDS = 120  # of it
ALL_PICTURES = 20580
PICTURE = re.compile(r"(?:\./)?Images/(n\d{8}-[A-Za-z][\w-]*)/(\w[\w.-]*\.jpg)", re.ASCII)
MAX_PICTURE = 50_000_000  # bytes; the official ones stay far below
SPARE = 100_000_000  # bytes that stay free on the disk
PATIENCE = 8  # seconds for an answer, and for more data: who is offline should know before long
WAITS = (1, 2, 4, 8, 8, 8)  # seconds before each new try after a broken connection
TREE = ("train", "val", "test", "classes.txt", "README.md", "prepared.json")  # what a finished run leaves


@dataclass
class DogsConfig:
    """Settings; the comment of a line is its help text."""

    output_dir: str = "data/dogs"  # where the tree goes, with the archive in its downloads/
    num_classes: Annotated[int, Range(1, ALL_BREEDS)] = 10  # the first N breeds in the order of their plain names
    breeds: str = ""  # these breeds in place of the first N: plain names with commas between, such as chihuahua,beagle
    split: str = "8:1:1"  # train:val:test, any three numbers, of every breed alike (in a YAML file in quotes)
    seed: Seed = 0  # with the pictures' names it decides the split, so that everyone gets the same one
    download: bool = True  # --no-download: take downloads/images.tar as you put it there, for machines without network
    url: str = PAGE + "images.tar"  # another http(s) address of the archive, such as a mirror
    sha256: str = ""  # refuse an archive with another digest; empty: the official file's, if it is downloaded from there
    validate: bool = False  # only check the tree in --output_dir, which any tool may have made
    demo: bool = False  # synthetic pictures of eight made-up breeds, for trying things out; only --seed counts
    overwrite: bool = False  # replace a tree that was made here with other settings

    def __post_init__(self):
        check_ranges(self)
        if not re.match("https?://.", self.url, re.IGNORECASE):
            raise UserError(f"--url {self.url!r} must start with http:// or https://")
        if not re.fullmatch("([0-9a-fA-F]{64})?", self.sha256):
            raise UserError("--sha256 must be 64 hexadecimal digits")
        read_shares(self.split)


def read_shares(text: str) -> tuple[float, ...]:
    """The shares of train, val and test, with a sum of 1. UserError where `text` is not such as 8:1:1."""
    try:
        shares = [float(part) for part in text.split(":")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= s < math.inf for s in shares) or not (shares[0] > 0 and shares[1] > 0):
        raise UserError(f"--split {text!r} must be three numbers for train:val:test, such as 8:1:1; only test may be 0")
    return tuple(round(s / sum(shares), 9) for s in shares)


def plain_name(name: str) -> str:
    """Black-and-tan coonhound -> black_and_tan_coonhound"""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def bar(iterable, text: str, **options):
    """A progress bar where somebody watches. common.runtime's loads torch first: seconds, and nothing here needs it."""
    from tqdm import tqdm

    return tqdm(iterable, desc=text, leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True, **options)


def need_space(folder: Path, size: int, what: str) -> None:
    """UserError where `size` bytes more would fill the disk."""
    free = shutil.disk_usage(folder).free
    if free < size + SPARE:
        raise UserError(
            f"too little disk space: {what} takes {size / 1e6:.0f} MB and some to spare, but {folder} has {free / 1e6:.0f} MB"
        )


# The download ----------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """The network failed us, so trying again may help; a full disk is none of these."""


def open_url(url: str, headers: dict):
    """The answer, of whatever status. Broken where there is none within PATIENCE seconds."""
    answers = queue.SimpleQueue()

    def ask():
        try:
            answers.put(urlopen(Request(url, headers=headers), timeout=PATIENCE))
        except HTTPError as answer:  # a status above 400, that is
            answers.put(answer)
        except Exception as error:
            answers.put(Broken(str(getattr(error, "reason", error)) or type(error).__name__))

    threading.Thread(target=ask, daemon=True).start()  # a name server that stays silent knows no time limit
    try:
        answer = answers.get(timeout=PATIENCE)
    except queue.Empty:
        answer = Broken(f"no answer within {PATIENCE} seconds")
    if isinstance(answer, Broken):
        raise answer
    return answer


def fetch(url: str, part: Path, note: Path) -> None:
    """Loads what `part` still lacks; returns when it is as long as the server said. Broken where the connection ends before.

    `note` holds what is known of the remote file: of another one, or a changed one, nothing is glued to what is there.
    """
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    have = part.stat().st_size if part.exists() and known.get("url") == url and known.get("size") else 0
    if have and have == known["size"]:
        return
    headers = {"Range": f"bytes={have}-"} if have else {}
    strong = [mark for mark in (known.get("etag"), known.get("modified")) if mark and not mark.startswith("W/")]
    if have and strong:
        headers["If-Range"] = strong[0]  # with this, most servers send a changed file as a whole
    with open_url(url, headers) as answer:
        size = answer.headers["Content-Length"]
        seen = {"url": url, "etag": answer.headers["ETag"], "modified": answer.headers["Last-Modified"]}
        seen["size"] = int(size) if (size or "").isdigit() else None
        if have and answer.status in (206, 416):
            place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers["Content-Range"] or "")
            seen["size"] = int(place[2]) if place else None
            same = all(seen[key] == known[key] for key in seen if seen[key] and known[key])
            if not same or not place or int(place[1]) != have:
                part.unlink()
                return fetch(url, part, note)
            print(f"going on after {have / 1e6:.0f} MB", flush=True)
        elif answer.status == 200:
            have = 0
            part.unlink(missing_ok=True)  # before the note: an old part must not pass for one of the new file
            note.write_text(json.dumps(seen), encoding="utf-8")
        else:
            raise Broken(f"the server answers {answer.status} {answer.reason}")
        need_space(part.parent, (seen["size"] or 0) - have, "the rest of images.tar")
        shown = bar(None, "downloading", total=seen["size"], initial=have, unit="B", unit_scale=True)
        with open(part, "ab") as file, shown:
            while piece := read_on(answer):
                file.write(piece)
                shown.update(len(piece))
    if seen["size"] and part.stat().st_size != seen["size"]:
        raise Broken("the server closed the connection")


def read_on(answer) -> bytes:
    """The next bytes, b"" at the end. Broken where the connection is."""
    try:
        return answer.read(1 << 16)
    except (OSError, HTTPException) as error:
        raise Broken(str(error) or type(error).__name__) from None


def download(url: str, archive: Path) -> Path:
    """`archive`.part, complete. UserError, with what to do by hand: at once where nobody answers, else after several tries."""
    part, note = Path(f"{archive}.part"), Path(f"{archive}.part.json")
    print(f"downloading {url}", flush=True)
    started = False  # whether this run got any data
    for wait in (*WAITS, None):
        before = part.stat().st_mtime_ns if part.exists() else 0
        try:
            fetch(url, part, note)
            return part
        except Broken as error:
            started = started or (part.exists() and part.stat().st_mtime_ns != before)
            if wait is None or not started:
                kept = f"; {part} stays: run again to go on, or" if part.exists() else ";"
                raise UserError(f"cannot download {url}: {error}{kept} {by_hand(archive)}") from None
            print(f"the download broke off ({error}): trying again in {wait} s", flush=True)
            sleep(wait)


def by_hand(archive: Path) -> str:
    return f"by hand: download images.tar from {PAGE} to {archive}, then run again with --no-download"


# The archive -----------------------------------------------------------------------------------------------------------


def get_archive(config, folder: Path):
    """(images.tar, what list_archive says of it, its sha256, where it comes from); downloaded where it is not there.

    It has this name only when it is complete and was found good. UserError where it cannot be had, or is not good.
    """
    archive = folder / "downloads" / "images.tar"
    archive.parent.mkdir(parents=True, exist_ok=True)
    note, place = Path(f"{archive}.json"), archive
    if not archive.is_file():
        if not config.download:
            raise UserError(f"there is no {archive}; {by_hand(archive)}")
        note.unlink(missing_ok=True)  # of an archive that was deleted
        place = download(config.url, archive)
    print(f"checking {place}", flush=True)
    origin = Path(f"{place}.json")  # what a download leaves beside it
    source = json.loads(origin.read_text(encoding="utf-8"))["url"] if origin.exists() else f"a copy of {PAGE} put there by hand"
    if config.download and origin.exists() and source != config.url:
        raise UserError(f"{archive} comes from {source}, not {config.url}: delete it, or use another --output_dir")
    pictures, digest = list_archive(place), check_digest(place, config.sha256 or DIGEST * (source == PAGE + "images.tar"))
    if place != archive:
        place.replace(archive)
        origin.replace(note)
    return archive, pictures, digest, source


def check_digest(path: Path, expected: str) -> str:
    """The sha256 of a file. UserError where another one is expected."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if expected and digest != expected.lower():
        raise UserError(f"{path} has the sha256 {digest}, expected {expected}: delete it and run again, or correct --sha256")
    return digest


def danger(member: tarfile.TarInfo) -> str:
    """Why an archive with this member is not to be trusted, "" if nothing speaks against it."""
    if member.name.startswith(("/", "\\")) or re.match("[A-Za-z]:", member.name):
        return "is an absolute path"
    if ".." in re.split(r"[/\\]", member.name):
        return "leads out of the folder"
    if not (member.isdir() or (member.isreg() and not member.issparse())):
        return "is neither a plain file nor a folder"
    if not 0 <= member.size <= MAX_PICTURE:  # tarfile would follow a negative size back, for ever
        return f"has a size of {member.size} bytes"
    return ""


def list_archive(path: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Breed folder -> picture name -> member, of the pictures; other files are passed over.

    UserError, which names the member, where one could do harm; and where the archive is damaged or has no pictures.
    """
    pictures = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if harm := danger(member):
                    raise UserError(f"{path} is refused, nothing was unpacked: its member {member.name!r} {harm}")
                if member.isreg() and (match := PICTURE.fullmatch(member.name)):
                    if pictures.setdefault(match[1], {}).setdefault(match[2], member) is not member:
                        raise UserError(f"{path} is refused, nothing was unpacked: it holds {member.name!r} twice")
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile takes a damaged header in the middle for the end
                raise tarfile.ReadError("its end is missing")
    except UserError:
        raise
    except Exception as error:  # on a damaged header tarfile may raise anything
        reason = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{path} is not a complete tar archive ({reason[0]}): delete it and run again") from None
    if not pictures:
        raise UserError(f"{path} holds no Images/<breed>/*.jpg: it is not the images.tar of {PAGE}; delete it and run again")
    return pictures


def choose_breeds(config, folders) -> dict[str, str]:
    """Class name -> breed folder, sorted. UserError for an unknown breed, too few of them, or two of one name."""
    known = {}
    for folder in sorted(folders):
        name = plain_name(folder.partition("-")[2])
        if name in known:
            raise UserError(f"the breeds {known[name]} and {folder} would get the same name {name}")
        known[name] = folder
    if not config.breeds:
        if config.num_classes > len(known):
            raise UserError(f"--num_classes is {config.num_classes}, but the archive has {len(known)} breeds")
        return {name: known[name] for name in sorted(known)[: config.num_classes]}
    wanted = wanted_breeds(config)
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(sorted(known)[:5])} ..."
            raise UserError(f"--breeds: there is no {name!r} among the {len(known)} breeds; {hint}")
    return {name: known[name] for name in wanted}


def wanted_breeds(config) -> list[str]:
    """The plain names in --breeds, sorted, each once."""
    return sorted({plain_name(name) for name in config.breeds.split(",")}) if config.breeds else []


def unpack(archive: Path, classes: dict, pictures: dict, folder: Path, faults: Faults) -> dict[str, list[str]]:
    """Writes the pictures that can be read to folder/<class>/. Class -> the names to use: each content once.

    tarfile extracts nothing itself, so no member says where or as what it is written.
    """
    members = [(member, name, place) for name, source in classes.items() for place, member in pictures[source].items()]
    need_space(archive.parent, sum(member.size for member, *_ in members), "unpacking the breeds")
    for name in classes:
        (folder / name).mkdir(parents=True)
    unreadable, contents = [], {}
    with tarfile.open(archive, "r:") as tar:
        for member, name, file in bar(sorted(members, key=lambda item: item[0].offset), "unpacking and checking"):
            data = tar.extractfile(member).read()
            try:
                decode(data)
            except ValueError as error:
                fault, _, detail = str(error).partition(", ")
                unreadable.append((fault, f"{name}/{file} ({detail})" if detail else f"{name}/{file}"))
                continue
            (folder / name / file).write_bytes(data)
            contents.setdefault(hashlib.sha256(data).digest(), []).append((name, file))
    for fault, place in sorted(unreadable):
        faults.add(fault, place)
    kept = {name: [] for name in classes}
    for (name, file), *copies in sorted(map(sorted, contents.values())):
        if any(other != name for other, _ in copies):  # nobody knows which of the two is right
            faults.add("picture that stands under several breeds", " = ".join("/".join(p) for p in [(name, file), *copies]))
            continue
        kept[name].append(file)
        for copy in copies:
            faults.add("exact copy of another picture", f"{'/'.join(copy)} (of {file})")
    return kept


def split_breed(name: str, files: list[str], shares, seed: int) -> dict[str, list[str]]:
    """Split -> files: the order of hashes of (seed, file name), cut. UserError where there are too few for the splits."""
    needed = sum(share > 0 for share in shares)
    if len(files) < needed:
        raise UserError(f"{name} has {len(files)} usable pictures, too few for {needed} splits; choose other --breeds")
    val, test = (max(1, round(len(files) * share)) if share else 0 for share in shares[1:])
    while val + test >= len(files):  # training gets one at least, too
        val, test = (val - 1, test) if val > test else (val, test - 1)
    order = sorted(files, key=lambda file: hashlib.sha256(f"{seed} {file}".encode()).digest())
    first, second = len(files) - val - test, len(files) - test
    return {"train": order[:first], "val": order[first:second], "test": order[second:]}


# The tree --------------------------------------------------------------------------------------------------------------


def is_there(config, folder: Path, settings: dict) -> bool:
    """Whether these settings made the tree in `folder`. UserError where others did (no --overwrite), or something else did."""
    if not any((folder / name).exists() for name in TREE):
        return False
    try:
        then = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} holds files that this script did not make: not touched; use another --output_dir") from None
    if config.overwrite or not (folder / "train").exists():  # train/ comes last: that run was killed while it renamed
        return False
    if config.sha256:
        settings = {**settings, "archive_sha256": config.sha256.lower()}
    differ = [key for key, value in settings.items() if then.get(key) != value]
    if differ:
        raise UserError(
            f"{folder} was made with another {', another '.join(differ)}; use another --output_dir, or --overwrite to replace it"
        )
    return True


def hold(folder: Path) -> int:
    """A descriptor that keeps other processes out of the folder until it is closed. UserError where one is in it."""
    lock = os.open(folder, os.O_RDONLY)  # the folder itself: no file stays behind
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: no lock
        pass
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"another process is preparing {folder}: wait for it, or use another --output_dir") from None
    return lock


def publish(made: Path, folder: Path, old: Path) -> None:
    """Renames the parts of the tree into `folder`, prepared.json first and train/ last; what was there goes to `old`.

    At whatever point this is killed: a train/ that is there has all the rest beside it, and a rest without it is known as ours.
    """
    old.mkdir()
    for name in TREE:
        if (folder / name).exists():
            os.replace(folder / name, old / name)
    for name in reversed(TREE):
        if (made / name).exists():
            os.replace(made / name, folder / name)


def find_tree(folder: Path, faults: Faults):
    """(class -> split -> number of pictures, [(split, picture)]) of an ImageFolder tree. UserError where it is none."""
    places = split_folders(folder)
    missing = [f"{split}/" for split in ("train", "val") if split not in places]
    if missing:
        raise UserError(f"{folder} holds no data set: there is no {' and no '.join(missing)}")
    found, counts = [], {}
    for split, place in places.items():
        for path in (place / entry.name for entry in visible_entries(place)):
            if path.is_dir():
                files = pictures_below(path)
                found += [(split, file) for file in files]
                counts.setdefault(path.name, dict.fromkeys(places, 0))[split] = len(files)
            elif is_picture(path.name):
                faults.add("picture outside the class folders", path.relative_to(folder))
    if not counts:
        raise UserError(f"{folder} holds no data set: there are no class folders in train/")
    return dict(sorted(counts.items())), found


def table(counts: dict) -> str:
    """Class by split, with sums: Markdown that reads well in a terminal, too."""
    splits = list(next(iter(counts.values()), {}))
    sums = {split: sum(row[split] for row in counts.values()) for split in splits}
    width = max(map(len, ["together", *counts]))
    head = [f"| {'class':<{width}} | " + " | ".join(f"{split:>5}" for split in splits) + " |"]
    head.append(f"| {'-' * width} | " + " | ".join("----:" for _ in splits) + " |")
    rows = [*counts.items(), ("together", sums)]
    return "\n".join(head + [f"| {n:<{width}} | " + " | ".join(f"{row[s]:>5}" for s in splits) + " |" for n, row in rows])


def listing(faults: Faults) -> list[str]:
    """A line for each kind of fault, with all its places: Faults.report names the first three only."""
    return [f"{fault} ({len(places)}): {', '.join(places)}" for fault, places in sorted(faults.found.items())]


def describe(config, command: str, counts: dict, faults: Faults, source: str) -> str:
    """The text of README.md."""
    if config.demo:
        about = f"""# Synthetic demo data

No photographs: `fine_tuning/synthetic.py` draws these pictures, with the seed {config.seed}, and the breeds are made up."""
    else:
        about = f"""# {len(counts)} breeds of dogs

Source: Stanford Dogs, {source}.
Khosla, Jayadevaprakash, Yao and Fei-Fei: Novel Dataset for Fine-Grained Image Categorization, 2011; cite it if you publish.

Split train:val:test = {config.split} of every breed, by seed {config.seed}: names in the order of their sha256 hashes, cut.

Stanford Dogs is a subset of ImageNet: a base that was pretrained on ImageNet labels has seen these pictures, those of test/
too, so that its scores here flatter it. What CLIP was trained on is not known."""
    out = "\n".join(f"- {line}" for line in listing(faults)) or "Nothing."
    return f"{about}\n\nMade by `{command}`\n\n{table(counts)}\n\n## Left out\n\n{out}\n"


def make_tree(config, folder: Path, aside: Path, faults: Faults) -> tuple[str, str | None]:
    """Writes the pictures to aside/tree: (where they come from, the archive's sha256). UserError where that is not possible."""
    if config.demo:
        drawing = project_root() / "fine_tuning" / "synthetic.py"
        if not drawing.is_file():
            raise UserError(f"--demo: there is no {drawing}, which draws the pictures; run this script in the whole project")
        print("drawing synthetic pictures, some ten seconds", flush=True)
        # By its path, not imported: other folders have a synthetic.py as well.
        runpy.run_path(str(drawing))["make_demo_data"](aside / "tree", seed=config.seed)
        return "", None
    archive, pictures, digest, source = get_archive(config, folder)
    many = len(pictures), sum(map(len, pictures.values()))
    if many != (ALL_BREEDS, ALL_PICTURES):
        print(f"note: {many[0]} breeds and {many[1]} pictures in it; the official one has {ALL_BREEDS} and {ALL_PICTURES}")
    classes = choose_breeds(config, pictures)
    print(f"unpacking {len(classes)} breeds: {', '.join(classes)}", flush=True)
    unpacked = aside / "unpacked"
    for name, files in unpack(archive, classes, pictures, unpacked, faults).items():
        for split, part in split_breed(name, files, read_shares(config.split), config.seed).items():
            if part:
                (aside / "tree" / split / name).mkdir(parents=True)
            for file in part:
                os.replace(unpacked / name / file, aside / "tree" / split / name / file)
    return f"{source} (sha256 {digest})", digest


def prepare(config, folder: Path, command: str) -> None:
    """Makes the tree, unless it is there already. UserError where that is not possible."""
    settings = {"demo": config.demo, "seed": config.seed}
    if not config.demo:
        breeds = wanted_breeds(config) or f"first {config.num_classes}"
        settings |= {"url": config.url, "breeds": breeds, "split": list(read_shares(config.split))}
    if is_there(config, folder, settings):
        print(f"{folder} is there already, made with the same settings: nothing to do")
        return
    aside = folder / ".unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold(folder)
        shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
        aside.mkdir()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output_dir") from None
    try:
        faults, made = Faults(), aside / "tree"
        source, settings["archive_sha256"] = make_tree(config, folder, aside, faults)
        counts, _ = find_tree(made, faults)
        (made / "classes.txt").write_text("".join(f"{name}\n" for name in counts), encoding="utf-8")
        (made / "README.md").write_text(describe(config, command, counts, faults, source), encoding="utf-8")
        (made / "prepared.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        publish(made, folder, aside / "old")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)
    print("\n".join([*(f"left out, {line}" for line in listing(faults)), table(counts)]))
    print(f"ready: {folder}; README.md there says how it was made")


def validate(folder: Path) -> bool:
    """Prints what a tree holds and what is wrong with it; whether nothing is. UserError where there is no tree."""
    if not folder.is_dir():
        raise UserError(f"--output_dir: there is no folder {folder}")
    faults, contents = Faults(), {}
    counts, found = find_tree(folder, faults)
    for split, path in bar(found, "checking"):
        place = path.relative_to(folder).as_posix()
        try:
            data = path.read_bytes()
            decode(data)
        except (OSError, ValueError) as error:
            faults.add("unreadable", f"{place} ({error})")
            continue
        copies = contents.setdefault(hashlib.sha256(data).digest(), {})
        for other in (copies[s] for s in copies if s != split):
            faults.add("the same picture in two splits", f"{other} = {place}")
        copies.setdefault(split, place)
    for name, row in counts.items():
        for split in (split for split in row if not row[split]):
            faults.add("class without pictures", f"{split}/{name}")
    if (folder / "classes.txt").is_file():
        listed = (folder / "classes.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        listed = [line.strip() for line in listed if line.strip()]
        if listed != list(counts):
            strange = sorted(set(listed) ^ set(counts))
            faults.add("classes.txt does not fit the folders", ", ".join(strange) or "the names are not sorted, or doubled")
    print(table(counts))
    for name in ("test", "classes.txt"):
        if not (folder / name).exists():
            print(f"note: there is no {name}")
    train = {name: row["train"] for name, row in counts.items() if row["train"]}
    if train and max(train.values()) > 3 * min(train.values()):
        large, small = max(train, key=train.get), min(train, key=train.get)
        print(f"warning: the classes are of very different size, {large} {train[large]} and {small} {train[small]} in train/")
    for line in listing(faults):
        print(f"fault: {line}")
    print(f"{folder}: {'faults found' if faults.found else 'fine'}")
    return not faults.found


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config = parse(DogsConfig, argv)
    folder = Path(config.output_dir).expanduser()
    if not config.validate:
        prepare(config, folder, f"python scripts/prepare_dog_dataset.py {shlex.join(argv)}".strip())
    elif not validate(folder):
        raise SystemExit(1)


if __name__ == "__main__":
    cli(main)
