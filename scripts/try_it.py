"""A page on this machine that asks base, LoRA and full side by side, of the runs that are there.

    python scripts/try_it.py                             # the runs in outputs/, on http://127.0.0.1:7860
    python scripts/try_it.py --runs_dir ~/runs --port 8000

Needs gradio: pip install "gradio>=6,<7". Nothing leaves the machine, and the page loads nothing from elsewhere.
"""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Count, Range, UserError, cli, parse, project_root  # noqa: E402
from common.runtime import counted, import_fault  # noqa: E402
from task_modules import FOLDERS  # noqa: E402

GRADIO = '"gradio>=6,<7"'
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".m4a", ".aac", ".webm")
VOLUMES = (".nii", ".nii.gz")
TAKES = {"voice_rvc": ("a recording", SOUNDS), "medical_sam3d": ("a NIfTI mask", VOLUMES)}  # all others: pictures
STYLE = "#run input { text-overflow: ellipsis; margin-right: 1.5em } iframe { width: 100%; height: 40rem; border: 0 }"
ANSWER_SECONDS = 600  # for three models to be loaded and asked
KEPT_SECONDS = 3600  # that files stay which the page was given or has made
COLUMNS = ("Base", "LoRA", "Full")
# What a browser may load: this page's own files. gradio's page names a few others, which are not asked for then.
ONLY_SELF = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
)


@dataclass
class TryConfig:
    runs_dir: str = ""  # folder with runs, <task>/<run name>/ in it; empty: outputs/ beside common/
    host: str = "127.0.0.1"  # address to listen on; the default is seen from this machine alone
    port: Annotated[int, Range(1, 65535)] = 7860  # of the page
    models: Count = 4  # models of a task that stay in memory; adapters on one base count as one
    most_mb: Annotated[int, Range(1, 4096)] = 64  # largest file that is taken
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU where there is one


# ---- runs ------------------------------------------------------------------------------------------------------------


class FinishedRun(NamedTuple):
    """A run that can be asked."""

    task: str
    name: str
    method: str  # full, lora or head
    metric: str  # as it is shown: balanced_accuracy 0.931
    base: str  # sha256
    base_name: str
    checkpoint: str
    when: float  # seconds since 1970

    @property
    def label(self) -> str:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.when))
        return f"{self.task} / {self.name} · {self.method} · {self.metric} · {made}"


def find_runs(runs_dir: Path) -> tuple[list[FinishedRun], list[str]]:
    """(runs with a checkpoint, the newest first; a line for each that cannot be asked). UserError where there is no folder."""
    if not runs_dir.is_dir():
        raise UserError(f"--runs_dir: there is no folder {runs_dir}; train something first, or name the folder of your runs")
    runs, faults = [], []
    for file in sorted(runs_dir.glob("*/*/summary.json")):
        try:
            runs.append(read_run(file))
        except OSError as error:
            faults.append(f"{file.parent}: {error.strerror.lower()}, {Path(error.filename).name}")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            faults.append(f"{file.parent}: its record is none that can be read ({type(error).__name__}: {error})")
    return sorted(runs, key=lambda run: -run.when), faults


def read_run(file: Path) -> FinishedRun:
    """The run of a summary.json; what its checkpoint holds is checked when it is loaded. ValueError and the like: it is none."""
    summary, best = json.loads(file.read_bytes()), file.parent / "checkpoints" / "best"
    origin = json.loads((best / "origin.json").read_bytes())
    if origin["task"] not in FOLDERS or origin["method"] not in ("full", "lora", "head"):
        raise ValueError(f"a checkpoint of {origin['task']} ({origin['method']})")
    name, best_metrics = summary["metrics"]["name"], summary["metrics"]["best"] or {}
    metric = f"{name} {best_metrics[name]:.3f}" if name in best_metrics else "no metric"
    what = origin["task"], file.parent.name, origin["method"], metric, origin["base"]["sha256"], origin["base"]["name"]
    return FinishedRun(*what, str(best), (best / "origin.json").stat().st_mtime)


def side_by_side(runs: list[FinishedRun], chosen: FinishedRun) -> dict[str, FinishedRun | None]:
    """{"Base", "LoRA", "Full"} -> the chosen run in its place, the newest of its base in the others; None where there is none."""
    kin = [chosen, *(run for run in runs if (run.task, run.base) == (chosen.task, chosen.base))]
    adapters = [run for run in kin if run.method == "lora"] or [run for run in kin if run.method == "head"]
    adapters = [chosen] if chosen.method == "head" else adapters
    whole = [run for run in kin if run.method == "full"]
    return {"Base": chosen, "LoRA": next(iter(adapters), None), "Full": next(iter(whole), None)}


