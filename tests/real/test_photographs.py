"""Faces of real photographs: found, told apart by real weights, flagged where they are copies."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scoring.small_world import row, write_dataset

from facediffuser.dataset import open_dataset
from facediffuser.dataset.added_columns import read_added_columns
from facediffuser.evaluation.add_columns import column_stage
from facediffuser.evaluation.copies import find_copies
from facediffuser.evaluation.score_settings import CopySettings, ScoreSettings
from facediffuser.faces import head_pose
from facediffuser.generation.job import prepare
from facediffuser.generation.shard_generator import ShardGenerator
from facediffuser.scoring.columns import load_columns
from facediffuser.scoring.face_detector import FaceDetector
from facediffuser.scoring.scorers import load_identity_scorer
from facediffuser.storage import open_store
from facediffuser.tasks.local_driver import LocalDriver

pytestmark = pytest.mark.real
CUT = 0.6  # dlib's own: below it is one person


@pytest.fixture(scope="module")
def dlib():
    return load_columns(["dlib"])["dlib"]


def distance(dlib, picture, *references) -> float | None:
    return dlib.score([picture], [[list(references)]], [""])["dlib_l2"][0].as_py()


def again(picture: Image.Image) -> Image.Image:
    """The picture as it comes back from elsewhere: smaller, brighter, as a JPEG."""
    buffer = io.BytesIO()
    smaller = picture.resize((picture.width * 4 // 5, picture.height * 4 // 5), Image.Resampling.LANCZOS)
    ImageEnhance.Brightness(smaller).enhance(1.1).save(buffer, "jpeg", quality=80)
    return Image.open(buffer).convert("RGB")


def test_every_portrait_has_a_face_upright_and_towards_the_camera(photographs):
    for name, faces in zip(
        photographs, FaceDetector("cpu", min_side=0).detect(list(photographs.values())), strict=True
    ):
        assert faces and faces[0].prob > 0.99, name
        yaw, pitch, roll = head_pose(faces[0].landmarks)
        assert abs(yaw) < 30 and abs(pitch) < 35 and abs(roll) < 20, (name, yaw, pitch, roll)


def test_a_mirrored_face_looks_the_other_way(photographs):
    from PIL import ImageOps

    detector = FaceDetector("cpu", min_side=0)
    for name in ("obama2", "obama3"):
        there, mirrored = (
            head_pose(detector.detect([one])[0][0].landmarks)
            for one in (photographs[name], ImageOps.mirror(photographs[name]))
        )
        assert there[0] * mirrored[0] < 0 and abs(there[0] + mirrored[0]) < 6, name


def test_one_man_lies_below_dlibs_cut_and_different_people_above(dlib, photographs):
    same = [distance(dlib, photographs[one], photographs["obama"]) for one in ("obama2", "obama3")]
    others = [distance(dlib, photographs[one], photographs["obama"]) for one in ("biden", "astronaut", "hopper")]
    print(f"dlib, L2: same {np.round(same, 3)}, different {np.round(others, 3)}")
    assert max(same) < CUT < min(others)


def test_without_a_face_there_is_no_distance(dlib, photographs):
    empty = Image.new("RGB", (200, 200), (90, 120, 90))
    assert distance(dlib, empty, photographs["obama"]) is None
    assert distance(dlib, photographs["obama"], empty) is None


def test_a_copy_of_a_photograph_is_flagged_and_another_of_the_same_man_is_not(photographs, tmp_path):
    identity, _ = load_identity_scorer("miniature")  # the check for pixels asks no network
    pictures = [again(photographs["obama"]), photographs["obama2"], photographs["obama3"]]
    boxes = [[list(face.box) for face in found[:1]] for found in identity.detector.detect(pictures)]
    rows = [
        row(n, picture, face_boxes=box, subject_ids=["obama"])
        for n, (picture, box) in enumerate(zip(pictures, boxes, strict=True))
    ]
    store = open_store(write_dataset(tmp_path / "dataset", rows, {"obama": photographs["obama"]}))
    found = find_copies(store, identity, CopySettings(url=store.url), None).to_pydict()
    print("correlation with the reference's pixels:", np.round(found["paste_similarity"], 3))
    assert found["pasted_reference"] == [True, False, False]


def test_a_dataset_of_a_real_person_has_every_column(portraits, world, tmp_path):
    """The models are random and small; reference, detector and the further scorers are real."""
    people = tmp_path / "people"
    for name, sources in {"obama": ("obama", "obama2"), "biden": ("biden",)}.items():
        (people / name).mkdir(parents=True)
        for source in sources:
            portraits[source].save(people / name / f"{source}.jpg")

    class Portraits:
        """A pipeline whose every image is another photograph of the first man."""

        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            return getattr(self.real, name)

        def __call__(self, **given):
            out = self.real(**given)
            out.images = [portraits["obama3"].resize((320, 520)) for _ in out.images]
            return out

    settings = world.settings(tmp_path / "out", subjects=str(people), steps=1, images_per_prompt=1, scorers="miniature")
    prepared = prepare(settings)
    prepared.write()
    loaded = ShardGenerator(prepared.job)
    generator = ShardGenerator(prepared.job, Portraits(loaded.pipeline), loaded.scorers)
    for shard in range(prepared.job.layout.shards):
        generator(shard)
    names = ["dlib", "nsfw", "face-quality", f"onnx-face:{mean_colours(tmp_path / 'colours.onnx')}"]
    LocalDriver().run(column_stage(ScoreSettings(url=str(tmp_path / "out"), add=names, device="cpu")))
    store = open_store(tmp_path / "out")
    rows = open_dataset(store.url).to_table().to_pylist()
    added = read_added_columns(store)
    found = added.rows(open_dataset(store.url).to_table(["sample_id"])["sample_id"]).to_pylist()
    for values, more in zip(rows, found, strict=True):
        assert values["status"] == "ok" and values["faces"][0]["probability"] > 0.99 and values["ip_margin"] is not None
        assert (more["dlib_l2"] < CUT) == (values["subject_ids"] == ["obama"])
        assert 0 <= more["nsfw"] < 0.2 and 0 < more["face_quality"] <= 1 and more["colours_cosine"] is not None
    assert added.licences()["dlib"] == "CC0-1.0" and added.licences()["nsfw"] == "BSD-2-Clause"
    assert len(added.digests()) == 4


def mean_colours(path):
    """Write a recogniser in ONNX that takes (n, 3, 112, 112) and returns 9 x 9 mean colours; return its path."""
    import onnx  # of the extra [real], which collecting this file does not need
    from onnx import TensorProto, helper

    take = helper.make_tensor_value_info("crops", TensorProto.FLOAT, ["n", 3, 112, 112])
    give = helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["n", "d"])
    nodes = [
        helper.make_node("AveragePool", ["crops"], ["cells"], kernel_shape=[12, 12], strides=[12, 12]),
        helper.make_node("Flatten", ["cells"], ["vectors"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "colours", [take], [give]), opset_imports=[helper.make_opsetid("", 13)]
    )
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def test_a_recogniser_in_onnx_sees_aligned_faces(portraits, tmp_path):
    """Mean colours of aligned crops: the same photograph, tilted and moved, is nearly the same; another is less so."""
    name = f"onnx-face:{mean_colours(tmp_path / 'Mean Colours.onnx')}"
    scorer = load_columns([name])[name]
    tilted = portraits["obama"].rotate(20, Image.Resampling.BICUBIC, expand=True)
    same, other = scorer.score([tilted, portraits["biden"]], [[[portraits["obama"]]]] * 2, ["", ""])[
        "mean_colours_cosine"
    ].to_pylist()
    assert same > 0.98 > other
