"""Each line of the log is a JSON object, whichever logger writes it."""

import json
import subprocess
import sys

CODE = """
import logging, warnings
from worker import logs
logs.configure()
logging.getLogger("ncml").info("hello", extra={"job": "j1"})
warnings.warn("two\\nlines")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("ncml").exception("odd")
"""


def test_every_line_is_json_including_warnings() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    hello, warned, odd = (json.loads(line) for line in run.stderr.splitlines())
    assert (hello["message"], hello["job"], hello["level"]) == ("hello", "j1", "info")
    assert "two\nlines" in warned["message"]
    assert (warned["logger"], warned["level"]) == ("py.warnings", "warning")
    assert "ZeroDivisionError" in odd["traceback"]
