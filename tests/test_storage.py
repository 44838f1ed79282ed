"""Storage: whole objects or none, both kinds of place alike, errors that name the mend and hide the secret."""

import datetime
import errno
import ipaddress
import os
import pickle
import socket
import stat
import tempfile
import threading
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from facediffuser.errors import InputError
from facediffuser.storage import StorageError, lasting_name, local_copy, open_store

SECRET = "wJalr-marked-secret-EXAMPLEKEY"


@pytest.fixture
def aws(monkeypatch, tmp_path):
    """A clean AWS environment: a key with a colon, a marked secret, no files of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test:tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


@pytest.fixture
def bucket(aws, moto_endpoint, request):
    aws.setenv("AWS_ENDPOINT_URL", moto_endpoint)
    name = f"b{abs(hash(request.node.name)) % 10**12}"
    boto3.session.Session().client("s3").create_bucket(Bucket=name)
    return name


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return open_store(tmp_path / "out" / "set")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/out/set")


def test_both_kinds_of_store_keep_the_same_contract(store):
    store.put("data/b.bin", b"two")
    store.put("data/a.bin", b"one")
    store.put("data/a.bin", b"uno")
    store.put("top.json", b"")
    assert store.get("data/a.bin") == b"uno"
    assert [(info.key, info.size) for info in store.list()] == [("data/a.bin", 3), ("data/b.bin", 3), ("top.json", 0)]
    assert [info.key for info in store.list("data/b")] == ["data/b.bin"]
    assert store.list("nothing/") == []
    assert store.exists("top.json") and not store.exists("data") and not store.exists("data/c.bin")
    assert store.child("data").get("b.bin") == b"two"
    assert [info.key for info in store.child("data").list()] == ["a.bin", "b.bin"]
    store.delete("data/a.bin")
    store.delete("data/a.bin")
    with pytest.raises(FileNotFoundError):
        store.get("data/a.bin")
    store.require_writable()


def test_put_if_absent_keeps_the_first_and_takes_a_repeat(store):
    store.put("lock", b"first", if_absent=True)
    store.put("lock", b"first", if_absent=True)
    with pytest.raises(FileExistsError):
        store.put("lock", b"second", if_absent=True)
    assert store.get("lock") == b"first"


def test_version_changes_with_the_content(store):
    store.put("x", b"aa")
    before = store.list()[0].version
    store.put("x", b"bb")
    assert store.list()[0].version != before


def test_a_store_travels_to_another_process_without_its_client(store):
    store.put("x", b"1")
    copy = pickle.loads(pickle.dumps(store))
    copy.put("y", b"2")
    assert store.get("y") == b"2" and copy.url == store.url
    assert SECRET.encode() not in pickle.dumps(store)


def test_pyarrow_reads_what_was_put(store):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": [1, 2, 3]}), sink)
    store.put("data/shard-0.parquet", sink.getvalue().to_pybytes())
    with store.open("data/shard-0.parquet") as source:
        assert pq.read_table(source)["n"].to_pylist() == [1, 2, 3]
    with store.open("data/shard-0.parquet") as source:
        assert pq.read_metadata(source).num_rows == 3


def test_a_part_of_an_object_is_read_without_the_rest(store):
    store.put("x", bytes(range(256)) * 4096)
    with store.open("x", buffer_bytes=512) as source:
        assert source.seek(-3, os.SEEK_END) == (1 << 20) - 3 and source.read() == b"\xfd\xfe\xff"
        source.seek(1000)
        assert source.read(4) == bytes([232, 233, 234, 235]) and source.tell() == 1004
        assert source.read(0) == b""
    with pytest.raises(FileNotFoundError), store.open("y"):
        pass


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(bucket):
    store = open_store(f"s3://{bucket}")
    store.put("x", b"a" * 4096)
    with store.open("x", buffer_bytes=16) as source:
        source.read(16)
        store.put("x", b"b" * 4096)
        with pytest.raises(StorageError, match="replaced while it was read"):
            source.read()


def test_folders_are_those_directly_below(store):
    store.put("ada/0.png", b"1")
    store.put("bob/more/0.png", b"1")
    store.put("subjects.csv", b"")
    assert store.folders() == ["ada", "bob"]


@pytest.mark.parametrize("key", ["../x", "a/../x", "/x", "a//b", "", "a/.", "a\nb"])
def test_a_key_cannot_leave_its_store(store, key):
    with pytest.raises(InputError):
        store.put(key, b"")


def test_a_reader_that_polls_never_sees_part_of_a_local_object(tmp_path):
    store, size, seen, done = open_store(tmp_path), 1 << 20, set(), threading.Event()

    def poll():
        while not done.is_set():
            for info in store.list():
                seen.add((info.key, info.size, len(set(store.get(info.key)))))

    reader = threading.Thread(target=poll)
    reader.start()
    for number in range(40):
        store.put("x", bytes([number]) * size)
    done.set()
    reader.join()
    assert seen == {("x", size, 1)}


def test_a_local_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    store = open_store(tmp_path)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left.*data/x"):
        store.put("data/x", b"1")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_folder_without_hard_links_keeps_the_first(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    sync = os.fsync
    monkeypatch.setattr(os, "link", refuse)
    # Such file systems may not sync folders either.
    monkeypatch.setattr(os, "fsync", lambda file: refuse() if stat.S_ISDIR(os.fstat(file).st_mode) else sync(file))
    store = open_store(tmp_path)
    store.put("lock", b"first", if_absent=True)
    store.put("lock", b"first", if_absent=True)
    with pytest.raises(FileExistsError, match="other content"):
        store.put("lock", b"second", if_absent=True)
    names = [b"%d" % place * 100_000 for place in range(8)]
    ready, won = threading.Barrier(len(names)), []

    def put(data):
        ready.wait()
        with suppress(FileExistsError):
            open_store(tmp_path).put("race", data, if_absent=True)
            won.append(data)

    threads = [threading.Thread(target=put, args=(data,)) for data in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [store.get("race")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "race"]


def test_another_fault_of_a_conditional_write_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="No space left"):
        open_store(tmp_path).put("lock", b"first", if_absent=True)
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_is_missing_is_reported(bucket):
    with pytest.raises(InputError, match="s3://no-such-bucket: no such bucket"):
        open_store("s3://no-such-bucket/x").require_writable()


def test_an_endpoint_that_does_not_answer_is_reported_quickly(aws):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(InputError, match=r"http://127.0.0.1:\d+ cannot be reached") as caught:
            open_store("s3://bucket/x").require_writable()
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("endpoint", [
    "http://user:{}@127.0.0.1:9", "user:{}@127.0.0.1:9", "http://user:{}/more@127.0.0.1:9", "user:{}/x@127.0.0.1:9",
    "http://127.0.0.1:9/?X-Amz-Signature={}", "http://127.0.0.1:9/#{}", "127.0.0.1:9?sig={}", "http://{}@127.0.0.1:9",
])  # fmt: skip
def test_an_endpoint_with_a_secret_is_refused_and_not_shown(aws, endpoint):
    aws.setenv("AWS_ENDPOINT_URL", endpoint.format(SECRET))
    store = open_store("s3://bucket/x")
    for use in (store.require_readable, store.require_writable, lambda: store.get("k"), lambda: store.put("k", b"")):
        with pytest.raises(InputError, match="endpoint") as caught:
            use()
        assert SECRET not in str(caught.value) and caught.value.__cause__ is None


NO_KEYS = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}


@pytest.mark.parametrize(("variables", "config", "says"), [
    ({"AWS_PROFILE": "nobody"}, "", "profile is in none"),
    ({}, "[default\nregion = x", "cannot be parsed"),
    ({"AWS_DEFAULT_REGION": "not a region!"}, "", "not a region's name"),
    ({"AWS_ENDPOINT_URL": "localhost:9000"}, "", "endpoint is not a URL"),
    ({"AWS_ENDPOINT_URL": "http://"}, "", "endpoint"),
    ({}, "[default]\nendpoint_url = 127.0.0.1:9", "endpoint is not a URL"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "[default]\ns3 =\n  addressing_style = odd", "configuration"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "[default]\nretry_mode = odd", "endpoint|configuration|reached"),
    ({"AWS_ENDPOINT_URL": "https://127.0.0.1:9", "AWS_CA_BUNDLE": "/no/such/file.pem"}, "", "AWS_CA_BUNDLE|reached"),
    ({"AWS_ENDPOINT_URL": "http://["}, "", "endpoint is not a URL"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"}, "", "configuration cannot be used"),
    ({"AWS_DEFAULTS_MODE": "odd"}, "", "configuration cannot be used"),
    ({}, "[default]\ns3 = odd", "configuration cannot be used .AttributeError"),
    (NO_KEYS, "[default]\ncredential_process = echo no-json", "configuration cannot be used .JSONDecodeError"),
    (NO_KEYS, "[default]\ncredential_process = /no/such/program", "configuration cannot be used .FileNotFoundError"),
    (NO_KEYS, "[default]\nrole_arn = arn:x\nsource_profile = nobody", "configuration|credentials"),
    (NO_KEYS, "[default]\nrole_arn = arn:x\nweb_identity_token_file = /no", "configuration cannot be used"),
    ({**NO_KEYS, "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://example.org/"}, "", "configuration cannot be used"),
])  # fmt: skip
def test_a_configuration_that_cannot_be_used_is_one_line(aws, tmp_path, variables, config, says):
    (tmp_path / "config").write_text(config)
    aws.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name, value in variables.items():
        aws.setenv(name, value) if value is not None else aws.delenv(name, raising=False)
    with pytest.raises(InputError, match=says) as caught:
        open_store("s3://bucket/x").require_readable()
    assert caught.value.__cause__ is None


def test_an_endpoint_in_a_config_file_serves_writing_and_reading(bucket, aws, tmp_path):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    (tmp_path / "keys").write_text(f"[lab]\naws_access_key_id = k\naws_secret_access_key = {SECRET}\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        aws.delenv(name)
    aws.setenv("AWS_PROFILE", "lab")
    aws.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    aws.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    put_and_read(f"s3://{bucket}/x")


def test_a_server_with_its_own_authority_is_used_through_aws_ca_bundle(aws):
    with authority() as (authority_file, certificate, key), ExitStack() as ending:
        moto = DomainDispatcherApplication(create_backend_app)
        server = make_server("127.0.0.1", 0, moto, threaded=True, ssl_context=(certificate, key))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        ending.callback(thread.join)
        ending.callback(server.shutdown)
        aws.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.server_port}")
        with pytest.raises(InputError, match="certificate is not trusted"):
            open_store("s3://tls/x").require_readable()
        aws.setenv("AWS_CA_BUNDLE", authority_file)
        boto3.session.Session().client("s3").create_bucket(Bucket="tls")
        put_and_read("s3://tls/x")


def put_and_read(url):
    store = open_store(url)
    store.require_writable()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": [1, 2, 3]}), sink)
    store.put("a.parquet", sink.getvalue().to_pybytes())
    with store.open("a.parquet") as source:
        assert pq.read_table(source)["n"].to_pylist() == [1, 2, 3]
    assert [info.key for info in store.list()] == ["a.parquet"]


@contextmanager
def authority():
    """Files of an authority, and of a certificate for 127.0.0.1 that it signed, with its key."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name, public, issuer, signer, extension):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return (
            x509.CertificateBuilder().subject_name(subject).issuer_name(issuer or subject).public_key(public)
            .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1)).add_extension(extension, critical=True)
            .sign(signer, hashes.SHA256())
        )  # fmt: skip

    own, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = certificate("test authority", own.public_key(), None, own, x509.BasicConstraints(True, None))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = certificate("127.0.0.1", server.public_key(), root.subject, own, address)
    pem = serialization.Encoding.PEM
    with tempfile.TemporaryDirectory() as folder:
        files = {"ca.pem": root.public_bytes(pem), "server.pem": leaf.public_bytes(pem)}
        files["key.pem"] = server.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        yield tuple(str(Path(folder, name)) for name in files)


