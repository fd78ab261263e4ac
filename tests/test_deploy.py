"""What leaves the project: adapters out of full fine-tunes, merged models, and the check that both answer alike."""

import json
import sys

import pytest
from conftest import ROOT
from tasks import TASKS, in_task, trained

from common.config import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import task_modules  # noqa: E402


@pytest.fixture(scope="session", params=TASKS.values(), ids=str)
def task(request):
    return request.param


def found_in(task, function, *args):
    """What function(*args) gives in a process of the task's; JSON in between."""

    def run():
        sys.path.append(str(ROOT / "scripts"))
        print("\n" + json.dumps(function(*args)))

    return json.loads(in_task(task, run).splitlines()[-1])


# ---- what a script learns of a task ----------------------------------------------------------------------------------


def look(checkpoint, other):
    import torch

    from common import config
    from task_modules import METRICS, enter_task, evaluate, load, outputs, real_batches, task_of

    folder, origin = task_of(checkpoint)
    model, processor, _ = load(folder)
    batches = real_batches(folder, processor, origin, most=3)
    said, again = outputs(origin["task"], model, batches[0]), outputs(origin["task"], model, batches[0])
    assert said.keys() == again.keys() and all(torch.equal(said[name], again[name]) for name in said)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    moved = outputs(origin["task"], model, batches[0])
    assert not any(torch.equal(said[name], moved[name]) for name in said)
    with pytest.raises(config.UserError, match="one task a process"):
        enter_task(other)
    model, _, _ = load(folder)
    metric = METRICS[origin["task"]]
    return {"task": origin["task"], "metric": metric, "value": evaluate(folder, model, processor, origin)[metric[0]]}


def test_a_script_gets_real_samples_answers_and_the_metrics_of_any_task(task):
    run = trained(task, "lora")
    other = "pose" if task.name != "pose" else "clip"
    found = found_in(task, look, run.folder, other)
    metrics = run.summary["metrics"]
    assert found["task"] == task.name and task_modules.FOLDERS[task.name] == task.folder
    assert found["metric"] == [metrics["name"], metrics["higher_is_better"]] == [task.metric, task.higher_is_better]
    assert found["value"] == pytest.approx(metrics["best"][task.metric], abs=1e-4)


def test_what_is_no_checkpoint_of_a_task_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        task_modules.task_of(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no origin.json"):
        task_modules.task_of(tmp_path)
    (tmp_path / "origin.json").write_text('{"task": ["pose"], "method": "full"}')
    with pytest.raises(UserError, match="not of one of classification, detection"):
        task_modules.task_of(tmp_path)
    with pytest.raises(UserError, match="there is no task 'speech'; there are classification"):
        task_modules.enter_task("speech")
