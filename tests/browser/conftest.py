"""JupyterLab on loopback, Debian's Chromium, and a notebook with every explorer.

`make test-browser` runs these tests; `make test` leaves them out.
"""

import ast
import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from driving import PATIENCE, Watched

REPOSITORY = Path(__file__).parents[2]
SCREENSHOTS = Path(__file__).parent / "screenshots"  # git ignores it
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
IDLE = """() => {
    const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
    return kernel?.connectionStatus === "connected" && kernel?.status === "idle";
}"""
CELLS = [
    """import json

import grokkit
import numpy as np

grokkit.virtual_devices(8)
lm = grokkit.load("nano", progress=False)
lm""",
    "from grokkit.widgets import *",
    'routing = RoutingExplorer(lm, "The duty of the Congress is", n_new=8)\nrouting',
    'attention = AttentionExplorer(lm, "27+58=85")\nattention',
    'lens = LensExplorer(lm, "27+58=")\nlens',
    'sampling = SamplingPlayground(lm, "The duty of the Congress is", max_len=16)\nsampling',
    'patching = PatchingExplorer(lm, "27+58=", "27+51=")\npatching',
]


@dataclasses.dataclass
class Lab:
    """A running JupyterLab."""

    url: str
    token: str
    root: Path
    runtime: Path

    def get(self, path: str):
        """What the server's REST interface answers."""
        request = urllib.request.Request(
            f"{self.url}{path}", headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def page_of(self, notebook: str) -> str:
        """The address at which a notebook opens alone, in a workspace of its own."""
        workspace = Path(notebook).stem
        return f"{self.url}/lab/workspaces/{workspace}/tree/{notebook}?token={self.token}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A server with settings and kernels of its own, that asks nothing of the internet."""
    base = tmp_path_factory.mktemp("lab")
    root, config, settings = base / "root", base / "config", base / "settings"
    for folder in (root, config / "labconfig", settings):
        folder.mkdir(parents=True)
    disabled = {"@jupyterlab/apputils-extension:announcements": True}
    (config / "labconfig" / "page_config.json").write_text(
        json.dumps({"disabledExtensions": disabled})
    )
    # Cells out of sight stay in the page, where the tests can scroll to them.
    tracker = settings / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps({"windowingMode": "none"}))
    write_notebook(root / "explorers.ipynb")
    for notebook in (REPOSITORY / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, root)
    port, token = free_port(), secrets.token_hex(16)
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(config),
        "JUPYTER_RUNTIME_DIR": str(base / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(base / "workspaces"),
        "IPYTHONDIR": str(base / "ipython"),
        "MPLCONFIGDIR": str(base / "matplotlib"),
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
        "--expose-app-in-browser", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    with (base / "log.txt").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, cwd=root, stdout=log, stderr=log, start_new_session=True
        )
    found = Lab(f"http://127.0.0.1:{port}", token, root, base / "runtime")
    try:
        wait_for(lambda: answers(found), server, base / "log.txt")
        yield found
    finally:
        os.killpg(server.pid, signal.SIGINT)  # kernels too, for they are in the server's session
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(lab: Lab) -> bool:
    try:
        return "version" in lab.get("/api")
    except OSError:
        return False


def wait_for(true, server, log) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        if server.poll() is not None or time.monotonic() > end:
            pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)


def write_notebook(path: Path) -> None:
    import nbformat

    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec})
    nbformat.write(notebook, path)


@pytest.fixture(scope="session")
def chromium():
    """Debian's own browser; Playwright's is never installed."""
    from playwright.sync_api import sync_playwright

    if not Path(CHROMIUM).is_file():
        pytest.fail(f"{CHROMIUM} is missing: apt-get install chromium, or set CHROMIUM")
    SCREENSHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def notebook(lab, chromium):
    """The notebook with every explorer, all cells run."""
    context = chromium.new_context(viewport={"width": 1300, "height": 1300})
    watched = Watched(context)
    page = watched.page
    page.goto(lab.page_of("explorers.ipynb"))
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function(IDLE)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_selector(".grokkit-patching .grokkit-view")
    page.wait_for_function(IDLE)
    # Results that arrive move what lies below them.
    ready = "document.querySelectorAll('.grokkit-explorer .gk-ready').length"
    page.wait_for_function(f"{ready} === 5")
    yield watched
    context.close()


@pytest.fixture
def page(notebook):
    """The notebook's page; a test fails if an error shows up in its console."""
    yield notebook.page
    notebook.check()


class Kernel:
    """A second line to the notebook's kernel, to ask what the page ought to show."""

    def __init__(self, connection_file: Path) -> None:
        from jupyter_client import BlockingKernelClient

        self._client = BlockingKernelClient(connection_file=str(connection_file))
        self._client.load_connection_file()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=PATIENCE)

    def ask(self, expression: str):
        """The value of an expression, by way of JSON."""
        # In a cell, and not as a user expression alone: cells take turns with the explorers.
        reply = self._client.execute(
            f"_asked = json.dumps({expression})", store_history=False, reply=True,
            timeout=PATIENCE, user_expressions={"it": "_asked"},
        )["content"]["user_expressions"]["it"]  # fmt: skip
        assert reply["status"] == "ok", reply
        return json.loads(ast.literal_eval(reply["data"]["text/plain"]))

    def wait_for(self, condition: str) -> None:
        """Wait until a condition holds: the page's messages come by another way than these."""
        end = time.monotonic() + PATIENCE
        while not self.ask(condition):
            assert time.monotonic() < end, f"{condition} never came true"
            time.sleep(0.1)

    def close(self) -> None:
        self._client.stop_channels()


@pytest.fixture(scope="session")
def kernel(lab, notebook):
    """The notebook's own kernel."""
    (session,) = [s for s in lab.get("/api/sessions") if s["path"] == "explorers.ipynb"]
    found = Kernel(lab.runtime / f"kernel-{session['kernel']['id']}.json")
    yield found
    found.close()


@pytest.fixture
def shoot():
    """Save a picture of an element, or of what a page shows."""

    def save(shown, name: str) -> None:
        path = SCREENSHOTS / f"{name}.png"
        shown.screenshot(path=path)
        assert path.stat().st_size > 5000  # more than an empty box

    return save


@pytest.fixture
def expect():
    """Playwright's assertions, which wait for what they assert."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE * 1000)
    return expect