# ---- workers ---------------------------------------------------------------------------------------------------------


class Worker:
    """A process with the models of one task (tasks name their modules alike); requests take turns."""

    def __init__(self, task: str, config: TryConfig, folder: Path):
        self.command = [sys.executable, str(Path(__file__).with_name("try_worker.py")), "--task", task]
        self.command += ["--models", str(config.models), "--device", config.device]
        self.log, self.lock, self.process = folder / f"{task}.log", threading.Lock(), None

    def ask(self, request: dict, seconds: int = ANSWER_SECONDS) -> list[dict]:
        """Its answers, see try_worker.answer_all. UserError where it ended or hung over it; the next request starts another."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                with self.log.open("a") as log:
                    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
                    self.process = subprocess.Popen(self.command, text=True, encoding="utf-8", **pipes)
            late = threading.Timer(seconds, self.process.kill)
            late.start()
            try:
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except OSError:
                line = ""
            hung = not late.is_alive()
            late.cancel()
            if not line:
                code = self.process.wait()
                said = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                ended = f"the process with the models ended ({code}): {said[0][:300]}"
                raise UserError(f"no answer within {seconds} seconds" if hung else ended)
            return json.loads(line)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:  # busy with a model in code that hears no signal
                self.process.kill()
                self.process.wait()


class Desk:
    """What the page asks: the runs, a worker for each task, and a folder for what is made of the files."""

    def __init__(self, config: TryConfig, folder: Path):
        self.config, self.folder = config, folder
        self.runs_dir = Path(config.runs_dir).expanduser() if config.runs_dir else project_root() / "outputs"
        self.workers, self.lock = {}, threading.Lock()

    def runs(self) -> dict[str, FinishedRun]:
        return {run.label: run for run in find_runs(self.runs_dir)[0]}

    def worker(self, task: str) -> Worker:
        with self.lock:
            return self.workers.setdefault(task, Worker(task, self.config, self.folder))

    def check_file(self, task: str, file: str | None) -> Path:
        """UserError for a file that the task does not take: none, too large, of another kind."""
        what, endings = TAKES.get(task, ("a picture", PICTURES))
        if not file:
            raise UserError(f"choose a file: {task} takes {what}")
        path = Path(file)
        if not path.name.lower().endswith(endings):
            raise UserError(f"{path.name} is of another kind: {task} takes {what} ({', '.join(endings)})")
        if path.stat().st_size > self.config.most_mb * 2**20:
            raise UserError(f"{path.name} is larger than {self.config.most_mb} MB, which --most_mb allows")
        return path

    def ask(self, label: str | None, file: str | None) -> list[dict]:
        """A dict for each of COLUMNS: title, and an answer or an error; see try_worker.answer_all. UserError in one line."""
        run = self.runs().get(label)
        if run is None:
            raise UserError("choose a run: the one that was chosen is not there any more" if label else "choose a run first")
        path, chosen = self.check_file(run.task, file), side_by_side(find_runs(self.runs_dir)[0], run)
        asked = {column: found for column, found in chosen.items() if found}
        columns = [{"name": column, "checkpoint": found.checkpoint, "base": column == "Base"} for column, found in asked.items()]
        place = tempfile.mkdtemp(prefix="answer-", dir=self.folder)
        for old in self.folder.glob("answer-*"):  # gradio has copies, which it removes itself (delete_cache)
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        request = {"file": str(path), "folder": place, "columns": columns}
        answers = dict(zip(asked, self.worker(run.task).ask(request), strict=True))
        titles = {"Base": f"the base, {run.base_name}"} | {c: f"{f.name}, {f.metric}" for c, f in asked.items() if c != "Base"}
        lacking = {"error": "there is no such run on this base"}
        return [{"title": titles.get(column, ""), **answers.get(column, lacking)} for column in COLUMNS]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


# ---- the page --------------------------------------------------------------------------------------------------------


class OnlySelf:
    """Adds to each answer of the page that a browser is to load nothing from elsewhere with it."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", ONLY_SELF.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def in_words(column: str, answer: dict) -> str:
    """What stands above an answer, in Markdown."""
    head = f"### {column}\n{plain(answer['title'])}"
    if "error" in answer:
        return f"{head}\n\n**no answer:** {plain(answer['error'])}"
    loading = f"model loaded in {answer['loading']:.1f} s" if answer["loading"] else "model in memory"
    return f"{head}  \n**{answer['milliseconds']:.0f} ms** · {loading}  \n{plain(answer['text'])}"


