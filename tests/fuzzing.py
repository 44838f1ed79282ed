"""A small world of valid files, hostile values and hostile files for it, and what a command must do with them."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from dataset.finished import finish_dataset, finish_plan
from every_command import every_command
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel
from skimage import data
from training.prepared_rows import prepared_row, write_prepared

from facediffuser.errors import RunError
from facediffuser.flows.cli import main
from facediffuser.generation.generate_check import check_generate, settings_document
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.shipped import models_folder
from facediffuser.storage import LocalStore
from facediffuser.training import training_run
from facediffuser.training.train_settings import TrainSettings

COMMANDS = every_command()

# The work behind each command, done only after its input was accepted: here it is not done at all.
WORK = {
    "demo": "facediffuser.flows.demo.demo",
    "rehearse": "facediffuser.flows.rehearse.rehearse",
    "preprocess": "facediffuser.flows.preprocess_ffhq.preprocess_ffhq",
    "train": "facediffuser.flows.train.train",
    "generate": "facediffuser.flows.generate_dataset.generate_dataset",
    "evaluate": "facediffuser.flows.evaluate.evaluate",
    "score": "facediffuser.flows.score.score",
    "copies": "facediffuser.flows.score.copies",
    "repair": "facediffuser.flows.repair_dataset.repair_dataset",
    "retry-failed": "facediffuser.flows.repair_dataset.retry_failed",
    "remake": "facediffuser.generation.repair.remake",
    "merge": "facediffuser.flows.curate.merge",
    "retract": "facediffuser.flows.curate.retract",
    "export": "facediffuser.flows.curate.export",
    "publish": "facediffuser.flows.curate.publish",
    "check": "facediffuser.evaluation.weights_check.check_weights",
    "explain": "facediffuser.explain.explain",
    "assemble": "facediffuser.modelfolder.written_whole",
    "convert": "facediffuser.checkpoints.written_whole",
    "miniature render": "facediffuser.miniature.render.render_set",
    "miniature claim": "facediffuser.flows.claim.claim",
    "verify": None,
    "card": None,
}
ACCEPTED = "the input was accepted"


def no_work(*_: Any, **__: Any) -> None:
    """Stand in for the work of a command."""
    raise RunError(ACCEPTED)


def make_templates(root: Path) -> None:
    """Make one valid file or folder of each kind in `root`."""
    photo = Image.fromarray(data.astronaut())
    (root / "people" / "ada").mkdir(parents=True)
    photo.resize((256, 256)).save(root / "people" / "ada" / "1.png")
    (root / "people" / "subjects.csv").write_text("subject_id,class_word\nada,woman\n")
    (root / "prompts.jsonl").write_text(json.dumps({"prompt": "{subject} on the beach", "prompt_id": "p"}) + "\n")
    (root / "prompts.csv").write_text("prompt,prompt_id\n{subject} on the beach,p\n")
    (root / "theirs").mkdir()
    photo.resize((64, 64)).save(root / "theirs" / "subject_0000_prompt_0000_instance_0000.png")
    (root / "index.csv").write_text("image,subject_ids,prompt_id\nsubject_0000_prompt_0000_instance_0000.png,ada,p\n")
    finish_dataset(root / "dataset")
    finish_dataset(root / "other", names=("cyd",))
    _begin(root)
    shutil.copytree(Path(__file__).parent / "generation" / "old_dataset", root / "old")
    shutil.copytree(root / "people" / "ada", root / "photos")
    _make_prepared(root / "prepared")
    settings = train_settings(root)
    training_run.begin_or_resume_training(LocalStore(root / "run"), settings)
    torch.save({"unet.weight": torch.zeros(2)}, root / "checkpoint.bin")
    (root / "options.yaml").write_text("seed: 1\n")
    (root / "options.toml").write_text("seed = 1\n")


def _begin(root: Path) -> None:
    """Make `begun`, the dataset that `generate` would make of the world, and `more.jsonl`, prompts to extend it with."""
    settings = GenerateSettings(
        models="miniature", subjects=str(root / "people"), prompts=str(root / "prompts.jsonl"),
        output=str(root / "begun"), steps=2, shard_size=1,
    )  # fmt: skip
    checked = check_generate(settings)
    document = settings_document(settings, checked.plan, checked.shard_size, checked.model.exact_scheduler)
    finish_plan(root / "begun", checked.plan, document)
    more = json.dumps({"prompt": "{subject} at night", "prompt_id": "night"}) + "\n"
    (root / "more.jsonl").write_text((root / "prompts.jsonl").read_text() + more)


def train_settings(root: Path) -> TrainSettings:
    """Return the settings of the run in `root`."""
    return TrainSettings(
        role="tdm", data=str(root / "prepared"), base="miniature", output=str(root / "run"), resume=True
    )


def _make_prepared(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        path = Path(made, "0.json")
        Image.new("RGB", (64, 64), (90, 90, 90)).save(path.with_suffix(".png"))
        ids = np.zeros((64, 64), np.uint8)
        ids[8:56, 8:56] = 1
        np.save(path.with_suffix(".npy"), ids)
        path.write_text(json.dumps({"caption": "a woman", "segments": [{"id": 1, "end": 7}]}))
        write_prepared(folder, [prepared_row(path, "train")])


# --- values -----------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63 - 1, 2**63, 2**64, 2**70, -(2**70), 10**30, 10**400]),
    st.floats(),
    st.sampled_from(["1e400", "1e9", "0x10", "1_000", "٣", "9" * 5000, "--", "1.0", "true", "None", "nan", "-inf"]),
).map(str)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", ",", ",,", ":", "a:", ":a", "a:b", "a=", "=a", "=", "..", ".", "~", "~nobody", "/", "//", "-", "--", "{}",
         "\0", "a\0b", "a\nb", "\x1b[31m", "\ud800", "\udcff", "é" * 100, "x" * 300, "x" * 5000, "foo", "cuda:", "cuda:-1",
         "cuda:99999999999999999999", "cuda:1:2", "meta", "{subject}", "<|image|>", "a woman <|image|>", "sharpness,",
         "json:loads", "os:path", ".x:y", "a.b:c", "miniature", "paper", "none"]
    ),
)  # fmt: skip
URLS = st.sampled_from(
    ["s3://", "s3:///x", "s3://b@c/x", "s3://b/../x", "s3://b/\0", "s3://B_/x", "s3://" + "b" * 300, "file://host/x", "file://",
     "file:///", "http://127.0.0.1:9/x", "https://", "gs://b/x", "://x", "hf://x", "s3://b?X-Amz-Signature=1", "file:///%00",
     "file://[", "http://[", "s3:/x"]
)  # fmt: skip
PLACES = st.sampled_from(
    ["/proc/x", "/proc/self/mem", "/proc/1/root/x", "/sys/x", "/dev/null", "/dev/zero", "/dev/null/x", "/dev/full", "/dev/x",
     "missing", "missing/deep/er", "people", "prompts.jsonl", "prompts.jsonl/x", "theirs", "dataset", "photos", "prepared",
     "run", "checkpoint.bin", "empty", "empty.bin", "fifo", "loop", "dangling", "bomb.png", "index.csv", "options.yaml",
     "n" * 300, "n" * 300 + "/x", "d/" * 2000 + "x", "people/ada/1.png", "/", ".", "a\nb", "\udcff"]
)  # fmt: skip
VALUES = st.one_of(NUMBERS, TEXTS, URLS, PLACES)


def make_hostile(root: Path) -> None:
    """Put beside the templates what no command can use."""
    (root / "empty").mkdir()
    (root / "empty.bin").touch()
    os.mkfifo(root / "fifo")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    (root / "bomb.png").write_bytes(_bomb(50_000))


def _bomb(side: int) -> bytes:
    """Return a PNG whose header promises side x side pixels."""
    png = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b"")):
        png += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png


def _suits(kind: Any) -> st.SearchStrategy[str]:
    """Return hostile values for a field, most of them of its own kind."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        kind = next(one for one in get_args(kind) if one is not NoneType)
    if kind in (int, float):
        return st.one_of(NUMBERS, NUMBERS, VALUES)
    return st.one_of(TEXTS, URLS, PLACES, PLACES, VALUES)


