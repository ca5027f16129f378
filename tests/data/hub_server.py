"""A small Hugging Face Hub on this machine, for downloads that are real."""

import contextlib
import hashlib
import http.server
import json
import threading

COMMIT = "c" * 40


class Hub(http.server.ThreadingHTTPServer):
  """Serves the files of a folder as one folder of a dataset's repository.

  Attributes:
    failures: so many requests get status 503 first.
    wrong: file whose SHA-256 is told wrongly.
    revisions: what was asked for by name.
    served: bytes of file content that were sent.
  """

  def __init__(self, folder, place):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.failures, self.wrong, self.revisions, self.served = 0, "", set(), 0
    self.files = {f"{place}/{p.name}": p for p in sorted(folder.iterdir())}

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}"

  def sha256(self, name):
    digest = hashlib.sha256(self.files[name].read_bytes()).hexdigest()
    return "0" * 64 if name.endswith(self.wrong or "?") else digest


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    hub, (path, _, _) = self.server, self.path.partition("?")
    parts = path.strip("/").split("/")
    if hub.failures:
      hub.failures -= 1
      self._send(503, b"", {})
    elif "tree" in parts:
      self._send(200, json.dumps([*map(self._entry, hub.files)]).encode(), {})
    elif "revision" in parts:
      hub.revisions.add(parts[-1])
      info = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []}
      self._send(200, json.dumps(info).encode(), {})
    elif "resolve" in parts:
      self._file("/".join(parts[parts.index("resolve") + 2 :]))
    else:
      self._send(404, b"", {})

  def _entry(self, name):
    size, digest = self.server.files[name].stat().st_size, hashlib.sha256
    lfs = {"oid": self.server.sha256(name), "size": size, "pointerSize": 134}
    oid = digest(name.encode()).hexdigest()[:40]
    return {"type": "file", "path": name, "size": size, "oid": oid, "lfs": lfs}

  def _file(self, name):
    data, status = self.server.files[name].read_bytes(), 200
    headers = {
      "X-Repo-Commit": COMMIT,
      "ETag": f'"{self.server.sha256(name)}"',
      "X-Linked-Etag": f'"{self.server.sha256(name)}"',
      "X-Linked-Size": str(len(data)),
      "Accept-Ranges": "bytes",
    }
    if asked := self.headers.get("Range"):
      first = int(asked.removeprefix("bytes=").split("-")[0])
      headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
      data, status = data[first:], 206
    if self.command == "GET":
      self.server.served += len(data)
    self._send(status, data, headers)

  def _send(self, status, data, headers):
    self.send_response(status)
    for name, value in (headers | {"Content-Length": str(len(data))}).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(data)


@contextlib.contextmanager
def serve(folder, place):
  """A running `Hub`."""
  hub = Hub(folder, place)
  threading.Thread(target=hub.serve_forever, daemon=True).start()
  try:
    yield hub
  finally:
    hub.shutdown()
    hub.server_close()
