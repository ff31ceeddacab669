"""Fetching: mirrors, checksums, locks and what is left after each fault, against a server on the loopback."""

import contextlib
import errno
import gzip
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import PATIENCE
from filelock import FileLock

from data_fixtures import idx_bytes, write_mnist
from lbp import registry
from lbp.datasets import fetch as fetching
from lbp.datasets import sources
from lbp.datasets.data import load
from lbp.datasets.fetch import fetch
from lbp.errors import DataError

BODY = bytes(range(256)) * 400
MD5 = hashlib.md5(BODY).hexdigest()
STEMS = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


def loaded(root):
    cfg = {"name": "torchvision_set", "set": "mnist", "root": str(root), "val_size": 0}
    return load(cfg, seed=0, batch_size=8)


class Server:
    """Serves `files` by path: bytes, a status, or a function of the request. Keeps the paths asked for."""

    def __init__(self):
        self.files, self.asked, self.over = {}, [], threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                serve = server.files.get(self.path, 404)
                if callable(serve):
                    serve(self)
                elif isinstance(serve, int):
                    self.send_error(serve)      # with an HTML page
                else:
                    server.send(self, serve)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @staticmethod
    def send(request, body, length=None):
        request.send_response(200)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        request.wfile.write(body)

    def silent(self, request):
        self.over.wait(20)

    def half(self, request):
        """Half of BODY, then silence."""
        self.send(request, BODY[:50_000], len(BODY))
        self.over.wait(20)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.over.set()
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture
def gone():
    """An address that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{s.getsockname()[1]}/file"


@contextlib.contextmanager
def powerless(mode):
    """A folder of that mode whose bits hold for this process, as they would not for root."""
    base = tempfile.mkdtemp()       # pytest's own tmp_path may be entered by its owner alone
    os.chmod(base, 0o755)
    try:
        (folder := Path(base) / "data").mkdir()
        yield folder, lambda: folder.chmod(mode) or (os.geteuid() == 0 and os.seteuid(65534))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)
        for inside in folder.rglob("*"):
            inside.chmod(0o755)
        shutil.rmtree(base)


# ---- one file

def test_the_first_mirror_that_serves_the_file(tmp_path, server, gone):
    server.files = {"/html/file": 403, "/damaged/file": BODY[:-1] + b"x", "/page/file": b"<html>hi</html>",
                    "/cut/file": lambda r: server.send(r, BODY[:99], len(BODY)),
                    "/good/file": BODY, "/unasked/file": BODY}
    mirrors = "html", "damaged", "page", "cut", "good", "unasked"
    to = tmp_path / "new" / "folder" / "file"
    fetch([gone] + [f"{server.url}/{m}/file" for m in mirrors], to, MD5)
    assert to.read_bytes() == BODY and list(to.parent.iterdir()) == [to]
    assert server.asked == [f"/{m}/file" for m in mirrors[:-1]]
    mask = os.umask(0)
    os.umask(mask)
    assert to.stat().st_mode & 0o777 == 0o666 & ~mask      # others of a shared folder can read it
    fetch([gone], to, MD5)
    assert len(server.asked) == 5


def test_every_fault_is_named_and_nothing_left_behind(tmp_path, server, gone):
    server.files = {"/html/file": 403, "/damaged/file": BODY[:-1] + b"x",
                    "/cut/file": lambda r: server.send(r, BODY[:99], len(BODY))}
    urls = [gone, *(f"{server.url}/{m}/file" for m in ("html", "damaged", "cut", "none")), "nonsense"]
    to = tmp_path / "new" / "folder" / "file"
    with pytest.raises(DataError) as e:
        fetch(urls, to, MD5)
    message = str(e.value)
    faults = "refused", "Error 403", "another md5", "99 of 102,400 bytes", "Error 404", "unknown url"
    for part in (*urls, *faults, str(to), f"(md5 {MD5})", "by hand"):
        assert part in message
    assert e.value.code == 3 and "\n" not in message and list(tmp_path.iterdir()) == []
    (tmp_path / "kept").write_bytes(b"another's")
    with pytest.raises(DataError):      # without a checksum the length is still compared
        fetch([f"{server.url}/cut/file"], tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("how", ("silent", "half", "lookup"))
def test_a_server_that_falls_silent(tmp_path, server, monkeypatch, how):
    monkeypatch.setattr(fetching, "TIMEOUT", 0.3)
    server.files = {"/a": getattr(server, how, None), "/b": BODY}
    if how == "lookup":
        known = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: server.over.wait(60) and []
                            if host == "nowhere" else known(host, *a, **k))
    first = "http://nowhere/a" if how == "lookup" else f"{server.url}/a"
    start = time.monotonic()
    with pytest.raises(DataError, match="TimeoutError"):
        fetch([first], tmp_path / "x" / "file", MD5)
    assert time.monotonic() - start < 30 and list(tmp_path.iterdir()) == []
    fetch([first, f"{server.url}/b"], tmp_path / "file", MD5)
    assert (tmp_path / "file").read_bytes() == BODY


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_no_right_to_write(server):
    server.files = {"/file": BODY}
    with powerless(0o555) as (folder, give_up):
        give_up()
        with pytest.raises(DataError, match="PermissionError.* by hand") as e:
            fetch([f"{server.url}/file"], folder / "file", MD5)
        for part in (str(folder / "file"), f"{server.url}/file", MD5):
            assert part in str(e.value)
        with pytest.raises(DataError, match="PermissionError"):
            fetch([f"{server.url}/file"], folder / "new" / "file", MD5)
    assert server.asked == []


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "data").write_text("a file, no folder")
    with pytest.raises(DataError, match=r"NotADirectoryError|FileExistsError"):
        fetch(["http://127.0.0.1/file"], tmp_path / "data" / "file", MD5)
    (tmp_path / "file").mkdir()
    with pytest.raises(DataError):
        fetch([], tmp_path / "file", MD5)


def test_a_full_disk_is_no_fault_of_the_mirrors(tmp_path, server, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(fetching, "_copy", full)
    with pytest.raises(OSError) as e:
        fetch([f"{server.url}/a", f"{server.url}/b"], tmp_path / "new" / "file", MD5)
    assert e.value.errno == errno.ENOSPC and e.value.filename.endswith("new/file")
    assert list(tmp_path.iterdir()) == []


# ---- several processes

DRIVER = """
import sys
from pathlib import Path
from lbp.datasets.fetch import fetch
assert not {"torch", "torchvision"} & set(sys.modules)
url, to, *files = sys.argv[1:]
print("ready", flush=True)
for file in files:
    name, md5 = file.split(":")
    fetch([f"{url}/gone/{name}", f"{url}/{name}"], Path(to) / name, md5)
