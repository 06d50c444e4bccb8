"""Check installed packages for known vulnerabilities: `python .ci/audit.py SITE_PACKAGES`. Needs pip-audit.

The exit status is 1 if there is a vulnerability. If the advisories cannot be reached, the check is skipped (status 0).
"""

import json
import subprocess
import sys


def main(site_packages: str) -> int:
    """Print the vulnerabilities, and return the exit status."""
    command = [sys.executable, "-m", "pip_audit", "--path", site_packages, "--skip-editable", "--format", "json"]
    command += ["--progress-spinner", "off", "--timeout", "10"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(run.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1][:200]
        print(f"audit: skipped, the advisories cannot be reached ({reason})")
        return 0
    checked = [package for package in packages if "skip_reason" not in package]
    vulnerable = [package for package in checked if package["vulns"]]
    for package in vulnerable:
        for vulnerability in package["vulns"]:
            fix_versions = vulnerability["fix_versions"]
            remedy = f"fixed in {', '.join(fix_versions)}" if fix_versions else "not fixed yet"
            print(f"audit: {package['name']} {package['version']}: {vulnerability['id']}, {remedy}")
    if not checked:
        print(f"audit: skipped, none of {len(packages)} packages is known to the reachable advisories")
    else:
        print(f"audit: {len(vulnerable)} of {len(checked)} packages are vulnerable ({len(packages)} are installed)")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
