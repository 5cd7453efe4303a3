"""As much of the Hugging Face Hub as push and pull talk to, on this machine."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories {"OWNER/NAME": {path: bytes}}; every commit is one request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.private, self.commits = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    def sha(self, repo):
        content = json.dumps(sorted(map(str, self.repos[repo].items())))
        return hashlib.sha1(content.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The requests that huggingface_hub makes."""

    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, value=None, code=200, data=None, **headers):
        data = json.dumps(value).encode() if data is None else data
        self.send_response(code)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, kind):
        self.answer({"error": "not found"}, 404, X_Error_Code=kind)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            if found[1] not in self.server.repos:
                return self.missing("RepoNotFound")
            repo = {"id": found[1], "sha": self.server.sha(found[1]), "siblings": []}
            return self.answer(repo | {"tags": [], "private": True})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(\w+)", path):
            files = self.server.repos[found[1]].items()
            return self.answer(
                [
                    {"type": "file", "path": p, "size": len(x), "oid": "0" * 40}
                    for p, x in files
                ]
            )
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            repo = self.server.repos[found[1]]
            if found[3] not in repo:
                return self.missing("EntryNotFound")
            data = repo[found[3]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            commit = self.server.sha(found[1])
            return self.answer(data=data, ETag=etag, X_Repo_Commit=commit)
        return self.missing("EntryNotFound")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            value = json.loads(body)
            repo = f"{value.get('organization') or 'me'}/{value['name']}"
            self.server.repos[repo] = {}
            self.server.private[repo] = value["visibility"] == "private"
            return self.answer({"url": f"{self.server.url}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            return self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular"}
                        | {"shouldIgnore": False}
                        for f in json.loads(body)["files"]
                    ]
                }
            )
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            head = lines[0]["value"]
            parent = head.get("parentCommit")
            if parent not in (None, self.server.sha(found[1])):
                return self.answer({"error": "the branch has moved"}, 412)
            for line in lines[1:]:
                value = line["value"]
                content = base64.b64decode(value["content"])
                self.server.repos[found[1]][value["path"]] = content
            self.server.commits.append(head["summary"])
            sha = self.server.sha(found[1])
            url = f"{self.server.url}/{found[1]}/commit/{sha}"
            return self.answer({"commitOid": sha, "commitUrl": url, "success": True})
        return self.missing("EntryNotFound")
