"""A server on this machine that answers as the Hub does."""

import hashlib
import http.server
import json
import threading

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Listings, and `GET` and `HEAD` of files, out of a dict of repositories."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, format, *args):
        pass

    def answer(self, body):
        path = self.path.lstrip("/").partition("?")[0]
        if path.startswith("api/models/"):
            return self.listing(path.removeprefix("api/models/"))
        name, _, file = path.replace(COMMIT, "main").partition("/resolve/main/")
        if file:
            self.server.requests.append((self.command, file))
        repo = self.server.repos.get(name)
        if repo is None or file not in repo:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if repo is None else "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(repo[file]).hexdigest()}"')
        self.send_header("Content-Length", str(len(repo[file])))
        self.end_headers()
        if body:
            self.wfile.write(repo[file])
        return None

    def listing(self, path):
        """The commit of a repository's main branch, or the files of that commit."""
        name, _, asked = path.replace("/revision/", "/tree/").partition("/tree/")
        repo = self.server.repos.get(name)
        files = [
            {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
            for file, content in (repo or {}).items()
        ]
        siblings = [{"rfilename": file} for file in repo or {}]
        about = {"id": name, "sha": COMMIT, "siblings": siblings} if asked == "main" else files
        text = json.dumps(about).encode()
        self.send_response(200 if repo is not None else 404)
        if repo is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running Hub that huggingface_hub takes for the real one; `.stop()` ends it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.requests = {}, []
    server.cache = tmp_path / "cache"
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(server.cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    stopped = []

    def stop():
        if not stopped:
            server.shutdown()
            server.server_close()
            stopped.append(True)
            monkeypatch.setattr("time.sleep", lambda _: None)  # between the library's retries

    server.stop = stop
    yield server
    stop()