def options(command: str) -> st.SearchStrategy[dict[str, str]]:
    """Return one to three options of a command with hostile values; the key is the field's name."""
    found: list[st.SearchStrategy[tuple[str, str]]] = []
    for name, info in COMMANDS[VARIANTS.get(command, Variant(command)).command].model_fields.items():
        kind = info.annotation
        inner = next((one for one in (kind, *get_args(kind)) if isinstance(one, type)), str)
        if issubclass(inner, BaseModel):
            continue
        found.append(st.tuples(st.just(name), _suits(kind)))
    return st.lists(st.one_of(found), min_size=1, max_size=3).map(dict)


# --- files ------------------------------------------------------------------------------------------------------------

# What of the world a command reads.
READS: dict[str, list[str]] = {
    "demo": [],
    "rehearse": [],
    "preprocess": ["photos"],
    "train": ["prepared", "run"],
    "assemble": ["run"],
    "convert": ["checkpoint.bin"],
    "generate": ["people", "prompts.jsonl", "models"],
    "evaluate": ["dataset", "people", "prompts.csv", "theirs", "index.csv"],
    "score": ["dataset"],
    "copies": ["dataset", "prepared"],
    "verify": ["dataset"],
    "repair": ["dataset"],
    "retry-failed": ["dataset"],
    "remake": ["dataset"],
    "merge": ["dataset", "other"],
    "retract": ["dataset"],
    "export": ["dataset"],
    "publish": ["dataset"],
    "card": ["dataset"],
    "check": ["models"],
    "explain": ["people", "models"],
    "miniature render": [],
    "miniature claim": [],
}
RUBBISH = (b"", b"\0" * 100, b"PAR1" + b"\xff" * 40 + b"PAR1", b"{}", b"[]", b"null", b'{"a": 1}', b"[" * 100_000, b"\xff\xfe\0",
           b"\x80\x04N.", b"1e999999", b'"\\ud800"', b"a,b\n", b"GIF89a", b"PK\x03\x04")  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """What is done to one file of the world: `which` of them, counted over, and how."""

    which: int
    how: str
    at: int
    rubbish: int

    def do(self, root: Path, names: list[str]) -> str:
        """Damage a file; return what was done."""
        files = [path for name in names for path in _files(root / name)]
        path = files[self.which % len(files)]
        content = path.read_bytes()
        path.unlink()
        if self.how == "folder":
            path.mkdir()
        elif self.how == "fifo":
            os.mkfifo(path)
        elif self.how == "link":
            path.symlink_to("nowhere")
        elif self.how == "rubbish":
            path.write_bytes(RUBBISH[self.rubbish % len(RUBBISH)])
        elif self.how == "values":
            is_parquet = path.suffix == ".parquet"
            path.write_bytes(with_hostile_values(content, self.at, self.rubbish) if is_parquet else b"{}")
        elif self.how == "truncated":
            path.write_bytes(content[: self.at % max(len(content), 1)])
        elif self.how == "flipped" and content:
            place = self.at % len(content)
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << self.rubbish % 8]) + content[place + 1 :])
        return f"{path.relative_to(root)} {self.how} {self.at} {self.rubbish}"


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())


