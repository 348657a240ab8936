"""Files that are there whole or not at all: the cache, downloads."""

import hashlib
import http.server
import threading

import numpy as np
import pytest

from mlframework.errors import UserError
from mlframework.files import atomic
from mlframework.tasks.data_folder import cached, data_folder, download

BODY = bytes(range(256)) * 1000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY; `/short` breaks off in the middle, `/absent` is a 404."""

    def do_GET(self):
        self.send_response(404 if self.path == "/absent" else 200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:1000] if self.path == "/short" else BODY)

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


def test_a_flipped_byte_in_the_cache_is_noticed(cache):
    def arrays():
        return cached("thing", 0, lambda: {"x": np.arange(1000)}, source=__file__)

    arrays()
    (path,) = cache.iterdir()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert np.array_equal(arrays()["x"], np.arange(1000))


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


def test_a_download_arrives_whole(server, tmp_path):
    download(f"{server}/file", tmp_path / "new" / "file", md5=hashlib.md5(BODY).hexdigest(), otherwise="")
    assert (tmp_path / "new" / "file").read_bytes() == BODY
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize("page", ["other", "short", "absent"])
def test_a_download_that_goes_wrong_leaves_nothing_and_says_what_else_to_do(server, tmp_path, page):
    right = "0" * 32 if page == "other" else hashlib.md5(BODY).hexdigest()
    with pytest.raises(UserError, match="put it here") as caught:
        download(f"{server}/{page}", tmp_path / "file", md5=right, otherwise="put it here")
    assert "\n" not in str(caught.value)
    assert f"{server}/{page}" in str(caught.value)
    assert files_in(tmp_path) == []


def test_the_data_folder_is_the_argument_else_the_environment_else_in_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFRAMEWORK_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(data_folder("~/data")) == "/home/somebody/data"
    assert data_folder(None) == tmp_path
    monkeypatch.delenv("MLFRAMEWORK_DATA")
    assert str(data_folder(None)) == "/home/somebody/.local/share/mlframework"


def test_what_is_built_and_what_is_read_have_the_same_layout(cache):
    def build():
        return {"turned": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1), "columns": np.ones((2, 3), order="F")}

    cold, warm = (cached("layout", 0, build, source=__file__) for _ in range(2))
    assert {name: array.strides for name, array in cold.items()} == {
        name: array.strides for name, array in warm.items()
    }
    assert all(array.flags.c_contiguous for array in (*cold.values(), *warm.values()))