"""


@contextlib.contextmanager
def process(server, to, files):
    ours = str(Path(fetching.__file__).parents[2])
    child = subprocess.Popen([sys.executable, "-c", DRIVER, server.url, str(to), *files], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=os.environ | {"PYTHONPATH": ours})
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def test_eight_processes_and_one_download_of_each_file(tmp_path, server):
    bodies = {name: BODY + name.encode() for name in "abcd"}
    files = [f"{name}:{hashlib.md5(body).hexdigest()}" for name, body in bodies.items()]
    ready = threading.Event()

    def slow(body):
        def serve(request):
            ready.wait(20)      # until all eight are there, or no two might meet
            time.sleep(0.1)
            server.send(request, body)
        return serve
    server.files = {f"/{name}": slow(body) for name, body in bodies.items()}
    to = tmp_path / "new"
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(process(server, to, files)) for _ in range(8)]
        for child in children:
            assert child.stdout.readline() == "ready\n"
        time.sleep(0.2)
        ready.set()
        for child in children:
            assert child.wait(20) == 0, child.stderr.read()
    assert sorted(server.asked) == sorted([f"/{n}" for n in bodies] + [f"/gone/{n}" for n in bodies])
    assert {p.name: p.read_bytes() for p in to.iterdir()} == bodies


def test_eight_processes_fail_together(tmp_path, server):
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(process(server, tmp_path / "new", [f"a:{MD5}"])) for _ in range(8)]
        for child in children:
            assert child.wait(20) == 1
            assert "DataError" in (said := child.stderr.read()) and "HTTP Error 404" in said
    assert list(tmp_path.glob("new/*")) == []


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, server):
    server.files = {"/file": server.half}
    with process(server, tmp_path, [f"file:{MD5}"]) as child:
        until = time.monotonic() + PATIENCE
        while not list(tmp_path.glob(".file.*.part")) and time.monotonic() < until:
            time.sleep(0.02)
        server.files = {"/file": BODY}
        ask = [f"{server.url}/file"], tmp_path / "file", MD5
        waiter = threading.Thread(target=fetch, args=ask, daemon=True)
        waiter.start()
        waiter.join(0.5)
        assert waiter.is_alive() and server.asked.count("/file") == 1       # it waits, and asks for nothing
        child.send_signal(signal.SIGKILL)
        waiter.join(PATIENCE)
        assert not waiter.is_alive()
    assert server.asked.count("/file") == 2 and (tmp_path / "file").read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["file"]     # nothing of the dead process's either


def test_the_wait_for_another_process_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "WAIT", 0.2)
    start = time.monotonic()
    with FileLock(tmp_path / ".file.lock"), pytest.raises(DataError, match="Timeout.*file.lock"):
        fetch(["http://127.0.0.1/file"], tmp_path / "file", MD5)
    assert time.monotonic() - start < 30


# ---- MNIST's files

@pytest.fixture
def mirrored(tmp_path, server, monkeypatch):
    """torchvision's MNIST on two mirrors of ours, /a/ and /b/; only /b/ serves. Returns {path: content}."""
    from torchvision.datasets import MNIST
    files = {f"/b/{name}.gz": gzip.compress(idx_bytes(array))
             for name, array in write_mnist(tmp_path / "made").items()}
    monkeypatch.setattr(MNIST, "mirrors", [f"{server.url}/a/", f"{server.url}/b/"])
    monkeypatch.setattr(MNIST, "resources",
                        [(path[3:], hashlib.md5(body).hexdigest()) for path, body in files.items()])
    server.files = dict(files)
    return files