def with_hostile_values(content: bytes, at: int, how: int) -> bytes:
    """Return Parquet with one column, the `at`th counted over, of hostile values, in all rows or in the first."""
    with pq.ParquetFile(io.BytesIO(content)) as file:
        table, rows = file.read(), [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    place = at % table.num_columns
    field, values = table.schema.field(place), table[place].to_pylist()
    hostile = _hostile(field.type, how % 4)
    values = [hostile] * len(values) if at & 1 else [hostile, *values[1:]][: len(values)]
    table = table.set_column(place, field.with_nullable(True), pa.array(values, field.type))
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=max(rows, default=1) or 1)
    return sink.getvalue()


def _hostile(kind: pa.DataType, how: int) -> Any:
    """Return a value of a type that no dataset holds there: null, empty, far too large, or none of its kind."""
    if how == 0:
        return None
    if pa.types.is_list(kind):
        return [] if how == 1 else [_hostile(kind.value_type, how)] * (3 if how == 2 else 1) + [None] * (how == 3)
    if pa.types.is_fixed_size_list(kind):
        return [_hostile(kind.value_type, how)] * kind.list_size
    if pa.types.is_struct(kind):
        return {kind.field(part).name: _hostile(kind.field(part).type, how) for part in range(kind.num_fields)}
    if pa.types.is_boolean(kind):
        return how == 2
    if pa.types.is_integer(kind):
        return (0, 2 ** (kind.bit_width - 1) - 1, 0 if pa.types.is_unsigned_integer(kind) else -1)[how - 1]
    if pa.types.is_floating(kind):
        return (0.0, math.inf, math.nan)[how - 1] if kind.bit_width > 16 else np.float16((0, np.inf, np.nan)[how - 1])
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return (b"", b"\x89PNG\r\n\x1a\n" + b"x" * 99, b"\xff\xd8\xff")[how - 1]
    return ("", "../../x\n|<script>\x1b[31m" * 9, "~")[how - 1]


