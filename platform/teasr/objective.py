"""The TEASR objective: every term of self-adversarial any-step distillation, in one model.

Notation (METHOD of TEASR, arXiv 2606.16188, on TwinFlow, arXiv 2512.05150, and RCGM): x clean
image, z ~ N(0, I), x_t = (1 - t) x + t z, velocity v = z - x, and F(x_t, t, r | y) the average
velocity from level t to level r, so that x_r = x_t - (t - r) F and the one-step image is x_hat =
x_t - t F(x_t, t, 0). Negative times are the twin trajectory: F(x'_t, -t, -t) is the velocity of
the flow between noise and the model's own one-step images. sg[.] is stop-gradient.

| term             | network at       | target                                                     |
|------------------|------------------|------------------------------------------------------------|
| any_step         | (x_t, t, r)      | sg[F - e], e the recursive consistency residual            |
| end_to_end       | (x_t, t, 0)      | the same with r = 0, from any t                            |
| flow_matching    | (x_t, t, r ~ t)  | v                                                          |
| self_adversarial | (x'_t, -t', -t') | z' - x_fake, x_fake = sg[x_hat]                            |
| rectification    | (x_t, t, 0)      | sg[F - (F(x'_t, -t', -t') - F(x'_t, t', t'))], times w(t)|
| pixel            | x_hat            | x, by squared or absolute error and LPIPS, times 1 - t     |

Where x is a picture's latents, the pixel terms compare decoded pictures.

Only targets need x_hat and the Euler steps, and targets have no gradient: whatever is asked without
gradient comes first, and rows that do not depend on each other share a pass over the weights. Per
step, with N Euler steps in the consistency target (2 by default):

| pass   | gradient | rows                                                                        |
|--------|----------|-----------------------------------------------------------------------------|
| 1      | no       | Euler step 1 of any-step and end-to-end rows; one-step images for the fakes |
| 2      | no       | Euler step 2; real velocity of the fakes                                    |
| 3 to N | no       | the other Euler steps, a pass each                                          |
| last   | yes      | any-step, end-to-end and flow-matching rows; twin velocity of the fakes,    |
|        |          | whose detached value serves the rectification                               |

That is N + 1 = 3 passes, 1 with gradient. One by one (`passes: sequential`) the same rows are 10
passes, 4 with gradient. Where weights are streamed a pass with gradient reads them twice, so that
14 sweeps over the weights become 4. A `target_network` has other weights: its N Euler passes take
nothing along, 5 passes in all. A term of weight 0 is left out with its rows and passes.

`passes: partitioned` gives each sample one role in place of all of them (TwinFlow's recipe for
large batches), in the same passes with a quarter of the rows with gradient:

| role             | terms of the sample                        | rows, by pass                    |
|------------------|--------------------------------------------|----------------------------------|
| any_step         | any_step                                   | Euler 1; Euler 2; any-step       |
| end_to_end       | end_to_end, rectification, the pixel terms | Euler 1, one-step image;         |
|                  |                                            | Euler 2, both velocities;        |
|                  |                                            | end-to-end                       |
| flow_matching    | flow_matching                              | flow-matching (last pass alone)  |
| self_adversarial | self_adversarial                           | one-step image; twin velocity    |

A role's terms are divided by its share of the optimizer step's samples. Each sample takes each role
equally often, so that the gradient is the stacked one in expectation, at a larger variance.

Every term is a pure function that returns one value per sample; the caller weighs and averages.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from teasr.backbones.base import Velocity
from teasr.config import Settings
from teasr.errors import UsageError
from teasr.lpips import Lpips

TWIN_TERMS = ("self_adversarial", "rectification")
FINE = 1.5
"""Deviation in pixels of the blur whose difference to a picture is its fine detail."""
PIXEL_TERMS = ("pixel_mse", "pixel_l1", "pixel_even", "pixel_lpips")
TERMS = ("any_step", "end_to_end", "flow_matching", *TWIN_TERMS, *PIXEL_TERMS)
ROLES = ("any_step", "end_to_end", "flow_matching", "pure_noise", "self_adversarial")
"""Groups of rows with gradient: what a sample can be there for. `pure_noise` is the rectification's
own, without `timestep_aware`."""


class ObjectiveSettings(Settings):
    """Weights and constants of the objective. A term of weight 0 is left out and costs nothing."""

    any_step: float = Field(1.0, ge=0)
    """Weight of the average-velocity term for random r < t."""
    end_to_end: float = Field(0.25, ge=0)
    """Weight of the same with r = 0."""
    flow_matching: float = Field(0.25, ge=0)
    """Weight of the instantaneous velocity."""
    self_adversarial: float = Field(0.25, ge=0)
    """Weight of the twin trajectory's velocity."""
    rectification: float = Field(0.25, ge=0)
    """Weight of the rectification of one-step images."""
    pixel_mse: float = Field(1.0, ge=0)
    """Weight of the squared error of one-step images."""
    pixel_l1: float = Field(0.0, ge=0)
    """Weight of their absolute error. Beside LPIPS it holds even areas together, where a squared
    error hardly weighs."""
    pixel_lpips: float = Field(1.0, ge=0)
    """Weight of LPIPS of one-step images; without LPIPS weights the term is left out."""
    pixel_sharpen: float = Field(0.0, ge=0)
    """Amount by which the pixel terms' target is sharpened (`sharpened`), as Real-ESRGAN does
    (arXiv 2107.10833, section 3.3): what is uncertain averages to a blur; this leans against it."""
    pixel_even: float = Field(0.0, ge=0)
    """Weight of the absolute error of fine detail in even areas: grain, which beside a larger error
    of tone hardly counts in `pixel_l1`."""
    pixel_detail: float = Field(0.0, ge=0)
    """Fine detail of the target, on the scale [-1, 1], from which an area is textured in full
    (`detail`); LPIPS counts there alone, `pixel_even` elsewhere. 0: both count everywhere. In even
    and defocused areas LPIPS-VGG rewards grain."""
    pixel_floor: float = Field(0.0, ge=0, le=1)
    """Smallest timestep weight of the pixel terms: they carry max(1 - t, pixel_floor). The
    published 0 suits a pretrained backbone; one that learns from nothing needs pixels at pure
    noise too."""
    pure_noise_share: float = Field(0.0, ge=0, le=1)
    """Share of end-to-end rows placed exactly at t = 1, where one-step restoration starts."""
    timestep_aware: bool = True
    """Whether one-step images are rectified at every noise level of the end-to-end rows. False, for
    comparison: at pure noise alone, on rows of their own, where the weight's factor t is 1."""
    teacher: bool = False
    """For comparison: distribution matching with a frozen teacher and a fake network of their own
    (`teasr.dmd`) in place of the twin trajectory."""
    consistency_step: float = Field(0.01, gt=0, le=0.5)
    """d of the recursive consistency target."""
    consistency_order: int = Field(2, ge=1)
    """N of the recursive consistency target: Euler steps without gradient."""
    fake_time_range: tuple[float, float] = (0.02, 0.98)
    """Levels of the twin trajectory, kept off 0 and 1: sign and boundary never degenerate."""
    rectification_bound: float = Field(10.0, gt=0)
    """Upper bound of the rectification's per-sample normaliser."""
    self_adversarial_after: float = Field(0.0, ge=0, le=1)
    """Share of the run in which the pixel terms of one-step images train alone. A network that
    starts from nothing must first make pictures before it can learn from its own, and one pass a
    step is far cheaper than three; a pretrained network starts at 0."""
    pixel_lpips_after: float = Field(0.0, ge=0, le=1)
    """Share of the run after which LPIPS joins the squared error: it costs more than the network,
    and has little to say about pictures that are not yet there."""
    passes: Literal["stacked", "sequential", "partitioned"] = "stacked"
    """`stacked`: rows that do not depend on each other share a pass. `sequential`: each term's rows
    have their own. Losses and gradients are equal. `partitioned`: each sample has the rows of one
    role, for a quarter of the memory; the gradient is equal in expectation. An optimizer step needs
    as many samples as there are roles (4): over micro-batches, if a batch has fewer."""

    @field_validator("fake_time_range")
    @classmethod
    def _inside(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] < value[1] < 1:
            raise ValueError("two increasing numbers strictly between 0 and 1 are expected")
        return value

    @model_validator(mode="after")
    def _something_is_trained(self) -> ObjectiveSettings:
        perceptual = self.pixel_lpips > 0 and self.pixel_lpips_after == 0
        pixels = self.pixel_mse > 0 or self.pixel_l1 > 0 or self.pixel_even > 0 or perceptual
        others = any(getattr(self, name) > 0 for name in TERMS if name not in PIXEL_TERMS)
        if not pixels and not (others and self.self_adversarial_after == 0):
            raise ValueError(
                "nothing is trained at the start; give a term a weight above 0 (only pixel terms "
                "train before self_adversarial_after)"
            )
        if self.teacher and not (self.self_adversarial > 0 and self.rectification > 0):
            raise ValueError("teacher needs self_adversarial and rectification above 0")
        if self.teacher and self.passes == "partitioned":
            raise ValueError("teacher needs passes=stacked or sequential: it is there to compare")
        return self

    def role_of(self, term: str) -> str:
        """The role whose rows `term` is a function of."""
        if term in PIXEL_TERMS:
            return "end_to_end"
        return self.source if term == "rectification" else term

    @property
    def source(self) -> str:
        """The role whose one-step images are the fakes."""
        return "end_to_end" if self.timestep_aware else "pure_noise"

    @property
    def least_samples(self) -> int:
        """Samples that an optimizer step needs: one for each role where they are partitioned."""
        trained = {self.role_of(name) for name in TERMS if getattr(self, name) > 0}
        return len(trained) if self.passes == "partitioned" else 1


