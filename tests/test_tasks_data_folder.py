"""Files that are there whole or not at all: the cache, downloads."""

import fcntl
import hashlib
import http.server
import os
import threading

import numpy as np
import pytest

from mlframework.backend import graph_cache
from mlframework.errors import UserError
from mlframework.files import atomic
from mlframework.tasks.data_folder import cached, data_folder
from mlframework.tasks.download import download

BODY = bytes(range(256)) * 1000
SHA256, LENGTH = hashlib.sha256(BODY).hexdigest(), len(BODY)

#: The ranges that the server was asked for.
asked = []


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY, from where it is asked to; what starts with `/short` breaks off, `/absent` is a 404.

    What ends with `from_the_start` does not know ranges.
    """

    def do_GET(self):
        wanted = self.headers.get("Range")
        asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and "from_the_start" not in self.path else 0
        self.send_response(404 if self.path == "/absent" else 206 if start else 200)
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        self.wfile.write(BODY[:1000] if self.path.startswith("/short") else BODY[start:])

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(folder):
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as part:  # noqa: PT012
        part.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert files_in(tmp_path) == ["file"]


def test_what_was_built_once_is_read_until_settings_or_source_change(cache, tmp_path):
    source = tmp_path / "source.py"
    source.write_text("version 1")
    built = []

    def arrays(settings):
        def build():
            built.append(settings)
            return {"x": np.arange(3) + settings, "names": np.array(["a", "bcd"])}

        return cached("thing", settings, build, source=str(source))

    first, again = arrays(1), arrays(1)
    assert built == [1]
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[key], again[key]) for key in first)
    arrays(2)
    source.write_text("version 2")
    arrays(2)
    assert built == [1, 2, 2]


@pytest.mark.parametrize("keep", [0, 10, -10])
def test_a_truncated_cache_file_is_built_anew(cache, keep):
    def arrays():
        return cached("thing", 0, lambda: {"x": np.arange(1000)}, source=__file__)

    arrays()
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    assert np.array_equal(arrays()["x"], np.arange(1000))
    assert np.array_equal(np.load(path)["x"], np.arange(1000))


def test_a_pipe_in_place_of_a_cache_file_is_not_waited_for(cache):
    def arrays():
        return cached("thing", 0, lambda: {"x": np.arange(9)}, source=__file__)

    arrays()
    (path,) = cache.iterdir()
    path.unlink()
    os.mkfifo(path)
    assert np.array_equal(arrays()["x"], np.arange(9)) and path.is_file()
    graph = cache / "0.pickle.z"
    os.mkfifo(graph)
    assert graph_cache.load(graph) is None


def test_a_download_writes_nothing_behind_a_link(server, tmp_path):
    """Everybody knows the name under which a download begins."""
    other = tmp_path / "other"
    other.write_text("somebody else's")
    (tmp_path / f"x.{SHA256[:32]}.part").symlink_to(other)
    with pytest.raises(UserError, match=r"cannot be downloaded to .*x .*Too many levels of symbolic links"):
        download(f"{server}/x", tmp_path / "x", sha256=SHA256, size=LENGTH, otherwise="put it there")
    assert other.read_text() == "somebody else's"


def test_every_flipped_bit_in_the_cache_is_noticed(cache):
    built = []

    def arrays():
        return cached("thing", 0, lambda: built.append(1) or {"x": np.arange(40), "y": np.eye(3)}, source=__file__)

    arrays()
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 61):  # every position within a byte
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        built.clear()
        found = arrays()
        assert built == [1], f"bit {bit}"
        assert np.array_equal(found["x"], np.arange(40)) and np.array_equal(found["y"], np.eye(3))


def test_a_build_that_fails_writes_nothing(cache):
    with pytest.raises(UserError):
        cached("thing", 0, lambda: (_ for _ in ()).throw(UserError("no")), source=__file__)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="computed anew every time"):
        arrays = cached("thing", 0, lambda: {"x": np.arange(3)}, source=__file__)
    assert arrays["x"].tolist() == [0, 1, 2]


def fetched(url, path, *, sha256=SHA256, size=LENGTH):
    download(url, path, sha256=sha256, size=size, otherwise="put it here")


def test_a_download_arrives_whole(server, tmp_path):
    fetched(f"{server}/file", tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_bytes() == BODY
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("page", "wrong", "line"),
    [
        ("file", {"sha256": "0" * 64}, "came with sha256 "),
        ("file", {"size": 5000}, "came with sha256 "),  # more is sent than declared
        ("absent", {}, "HTTP Error 404"),
    ],
)
def test_a_download_that_goes_wrong_leaves_nothing_and_says_what_else_to_do(server, tmp_path, page, wrong, line):
    with pytest.raises(UserError, match="put it here") as caught:
        fetched(f"{server}/{page}", tmp_path / "file", **wrong)
    assert "\n" not in str(caught.value) and line in str(caught.value)
    assert f"{server}/{page}" in str(caught.value)
    assert files_in(tmp_path) == []


def test_no_more_than_the_declared_bytes_are_written(server, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("mlframework.tasks.download.sha256_of", lambda part: written.append(part.stat().st_size))
    with pytest.raises(UserError):
        fetched(f"{server}/file", tmp_path / "file", size=5000)
    assert written[0] <= 5000 + 2**16 < len(BODY)


@pytest.mark.parametrize("page", ["short", "short_and_from_the_start"])
def test_a_download_that_broke_off_goes_on(server, tmp_path, page):
    path = tmp_path / "file"
    with pytest.raises(UserError, match=r"broke off after 1000 of 256000 bytes: try again, or put it here"):
        fetched(f"{server}/{page}", path)
    asked.clear()
    fetched(f"{server}/{'file' if page == 'short' else 'from_the_start'}", path)
    assert asked == ["bytes=1000-"]
    assert path.read_bytes() == BODY and files_in(tmp_path) == ["file"]


def test_what_an_earlier_try_fetched_wrongly_is_fetched_anew(server, tmp_path):
    part = tmp_path / f"file.{SHA256[:32]}.part"
    part.write_bytes(b"wrong" * 100)
    with pytest.raises(UserError, match="sha256"):
        fetched(f"{server}/file", tmp_path / "file")
    fetched(f"{server}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY


def test_two_processes_that_download_one_file_do_not_mix_it_up(server, tmp_path):
    part = tmp_path / f"file.{SHA256[:32]}.part"
    with part.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as another process that is at it
        fetched(f"{server}/file", tmp_path / "file")
        assert not part.stat().st_size
    assert (tmp_path / "file").read_bytes() == BODY


def test_the_data_folder_is_the_argument_else_the_environment_else_in_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFRAMEWORK_DATA", str(tmp_path))
    home = tmp_path / "somebody"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert data_folder("~/data") == home / "data"
    assert data_folder(None) == tmp_path
    monkeypatch.delenv("MLFRAMEWORK_DATA")
    assert data_folder(None) == home / ".local" / "share" / "mlframework"


def test_what_is_built_and_what_is_read_have_the_same_layout(cache):
    def build():
        return {"turned": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1), "columns": np.ones((2, 3), order="F")}

    cold, warm = (cached("layout", 0, build, source=__file__) for _ in range(2))
    assert {name: array.strides for name, array in cold.items()} == {
        name: array.strides for name, array in warm.items()
    }
    assert all(array.flags.c_contiguous for array in (*cold.values(), *warm.values()))
