"""A hub of one repository on this machine: the few addresses that huggingface_hub asks for."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Serves `files` of org/name at COMMIT, also under the names in `branches`; keeps what was asked for."""

    def __init__(self, files, status=200, error=""):
        self.files = files
        self.branches = {"main", COMMIT}
        self.status, self.error = status, error
        self.fetched = []
        hub = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                return None

            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, request, body):
        path = urlsplit(request.path).path
        if self.status != 200:
            return self.send(request, b"{}", body, self.status, {"X-Error-Code": self.error})
        head = "/api/models/org/name/"
        if path.startswith(head + "revision/"):
            if path.rsplit("/", 1)[1] not in self.branches:
                return self.send(request, b"{}", body, 404, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
            return self.send(request, json.dumps(info).encode(), body)
        if path.startswith(head + "tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return self.send(request, json.dumps(tree).encode(), body)
        prefix = f"/org/name/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name not in self.files:
            return self.send(request, b"", body, 404, {"X-Error-Code": "EntryNotFound"})
        if body:
            self.fetched.append(name)
        data = self.files[name]
        tag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.send(request, data, body, headers=tag)

    def send(self, request, data, body, status=200, headers=None):
        request.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(data)