def plain(text: str) -> str:
    """Text in which nothing is Markdown or HTML: names of classes and files are strangers' words."""
    return "".join(f"&#{ord(letter)};" if letter in "\\`*_{}[]()<>#|!~$&" else letter for letter in text)


def build_page(gradio, desk: Desk):
    """The gradio.Blocks of the page."""
    labels = list(desk.runs())

    def ask(label, file):
        shown = []
        try:
            answers, trouble = desk.ask(label, file), ""
        except UserError as error:
            answers, trouble = [{}] * len(COLUMNS), f"**{plain(str(error))}**"
        for column, answer in zip(COLUMNS, answers, strict=True):
            files = [answer.get(kind) for kind in ("picture", "sound")]
            shown += [in_words(column, answer) if answer else "", *(gradio.update(value=f, visible=bool(f)) for f in files)]
        page = answers[0].get("page", "")
        frame = f'<iframe title="meshes" srcdoc="{html.escape(Path(page).read_text())}"></iframe>' if page else ""
        return [gradio.update(value=trouble, visible=bool(trouble)), *shown, gradio.update(value=frame, visible=bool(frame))]

    def takes(label):
        run = desk.runs().get(label)
        return gradio.update(label=f"{run.task} takes {TAKES.get(run.task, ('a picture', PICTURES))[0]}" if run else "a file")

    with gradio.Blocks(title="Try it · LoRA Workshop", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        gradio.Markdown("# Base, LoRA and full, side by side")
        with gradio.Row():
            run = gradio.Dropdown(labels, value=labels[0] if labels else None, label="run, the newest first", elem_id="run")
            file = gradio.File(label="a file", elem_id="file", height=140)
        button = gradio.Button("Ask", variant="primary", elem_id="ask")
        outputs = [gradio.Markdown(visible=False, elem_id="trouble")]
        with gradio.Row(equal_height=False):
            for column in COLUMNS:
                with gradio.Column(min_width=280, elem_id=column.lower()):
                    outputs.append(gradio.Markdown(elem_classes="words"))
                    outputs.append(gradio.Image(visible=False, show_label=False, buttons=["fullscreen"]))
                    outputs.append(gradio.Audio(visible=False, show_label=False, buttons=["download"]))
        outputs.append(gradio.HTML(visible=False, elem_id="meshes"))
        page.load(lambda: gradio.update(choices=list(desk.runs())), outputs=run, api_visibility="private")
        for event in (page.load, run.change):
            event(takes, run, file, api_visibility="private")
        waiting = gradio.update(value="asking; a model's first answer takes longest, since it is loaded for it ...", visible=True)
        asked = button.click(lambda: waiting, outputs=outputs[0], queue=False, api_visibility="private")
        asked.then(ask, [run, file], outputs, concurrency_limit=None, api_visibility="private")
    return page


def main(argv=None):
    config = parse(TryConfig, argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    folder = Path(tempfile.mkdtemp(prefix="try_it-"))
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    desk = Desk(config, folder)
    try:
        if fault := import_fault("gradio", GRADIO):
            raise UserError(f"the page needs {fault}")
        import gradio

        runs, faults = find_runs(desk.runs_dir)
        for fault in faults:
            print(f"left out: {fault}")
        print(f"{counted(len(runs), 'run')} in {desk.runs_dir}")
        serve(gradio, desk)
    finally:
        desk.close()


def serve(gradio, desk: Desk) -> None:
    """Shows the page until Ctrl-C or SIGTERM."""
    config = desk.config
    signal.signal(signal.SIGTERM, interrupt)
    page = build_page(gradio, desk)
    local = ["system-ui", "sans-serif"]
    try:
        page.launch(
            server_name=config.host,
            server_port=config.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            enable_monitoring=False,
            max_file_size=config.most_mb * 2**20,
            app_kwargs={"middleware": [(OnlySelf, (), {})], "docs_url": None, "redoc_url": None},
            footer_links=[],
            css=STYLE,
            theme=gradio.themes.Default(font=local, font_mono=["ui-monospace", "monospace"]),
        )
    except OSError as error:
        raise UserError(f"--port {config.port}: cannot listen there ({one_reason(error)}); choose another") from None
    if config.host not in ("127.0.0.1", "localhost", "::1"):
        print("note: whoever reaches this address can use the page, for there is no password")
    print(f"open http://{config.host}:{config.port} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def interrupt(*_):
    """SIGTERM ends the page as Ctrl-C does."""
    raise KeyboardInterrupt


def one_reason(error: OSError) -> str:
    return " ".join(str(error).split())[:150]


if __name__ == "__main__":
    cli(main)
