"""Distillation from a teacher, for comparison: distribution matching with three whole networks.

What TEASR does with one network, distribution matching distillation (DMD, arXiv 2311.18828) does
with three, all of them copies of the weights that training starts from:

| network | trained | gives                                                                     |
|---------|---------|---------------------------------------------------------------------------|
| student | yes     | one-step images x_hat = x_t - t F(x_t, t, 0): what is kept at the end      |
| fake    | yes     | F_fake(x'_t, t', t'), by flow matching on the student's images alone       |
| teacher | no      | F_real(x'_t, t', t'): the starting weights must have learned flow matching |

The student follows the pixel terms and the distribution-matching gradient F_fake - F_real at its
own images noised to t', with the times and the per-sample normaliser of the self-adversarial form:
only where the two velocities come from differs. So `teasr.objective.Objective` runs it, given the
two networks, and its terms keep their names: `self_adversarial` is the fake network's flow
matching, `rectification` the distribution matching. The consistency terms and flow matching of the
student are the recipe's to set: DMD has none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from torch import Tensor

from teasr.backbones.base import Backbone, Velocity

Role = Literal["student", "fake", "teacher"]


class TeacherStudent(Backbone):
    """Student, fake network and frozen teacher in one module: one engine trains the first two.

    Args:
        start: becomes the student; the others are copies of it.
    """

    def __init__(self, start: Backbone) -> None:
        super().__init__()
        self.scale, self.multiple, self.period = start.scale, start.multiple, start.period
        self.student = start
        self.fake = copy.deepcopy(start)
        self.teacher = copy.deepcopy(start).requires_grad_(False)

    def forward(
        self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor, role: Role = "student"
    ) -> Tensor:
        network: Backbone = getattr(self, role)
        velocity: Tensor = network(x_t, t, r, condition)
        return velocity


def judges(network: Callable[..., Tensor]) -> dict[str, Velocity]:
    """`fake_network` and `teacher` of a `TeacherStudent`, or of an engine around one."""
    return {
        "fake_network": partial(network, role="fake"),
        "teacher": partial(network, role="teacher"),
    }


def student_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's state dict, out of that of a `TeacherStudent`."""
    prefix = "student."
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
