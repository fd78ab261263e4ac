"""The documents are true: each command in them is one that its script takes, and is run as a reader would, links lead somewhere.

A reader has a fresh clone, so the commands run in a copy of the tree, on few samples (SMALL below) and the small bases; what
else is put in the place of a reader's files and of models from the hub is said in the tables below.
"""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import CLASSIFICATION, CLIP, DETECTION, FOLDERS, MEDICAL, POSE, ROOT, VOICE, Child, Payload, Script, enter
from documents import Command, anchors, blocks, commands, documents, headings, links, tables, text_of, tracked
from tasks import ROWS, SCRIPT, TASKS, scratch, small_data

from common.config import VERSION

NOT_RUN = {  # scripts that take long whatever they are told, and have tests of their own
    "make_demo_base.py": "trains for hours",
    "benchmark.py": "trains at real size",
    "peft_table.py": "trains eleven adapters",
    "try_it.py": "serves a page until it is stopped",
    "run_all.py": "trains nine runs of a task",
}
DOWNLOADS = {
    ("prepare_dog_dataset.py", "--num_classes"),
    ("prepare_dog_dataset.py", "data/dogs"),
}  # script, a word of the command
SMALL = ("--epochs", "1", "--max_steps_per_epoch", "2", "--batch_size", "2", "--warmup_steps", "1", "--num_workers", "0")
SMALL += ("--precision", "fp32", "--device", "cpu", "--threads", "1", "--model", "demo")
PLAIN = ("--device", "cpu", "--threads", "1", "--precision", "fp32")
HOME = {  # what a reader has in ~
    "boxes": DETECTION,
    "bccd": DETECTION,
    "new_pictures": DETECTION,
    "pictures": CLASSIFICATION,
    "clothing": CLASSIFICATION,
    "points": POSE,
    "faces68": POSE,
    "voice": VOICE,
    "speech": VOICE,
    "songs": VOICE,
    "scans": MEDICAL,
    "Totalsegmentator_dataset": MEDICAL,
    "Task04_Hippocampus": MEDICAL,
}
OF_ORGANS, OF_VOICES = "data/demo/target/s0001/segmentations", "data/demo/source/test"
INSTEAD = {  # in the place of what is not there
    "../data/dogs": "~/pictures",
    "data/demo/target/s0014": "data/demo/target/s0009",
    "kidney_left,kidney_right": "kidney_left,liver",
    "~/new_patient/segmentations/kidney_left.nii.gz": f"{OF_ORGANS}/kidney_left.nii.gz",
    "thick.nii.gz": f"{OF_ORGANS}/kidney_left.nii.gz",
    "mask.nii.gz": f"{OF_ORGANS}/liver.nii.gz",
    "masks/": OF_ORGANS,
    "~/songs/verse.wav": f"{OF_VOICES}/birch_test_001.wav",
    "speech.mp3": f"{OF_VOICES}/birch_test_001.wav",
    "song.wav": f"{OF_VOICES}/birch_test_002.wav",
    "talk.flac": f"{OF_VOICES}/fir_test_001.wav",
    "~/speech/1688": "~/speech",
    "~/speech/2414": OF_VOICES,
    "voice.pth": "~/me.pth",  # an export that an earlier command made
    "their.pth": "~/me.pth",
    "~/rvc/weights/me.pth": "~/me.pth",
    "added_voice.index": "../outputs/voice_rvc/lora/voice.index",
}
OF_PROGRAMS = {  # files of programs in Python
    "speech.wav": "voice_rvc/data/demo/source/test/birch_test_001.wav",
    "segmentation.nii.gz": "medical_sam3d/data/demo/target/s0001/segmentations/kidney_left.nii.gz",
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


TROUBLE = ROOT / "docs" / "troubleshooting.md"
each = pytest.mark.parametrize("document", documents(), ids=name_of)


# ---- every command ---------------------------------------------------------------------------------------------------


def check_files(command):
    for word in command.words:
        assert not word.endswith(".txt") or any((folder / word).is_file() for folder in command.folders), f"{command}: no {word}"


def check_cd(command):
    assert command.words[1][0] == "~" or (command.folder / command.words[1]).is_dir(), f"{command}: no such folder"


def check_script(command):
    if command.words[1:3] == ("-m", "pytest"):
        return
    script = next(word for word in command.words if word.endswith(".py"))
    assert (command.folder / script).is_file(), f"{command}: no such script in {[str(folder) for folder in command.folders]}"


def known(command):
    """A program of the system."""


PROGRAMS = {"python": check_script, "torchrun": check_script, "srun": check_script, "cd": check_cd, "pip": check_files}
PROGRAMS |= dict.fromkeys(("export", "git", "pre-commit"), known)


@each
def test_every_command_is_one_that_is_checked(document):
    for command in commands(document):
        program = command.words[0]
        if program.endswith(".sh"):
            assert os.access(command.folder / program, os.X_OK), f"{command}: no such program"
            continue
        how = "say in PROGRAMS of tests/test_docs.py how it is checked; what a command prints goes into a block ```text"
        assert program in PROGRAMS, f"{command}: {how}"
        PROGRAMS[program](command)


class Parsed(BaseException):
    """The flags of a script were good."""


def say_which_are_refused(named):
    """Prints each command that its script's parser does not take, and why. named: {script: {arguments: place}}."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    argparse.ArgumentParser.parse_args = parse_and_leave
    for script, commands_of_it in named.items():
        sys.path.insert(0, str(script.parent))
        for arguments, place in commands_of_it.items():
            sys.argv = [script.name, *arguments]
            try:
                runpy.run_path(str(script), run_name="__main__")
                print(f"{place}: this test does not see how {script.name} reads its flags")
            except Parsed:
                pass
            except SystemExit:
                print(f"in {place}: {' '.join(sys.argv)}")
        forget_modules(script.parent)


def forget_modules(folder: Path) -> None:
    """Another folder's modules may have the same names; what they import of torch and its like is imported once."""
    sys.path[:] = [path for path in sys.path if path != str(folder)]
    for name, module in list(sys.modules.items()):
        if os.path.dirname(getattr(module, "__file__", None) or "") == str(folder):
            del sys.modules[name]


def test_scripts_take_the_flags_that_documents_name(tmp_path):
    """Names and values, checked by each script's own parser."""
    named = {}
    for command in (command for document in documents() if document != TROUBLE for command in commands(document)):
        if command.words[0] in ("python", "torchrun", "srun") and "-m" not in command.words[:2]:
            at = next(i for i, word in enumerate(command.words) if word.endswith(".py"))
            script = (command.folder / command.words[at]).resolve()
            named.setdefault(script, {}).setdefault(command.words[at + 1 :], command.place)
    assert len(named) > 25
    child = Child(say_which_are_refused, named, log=tmp_path / "refused.txt")
    assert (child.wait(), child.text) == (0, "")


# ---- commands, run ---------------------------------------------------------------------------------------------------


@cache
def clone() -> Path:
    """A copy of the tree."""
    folder = scratch() / "clone"
    for path in tracked():
        if path.relative_to(ROOT).parts[0] not in ("tests", ".ci") and path.suffix != ".jpg" and path.is_file():
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


@cache
def home() -> Path:
    folder = scratch() / "home"
    folder.mkdir()
    return folder


@cache
def give_data(task) -> None:
    """Few samples in the place of a task's demo data, and as what a reader has of it in ~."""
    data, place = small_data(task), clone() / task.folder.relative_to(ROOT) / "data"
    place.mkdir()
    (place / "demo").symlink_to(data.parent if task.samples else data)
    for name in (name for name, folder in HOME.items() if folder == task.folder):
        (home() / name).symlink_to(data)


def as_run(command) -> tuple[Path, list[str]] | None:
    """(script, arguments) by which a command is run; None for what is not run."""
    if not command.fenced or command.words[0] not in ("python", "torchrun") or "-m" in command.words[:2]:
        return None
    at = next(i for i, word in enumerate(command.words) if word.endswith(".py"))
    script = place_of(command) / command.words[at]
    arguments = [INSTEAD.get(word, word) for word in command.words[at + 1 :]]
    if script.name in NOT_RUN or any(script.name == name and word in command.words for name, word in DOWNLOADS):
        return None
    for task in ROWS:
        names = {name for name, folder in HOME.items() if folder == task.folder}
        if command.folder == task.folder or names & {part for word in arguments for part in Path(word).parts}:
            give_data(task)
    if script.parts[-2:] == ("voice_rvc", "preprocess.py"):
        arguments += ["--model", "demo"]
    more = SMALL if script.name in ("train.py", "train_lora.py") else PLAIN if script.name.startswith(("eval", "infer")) else ()
    more += ("--sources", "2") if script.parent.name == "voice_rvc" and script.name.startswith("eval") else ()
    is_trouble = command.place.startswith(name_of(TROUBLE))
    arguments = [*more, *arguments] if is_trouble else [*arguments, *more]  # of a flag that is given twice the second counts
    return script, [re.sub("^~", str(home()), word) for word in arguments]


def place_of(command) -> Path:
    """Where a command is run: in the clone, or in the reader's own folder."""
    first = command.folders[0]
    return home() / Path(*first.parts[1:]) if first.parts[0] == "~" else clone() / command.folder.relative_to(ROOT)


def give_runs(command) -> None:
    """The runs that a tool over the tasks looks at, trained where no command of before did."""
    named = re.findall(r"outputs/(\w+)/(full|lora)\b", " ".join(command.words))
    for name, method in named or [("detection", "full"), ("detection", "lora")]:
        if not (clone() / "outputs" / name / method).exists():
            training = Command(("python", SCRIPT[method]), (TASKS[name].folder,), "before", True)
            run(training, as_run(training))


def run(command, how, expect=0) -> str:
    """What a command prints, with the reader's own paths."""
    log = scratch() / f"docs-{len(list(scratch().glob('docs-*.out')))}"
    script, arguments = how
    done = Script(script.parent.resolve(), script.name, arguments, log, cwd=place_of(command), draw=False).wait(expect)
    return (done.stdout + done.stderr).replace(str(home()), "~")


RAN = []  # (place, script, arguments) of what was run


def run_commands(document, only=()) -> None:
    """Runs those in a document's blocks, one after the other, then its programs in Python. only: names of scripts.

    What was run before, for whatever document, is not run again.
    """
    for command in commands(document):
        how = as_run(command)
        if how and only and how[0].name not in only:
            continue
        if how and (place_of(command), *how) not in RAN:
            if how[0].name == "compare.py" or how[0].parent.name == "scripts" and "outputs/" in str(command):
                give_runs(command)
            print(command)
            RAN.append((place_of(command), *how))
            run(command, how)
    for line, language, content in blocks(document):
        if language == "python":
            log = scratch() / f"docs-{document.parent.name}-{line}.txt"
            child = Child(run_program, document, content, log=log)
            assert child.wait() == 0, f"{document}:{line}\n{child.text}"


def run_program(document, content) -> None:
    """A program of a page, started where its paths are right."""
    task = document.parent if document.parent in FOLDERS else CLIP
    enter(clone() / task.relative_to(ROOT))
    os.chdir(clone() / task.relative_to(ROOT) if "../outputs" in content else clone())
    for name, place in OF_PROGRAMS.items():
        content = content.replace(f'"{name}"', repr(str(place)))
    exec(compile(content, str(document), "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_the_readme_says_how_to_train_compare_and_copy():
    run_commands(ROOT / "README.md", {"train.py", "train_lora.py", "eval_lora.py", "infer_lora.py", "compare.py", "export.py"})


TO_RUN = [path for path in documents() if path not in (ROOT / "README.zh-CN.md", TROUBLE)]


@pytest.mark.slow
@pytest.mark.parametrize("document", TO_RUN, ids=name_of)
def test_documents_say_what_works(document):
    run_commands(document)


# ---- troubleshooting -------------------------------------------------------------------------------------------------


@cache
def make_trouble() -> None:
    """What is wrong in ~, by its name on the page."""
    for name in ("empty", "short", "pickled"):
        (home() / name).mkdir()
    (home() / "mine.yaml").write_text("epochs: 3\nlearning_rate: 1e-4\n")
    write_silence(home() / "short" / "a.wav"), write_silence(home() / "short" / "b.wav")
    for part in (CLASSIFICATION / "demo_base").glob("*.json"):
        shutil.copy(part, home() / "pickled")
    torch.save({"payload": Payload(home() / "ran")}, home() / "pickled" / "pytorch_model.bin")
    pictures, boxes = (small_data(TASKS[name]) for name in ("classification", "detection"))
    for name in ("broken", "stranger"):
        shutil.copytree(pictures, home() / name)
    damaged = home() / "broken" / "train" / "checked_diamond" / "000.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (home() / "stranger" / "val" / "plain_diamond").rename(home() / "stranger" / "val" / "unseen")
    for place in (pictures / "train").glob("*"):
        shutil.copytree(place, home() / "single" / place.name)
    (home() / "single" / "plain_diamond" / "001.png").unlink()
    shutil.copytree(boxes, home() / "outside")
    table = home() / "outside" / "annotations" / "instances_train.json"
    content = json.loads(table.read_text())
    for annotation, box in zip(content["annotations"], ([200, 200, 10, 10], [90, 90, 40, 40]), strict=False):
        annotation["bbox"] = box
    table.write_text(json.dumps(content))


def write_silence(file) -> None:
    soundfile.write(file, np.zeros(1600), 16000)


def check_what_is_printed(part: str) -> None:
    """Types the commands of a part of the page. A text that follows a block is what its last command prints: error or not."""
    make_trouble()
    found = blocks(TROUBLE)
    starts = [text_of(TROUBLE)[: heading.start()].count("\n") for heading in re.finditer("^## ", text_of(TROUBLE), re.MULTILINE)]
    first = text_of(TROUBLE)[: text_of(TROUBLE).index(f"## {part}")].count("\n")
    last = min([line for line in starts if line > first], default=10**6)
    typed = {}
    for command in commands(TROUBLE):
        if command.fenced and first < (line := int(command.place.rpartition(":")[2])) < last and command.words[0] != "cd":
            typed.setdefault(max(start for start, language, _ in found if start <= line and not language), []).append(command)
    assert len(typed) > 4
    for (start, _, _), (_, language, text) in zip(found, found[1:], strict=False):
        for command in typed.get(start, ()):
            is_last = command == typed[start][-1]
            error = is_last and text.startswith("error: ") or "--start_from" in command.words
            said = run(command, as_run(command), expect=2 if error else 0)
            for line in text.splitlines() if is_last else ():
                assert language == "text" and line.removesuffix("...").strip() in said, f"{command}\n{said}"


def test_what_is_refused_at_once_is_said_as_the_page_has_it():
    check_what_is_printed("Refused at once")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["Data and base", "Runs"])
def test_what_scripts_say_of_trouble_is_said_as_the_page_has_it(part):
    check_what_is_printed(part)


# ---- the tutorial as a notebook ------------------------------------------------------------------------------------------


def test_the_notebook_has_the_tutorials_text_and_commands(monkeypatch):
    """Its commands are those that are run above: here they are found in the folders to which its cells change."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from make_notebook import notebook

    page = ROOT / "docs" / "lora_clip.md"
    made, kept = notebook(text_of(page)), json.loads(page.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert kept == made, "python scripts/make_notebook.py makes it anew"
    here, typed = page.parent, []
    for cell in made["cells"]:
        for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else ():
            if line.startswith("%cd "):
                here = (here / line[4:]).resolve(strict=True)
            elif line.startswith("!"):
                typed.append((here, *shlex.split(line[1:])))
    expected = [(c.folder, *c.words) for c in commands(page) if c.fenced and c.words[0] != "cd" and "data/dogs" not in c.words]
    assert typed == expected and len(typed) > 8


# ---- links -----------------------------------------------------------------------------------------------------------


@each
def test_links_lead_to_files_and_headings_that_are_there(document):
    for link in links(document):
        path, _, part = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name}: {link}"
        assert target in tracked() or target.is_dir(), f"{document.name}: {link} is not in the repository"
        assert not part or part in anchors(target), f"{document.name}: {link}: there is {', '.join(sorted(anchors(target)))}"


# ---- two languages ---------------------------------------------------------------------------------------------------


def test_both_readmes_have_the_same_commands_links_and_tables():
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    each_other = {"README.md", "README.zh-CN.md"}
    assert each_other <= {*links(english), *links(chinese)}
    for name, parts in {
        "commands": lambda document: sorted(command.words for command in commands(document)),
        "links": lambda document: sorted(set(links(document)) - each_other),
        "headings": lambda document: [heading.count("#") for heading in headings(document)],
        "tables": lambda document: [[facts(row) for row in table[1:]] for table in tables(document)],
        "numbers": lambda document: sorted(re.findall(r"\d+\.\d+", text_of(document))),
    }.items():
        assert parts(chinese) == parts(english), name


def facts(row: list[str]) -> list[list[str]]:
    """Numbers, and names of files and flags, of each cell of a table: what any language writes alike."""
    return [sorted(re.findall(r"\d+(?:\.\d+)?|`[^`]+`", cell)) for cell in row]


def test_one_version_is_said_everywhere():
    changes, citation = text_of(ROOT / "CHANGELOG.md"), text_of(ROOT / "CITATION.cff")
    assert re.findall(r"^## (.+)", changes, re.M)[0] == re.search(r'^version: "(.+)"', citation, re.M)[1] == VERSION
