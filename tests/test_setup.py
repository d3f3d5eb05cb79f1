"""Setting up and saving: Makefile, JupyterLab as `make lab` starts it, git's merges; all in a folder with a space in its name."""
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, load
from jupyter_client import BlockingKernelClient

pytestmark = pytest.mark.committed
CHAPTER = "02_forward.ipynb"


def run(*command, cwd, **env):
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path) -> Path:
    "A git repository with the files of this one, which uses this one's virtual environment."
    clone = tmp_path / "with a space" / "fromfound"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info"))
    (clone / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir(): (clone / ".venv" / path.name).symlink_to(path)
    (clone / ".venv" / ".ready").unlink(missing_ok=True)
    (clone / ".venv" / ".ready").touch()
    for command in ("init -q -b main", "add -A", "-c user.name=a -c user.email=a@example.org commit -qm all"):
        done = run("git", *command.split(), cwd=clone)
        assert done.returncode == 0, done.stderr
    return clone


@pytest.fixture
def lab(clone, tmp_path):
    "A function that asks the server of `make lab`, by Jupyter's REST interface."
    runtime = tmp_path / "runtime"
    server = subprocess.Popen(["make", "lab", "LAB_ARGS=--no-browser --port=0"], cwd=clone, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "JUPYTER_RUNTIME_DIR": str(runtime)}, start_new_session=True)
    for line in server.stderr:
        if found := re.search(r"(http://localhost:\d+)/\S*token=(\w+)", line): break
    else: raise AssertionError("make lab has ended")

    def ask(method: str, path: str, body: dict | None = None) -> dict:
        request = urllib.request.Request(f"{found.group(1)}/api/{path}", method=method, data=body and json.dumps(body).encode(),
                                         headers={"Authorization": f"token {found.group(2)}"})
        with urllib.request.urlopen(request) as answer: return json.loads(answer.read() or "null")

    for _ in range(100):  # the address is printed a little before somebody answers there
        try: ask("GET", "status")
        except urllib.error.URLError: time.sleep(0.1)
        else: break
    ask.runtime = runtime
    yield ask
    os.killpg(server.pid, signal.SIGTERM)
    server.wait()


def outputs_of(kernel: BlockingKernelClient, code: str) -> list[dict]:
    "Run code in a kernel and return its outputs as JupyterLab would store them."
    outputs = []

    def keep(message):
        kind, content = message["msg_type"], message["content"]
        if kind == "stream": outputs.append({"output_type": "stream", **content})
        if kind == "execute_result": outputs.append({"output_type": kind, **content})
        assert kind != "error", content

    kernel.execute_interactive(code, timeout=60, output_hook=keep)
    return outputs


