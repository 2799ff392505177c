"""Stand-ins of wandb and mlflow: what ignite's handlers call, writing down what reaches them."""

from __future__ import annotations

import sys
import types


def fake_module(name):
    module = types.ModuleType(name)
    module.__file__ = f"{name}.py"  # what an installed package has, and a mere folder has not
    return module


class Server:
    """Runs by id: settings, numbers as ``(step, values)``, and how each opening ended."""

    def __init__(self):
        self.runs = {}
        self.broken = None  # an exception that logging raises
        self.calls = []

    def open(self, run_id):
        run_id = run_id or f"run{len(self.runs)}"
        return run_id, self.runs.setdefault(run_id, {"settings": [], "log": [], "ended": []})

    def log(self, run_id, values, step):
        if self.broken is not None:
            raise self.broken
        self.runs[run_id]["log"].append((step, dict(values)))


def fake_wandb(server):
    """As wandb: a step that is not complete waits for more, and steps cannot go back."""
    wandb = fake_module("wandb")
    wandb.run = None

    def init(**given):
        server.calls.append(given)
        assert given["resume"] == "allow"
        run_id, run = server.open(given["id"])
        run["settings"].append(given["config"])
        wandb.run = types.SimpleNamespace(id=run_id)

    def log(values, step, commit):
        done = [logged for logged, _ in server.runs[wandb.run.id]["log"]]
        assert not done or step >= done[-1]
        assert commit == ("epoch" in values)
        server.log(wandb.run.id, values, step)

    def finish(exit_code=0):
        server.runs[wandb.run.id]["ended"].append(exit_code)
        wandb.run = None

    wandb.init, wandb.log, wandb.finish = init, log, finish
    return wandb


def fake_mlflow(server):
    """As mlflow: runs stand in a stack, parameters cannot change, the place is a global."""
    mlflow = fake_module("mlflow")
    mlflow.uri, stack = None, []

    def start_run(run_id=None, run_name=None, nested=False):
        server.calls.append({"uri": mlflow.uri, "run_name": run_name})
        assert not stack or nested
        if run_id is not None and run_id not in server.runs:
            raise RuntimeError(f"Run {run_id} not found")
        run_id, _ = server.open(run_id)
        stack.append(types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id)))

    def log_params(params):
        run = server.runs[stack[-1].info.run_id]
        assert not run["settings"]
        run["settings"].append(params)

    def log_metrics(values, step):
        server.log(stack[-1].info.run_id, values, step)

    def end_run(status="FINISHED"):
        server.runs[stack.pop().info.run_id]["ended"].append(status)

    mlflow.active_run = lambda: stack[-1] if stack else None
    mlflow.is_tracking_uri_set = lambda: mlflow.uri is not None
    mlflow.set_tracking_uri = lambda uri: setattr(mlflow, "uri", uri)
    mlflow.start_run, mlflow.end_run = start_run, end_run
    mlflow.log_params, mlflow.log_metrics = log_params, log_metrics
    return mlflow


def fake_servers(monkeypatch):
    """Replace both packages; a server of each by name."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    made = {"wandb": Server(), "mlflow": Server()}
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(made["wandb"]))
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow(made["mlflow"]))
    return made
