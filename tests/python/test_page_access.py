"""Who may read the run page, with a browser's password or a program's token, plain and over TLS."""

import base64
import json
import re
import ssl
import subprocess
import urllib.error
import urllib.request

from cluster import BINARY
from secured import authority, folder, service  # noqa: F401
from test_end_to_end import inputs, phase, spec  # noqa: F401


def test_the_run_page_shows_a_tokens_runs(inputs, service, authority, tmp_path):  # noqa: F811
    uniform = [phase(policy="uniform", n_chunks=1)]
    for name in ("team-a-page", "team-b-page"):
        asked = spec(inputs, name, phases=uniform, reference=None, learner=None)
        service.connect("admin").open_run(asked)

    def ask(path: str, header: str | None, page: str = service.coordinator.page_address, **how):
        request = urllib.request.Request(
            page + path, headers={"Authorization": header} if header else {}
        )
        try:
            return urllib.request.urlopen(request, timeout=10, **how)
        except urllib.error.HTTPError as error:
            return error

    def bearer(name: str) -> str:
        return f"Bearer {service.secrets[name]}"

    for header in (None, "Bearer sbt_" + "0" * 64):
        refusal = ask("/", header)
        assert refusal.status == 401 and refusal.headers["WWW-Authenticate"].startswith("Basic ")
    assert ask("/api/runs", bearer("worker")).status == 403
    assert b"<html" in ask("/", bearer("reader")).read()
    # The trainer's token is for `team-a-*`, the reader's for all runs. A browser sends a password.
    password = base64.b64encode(f"me:{service.secrets['trainer']}".encode()).decode()
    listed = json.load(ask("/api/runs", f"Basic {password}"))["runs"]
    names = {run["run"] for run in listed}
    assert "team-a-page" in names and all(name.startswith("team-a-") for name in names)
    names = {run["run"] for run in json.load(ask("/api/runs", bearer("reader")))["runs"]}
    assert {"team-a-page", "team-b-page"} <= names
    assert ask("/api/runs/team-a-page", bearer("trainer")).status == 200
    for path in ("team-b-page", "team-b-pag%65", "team-b-page/timeline", "team-b-none"):
        assert ask(f"/api/runs/{path}", bearer("trainer")).status == 403, path
    # Off loopback it speaks TLS, with the same tokens.
    config = tmp_path / "page.json"
    settings = {
        "page_listen": "0.0.0.0:0",
        "state": (service.folder / "state").as_uri(),
        "tls": {"cert": service.cert, "key": service.key},
        "auth": {"tokens_file": str(service.tokens)},
    }
    config.write_text(json.dumps(settings))
    page = subprocess.Popen([BINARY, "page", "--config", config], stdout=subprocess.PIPE, text=True)
    try:
        said = re.search(r"https://0.0.0.0:\d+", page.stdout.readline())
        address = said.group().replace("0.0.0.0", "127.0.0.1")
        trusted = ssl.create_default_context(cafile=service.ca)
        assert ask("/api/about", None, address, context=trusted).status == 401
        assert ask("/api/about", bearer("reader"), address, context=trusted).status == 200
    finally:
        page.terminate()
        page.wait()
        page.stdout.close()
