"""A small Hugging Face Hub on this machine, for transfers that are real."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading

COMMIT = "c" * 40


class Hub(http.server.ThreadingHTTPServer):
  """Serves the files of a folder as one folder of a repository.

  Attributes:
    files: contents of the repository by name; uploads add to them.
    created: bodies of the requests to make a repository.
    failures: so many requests get status 503 first.
    wrong: file whose SHA-256 is told wrongly.
    revisions: what was asked for by name.
    served: bytes of file content that were sent.
  """

  def __init__(self, folder=None, place=""):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.failures, self.wrong, self.revisions, self.served = 0, "", set(), 0
    self.created = []
    paths = sorted(folder.iterdir()) if folder else []
    self.files = {
      f"{place}/{p.name}".lstrip("/"): p.read_bytes() for p in paths
    }

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}"

  def sha256(self, name):
    digest = hashlib.sha256(self.files[name]).hexdigest()
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
    elif "revision" in parts or parts[:2] == ["api", "models"]:
      if "revision" in parts:
        hub.revisions.add(parts[-1])
      info = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []}
      self._send(200, json.dumps(info).encode(), {})
    elif "resolve" in parts:
      self._file("/".join(parts[parts.index("resolve") + 2 :]))
    else:
      self._send(404, b"", {})

  def do_POST(self):
    hub, parts = self.server, self.path.partition("?")[0].strip("/").split("/")
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    if "create" in parts:
      hub.created.append(json.loads(body))
      owner = hub.created[-1].get("organization", "user")
      answer = {"url": f"{hub.url}/{owner}/{hub.created[-1]['name']}"}
    elif "validate-yaml" in parts:
      answer = {"errors": [], "warnings": []}
    elif "preupload" in parts:
      names = [file["path"] for file in json.loads(body)["files"]]
      answer = {
        "files": [
          {"path": name, "uploadMode": "regular", "shouldIgnore": False}
          for name in names
        ]
      }
    elif "commit" in parts:
      for line in map(json.loads, body.decode().splitlines()):
        if line["key"] == "file":
          content = base64.b64decode(line["value"]["content"])
          hub.files[line["value"]["path"]] = content
      url = f"{hub.url}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
      answer = {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""}
    else:
      self._send(404, b"", {})
      return
    headers = {"Content-Type": "application/json"}
    self._send(200, json.dumps(answer).encode(), headers)

  def _entry(self, name):
    size, digest = len(self.server.files[name]), hashlib.sha256
    lfs = {"oid": self.server.sha256(name), "size": size, "pointerSize": 134}
    oid = digest(name.encode()).hexdigest()[:40]
    return {"type": "file", "path": name, "size": size, "oid": oid, "lfs": lfs}

  def _file(self, name):
    data, status = self.server.files[name], 200
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
    if self.command != "HEAD":
      self.wfile.write(data)


@contextlib.contextmanager
def serve(folder=None, place=""):
  """A running `Hub`."""
  hub = Hub(folder, place)
  threading.Thread(target=hub.serve_forever, daemon=True).start()
  try:
    yield hub
  finally:
    hub.shutdown()
    hub.server_close()
