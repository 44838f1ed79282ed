"""The stage on Ray Train: two workers, and errors that come out as what they are."""

import pytest
import torch
from training.test_loop import weights

from facediffuser.errors import InputError
from facediffuser.training.loop import DivergedError, train_model
from tasks.train import train_on_ray


def test_two_workers_on_ray_train_the_weights_of_one_with_the_doubled_batch(ray_session, settings, tmp_path):
    """AdamW's first step moves each weight by the sign of its gradient, so SGD-like closeness is asked of most weights."""
    given = dict(steps=2, warmup_steps=0, cpus_per_worker=1)
    result = train_on_ray.fn(settings("sdm", workers=2, batch_size=2, output=str(tmp_path / "two"), **given))
    assert (result["role"], result["step"]) == ("sdm", 2) and result["loss"] > 0
    train_model(settings("sdm", workers=1, batch_size=4, output=str(tmp_path / "one"), **given), lambda numbers: None)
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    close = torch.cat([torch.isclose(ours[name], theirs[name], atol=1e-5).flatten().float() for name in ours])
    assert close.mean() > 0.99


def test_a_run_that_has_ended_is_left_as_it_is(ray_session, settings, tmp_path):
    chosen = settings("tdm", resume=True)
    train_model(chosen, lambda numbers: None)
    assert train_on_ray.fn(chosen)["seconds"] == 0.0


@pytest.mark.parametrize(
    ("given", "kind"),
    [({"data": "/nowhere/prepared"}, InputError), ({"learning_rate": 1e30, "max_grad_norm": 1e30}, DivergedError)],
)
def test_errors_of_the_workers_come_out_as_what_they_are_and_are_not_tried_again(ray_session, settings, given, kind):
    with pytest.raises(kind):
        train_on_ray.fn(settings("tdm", steps=30, warmup_steps=0, workers=1, **given))