def test_open_run_a_cell_and_save(lab, clone):
    "What a reader's JupyterLab does: open a chapter, run its first cells, save. Nothing but outputs has changed then, and all tests pass."
    opened = lab("GET", f"contents/{CHAPTER}")["content"]
    saved = copy.deepcopy(opened)
    session = lab("POST", "sessions", {"path": CHAPTER, "type": "notebook", "name": "", "kernel": {"name": "python3"}})
    kernel = BlockingKernelClient(connection_file=str(lab.runtime / f"kernel-{session['kernel']['id']}.json"))
    kernel.load_connection_file()
    kernel.start_channels()
    kernel.wait_for_ready(timeout=60)
    for count, cell in enumerate([c for c in saved["cells"] if c["cell_type"] == "code"][:8], start=1):
        cell.update(outputs=outputs_of(kernel, "".join(cell["source"])), execution_count=count)
        cell["metadata"] |= {"execution": {"iopub.execute_input": "2026-01-01T00:00:00Z"}, "trusted": True}
    controls = {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "interactive()"}}
    cell["outputs"].append(controls)  # what stands below a figure that moves
    saved["metadata"]["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    saved["metadata"]["language_info"] = {"name": "python", "version": "3.11.7", "file_extension": ".py"}
    lab("PUT", f"contents/{CHAPTER}", {"type": "notebook", "format": "json", "content": saved})
    kernel.stop_channels()

    now, committed = load(clone / "nbs" / CHAPTER), load(ROOT / "nbs" / CHAPTER)
    assert "jupyter.widget" not in json.dumps(now), "sliders are of no use without a kernel, and a page would load their code from elsewhere"
    for notebook in (now, committed):
        for cell in notebook["cells"]: cell.pop("outputs", None)
    assert now == committed, "saving has changed more than outputs"
    changed = run("git", "status", "--short", cwd=clone).stdout.split("\n")
    assert set(changed) <= {f" M nbs/{CHAPTER}", ""}, changed
    bin = str(clone / ".venv" / "bin")
    done = run(f"{bin}/nbdev_test", "--path", f"nbs/{CHAPTER}", cwd=clone, PATH=f"{bin}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(f"{bin}/python", "-m", "pytest", "-m", "committed", "tests/test_in_step.py", cwd=clone)
    assert done.returncode == 0, done.stdout


def test_readers_see_the_notebooks(lab):
    names = [entry["name"] for entry in lab("GET", "contents")["content"]]
    assert names and all(name.endswith(".ipynb") for name in names), names


def test_export_in_a_folder_with_a_space(clone):
    assert run("make", "export", cwd=clone).returncode == 0
    assert run("git", "diff", "--stat", cwd=clone).stdout == ""


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_an_old_python_is_told_what_to_do(clone, tmp_path):
    (clone / ".venv" / ".ready").unlink()
    old = script(tmp_path / "python3.9", f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, 9, 6); sys.version = \'3.9.6\'; $2"')
    done = run("make", "setup", f"PYTHON={old}", cwd=clone)
    assert done.returncode and "this is 3.9.6" in done.stderr and "make setup PYTHON=python3.12" in done.stderr


def test_a_half_made_environment_is_made_again(clone, tmp_path):
    "Debian without python3-venv leaves a .venv without pip behind."
    shutil.rmtree(clone / ".venv")
    half = clone / ".venv" / "bin"
    half.mkdir(parents=True)
    script(half / "python", "exit 1")
    debian = script(tmp_path / "python3", f'[ "$2" = venv ] && exit 1; exec "{sys.executable}" "$@"')
    done = run("make", "setup", f"PYTHON={debian}", cwd=clone)
    assert done.returncode and "apt install python3-venv" in done.stderr and not (clone / ".venv").exists()


@pytest.mark.parametrize("installed", [True, False], ids=["with nbdev", "without"])
def test_two_sides_of_a_notebook_are_merged(clone, installed):
    "Two branches write into one cell: both sides are in the file afterwards, and git says that there is a conflict."
    def git(*command, ok=True):
        done = run("git", "-c", "user.name=a", "-c", "user.email=a@example.org", *command, cwd=clone, PATH="/usr/bin:/bin")
        assert not ok or done.returncode == 0, done.stdout + done.stderr
        return done

    def write(text):
        notebook = load(clone / "nbs" / CHAPTER)
        notebook["cells"][0]["source"] = [f"# {text}\n"]
        (clone / "nbs" / CHAPTER).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        git("commit", "-qam", text)

    git("config", "--local", "include.path", "../.gitconfig")
    git("switch", "-qc", "other")
    write("THEIRS")
    git("switch", "-q", "main")
    write("OURS")
    if not installed: shutil.rmtree(clone / ".venv")
    done = git("merge", "other", ok=False)
    merged = (clone / "nbs" / CHAPTER).read_text()
    assert "THEIRS" in merged and "OURS" in merged, done.stdout + done.stderr
    assert done.returncode != 0 and "CONFLICT" in done.stdout
    if installed: assert load(clone / "nbs" / CHAPTER), "still a notebook"
