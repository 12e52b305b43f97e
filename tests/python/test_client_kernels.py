"""`superbatch.kernels` is the package superbatch_kernels, which the client does without."""

import subprocess
import sys

import superbatch
import superbatch_kernels


def test_the_client_has_the_kernels_under_its_own_name():
    for name in superbatch.kernels.__all__:
        assert getattr(superbatch.kernels, name) is getattr(superbatch_kernels, name)


def run(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout


def test_the_client_does_not_load_the_kernels():
    assert run("import superbatch, sys; print('superbatch_kernels' in sys.modules)") == "False\n"


def test_where_the_kernels_are_missing_the_error_says_what_to_install():
    script = """
import sys
sys.modules["superbatch_kernels"] = None
import superbatch
try:
    superbatch.kernels
except ImportError as error:
    print(error)
"""
    assert "pip install 'superbatch[kernels]'" in run(script)
