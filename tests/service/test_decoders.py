"""Images are decoded in processes that hostile files can neither occupy nor fill."""

import asyncio
import functools
import io
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from ncml.errors import InputError, NotAnImage, TooCostly
from ncml.images import open_resized, structure
from service import decoder, decoders
from service.decoder import Limits
from service.decoders import MAX_EXPENSIVE, DecoderPool
from service.http.problems import Problem
from tests.conftest import alive
from tests.service import costly


def burn() -> None:
    """Compute for longer than the limit, but not for ever: only the limit ends it early."""
    while time.process_time() < 3:
        pass


def note_pid_and_burn(path: Path) -> None:
    part = path.with_suffix(".part")
    part.write_text(str(os.getpid()))
    part.rename(path)
    burn()


def fill_memory() -> int:
    return len(bytearray(10**9))


def die(signum: int) -> None:
    os.kill(os.getpid(), signum)


def die_while_answering() -> None:
    """Die in the middle of the answer, as a process that the system kills for want of memory."""

    def send_part(pipe: Connection, answer: bytes) -> None:
        os.write(pipe.fileno(), len(answer).to_bytes(4, "big") + answer[:1])
        die(signal.SIGKILL)

    Connection.send_bytes = send_part


def run(check: Callable[[DecoderPool], Awaitable[None]], *, cpu_s: float = 0.1) -> None:
    """Run a check on a pool of two slots."""

    @asynccontextmanager
    async def pool() -> AsyncGenerator[DecoderPool]:
        pool = DecoderPool(2, Limits(cpu_s=cpu_s, memory_bytes=400 * 10**6))
        await pool.start()
        try:
            yield pool
        finally:
            await pool.close()

    async def main() -> None:
        async with pool() as decoders:
            await check(decoders)

    asyncio.run(main())


def give(data: bytes) -> bytes:
    return data


@pytest.mark.skipif(sys.platform == "win32", reason="uvloop does not exist there")
def test_large_calls_and_answers_pass_through_a_kept_process_under_uvloop() -> None:
    """Larger than what the kernel buffers; the service runs on uvloop, the other tests do not."""
    import uvloop

    async def main() -> None:
        pool = DecoderPool(1, Limits(cpu_s=5, memory_bytes=400 * 10**6))
        await pool.start()
        try:
            for value in range(3):
                data = bytes([value]) * 4_000_000
                assert await pool.run("image", functools.partial(give, data)) == data
        finally:
            await pool.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def photo(width: int, height: int, form: str = "JPEG", **options: object) -> bytes:
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
    file = io.BytesIO()
    small.resize((width, height)).save(file, form, **options)
    return file.getvalue()


class Exploit:
    """Pickles as a call of `os.mkdir`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.path,)


def test_an_answer_cannot_run_code(tmp_path: Path) -> None:
    target = tmp_path / "made"

    async def check(pool: DecoderPool) -> None:
        with pytest.raises(TooCostly, match="crashed the decoder"):
            await pool.run("image", functools.partial(Exploit, str(target)))
        assert await pool.run("image", os.getpid)

    run(check)
    assert not target.exists()


def array_with_a_newer_default_protocol() -> np.ndarray:
    """Return an image from a process that pickles with protocol 5 by default, as Python 3.14 does."""
    ForkingPickler.dumps = classmethod(lambda _, value, protocol=5: pickle.dumps(value, protocol))
    return np.ones((8, 8, 3), np.uint8)


def test_answers_can_be_read_whatever_the_default_pickle_protocol() -> None:
    async def check(pool: DecoderPool) -> None:
        image = await pool.run("image", array_with_a_newer_default_protocol)
        np.testing.assert_array_equal(image, np.ones((8, 8, 3), np.uint8))

    run(check)


def test_a_process_answers_as_the_function_does() -> None:
    data = photo(64, 48)

    async def check(pool: DecoderPool) -> None:
        first = await pool.run("image", os.getpid)
        assert first != os.getpid()
        decoded = await pool.run("image", functools.partial(open_resized, data, 8, 8))
        np.testing.assert_array_equal(decoded, open_resized(data, 8, 8))
        with pytest.raises(NotAnImage, match=r"^photo is not an image") as error:
            await pool.run("photo", functools.partial(open_resized, b"text", 8, 8, field="photo"))
        assert error.value.field == "photo"
        assert await pool.run("image", os.getpid) == first  # it is kept

    run(check)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (burn, "^image takes more than 0.1 s to decode, the limit; "),
        (fill_memory, "^image needs more than 400 MB of memory to decode, the limit; "),
        (functools.partial(die, signal.SIGSEGV), "^image cannot be decoded: it crashed the decoder; "),
        (die_while_answering, "^image cannot be decoded: it crashed the decoder; "),
    ],
    ids=["time", "memory", "crash", "crash while answering"],
)
def test_beyond_a_limit_the_image_is_refused_and_the_next_one_decoded(call: Callable[[], object], reason: str) -> None:
    async def check(pool: DecoderPool) -> None:
        for _ in range(2):
            with pytest.raises(TooCostly, match=reason) as error:
                await pool.run("image", call)
            assert error.value.field == "image"
        assert await pool.run("image", os.getpid)

    run(check)


def test_a_process_that_uses_no_cpu_time_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "MAX_WALL_S", 0.1)

    async def check(pool: DecoderPool) -> None:
        with pytest.raises(TooCostly, match=r"^image takes more than 0\.1 s to decode"):
            await pool.run("image", functools.partial(time.sleep, 600))
        assert await pool.run("image", os.getpid)

    run(check)


def test_a_process_killed_while_it_waited_is_replaced() -> None:
    async def check(pool: DecoderPool) -> None:
        for _ in range(3):  # more often than there are idle processes
            pid = await pool.run("image", os.getpid)
            os.kill(pid, signal.SIGKILL)
            while psutil.pid_exists(pid):  # until its parent has noticed
                await asyncio.sleep(0.01)
        assert await pool.run("image", os.getpid) != pid

    run(check)


def test_an_image_whose_client_is_gone_is_dropped(tmp_path: Path) -> None:
    async def check(pool: DecoderPool) -> None:
        noted = tmp_path / "pid"
        burning = asyncio.create_task(pool.run("image", functools.partial(note_pid_and_burn, noted)))
        while not noted.exists():
            await asyncio.sleep(0.01)
        process = psutil.Process(int(noted.read_text()))
        burning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await burning
        process.wait(timeout=60)
        assert await pool.run("image", os.getpid) != process.pid

    run(check, cpu_s=600)


def test_a_pipe_stays_open_as_long_as_an_abandoned_thread_reads_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next socket would get its number, and the thread would read what another client sends."""
    pipes: list[Connection] = []
    reading, resume = threading.Event(), threading.Event()
    receive = Connection.recv_bytes

    def wait_and_receive(pipe: Connection) -> bytes:
        pipes.append(pipe)
        reading.set()
        assert resume.wait(60)
        return receive(pipe)

    async def check(pool: DecoderPool) -> None:
        monkeypatch.setattr(Connection, "recv_bytes", wait_and_receive)
        decoding = asyncio.create_task(pool.run("image", os.getpid))
        assert await asyncio.to_thread(reading.wait, 60)
        decoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decoding
        assert not pipes[0].closed
        resume.set()
        while not pipes[0].closed:
            await asyncio.sleep(0.01)

    run(check)


