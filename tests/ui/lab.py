"JupyterLab on loopback and a notebook in it, as a browser sees them."
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
HOMES = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR",
         "MPLCONFIGDIR", "MEDKD_CACHE", "HOME")
# what a cell shows: its pictures; its lines of text, what is unfolded or pops up; the numbers beside sliders left out
STATE = """async cell => {
    const bytes = async image => [...new Uint8Array(await crypto.subtle.digest('SHA-1', await (await fetch(image.src)).arrayBuffer()))].join();
    const seen = image => image.src && image.getBoundingClientRect().width > 0;
    const pictures = await Promise.all([...cell.querySelectorAll('.jp-Cell-outputWrapper img')].filter(seen).map(bytes));
    const drawn = [...cell.querySelectorAll('.jp-Cell-outputWrapper .widget-html svg')].map(svg => svg.innerHTML);
    const text = [...cell.querySelectorAll('.jp-Cell-outputWrapper :is(pre, table, .widget-label, .widget-html)')].map(part => part.textContent);
    const open = [...cell.querySelectorAll('details')].map(part => part.open), more = [...cell.querySelectorAll('.medkd-more')].map(part => getComputedStyle(part).visibility);
    return {pictures: [...pictures, ...drawn].join(';'), text: [...text, ...open, ...more].join(';')};
}"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def jupyterlab(folder, home):
    """Address and token of a JupyterLab that serves `folder`; what it and its kernels write elsewhere goes to `home`.
    Afterwards it is asked to stop; RuntimeError if a process of it is left (then ended) or it did not start."""
    port, token = free_port(), secrets.token_hex(16)
    env = os.environ | {name: str(home/name.lower()) for name in HOMES} | dict(IN_TEST="1")
    for name in ("MEDKD_DATA", "MPLBACKEND"): env.pop(name, None)
    for name in HOMES: (home/name.lower()).mkdir(parents=True, exist_ok=True)
    quiet = home/"jupyterlab_settings_dir"/"@jupyterlab"/"apputils-extension"/"notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"]
    address = f"http://127.0.0.1:{port}"
    with open(home/"server.log", "w") as log:
        server = psutil.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        await_server(server, f"{address}/api?token={token}", home/"server.log")
        yield address, token
        family = [server, *server.children(recursive=True)]
        ask(f"{address}/api/shutdown?token={token}", data=b"")
        left = psutil.wait_procs(family, timeout=30)[1]
        if left: raise RuntimeError(f"JupyterLab left processes: {[process.cmdline() for process in left]}")
    finally:
        for process in reversed([server, *server.children(recursive=True)] if server.is_running() else []):
            with contextlib.suppress(psutil.NoSuchProcess): process.kill()


def ask(address, data=None):
    with urllib.request.urlopen(address, data, timeout=10) as answer: return answer.read()


def await_server(server, address, log):
    for _ in range(480):
        if server.poll() is not None: break
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError): return ask(address)
        time.sleep(.25)
    raise RuntimeError(f"JupyterLab did not start:\n{Path(log).read_text()[-3000:]}")


class Notebook:
    "An open notebook: run it, look at its cells and controls."
    def __init__(self, page, address, token, path):
        self.page = page
        page.goto(f"{address}/lab/tree/{path}?token={token}")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        self.do("await w.context.ready; await w.sessionContext.ready; await w.sessionContext.session.kernel.info;")
        self.until("w.sessionContext.session.kernel.status == 'idle'", 90)
        self.do("window.kernelErrors = []; w.sessionContext.iopubMessage.connect((_, message) => {"
                " if (message.header.msg_type == 'error') window.kernelErrors.push(message.content.traceback.join('\\n')); });")

    def do(self, script):
        "Run JavaScript; `w` is the notebook panel, `app` JupyterLab."
        return self.page.evaluate("async () => { const app = window.jupyterapp, w = app.shell.currentWidget; %s }" % script)

    def until(self, condition, seconds):
        self.page.wait_for_function("() => { const app = window.jupyterapp, w = app.shell.currentWidget; return %s; }" % condition,
                                    timeout=1000 * seconds, polling=500)

    def run_all(self, seconds):
        "Run every cell and wait for the last; the outputs of each."
        self.do("app.commands.execute('notebook:run-all-cells');")
        idle = "w.sessionContext.session.kernel.status == 'idle'"
        self.until(idle + " && w.content.widgets.every(c => c.model.type != 'code' || !c.model.sharedModel.source || c.model.executionState == 'idle'"
                   " && (c.model.executionCount || c.model.outputs.toJSON().some(o => o.output_type == 'error')))"
                   " || w.content.widgets.some(c => c.model.type == 'code' && c.model.outputs.toJSON().some(o => o.output_type == 'error'))", seconds)
        return self.outputs()

    def outputs(self):
        return self.do("return [...w.content.widgets].map(c => c.model.type == 'code' ? c.model.outputs.toJSON() : []);")

    def sources(self): return self.do("return [...w.content.widgets].map(c => c.model.sharedModel.source);")

    def errors(self):
        "Of cells and of what controls call, which JupyterLab shows nowhere."
        return self.page.evaluate("window.kernelErrors")

    def theme(self, name):
        self.do(f"await app.commands.execute('apputils:change-theme', {{theme: '{name}'}});")
        self.page.wait_for_function(f"() => document.body.dataset.jpThemeName == '{name}'")

    def cell(self, index):
        "The cell, scrolled into view."
        self.do(f"w.content.activeCellIndex = {index}; await w.content.scrollToItem({index});")
        found = self.page.locator(f'.jp-Notebook .jp-Cell[data-windowed-list-index="{index}"]')
        found.locator(".jupyter-widgets").first.wait_for(state="attached", timeout=30_000)
        return found


def state(cell): return cell.evaluate(STATE)


def changed(cell, before, seconds=60):
    "What the cell shows once that differs from `before` and stays while the kernel has nothing left to do; None when it does not."
    end, last = time.time() + seconds, before
    while time.time() < end:
        time.sleep(.25)
        idle, now = cell.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status") == "idle", state(cell)
        if now != before and now == last and idle: return now
        last = now if idle else None
    return None
