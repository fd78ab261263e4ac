"""The page that asks base, LoRA and full side by side: which runs it finds, its workers, its lines for mistakes; in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, free_port
from tasks import TASKS, in_task, scratch, trained

sys.path.insert(0, str(ROOT / "scripts"))
from common.config import UserError  # noqa: E402
from try_it import ANSWER_SECONDS, Desk, TryConfig, Worker, find_runs, in_words, main, side_by_side  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def write_run(folder, task="detection", method="lora", base="a", when=1000, **summary):
    best = folder / "checkpoints" / "best"
    best.mkdir(parents=True)
    about = {"task": task, "method": method, "base": {"name": "demo", "sha256": base}}
    (best / "origin.json").write_text(json.dumps(about))
    os.utime(best / "origin.json", (when, when))
    metrics = {"name": "map", "best": {"map": 0.5}}
    (folder / "summary.json").write_text(json.dumps({"metrics": metrics} | summary))


def test_runs_are_found_newest_first_and_what_cannot_be_asked_is_named(tmp_path):
    write_run(tmp_path / "detection" / "old", when=1000)
    write_run(tmp_path / "detection" / "new", "detection", "full", when=2000, metrics={"name": "map", "best": None})
    write_run(tmp_path / "weather" / "rain", task="weather")
    for name, text in (("half", "{}"), ("nest", "[" * 100_000), ("odd", "[")):
        (tmp_path / "pose" / name).mkdir(parents=True)
        (tmp_path / "pose" / name / "summary.json").write_text(text)
    runs, faults = find_runs(tmp_path)
    assert [run.label.rpartition(" · ")[0] for run in runs] == [
        "detection / new · full · no metric",
        "detection / old · lora · map 0.500",
    ]
    told = [re.sub(f"^{tmp_path}/", "", fault) for fault in faults]
    assert [line.partition(":")[0] for line in told] == ["pose/half", "pose/nest", "pose/odd", "weather/rain"]
    assert "no such file or directory, origin.json" in told[0] and "a checkpoint of weather (lora)" in told[3]
    with pytest.raises(UserError, match="there is no folder .*nowhere; train something first"):
        find_runs(tmp_path / "nowhere")


def test_beside_a_run_stand_the_newest_of_its_base(tmp_path):
    for name, method, base, when in (("a", "lora", "x", 1), ("b", "lora", "x", 2), ("c", "full", "y", 3), ("d", "head", "x", 4)):
        write_run(tmp_path / "pose" / name, "pose", method, base, when)
    write_run(tmp_path / "clip" / "e", "clip", "full", "x", 5)
    runs = find_runs(tmp_path)[0]
    beside = {run.name: {c: f and f.name for c, f in side_by_side(runs, run).items()} for run in runs}
    assert beside["a"] == {"Base": "a", "LoRA": "a", "Full": None}
    assert beside["c"] == {"Base": "c", "LoRA": None, "Full": "c"}
    assert beside["d"] == {"Base": "d", "LoRA": "d", "Full": None} and beside["e"]["LoRA"] is None


def test_it_is_seen_from_this_machine_alone_and_says_what_it_lacks(monkeypatch, capsys):
    assert TryConfig().host == "127.0.0.1"
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=re.escape('the page needs gradio, which is not installed: pip install "gradio>=6,<7"')):
        main([])


def test_a_file_that_does_not_fit_is_told_in_a_line_before_a_model_is_loaded(tmp_path):
    write_run(tmp_path / "runs" / "pose" / "a", "pose")
    desk = Desk(TryConfig(runs_dir=str(tmp_path / "runs"), most_mb=1), tmp_path)
    (label,) = desk.runs()
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "large.png").write_bytes(b"0" * (2**20 + 1))
    for run, file, told in (
        (label, None, "choose a file: pose takes a picture"),
        (label, tmp_path / "notes.txt", "notes.txt is of another kind: pose takes a picture"),
        (label, tmp_path / "large.png", "large.png is larger than 1 MB"),
        (None, tmp_path / "large.png", "choose a run first"),
        ("gone", tmp_path / "large.png", "is not there any more"),
    ):
        with pytest.raises(UserError, match=told):
            desk.ask(run, file and str(file))
    assert desk.workers == {}


def test_names_from_files_are_shown_as_they_are_written():
    shown = in_words("LoRA", {"title": "<b>a</b>", "text": "*dog*", "milliseconds": 12.3, "loading": 0.0})
    assert "<" not in shown and "*dog" not in shown and "**12 ms** · model in memory" in shown
    assert "no answer:** &#60;img" in in_words("Base", {"title": "", "error": "<img"})


def test_a_worker_that_dies_or_hangs_is_told_and_the_next_request_starts_another(tmp_path):
    worker = Worker("pose", TryConfig(), tmp_path)
    worker.command = [sys.executable, "-c", "import sys; sys.exit(f'no room, {input()[:11]}')"]
    for _ in range(2):
        with pytest.raises(UserError, match=r"the process with the models ended \(1\): no room, {\"file\": \"a"):
            worker.ask({"file": "a"})
    worker.command = [sys.executable, "-c", "input(); import time; time.sleep(60)"]
    with pytest.raises(UserError, match="no answer within 1 seconds"):
        worker.ask({"file": "a"}, seconds=1)
    assert ANSWER_SECONDS > 60 and worker.process.poll() is not None


@pytest.mark.parametrize("task", [TASKS["classification"], pytest.param(TASKS["voice_rvc"], marks=pytest.mark.slow)], ids=str)
def test_base_lora_and_full_answer_and_models_stay_in_memory(task, tmp_path):
    """A broken file costs one line a column; the adapter's Predictor is shared by the adapters of its base."""
    lora, full = (trained(task, method).best for method in ("lora", "full"))
    good, broken = task.inputs(scratch() / task.name / "data" / task.samples, tmp_path)
    kind = "sound" if task.name == "voice_rvc" else "picture"

    def check():
        sys.path.append(str(ROOT / "scripts"))
        from try_worker import Models, answer_all

        models = Models(task.name, 3, "cpu")
        asked = (("Base", lora), ("LoRA", lora), ("Full", full))
        columns = [{"name": name, "checkpoint": str(best), "base": name == "Base"} for name, best in asked]

        def ask(name, number):
            place = tmp_path / f"out{number}"
            place.mkdir()
            return answer_all(models, {"file": str(tmp_path / name), "folder": str(place), "columns": columns})

        first = ask(good[0], 0)
        assert all(answer["loading"] > 0 and Path(answer[kind]).stat().st_size > 1000 for answer in first)
        again = ask(good[0], 1)
        assert [a["loading"] for a in again] == [0, 0, 0] and len({Path(a[kind]).read_bytes() for a in again}) == 3
        assert [Path(a[kind]).read_bytes() for a in again] == [Path(a[kind]).read_bytes() for a in first]
        faults = ask(broken, 2)
        assert len({a["error"] for a in faults}) == 1 and str(tmp_path) not in faults[0]["error"], faults
        assert len(models.kept) == 3
        models.most = 1
        models.get(str(full), True)
        assert len(models.kept) == 1

    in_task(task, check)


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page over the small classification runs: .url, .runs, .files (two pictures and a broken one), .temporary."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    pytest.importorskip("playwright", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("there is no chromium")
    task, files, temporary = TASKS["classification"], tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("temporary")
    runs = trained(task, "lora").folder.parents[1]
    trained(task, "full")
    good, broken = task.inputs(scratch() / task.name / "data" / task.samples, files)
    port = free_port()
    command = [
        sys.executable,
        str(ROOT / "scripts" / "try_it.py"),
        "--runs_dir",
        str(runs),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "TMPDIR": str(temporary)}
    )
    lines = []
    while not lines or not lines[-1].startswith("open "):
        lines.append(process.stdout.readline())
        assert lines[-1], f"the page did not start: {lines}"
    url = lines[-1].split()[1]
    yield SimpleNamespace(url=url, files=files, good=good, broken=broken, temporary=temporary)
    process.terminate()
    process.wait(60)
    assert list(temporary.glob("try_it-*")) == []  # uploads, pictures and logs are gone with it