def test_ordinary_images_do_not_wait_behind_expensive_ones() -> None:
    """Eight images that would take minutes: without slots of their own, ordinary ones would wait for them."""

    async def check(pool: DecoderPool) -> None:
        await pool.run("image", os.getpid)
        hostile = [asyncio.create_task(pool.run("image", burn)) for _ in range(8)]
        await asyncio.sleep(0)
        for _ in range(5):
            await pool.run("image", os.getpid)
        assert not any(task.done() for task in hostile)
        for task in hostile:
            task.cancel()
        await asyncio.gather(*hostile, return_exceptions=True)

    run(check, cpu_s=600)


def test_too_many_expensive_images_are_refused() -> None:
    async def check(pool: DecoderPool) -> None:
        tasks = [asyncio.create_task(pool.run("image", burn)) for _ in range(MAX_EXPENSIVE + 4)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=60)
        (refused, *_) = (task.exception() for task in done)
        assert isinstance(refused, Problem)
        assert (refused.status, refused.kind) == (503, "no-room")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(check, cpu_s=60)


@pytest.mark.parametrize("name", costly.FILES)
def test_a_look_at_the_structure_refuses_what_costs_far_more_than_it_shows(name: str) -> None:
    data = costly.FILES[name]()
    assert len(data) <= costly.MAX_BYTES
    began = time.process_time()
    with pytest.raises(TooCostly, match=r"^image is a .* file with more than [0-9]+ .*, the most that are accepted; "):
        open_resized(data, 8, 8)
    assert time.process_time() - began < 10  # 0.06 s on an idle machine; decoding takes minutes


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "JPEG", "TIFF"])
def test_ordinary_structures_pass(form: str) -> None:
    structure.check(photo(300, 200, form), "image")
    structure.check(photo(300, 200, "JPEG", progressive=True, comment=b"a" * 60_000), "image")


@pytest.mark.slow
@pytest.mark.parametrize("name", costly.LARGE_FILES)
def test_the_largest_images_stay_within_the_limits(name: str, record_property: Callable[[str, object], None]) -> None:
    data = costly.LARGE_FILES[name]()

    async def check(pool: DecoderPool) -> None:
        peak = 0
        process = psutil.Process(await pool.run("image", os.getpid))
        before = process.memory_info().rss
        task = asyncio.create_task(pool.run("image", functools.partial(open_resized, data, 32, 32)))
        while not task.done():
            if alive([process]):
                peak = max(peak, process.memory_info().rss - before)
            await asyncio.sleep(0.01)
        if error := task.exception():
            assert isinstance(error, InputError)
        record_property("peak", peak)
        assert peak < 400e6

    run(check, cpu_s=2)


def test_an_answer_too_large_to_be_sent_is_reported_as_too_little_memory() -> None:
    class Large:
        def __reduce__(self) -> str:
            raise MemoryError

    assert pickle.loads(decoder._answer(Large)).out_of_memory