def test_missing_credentials_are_reported(aws):
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="no S3 credentials"):
        open_store("s3://bucket/x").require_writable()


@pytest.mark.parametrize(("status", "code", "kind"), [
    (403, "SignatureDoesNotMatch", InputError), (403, "AccessDenied", InputError),
    (500, "InternalError", StorageError), (503, "SlowDown", StorageError),
])  # fmt: skip
def test_refusals_become_one_line_without_what_the_server_said(aws, status, code, kind):
    from botocore.exceptions import ClientError

    class Refusing:
        def put_object(self, **_):
            answer = {"Error": {"Code": code, "Message": f"you sent {SECRET}"}}
            raise ClientError({**answer, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")

    store = open_store("s3://bucket/x")
    store._cached_client = Refusing()
    with pytest.raises(kind, match=code) as caught:
        store.put("k", b"")
    assert SECRET not in str(caught.value)


@pytest.fixture
def refusing():
    """A server on a free port that refuses every request with `status`; its endpoint is in `url`."""

    class Handler(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            code = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}[self.server.status]
            body = f"<Error><Code>{code}</Code><Message>you sent {SECRET}</Message></Error>".encode()
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET = refuse

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "kind", "told"), [
    (403, InputError, "s3://bucket/x/k: access denied"), (500, StorageError, "s3://bucket/x/k: S3 answered 500"),
    (503, StorageError, "s3://bucket/x/k: S3 answered 503"), (404, FileNotFoundError, "bucket/x/k"),
])  # fmt: skip
def test_what_reading_a_part_is_refused_is_said_as_for_the_whole(aws, monkeypatch, refusing, status, kind, told):
    monkeypatch.setattr("facediffuser.storage.s3._ATTEMPTS", 1)
    aws.setenv("AWS_ENDPOINT_URL", refusing.url)
    refusing.status = status
    store = open_store("s3://bucket/x")
    with pytest.raises(kind, match=told) as caught, store.open("k") as source:
        source.read()
    assert SECRET not in str(caught.value) and caught.value.__cause__ is None
    with pytest.raises(kind):
        store.get("k")