HOWS = ("missing", "folder", "fifo", "link", "rubbish", "rubbish", "truncated", "flipped", "values", "values")
DAMAGES = st.builds(Damage, st.integers(0, 200), st.sampled_from(HOWS), st.integers(0, 1 << 20), st.integers(0, 200))


# --- running ----------------------------------------------------------------------------------------------------------


def words(command: str, root: Path, given: dict[str, str]) -> list[str]:
    """Return a command line that is valid in `root`, but for what is `given`."""
    options = VARIANTS.get(command, Variant(command))
    base = BASE[options.command] | options.given | given
    base = {name: value for name, value in base.items() if name in given or value}
    positional = COMMANDS[options.command].positional
    line = options.command.split()
    if positional in base:
        line.append(_placed(root, base.pop(positional)))
    for name, value in base.items():
        line.append(f"--{name.replace('_', '-')}={_placed(root, value)}")
    return line


@dataclass(frozen=True)
class Variant:
    """A command with options that change what it reads: `given` beside those of BASE, "" to leave one out."""

    command: str
    given: dict[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ()


EXTENDED = {"output": "begun", "prompts": "more.jsonl", "shard_size": "1", "extend": "true"}
METHODS = {"dataset": "", "images": "", "index": "", "prompts": "", "models": "miniature", "benchmark": "single-30"}
VARIANTS = {
    "generate --extend": Variant("generate", EXTENDED, ("begun",)),
    "generate, resumed": Variant("generate", {"output": "begun", "shard_size": "1"}, ("begun",)),
    "generate --measured-by": Variant("generate", {"measured_by": "dataset"}, ("dataset",)),
    "preprocess --earlier": Variant("preprocess", {"earlier": "prepared"}, ("prepared",)),
    "score --add faces": Variant("score", {"url": "old", "add": "faces"}, ("old",)),
    "score --add face-quality": Variant("score", {"add": "face-quality"}, ("dataset",)),
    "evaluate --models": Variant("evaluate", METHODS, ("people",)),
    "verify --absent": Variant("verify", {"absent": "ada"}, ("dataset",)),
    "export --to faces": Variant("export", {"to": "faces", "where": ""}, ("dataset",)),
}


def _placed(root: Path, value: str) -> str:
    return value.replace("ROOT", str(root))


BASE: dict[str, dict[str, str]] = {
    "demo": {"output": "out"},
    "rehearse": {"output": "out"},
    "preprocess": {"source": "photos", "output": "out", "captioner": "none", "segmenter": "none", "matcher": "none"},
    "train": {"role": "tdm", "data": "prepared", "base": "miniature", "output": "run", "resume": "true"},
    "assemble": {"base": "miniature", "tdm": "run", "sdm": "run", "output": "out"},
    "convert": {"base": "miniature", "image_encoder": "miniature", "sdm": "checkpoint.bin", "tdm": "checkpoint.bin",
                "output": "out"},
    "generate": {"models": "miniature", "subjects": "people", "prompts": "prompts.jsonl", "output": "out", "steps": "2"},
    "evaluate": {"dataset": "dataset", "images": "theirs", "subjects": "people", "prompts": "prompts.csv",
                 "index": "index.csv", "scorers": "miniature", "output": "out"},
    "score": {"url": "dataset"},
    "copies": {"url": "dataset", "training": "prepared", "scorers": "miniature"},
    "verify": {"url": "dataset"},
    "repair": {"url": "dataset"},
    "retry-failed": {"url": "dataset"},
    "remake": {"sample_id": "ada~p0~0", "dataset": "dataset"},
    "merge": {"urls": "dataset,other", "output": "out"},
    "retract": {"url": "dataset", "subject": "ada"},
    "export": {"url": "dataset", "to": "lmdb", "output": "out", "where": "ip > 0"},
    "publish": {"places": "dataset,hf://datasets/org/name"},
    "card": {"url": "dataset"},
    "check": {"models": "miniature", "scorers": "miniature"},
    "explain": {"models": "miniature", "prompt": "a woman <|image|> on the beach", "reference": "people/ada/1.png",
                "output": "out/explain.png"},
    "miniature render": {"count": "2", "output": "out"},
    "miniature claim": {"output": "out"},
}  # fmt: skip


@dataclass
class Tried:
    """How many inputs of a command were refused and accepted."""

    refused: int = 0
    accepted: int = 0


STARTED = re.compile(r"\d\d:\d\d:\d\d .*")


def run(line: list[str], root: Path) -> tuple[int, str]:
    """Run a command in `root`; return its exit code and what it wrote to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(root), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(line)
    return code, err.getvalue()


def contents(root: Path) -> dict[str, tuple]:
    """Return name -> (kind, size, time) of all in a folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        state = path.lstat()
        found[str(path)] = (state.st_mode, state.st_size if path.is_file() else 0, state.st_mtime_ns)
    return found


def require_promise(command: str, line: list[str], root: Path, tried: Tried) -> None:
    """Run a command on hostile input and check the promise: one line, exit 2, nothing written; or the input is good."""
    before = contents(root)
    code, err = run(line, root)
    lines = err.splitlines()
    if ACCEPTED in err or code == 0 or (command.startswith("verify") and code == 1):
        tried.accepted += 1
    else:
        assert code == 2, (line, code, err)
        *start, last = lines
        assert last.startswith("facediffuser"), (line, err)
        assert len(start) <= 1 and all(STARTED.fullmatch(one) for one in start), (line, err)
        assert len(last.encode(errors="replace")) < 20_000, (line, "a line of", len(last))
        tried.refused += 1
    if not (command == "card" and code == 0):
        assert contents(root) == before, (line, code, err, "something was written")


@contextlib.contextmanager
def world_of(templates: Path, names: list[str]) -> Iterator[Path]:
    """Yield a folder with copies of some templates and links to the others."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root = Path(folder)
        for path in templates.iterdir():
            if path.name not in names:
                (root / path.name).symlink_to(path)
            elif path.is_dir():
                shutil.copytree(path, root / path.name)
            else:
                shutil.copy(path, root / path.name)
        if "models" in names:
            shutil.copytree(models_folder(), root / "models", dirs_exist_ok=True)
        yield root