@dataclass(frozen=True)
class Times:
    """The times that one step draws per sample; each (N,) float32."""

    any_t: Tensor
    """t of the any-step rows, in (0, 1)."""
    any_r: Tensor
    """r of the any-step rows, 0 <= r < t."""
    end_t: Tensor
    """t of the end-to-end rows, in (0, 1]."""
    flow_t: Tensor
    """t of the flow-matching rows."""
    flow_r: Tensor
    """r of the flow-matching rows, within 5% of t."""
    fake_t: Tensor
    """Level of the fakes, inside `fake_time_range`."""


@dataclass(frozen=True)
class Rows:
    """Where a network is asked: points x_t (N, C, H, W), levels t and targets r, each (N,), and the
    condition (N, ...)."""

    x_t: Tensor
    t: Tensor
    r: Tensor
    condition: Tensor


@dataclass(frozen=True)
class Fakes:
    """One-step images without gradient, noised afresh to level t'."""

    rows: Rows
    """Where the twin velocity is asked."""
    velocity: Tensor
    """z' - x_fake."""
    judged: list[Tensor]
    """Real velocity, and the fake one if it was asked without gradient; empty if neither was."""


@dataclass(frozen=True)
class MicroBatch:
    """Which part of an optimizer step a batch is. All workers give the same."""

    index: int = 0
    """Batches of this step that came before."""
    count: int = 1
    """Batches of this step."""
    step: int = 0
    """Optimizer steps before this one."""


