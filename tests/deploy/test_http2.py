"""What h2spec says of a coordinator's port: 145 cases of well-formed and malformed HTTP/2."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import superbatch
from tools import ROOT, tool

sys.path.append(str(ROOT / "tests" / "python"))
from cluster import Cluster  # noqa: E402

#: Cases that expect something else than the service does, and why that is right.
KNOWN = {
    ("generic/2", "Sends a WINDOW_UPDATE frame on half-closed (remote) stream"): (
        "wants a page in DATA frames; a call that is no gRPC gets a head alone"
    ),
    ("generic/2", "Sends a PRIORITY frame on half-closed (remote) stream"): (
        "wants a page in DATA frames; a call that is no gRPC gets a head alone"
    ),
    ("http2/3.5", "Sends invalid connection preface"): (
        "the connection ends by a reset, which is an end as well"
    ),
    (
        "http2/4.2",
        "Sends a large size HEADERS frame that exceeds the SETTINGS_MAX_FRAME_SIZE",
    ): "sends less than the 1 MiB that a frame may have here; the head's own limit refuses it",
    (
        "http2/5.1.2",
        "Sends HEADERS frames that causes their advertised concurrent stream limit to be exceeded",
    ): "the service answers each call before the limit of calls under way is reached",
}


#: A call that reads its body before it answers. Others are answered at once, and whether a stream
#: is open or closed when h2spec sends its next frame is then a matter of time.
CALL = "/superbatch.v1.SelectionService/GetRun"


def cases(report: Path) -> tuple[int, set[tuple[str, str]]]:
    """How many cases passed, and those that did not."""
    passed, failed = 0, set()
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add((case.get("package"), case.get("classname")))
        elif case.find("skipped") is None:
            passed += 1
    return passed, failed


def test_malformed_http2_is_refused_as_the_specification_says(tmp_path):
    with Cluster(tmp_path) as cluster:
        host, port = cluster.address.removeprefix("http://").split(":")
        report = tmp_path / "report.xml"
        subprocess.run(
            [tool("h2spec"), "-h", host, "-p", port, "-P", CALL, "-o", "8", "-j", report],
            capture_output=True,
            timeout=600,
        )
        passed, failed = cases(report)
        assert failed <= KNOWN.keys(), failed - KNOWN.keys()
        assert passed >= 136
        assert superbatch.connect(cluster.address).list_runs() == [], "others are served after it"