@pytest.fixture(scope="module")
def browser(served):
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=BROWSER, args=flags)
        yield started
        started.close()


def open_page(served, browser, width=1366):
    """(page, the addresses elsewhere that it asked for) of a user."""
    page, outside = browser.new_context(viewport={"width": width, "height": 900}).new_page(), []
    page.on("request", lambda r: None if r.url.startswith((served.url, "data:", "blob:")) else outside.append(r.url))
    page.goto(served.url)
    page.wait_for_selector("#ask", timeout=60_000)
    return page, outside


def upload(page, path):
    page.set_input_files("#file input[type=file]", path)
    page.wait_for_function("/\\d\\s*[KM]?B/.test(document.querySelector('#file').innerText)", timeout=60_000)


def said(page, column):
    page.wait_for_selector(f"#{column} .words h3", timeout=180_000)
    return page.inner_text(f"#{column} .words")


@pytest.mark.slow
def test_in_a_browser_a_picture_is_answered_side_by_side_and_a_bad_file_costs_a_line(served, browser):
    for width in (1366, 390):
        page, outside = open_page(served, browser, width)
        page.click("#ask")
        page.get_by_text("choose a file: classification takes a picture").wait_for(timeout=30_000)
        upload(page, served.files / served.good[0])
        page.click("#ask")
        for column in ("base", "lora", "full"):
            assert re.search(r"\d+ ms", said(page, column)), column
            page.wait_for_selector(f"#{column} img", timeout=30_000)
        assert page.get_by_text("choose a file").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width and outside == []
        page.context.close()
    page, _ = open_page(served, browser)
    upload(page, served.files / served.broken)
    page.click("#ask")
    assert "no answer: " in said(page, "full") and "Traceback" not in page.content()
    page.context.close()


@pytest.mark.slow
def test_two_users_at_once_get_their_own_answers(served, browser):
    users = [open_page(served, browser)[0] for _ in range(2)]
    for page, name in zip(users, served.good, strict=False):
        upload(page, served.files / name)
    for page in users:
        page.click("#ask")
    pictures = []
    for page in users:
        said(page, "lora")
        page.wait_for_selector("#lora img", timeout=30_000)
        source = page.get_attribute("#lora img", "src")
        pictures.append(page.request.get(source).body())
    alone = []
    for name in served.good[:2]:
        page, _ = open_page(served, browser)
        upload(page, served.files / name)
        page.click("#ask")
        said(page, "lora")
        page.wait_for_selector("#lora img", timeout=30_000)
        alone.append(page.request.get(page.get_attribute("#lora img", "src")).body())
        page.context.close()
    assert pictures == alone and pictures[0] != pictures[1]