def test_torchvision_knows_our_files():
    from torchvision import datasets
    for name in ("MNIST", "FashionMNIST", "KMNIST"):
        source = getattr(datasets, name)
        assert source.mirrors and all(m.startswith("http") and m.endswith("/") for m in source.mirrors)
        assert {file for file, _ in source.resources} == {f"{stem}.gz" for stem in STEMS}
        assert all(len(bytes.fromhex(md5)) == 16 for _, md5 in source.resources)


def test_missing_files_are_fetched_and_good_copies_kept(tmp_path, server, mirrored):
    raw = tmp_path / "data/MNIST/raw"
    assert len(loaded(tmp_path / "data").test) == 10
    assert sorted(p.name for p in raw.iterdir()) == sorted(f"{stem}.gz" for stem in STEMS)
    (raw / "train-labels-idx1-ubyte.gz").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in raw.iterdir()}
    server.asked.clear()
    server.files["/a/train-labels-idx1-ubyte.gz"] = server.files["/b/train-labels-idx1-ubyte.gz"]
    loaded(tmp_path / "data")
    assert server.asked == ["/a/train-labels-idx1-ubyte.gz"]
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_a_failed_start_and_the_next(tmp_path, server, mirrored):
    raw, damaged, md5s = tmp_path / "data/MNIST/raw", "/b/train-labels-idx1-ubyte.gz", {}
    for path, body in mirrored.items():
        md5s[path[3:]] = hashlib.md5(body).hexdigest()
    server.files[damaged] = mirrored[damaged][:-5]
    for _ in range(2):
        with pytest.raises(DataError) as e:
            loaded(tmp_path / "data")
        missing = [f"{stem}.gz" for stem in STEMS[1:]]
        for part in (str(raw / missing[0]), *missing, *(md5s[file] for file in missing), f"{server.url}/a/",
                     f"{server.url}/b/", "another md5", "dataset.root or LBP_DATA", "dataset=mnist5k"):
            assert part in str(e.value)
        assert e.value.code == 3 and "\n" not in str(e.value)
        assert [p.name for p in raw.iterdir()] == [f"{STEMS[0]}.gz"]
    server.files[damaged] = mirrored[damaged]
    server.asked.clear()
    assert len(loaded(tmp_path / "data").test) == 10
    assert not any(STEMS[0] in path for path in server.asked)       # the good copy is not asked for again


def test_no_network_leaves_nothing_behind(tmp_path, server, mirrored):
    server.files = {}
    with pytest.raises(DataError, match="HTTP Error 404"):
        loaded(tmp_path / "new" / "data")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name, damage", [
    (STEMS[0], lambda body: gzip.decompress(body)[:-100]),      # half unpacked
    (f"{STEMS[0]}.gz", lambda body: body[:-100]),
    (f"{STEMS[0]}.gz", lambda body: body[:1000] + bytes([body[1000] ^ 1]) + body[1001:]),
    (f"{STEMS[0]}.gz", lambda body: b"<html>403 Forbidden</html>")])
def test_a_damaged_file_in_the_folder_is_refused_by_name(tmp_path, server, mirrored, name, damage):
    loaded(tmp_path / "data")
    file = tmp_path / "data/MNIST/raw" / name
    bad = damage(mirrored[f"/b/{STEMS[0]}.gz"])
    file.write_bytes(bad)
    server.asked.clear()
    for _ in range(2):
        with pytest.raises(DataError, match=f"raw/{name} cannot be read.*delete it"):
            loaded(tmp_path / "data")
        assert file.read_bytes() == bad and server.asked == []
    file.unlink()       # as the message says
    loaded(tmp_path / "data")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_read_only_folder_with_all_files_needs_no_lock():
    with powerless(0o555) as (folder, give_up):
        write_mnist(folder)
        raw = folder / "MNIST" / "raw"
        held = sorted(raw.iterdir())
        for place in (raw, raw.parent):
            place.chmod(0o555)
        give_up()
        assert len(loaded(folder).test) == 10
        assert sorted(raw.iterdir()) == held
        for place in held:
            fetch([], place)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_folder_that_may_not_be_entered(mirrored):
    with powerless(0o000) as (folder, give_up):
        give_up()
        with pytest.raises(DataError, match="PermissionError"):
            loaded(folder)


@pytest.mark.parametrize("error", (ImportError("no module"), RuntimeError("torchvision::nms does not exist")))
@pytest.mark.parametrize("module, package", [
    ("torchvision.datasets", "torchvision"), ("sklearn.datasets", "scikit-learn")])
def test_broken_packages_are_named(tmp_path, monkeypatch, module, package, error):
    read = {name: registry.load("dataset", name) for name in ("torchvision_set", "sklearn_table")}

    def broken(name):
        assert name == module
        raise error
    monkeypatch.setattr(sources.importlib, "import_module", broken)
    with pytest.raises(DataError, match=f"package {package}, .*{error}"):
        if package == "torchvision":
            read["torchvision_set"](root=str(tmp_path), set="mnist")
        else:
            read["sklearn_table"](table="iris")