def test_an_endpoint_that_goes_away_while_reading_is_said(aws, monkeypatch):
    monkeypatch.setattr("facediffuser.storage.s3._ATTEMPTS", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        store = open_store("s3://bucket/x")
        with pytest.raises(StorageError, match=r"s3://bucket/x/k: http://.* cannot be reached"):
            with store.open("k") as source:
                source.read()


@pytest.mark.parametrize("url", [
    "ftp://bucket/x", "gs://", "s3://", "s3://key:secret@bucket/x", "s3://bucket/../x", "",
    "s3://bucket/x?X-Amz-Signature=key:secret", "file://host/x", "file://host:1/x",
    "FILE://[", "file:///%00", "FILE:///a%00/b",
    "s3:/bucket/x", "S3:/x", "file:/x", "file://", "file://localhost", "file://[::1]/x"])  # fmt: skip
def test_urls_that_cannot_be_are_refused(url):
    with pytest.raises(InputError) as caught:
        open_store(url)
    assert "key:secret" not in str(caught.value)


def test_a_file_url_names_the_folder_that_it_spells():
    for url, path in (("file:///a%20b", "/a b"), ("FILE://localhost/a", "/a"), ("file:///run#2/x?y", "/run#2/x?y")):
        assert open_store(url).url == path


def test_a_file_in_the_way_of_the_output_is_reported(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        open_store(tmp_path / "file" / "out").require_writable()


def test_a_local_copy_is_made_once_and_again_when_the_source_changes(bucket, tmp_path):
    store = open_store(f"s3://{bucket}/models/tiny")
    store.put("unet/weights", b"abc")
    store.put("config.json", b"{}")
    open_store(f"s3://{bucket}/models").put("tiny-other/x", b"not part of it")
    folder = local_copy(store.url, tmp_path / "cache")
    assert folder.name == "tiny"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "config.json",
        "unet/weights",
    ]
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert local_copy(store.url, tmp_path / "cache") == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    store.put("unet/weights", b"xyz")
    assert (local_copy(store.url, tmp_path / "cache") / "unet/weights").read_bytes() == b"xyz"


def test_a_local_copy_of_one_object_is_a_file(bucket, tmp_path):
    open_store(f"s3://{bucket}").put("prompts.jsonl", b"{}\n")
    path = local_copy(f"s3://{bucket}/prompts.jsonl", tmp_path / "cache")
    assert path.name == "prompts.jsonl" and path.read_bytes() == b"{}\n"


def test_a_local_copy_of_nothing_is_reported(bucket, tmp_path):
    with pytest.raises(InputError, match="nothing there"):
        local_copy(f"s3://{bucket}/none", tmp_path / "cache")
    with pytest.raises(InputError, match="no such file or folder"):
        local_copy(tmp_path / "none")
    assert local_copy(tmp_path) == Path(tmp_path)


def test_links_are_followed_and_what_cannot_be_listed_is_named(tmp_path):
    real = tmp_path / "real"
    (real / "more").mkdir(parents=True)
    (real / "0.png").write_bytes(b"1")
    (real / "more" / "1.png").write_bytes(b"22")
    folder = tmp_path / "people"
    folder.mkdir()
    (folder / "ada").symlink_to(real)
    (folder / "2.png").symlink_to(real / "0.png")
    (folder / "empty").mkdir()
    store = open_store(folder)
    assert [info.key for info in store.list()] == ["2.png", "ada/0.png", "ada/more/1.png"]
    assert store.folders() == ["ada", "empty"]
    (folder / "dead").symlink_to(tmp_path / "none")
    with pytest.raises(InputError, match="dead: a link that leads nowhere"):
        store.list()
    (folder / "dead").unlink()
    (real / "loop").symlink_to(folder)
    with pytest.raises(InputError, match="loop: a link that leads back"):
        store.list()
    (real / "loop").unlink()
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(InputError, match="pipe.png: not a regular file"):
        store.list()
    with pytest.raises(InputError, match="pipe.png: not a regular file"):
        store.get("pipe.png")


def test_a_folder_without_read_permission_is_named():
    with not_as_root(), tempfile.TemporaryDirectory() as name:
        people = Path(name, "people")
        (people / "bob").mkdir(parents=True)
        (people / "bob" / "0.png").write_bytes(b"1")
        (people / "bob").chmod(0o300)
        with pytest.raises(InputError, match="bob: folder cannot be read"):
            open_store(people).list()
        (people / "bob").chmod(0o700)


@contextmanager
def not_as_root():
    """Permissions do not bind root: what root runs in this block is done as nobody."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("path", ["/proc/x/y", "x" * 300, "/".join(["y" * 100] * 60), "a\0b"])
def test_a_path_that_cannot_be_written_is_refused_before_anything_is(tmp_path, path):
    with pytest.raises(InputError):
        open_store(path if path.startswith("/") else f"{tmp_path}/{path}").require_writable()


def test_a_name_that_lasts_is_the_same_from_every_folder(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "miniature").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lasting_name("models") == lasting_name("./models/") == str(tmp_path / "models")
    for name in ("s3://bucket/models", "owner/model", "miniature", str(tmp_path / "models")):
        assert lasting_name(name, ["miniature"]) == name
