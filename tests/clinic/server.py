"""A real MONAI Label server with its sample app `monaibundle`, on loopback and without any other network."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

CLINIC = Path(__file__).resolve().parents[2] / ".venv-clinic" / "bin"
STAND_IN = Path(__file__).parent / "stand_in"
MODEL = "semisam_o1"
STARTS, TRAINS, ANSWERS = 120, 600, 120  # most seconds


def environment() -> dict[str, str]:
    """Of MONAI Label's processes: `monailabel` calls a bare python, and torchvision needs its operators declared."""
    return os.environ | {
        "PATH": f"{CLINIC}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{STAND_IN}{os.pathsep}{STAND_IN.parents[2]}",  # the package of this checkout
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def make_app(folder: Path) -> None:
    """A copy of the app `monaibundle` from the installed package."""
    command = ["monailabel", "apps", "--download", "--name", "monaibundle", "--output", str(folder)]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=STARTS)


class Refused(Exception):
    """An answer that says no: its status and its text."""

    def __init__(self, status: int, text: str):
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text


class Server:
    """A server of the app in ``folder``/apps for the images in ``studies``, with ``bundle`` as its one model.

    The bundle is copied into the app at the first start. Use it as a context; a failure in it shows the end of its log.
    """

    def __init__(self, folder: Path, studies: Path, bundle: Path, **conf: str):
        self.folder, self.studies, self.app = folder, studies, folder / "apps" / "monaibundle"
        self.bundle, self.log = self.app / "model" / MODEL, folder / "server.log"
        if not self.app.is_dir():
            make_app(folder / "apps")
        if not self.bundle.is_dir():
            shutil.copytree(bundle, self.bundle)
        self.conf = {"models": MODEL, "zoo_source": "local", "sam2": "false"} | conf

    def __enter__(self) -> "Server":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        conf = [part for name, value in self.conf.items() for part in ("--conf", name, value)]
        command = ["monailabel", "start_server", "--app", str(self.app), "--studies", str(self.studies), *conf]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait_for_start()
        except BaseException:
            self.__exit__(RuntimeError, None, None)
            raise
        return self

    def _wait_for_start(self) -> None:
        end = time.monotonic() + STARTS
        while time.monotonic() < end:
            assert self.process.poll() is None, "the server ended"
            with contextlib.suppress(OSError):
                self.get("/info/")
                return
            time.sleep(0.5)
        raise AssertionError(f"the server did not answer in {STARTS} seconds")

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if kind is not None:
            print("\n".join(self.log.read_text(errors="replace").splitlines()[-80:]))

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json", **query) -> bytes:
        """The body of an answer.

        Raises:
            Refused: the server says no.
        """
        address = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(address, body, {"Content-Type": kind} if body else {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=ANSWERS) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")) from error

    def get(self, path: str, **query):
        return json.loads(self.ask("GET", path, **query))

    def infer(self, image: str | Path, out: Path, **params) -> Path:
        """The label that the server gives an image (its id or its path), written to ``out``."""
        body, kind = form({"params": json.dumps(self.shown("models") | {"device": "cpu"} | params)})
        out.write_bytes(self.ask("POST", f"/infer/{MODEL}", body, kind, image=str(image), output="image"))
        return out

    def save_label(self, image: str, label: Path, tag: str = "final", params: dict | None = None) -> dict:
        """What 3D Slicer's module does when a person submits a label; the server's answer."""
        body, kind = form({"params": json.dumps(params or {})}, {"label": label})
        return json.loads(self.ask("PUT", "/datastore/label", body, kind, image=image, tag=tag))

    def train(self, **settings) -> dict:
        """Start a training with the settings that the page shows."""
        chosen = self.shown("trainers") | {"device": "cpu"} | settings
        return json.loads(self.ask("POST", f"/train/{MODEL}", json.dumps(chosen).encode()))

    def shown(self, section: str) -> dict:
        """What 3D Slicer's module sends along: every field that the server shows, the first choice of lists."""
        fields = self.get("/info/")[section][MODEL]["config"]
        return {name: value[0] if isinstance(value, list) else value for name, value in fields.items()}

    def running(self, task: str = "train") -> dict:
        """The task of a kind that runs now, once its process has begun."""
        end = time.monotonic() + STARTS
        while True:
            try:
                return self.get(f"/{task}/", check_if_running=True)
            except Refused:  # not yet
                assert time.monotonic() < end, f"no {task} began in {STARTS} seconds"
                time.sleep(0.1)

    def wait(self, task: str = "train", seconds: float = TRAINS) -> dict:
        """The last task of a kind once it is done: its status and the last lines that it said."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.get(f"/{task}/")
            if found["status"] in ("DONE", "ERROR", "STOPPED"):
                return found
            time.sleep(0.5)
        raise AssertionError(f"{task} was not done in {seconds} seconds")


def form(fields: dict[str, str], files: dict[str, Path] | None = None) -> tuple[bytes, str]:
    """A body of multipart/form-data, and its content type."""
    mark = "----------semisam"
    parts = [f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()
             for name, text in fields.items()]  # fmt: skip
    for name, path in (files or {}).items():
        head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="{path.name}"\r\n'
        parts.append(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + path.read_bytes() + b"\r\n")
    return b"".join(parts) + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"