@dataclass(frozen=True)
class Share:
    """Samples of a batch that have a role, and what their mean counts in the batch's loss."""

    samples: slice | Tensor
    weight: float


Result = TypeVar("Result")
Ask = tuple[Velocity, Rows]
"""A network, and where it is asked."""
Evaluate = Callable[[Sequence[Ask]], list[Tensor]]
"""Velocities (N, C, H, W), one for each of what is asked."""
Chain = Generator[list[Ask], list[Tensor], Result]
"""Passes that depend on each other: yields what to ask, is sent velocities, returns a result."""


@dataclass(frozen=True)
class Losses:
    """One step's losses.

    Attributes:
        total: scalar, the weighted mean to differentiate.
        terms: per-sample values (N,) by term, unweighted and detached: what is logged.
    """

    total: Tensor
    terms: dict[str, Tensor]

    def is_finite(self) -> bool:
        """Whether every value of every term is a finite number."""
        return not self.not_finite()

    def not_finite(self) -> str:
        """Name of the first term with a NaN or an infinity, or nothing."""
        for name, values in self.terms.items():
            if not bool(torch.isfinite(values).all()):
                return name
        return ""


# --------------------------------------------------------------------------- the terms, each on
# its own


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - |t|) x + |t| z; x, z (N, C, H, W), t (N,)."""
    level = _column(t.abs())
    return (1 - level) * x + level * z


def one_step_image(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """x_hat = x_t - t F(x_t, t, 0)."""
    return x_t - _column(t) * velocity


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error averaged over all but the first axis: (N, ...) -> (N,)."""
    return (prediction - target).square().flatten(1).mean(1)


