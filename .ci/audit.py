"""Look installed packages up among known vulnerabilities: `python .ci/audit.py SITE_PACKAGES`, with pip-audit at hand.

Status 1 for a vulnerability. Where the advisories cannot be reached, nothing can be said: a line says so, status 0.
"""

import json
import subprocess
import sys


def main(site_packages: str) -> int:
    """Say what was found, and return the status."""
    command = [sys.executable, "-m", "pip_audit", "--path", site_packages, "--skip-editable", "--format", "json"]
    command += ["--progress-spinner", "off", "--timeout", "10"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(run.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"audit: skipped, the advisories cannot be reached ({run.stderr.strip().splitlines()[-1][:200]})")
        return 0
    looked_up = [package for package in found if "skip_reason" not in package]
    vulnerable = [package for package in looked_up if package["vulns"]]
    for package in vulnerable:
        for fault in package["vulns"]:
            remedy = f"fixed in {', '.join(fault['fix_versions'])}" if fault["fix_versions"] else "not fixed yet"
            print(f"audit: {package['name']} {package['version']}: {fault['id']}, {remedy}")
    if not looked_up:
        print(f"audit: skipped, none of {len(found)} packages is known to the advisories that can be reached from here")
    else:
        print(f"audit: {len(vulnerable)} of {len(looked_up)} packages are vulnerable ({len(found)} are installed)")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
