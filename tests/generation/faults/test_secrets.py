"""A marked secret: in no file, log, artifact or error text of a run that works against S3 and then fails."""

import shutil
import tempfile
from pathlib import Path

import pytest
from faults.ground import shards_there, wait_until
from faults.proxy import FaultyProxy
from swift import MARKED_ACCESS_KEY, MARKED_SECRET_KEY

from facediffuser.storage import open_store


# The command with its own Prefect and Ray, and a minute of tries before a store that only answers 500 is given up.
@pytest.mark.timeout(3600)
@pytest.mark.slow
def test_a_secret_is_nowhere_in_what_a_failing_run_leaves_behind(ground, s3_bucket, s3_server, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", MARKED_ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", MARKED_SECRET_KEY)
    url = f"{s3_bucket.url}/out/dataset"
    sessions = Path(tempfile.mkdtemp(prefix="fdray"))  # a short name: Ray's sockets lie there
    monkeypatch.setenv("RAY_TMPDIR", str(sessions))
    try:
        with FaultyProxy(s3_server.endpoint, ("500",), 1.0) as proxy:
            proxy.active = False
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            driver = ground.start_command(ground.settings(url))
            monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
            wait_until(lambda: shards_there(url) >= 1, driver)
            proxy.active = True
            code = driver.wait()
        assert code == 1 and "S3 answered 500" in driver.said()
        files = [path for folder in (ground.folder, sessions) for path in folder.rglob("*") if path.is_file()]
        found = [str(path) for path in files if MARKED_SECRET_KEY.encode() in path.read_bytes()]
        store = open_store(url)
        objects = store.list()
        found += [info.key for info in objects if MARKED_SECRET_KEY.encode() in store.get(info.key)]
        assert found == []
        kinds = {path.suffix for path in files}
        assert ".db" in kinds and ".log" in kinds and len(objects) >= 3, kinds
    finally:
        shutil.rmtree(sessions, ignore_errors=True)