def mean_absolute(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute error averaged over all but the first axis: (N, ...) -> (N,)."""
    return (prediction - target).abs().flatten(1).mean(1)


def step_back(rows: Rows, velocity: Tensor, step: float) -> Rows:
    """(x_m, t_m, r): `rows` moved along `velocity` to t_m = max(t - step, r)."""
    t_m = torch.maximum(rows.t - step, rows.r)
    return Rows(rows.x_t - _column(rows.t - t_m) * velocity, t_m, rows.r, rows.condition)


def rcgm_integral(network: Velocity, start: Rows, order: int) -> Chain[Tensor]:
    """I = sum_i (s_i - s_{i+1}) F(x_{s_i}, s_i, s_{i+1}), `order` Euler steps from t_m to r, where
    `start` is (x_m, t_m, r)."""
    total = torch.zeros_like(start.x_t)
    for i in range(order):
        t, r = (torch.lerp(start.t, start.r, j / order) for j in (i, i + 1))
        (velocity,) = yield [(network, Rows(start.x_t - total, t, r, start.condition))]
        total = total + _column(t - r) * velocity
    return total


def make_fakes(
    network: Velocity,
    source: Rows,
    z: Tensor,
    level: Tensor,
    *,
    real: Velocity | None = None,
    fake: Velocity | None = None,
    twin: bool = True,
) -> Chain[Fakes]:
    """The one-step images of `source` with noise z (N, C, H, W) of `level` (N,).

    Args:
        real, fake: networks that are asked for the velocity there, if any.
        twin: whether a fake velocity is asked at negative times.
    """
    (velocity,) = yield [(network, source)]
    x_fake = one_step_image(source.x_t, velocity, source.t)
    here = Rows(interpolate(x_fake, z, level), level, level, source.condition)
    there = Rows(here.x_t, -level, -level, source.condition) if twin else here
    asked = [*([(real, here)] if real else []), *([(fake, there)] if fake else [])]
    judged = (yield asked) if asked else []
    return Fakes(there, z - x_fake, judged)


@torch.no_grad()
def in_step(evaluate: Evaluate, chains: Mapping[str, Chain[Any]]) -> dict[str, Any]:
    """Results of `chains`; what they ask at a time is evaluated together."""
    results: dict[str, Any] = {}
    sent: dict[str, list[Tensor] | None] = dict.fromkeys(chains)
    while sent:
        asked: dict[str, list[Ask]] = {}
        for name, velocities in sent.items():
            try:
                asked[name] = chains[name].send(velocities)  # type: ignore[arg-type]
            except StopIteration as end:
                results[name] = end.value
        answers = iter(evaluate([ask for asks in asked.values() for ask in asks]))
        sent = {name: [next(answers) for _ in asks] for name, asks in asked.items()}
    return results


def rcgm_target(
    prediction: Tensor, velocity: Tensor, integral: Tensor, t: Tensor, t_m: Tensor, r: Tensor
) -> Tensor:
    """sg[F - e] with e = clamp(((t - r) F - I) / (t - t_m) - v, -1, 1) (RCGM; METHOD section 3).

    The consistent average velocity satisfies (t - r) F = (t - t_m) v + I; e is the residual on the
    scale of a velocity. Where the gap is a single step (t_m = r) the target is v itself.
    """
    prediction = prediction.detach()
    gap = _column((t - t_m).clamp(min=1e-6))
    residual = (_column(t - r) * prediction - integral) / gap - velocity
    target = prediction - residual.clamp(-1, 1)
    return torch.where(_column(t_m <= r), velocity, target)


def rectification_target(
    prediction: Tensor, fake_velocity: Tensor, real_velocity: Tensor
) -> Tensor:
    """sg[F - (F_fake(x'_t') - F_real(x'_t'))]: where both velocities agree, nothing moves."""
    return (prediction - (fake_velocity - real_velocity)).detach()


def rectification_weight(
    fake_velocity: Tensor, real_velocity: Tensor, t: Tensor, bound: float
) -> Tensor:
    """(N,) weight of the rectification: t * min(1 / mean|correction|, bound).

    The second factor is the normaliser of distribution matching (DMD, arXiv 2311.18828, eq. 8), per
    sample and bounded. The first is the timestep-aware part: a change of F moves the one-step image
    by t times as much, so at low noise there is little to rectify and much to disturb.
    """
    size = (fake_velocity - real_velocity).detach().abs().flatten(1).mean(1)
    return t * (1 / size.clamp(min=1e-6)).clamp(max=bound)


def pixel_weight(t: Tensor, floor: float) -> Tensor:
    """(N,) max(1 - t, floor): pixels are trusted where little noise is left."""
    return (1 - t).clamp(min=floor)


@torch.no_grad()
def sharpened(x: Tensor, amount: float) -> Tensor:
    """x (N, C, H, W) in [-1, 1] under an unsharp mask of deviation 1.5 pixels.

    x + amount * m * (x - blur(x)), where m rises from 0 to 1 with the largest difference of a
    pixel's channels, up to 8 levels of 255: noise is not sharpened.
    """
    if amount == 0:
        return x
    fine = _fine(x)
    strength = (fine.abs().amax(1, keepdim=True) / (8 / 127.5)).clamp(max=1)
    return (x + amount * strength * fine).clamp(-1, 1)


@torch.no_grad()
def detail(x: Tensor, level: float) -> Tensor:
    """(N, 1, H, W) in [0, 1]: where x (N, C, H, W) has fine detail.

    The local root mean square of x - blur(x), from 0 at a third of `level` to 1 at `level`. A ramp
    has none, so defocused edges count as even. Level 0 gives ones.
    """
    if level == 0:
        return torch.ones_like(x[:, :1])
    size = _blur(_fine(x).square().mean(1, keepdim=True), 2.0).clamp(min=0).sqrt()
    return _blur(((1.5 * size / level) - 0.5).clamp(0, 1), FINE).clamp(0, 1)


def _fine(x: Tensor) -> Tensor:
    """x - blur(x): the fine detail of (N, C, H, W)."""
    return x - _blur(x, FINE)


def _blur(x: Tensor, deviation: float) -> Tensor:
    """Gaussian of `deviation` pixels over (N, C, H, W), whose borders are repeated."""
    reach = round(3 * deviation)
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-offsets.square() / (2 * deviation**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    x = F.pad(x, (reach,) * 4, mode="replicate")
    x = F.conv2d(x, kernel[:, :, None, :], groups=x.shape[1])
    return F.conv2d(x, kernel[:, :, :, None], groups=x.shape[1])


def draw_times(count: int, settings: ObjectiveSettings, generator: torch.Generator) -> Times:
    """Fresh times for `count` samples, in float32 on the CPU."""
    uniform = torch.rand(7, count, generator=generator)
    any_t = uniform[0]
    flow_t = uniform[3]
    low, high = settings.fake_time_range
    at_noise = uniform[6] < settings.pure_noise_share
    return Times(
        any_t=any_t,
        any_r=any_t * uniform[1],
        end_t=torch.where(at_noise, torch.ones(count), uniform[2]),
        flow_t=flow_t,
        flow_r=flow_t * (1 - 0.05 * uniform[4]),
        fake_t=low + (high - low) * uniform[5],
    )


def deal_roles(roles: Sequence[str], samples: int, part: MicroBatch) -> dict[str, Share]:
    """One role for each of `samples`; roles that none of them has are left out.

    The P samples of the optimizer step stand in a ring; place p has role p modulo their number, and
    with every step each sample moves on by one place. After P steps each has been everywhere: the
    mean over these deals of sum_role weight * mean_role is the mean over all samples and roles.

    Args:
        samples: of this micro-batch, as many as in the others.

    Raises:
        UsageError: when the optimizer step has fewer samples than there are roles.
    """
    total = samples * part.count
    if total < len(roles):
        raise UsageError(
            f"objective.passes=partitioned gives each sample one of {len(roles)} roles "
            f"({', '.join(roles)}); an optimizer step has {total} "
            f"sample{'s' if total > 1 else ''} per worker.",
            f"Raise training.batch or engine.gradient_accumulation until their product is "
            f"{len(roles)} or more, or set objective.passes=stacked.",
        )
    places = (torch.arange(samples) + part.index * samples + part.step) % total
    shares = {}
    for i, role in enumerate(roles):
        (own,) = torch.where(places % len(roles) == i)
        share = len(range(i, total, len(roles))) / total
        if len(own):
            shares[role] = Share(own, len(own) / (samples * share))
    return shares


# --------------------------------------------------------------------------- the step


class Objective:
    """All terms of one step, in few passes.

    Args:
        settings: weights and constants.
        lpips: perceptual distance for the pixel term, or None to leave it out.
        decode: latents (N, C, h, w) to pictures (N, 3, H, W), differentiable, for a network that
            works on latents; None for one that works on pixels.

    Raises:
        UsageError: when LPIPS alone would be trained, and is left out.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        lpips: Lpips | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.settings = settings
        self.decode = decode
        self.lpips = lpips if settings.pixel_lpips > 0 else None
        if not self._active(0.0):
            raise UsageError(
                "objective.pixel_lpips is all that trains at the start, and there are no LPIPS "
                "weights.",
                "Set lpips or $TEASR_LPIPS to their folder, or objective.pixel_l1 above 0.",
            )

    def __call__(
        self,
        network: Velocity,
        x: Tensor,
        condition: Tensor,
        generator: torch.Generator,
        *,
        pictures: Tensor | None = None,
        progress: float = 1.0,
        micro_batch: MicroBatch = MicroBatch(),
        target_network: Velocity | None = None,
        fake_network: Velocity | None = None,
        teacher: Velocity | None = None,
    ) -> Losses:
        """Losses of one batch.

        Args:
            network: what is trained.
            x: (N, C, H, W) clean images in [-1, 1], or their latents. condition: (N, ...) of the
                same pictures.
            generator: source of noise and times, on the CPU.
            pictures: (N, 3, H, W) clean images, where x is their latents.
            progress: share of the run that is done, for `self_adversarial_after`.
            micro_batch: which part of the optimizer step this is, for `passes: partitioned`.
            target_network: network without gradient for the consistency target (an average of
                the weights for small models); None takes `network` itself.
            fake_network, teacher: what gives the fake and the real velocity of the fakes, at
                positive times both, in place of `network` (`teasr.dmd`); both or neither.

        Raises:
            UsageError: when the optimizer step has too few samples to partition.
        """
        settings = self.settings
        active = self._active(progress)
        shares = self._shares(active, len(x), micro_batch)
        active = [name for name in active if settings.role_of(name) in shares]
        times = _to(draw_times(len(x), settings, generator), x.device)
        places, noise = self._places(times), _Noise(x, generator)

        def rows_of(place: str, role: str) -> tuple[Rows, Tensor]:
            """Rows at `place` of the samples that have `role`, and their velocity z - x."""
            own = shares[role].samples
            t, r = (values[own] for values in places[place])
            clean, z = x[own], noise(place)[own]
            return Rows(interpolate(clean, z, t), t, r, condition[own]), z - clean

        rows: dict[str, Rows] = {}
        velocities: dict[str, Tensor] = {}
        for role in shares:
            if role != "self_adversarial":
                rows[role], velocities[role] = rows_of(role, role)

        # 1 to N. Without gradient: Euler steps, and one-step images with the velocities there.
        starts: dict[str, Rows] = {}
        chains: dict[str, Chain[Any]] = {}
        for name in ("any_step", "end_to_end"):
            if name in active:
                start = step_back(rows[name], velocities[name], settings.consistency_step)
                starts[name] = start
                order = settings.consistency_order
                chains[name] = rcgm_integral(target_network or network, start, order)

        def fakes_of(role: str, **judges: Velocity | None) -> Chain[Fakes]:
            own = shares[role].samples
            source, _ = rows_of(settings.source, role)
            z, level = noise("fakes")[own], times.fake_t[own]
            return make_fakes(network, source, z, level, twin=fake_network is None, **judges)

        adversarial = "self_adversarial" in active
        one_for_both = adversarial and settings.passes != "partitioned"
        if "rectification" in active:
            fake_judge = None if one_for_both else fake_network or network
            chains["rectification"] = fakes_of(
                settings.source, real=teacher or network, fake=fake_judge
            )
        if adversarial and not (one_for_both and "rectification" in active):
            chains["self_adversarial"] = fakes_of("self_adversarial")
        results = in_step(self._evaluate, chains)

        # The last pass, with gradient.
        asked = {role: (network, at) for role, at in rows.items()}
        if adversarial:
            fakes: Fakes = results.get("self_adversarial") or results["rectification"]
            asked["self_adversarial"] = (fake_network or network, fakes.rows)
        predictions = dict(zip(asked, self._evaluate(list(asked.values()))))

        terms: dict[str, Tensor] = {}
        weights: dict[str, Tensor | float] = {name: getattr(settings, name) for name in TERMS}
        for name, start in starts.items():
            t, r, velocity = rows[name].t, rows[name].r, velocities[name]
            target = rcgm_target(predictions[name], velocity, results[name], t, start.t, r)
            terms[name] = mean_square(predictions[name], target)
        if "flow_matching" in active:
            terms["flow_matching"] = mean_square(
                predictions["flow_matching"], velocities["flow_matching"]
            )
        if set(PIXEL_TERMS).intersection(active):
            end = rows["end_to_end"]
            x_hat = one_step_image(end.x_t, predictions["end_to_end"], end.t)
            if self.decode is not None:
                x_hat = self.decode(x_hat)
            clean = (x if pictures is None else pictures)[shares["end_to_end"].samples]
            goal = sharpened(clean, settings.pixel_sharpen)
            for name in PIXEL_TERMS:
                weights[name] *= pixel_weight(end.t, settings.pixel_floor)
            if "pixel_mse" in active:
                terms["pixel_mse"] = mean_square(x_hat, goal)
            if "pixel_l1" in active:
                terms["pixel_l1"] = mean_absolute(x_hat, goal)
            seen = detail(goal, settings.pixel_detail)
            if "pixel_even" in active:
                even = 1 - seen if settings.pixel_detail else seen
                terms["pixel_even"] = mean_absolute(even * _fine(x_hat), even * _fine(goal))
            if "pixel_lpips" in active and self.lpips:
                terms["pixel_lpips"] = self.lpips(torch.lerp(goal, x_hat, seen), goal)

        if adversarial:
            terms["self_adversarial"] = mean_square(predictions["self_adversarial"], fakes.velocity)
        if "rectification" in active:
            one_step, judged = predictions[settings.source], results["rectification"].judged
            real, fake = judged if len(judged) > 1 else (*judged, predictions["self_adversarial"])
            target = rectification_target(one_step, fake, real)
            terms["rectification"] = mean_square(one_step, target)
            weights["rectification"] *= rectification_weight(
                fake, real, rows[settings.source].t, settings.rectification_bound
            )
        parts = {name: shares[settings.role_of(name)].weight for name in terms}
        return _weigh(terms, weights, parts)

    def _active(self, progress: float) -> list[str]:
        """Terms that are trained when `progress` of the run is done."""
        settings = self.settings
        names = TERMS if progress >= settings.self_adversarial_after else PIXEL_TERMS
        perceptual = self.lpips is not None and progress >= settings.pixel_lpips_after
        return [
            name
            for name in names
            if getattr(settings, name) > 0 and (perceptual or name != "pixel_lpips")
        ]

    def _shares(
        self, active: Sequence[str], samples: int, micro_batch: MicroBatch
    ) -> dict[str, Share]:
        """Who has which role: all samples have all of them, or each has one."""
        asked = {self.settings.role_of(name) for name in active}
        roles = [role for role in ROLES if role in asked]
        if self.settings.passes == "partitioned":
            return deal_roles(roles, samples, micro_batch)
        return {role: Share(slice(None), 1.0) for role in roles}

    def _places(self, times: Times) -> dict[str, tuple[Tensor, Tensor]]:
        """(t, r) of each group of rows between pictures and noise."""
        zeros = torch.zeros_like(times.end_t)
        return {
            "any_step": (times.any_t, times.any_r),
            "end_to_end": (times.end_t, zeros),
            "flow_matching": (times.flow_t, times.flow_r),
            "pure_noise": (torch.ones_like(zeros), zeros),
        }

    def _evaluate(self, asked: Sequence[Ask]) -> list[Tensor]:
        """Velocities at each of `asked`, in one pass per network or in one for each."""
        if self.settings.passes == "sequential":
            return [network(at.x_t, at.t, at.r, at.condition) for network, at in asked]
        found: dict[int, Tensor] = {}
        for network in dict.fromkeys(network for network, _ in asked):
            own = [i for i, (other, _) in enumerate(asked) if other == network]
            groups = [asked[i][1] for i in own]
            inputs = (
                torch.cat([getattr(rows, name) for rows in groups])
                for name in ("x_t", "t", "r", "condition")
            )
            velocities = network(*inputs).split([len(rows.t) for rows in groups])
            found.update(zip(own, velocities))
        return [found[i] for i in range(len(asked))]


class _Noise:
    """Standard normal fields like x, one per name; a field does not depend on which others are
    drawn."""

    NAMES = ("any_step", "end_to_end", "flow_matching", "fakes", "pure_noise")

    def __init__(self, x: Tensor, generator: torch.Generator) -> None:
        seeds = torch.randint(2**62, (len(self.NAMES),), generator=generator)
        self._x, self._seeds = x, dict(zip(self.NAMES, seeds.tolist()))
        self._drawn: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self._drawn:
            generator = torch.Generator().manual_seed(self._seeds[name])
            field = torch.randn(self._x.shape, generator=generator)
            self._drawn[name] = field.to(self._x.device)
        return self._drawn[name]


def _weigh(
    terms: dict[str, Tensor], weights: dict[str, Tensor | float], parts: dict[str, float]
) -> Losses:
    total = sum(parts[name] * (weights[name] * values).mean() for name, values in terms.items())
    assert isinstance(total, Tensor)
    return Losses(total, {name: values.detach() for name, values in terms.items()})


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _to(times: Times, device: torch.device) -> Times:
    return Times(**{name: value.to(device) for name, value in vars(times).items()})
