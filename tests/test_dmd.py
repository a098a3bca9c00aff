"""Three whole networks in place of one: who is asked what, and who learns from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teasr.backbones import PRESETS, DualBranchDiT
from teasr.dmd import TeacherStudent, judges, student_weights
from teasr.objective import (
    Losses,
    Objective,
    ObjectiveSettings,
    mean_square,
    rectification_target,
    rectification_weight,
)
from tests.ports import free_port

SETTINGS = {"teacher": True, "any_step": 0.0, "end_to_end": 0.0, "flow_matching": 0.0}


def networks() -> TeacherStudent:
    torch.manual_seed(0)
    start = DualBranchDiT(PRESETS["teasr-xs"])
    for parameter in start.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return TeacherStudent(start)


class Recorder:
    """Writes down who was asked what."""

    def __init__(self, module: TeacherStudent) -> None:
        self.module = module
        self.calls: list[tuple[str, bool, tuple[Tensor, ...], Tensor]] = []

    def __call__(self, *inputs: Tensor, role: str = "student") -> Tensor:
        output = self.module(*inputs, role=role)
        self.calls.append((role, torch.is_grad_enabled(), inputs, output))
        return output


def step(network: Recorder | TeacherStudent, **settings: object) -> Losses:
    generator = torch.Generator().manual_seed(1)
    condition = torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1
    x = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    chosen = ObjectiveSettings.model_validate(SETTINGS | settings)
    return Objective(chosen)(network, x, condition, generator, **judges(network))


def moved(module: torch.nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_each_network_is_a_whole_copy_and_the_teacher_is_frozen() -> None:
    made = networks()
    state = made.state_dict()
    names = made.student.state_dict()
    assert len(state) == 3 * len(names)
    for name, value in names.items():
        for role in ("fake", "teacher"):
            assert torch.equal(state[f"{role}.{name}"], value)
            assert state[f"{role}.{name}"].data_ptr() != value.data_ptr()
    assert not any(p.requires_grad for p in made.teacher.parameters())
    kept = student_weights(state)
    DualBranchDiT(PRESETS["teasr-xs"]).load_state_dict(kept)
    assert list(kept) == list(names)


def test_velocities_of_the_fakes_come_from_the_fake_network_and_the_teacher() -> None:
    recorder = Recorder(networks())
    losses = step(recorder)
    roles = [(role, gradient) for role, gradient, _, _ in recorder.calls]
    assert roles == [("student", False), ("teacher", False), ("student", True), ("fake", True)]
    (_, _, real, real_velocity), (_, _, (x_t, t, r, _), velocity), (_, _, fake, fake_velocity) = (
        recorder.calls[1:]
    )
    assert not r.any()
    for one, other in zip(real, fake):
        assert torch.equal(one, other)  # one point, one level; the sign of time means nothing here
    assert bool((fake[1] > 0).all()) and torch.equal(fake[1], fake[2])
    level = fake[1].view(-1, 1, 1, 1)
    image = (x_t - t.view(-1, 1, 1, 1) * velocity).detach()
    noise = (fake[0] - (1 - level) * image) / level
    torch.testing.assert_close(
        losses.terms["self_adversarial"],
        mean_square(fake_velocity, noise - image).detach(),
        rtol=1e-4,
        atol=1e-5,
    )
    target = rectification_target(velocity, fake_velocity, real_velocity)
    torch.testing.assert_close(
        losses.terms["rectification"], mean_square(velocity, target).detach()
    )


def test_each_term_trains_its_own_network_and_the_teacher_never_moves() -> None:
    made = networks()
    for parameter in made.fake.parameters():  # the first step of training has the two equal
        parameter.data += 0.02 * torch.randn(parameter.shape)
    step(made, pixel_mse=0.0, self_adversarial=1e-30).total.backward()
    student = [p.grad.clone() for p in made.student.parameters() if p.grad is not None]
    assert student and any(bool(gradient.abs().max() > 1e-6) for gradient in student)
    assert max(float(p.grad.abs().max()) for p in made.fake.parameters()) < 1e-20
    made.zero_grad()
    step(made, pixel_mse=0.0, rectification=1e-30).total.backward()
    assert moved(made.fake)
    assert max(float(p.grad.abs().max()) for p in made.student.parameters()) < 1e-20
    assert not moved(made.teacher)


def test_distribution_matching_gradient_is_the_normalised_difference_of_velocities() -> None:
    """d total / d F = weight * 2 (F_fake - F_real) / elements."""
    made = networks()
    for parameter in made.fake.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    recorder = Recorder(made)
    losses = step(recorder, pixel_mse=0.0, rectification=0.7)
    (*_, real), (_, _, inputs, velocity), (*_, fake) = recorder.calls[1:]
    velocity.retain_grad()
    losses.total.backward()
    weight = rectification_weight(fake, real, inputs[1], 10.0).view(-1, 1, 1, 1)
    expected = 0.7 * weight * 2 * (fake - real).detach() / velocity.numel()
    torch.testing.assert_close(velocity.grad, expected, rtol=1e-4, atol=1e-7)


TRAIN = """
import sys
from pathlib import Path
import torch
from teasr.backbones import PRESETS, DualBranchDiT
from teasr.dmd import TeacherStudent, judges, student_weights
from teasr.engine import Engine, EngineSettings
from teasr.objective import Objective, ObjectiveSettings

torch.set_num_threads(1)
folder, stage = Path(sys.argv[1]), int(sys.argv[2])
objective = Objective(ObjectiveSettings(teacher=True, any_step=0, end_to_end=0, flow_matching=0))

def made(seed):
    torch.manual_seed(seed)
    settings = EngineSettings(zero_stage=stage, precision="fp32", learning_rate=1e-3)
    return Engine(TeacherStudent(DualBranchDiT(PRESETS["teasr-xs"])), settings, 2)

def step(engine, number):
    generator = torch.Generator().manual_seed(number)
    condition = torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1
    x = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    losses = objective(engine.network, x, condition, generator,
                       target_network=engine.averaged_network, **judges(engine.network))
    engine.step(losses.total, number / 10)

engine = made(0)
begun = engine.state_dict(average=False)
for number in range(3):
    step(engine, number)
engine.save(folder, {})
step(engine, 3)
straight = engine.state_dict(average=False)
again = made(1)
again.load(folder)
step(again, 3)
resumed = again.state_dict(average=False)
for name, value in straight.items():
    if name.startswith("teacher."):
        assert torch.equal(value, begun[name]), name
    assert torch.equal(value, resumed[name]), name
for role in ("student", "fake"):
    assert any(not torch.equal(v, begun[n]) for n, v in straight.items() if n.startswith(role))
DualBranchDiT(PRESETS["teasr-xs"]).load_state_dict(student_weights(engine.state_dict()))
"""


@pytest.mark.parametrize("stage", [1, 3])
def test_one_engine_trains_student_and_fake_network_and_resumes(tmp_path: Path, stage: int) -> None:
    """DeepSpeed in its own process: the teacher stays, a resumed run is the same to the bit."""
    worker = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path), str(stage)],
        env=os.environ | worker | {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
