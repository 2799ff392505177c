"""What the self-normalizing layers share: a weight, a learned inverse, and how that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import exact, func_transforms, ops, passes, shard, tracking
from ..bijection import FlowStep, wide_dtype
from ..constraint import weighted
from ..controllers import Controller
from ..own_parameters import SetsParameters
from ..reference.autocast import widened_under_autocast, without_autocast
from ..refine import Refined, checked_steps, refined
from .debias import Debias
from .refining import Refining
from .upkeep import Penalty, Tracked, Upkeep, checked_upkeep


class LearnedInverse(SetsParameters, Refining):
    """A layer with a weight W, its learned inverse R, and a cache of the exact factorisation.

    Subclasses say what linear map their weights stand for, and how R is fitted and corrected.
    """

    _version = 2  # version 1 had no tracked inverses, and so no "due"
    mixing = True
    event_dims: ClassVar[int]
    weight: nn.Parameter
    weight_inv: nn.Parameter
    bias: nn.Parameter | None
    controller: Controller | None

    def __init__(self, inverse: str | Upkeep, debias: int | Debias) -> None:
        super().__init__()
        self.upkeep = checked_upkeep(inverse)
        self.debias = (debias if isinstance(debias, Debias) else Debias(debias)).checked()
        self._cache = exact.FactorizationCache()
        self.controller = None
        self.growth: Tensor | None = None  # of the last probes by I - W R, where they are debiased
        self.held = False  # whether others call keep_up, and training does not
        self._due = torch.zeros((), dtype=torch.int64, device="cpu")  # steps to the next fit
        self._image: tuple[int, ...] = ()  # size of the last batch's images

    @property
    def due(self) -> Tensor:
        """Steps to the next fit of a tracked inverse: saved with its state, and on the CPU."""
        return self._due

    @property
    def gradient_share(self) -> float:
        """How much of the objective's gradient W gets: half where R has a density of its own."""
        return 1.0 if isinstance(self.upkeep, Tracked) else 0.5

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        """``z = W x + c``.

        Training: the value of ``log_det`` is 0 and its gradient the learned inverse's. A tracked
        inverse is brought up to date first, where gradients are taken, but not inside transforms
        of ``torch.func``.
        Evaluation: the value is exact (factorised once, kept until the weight changes); the
        gradient still the learned inverse's.
        """
        if not self.training:
            return self.exact_forward(x)
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        transformed = func_transforms.active()  # which leaves the layer's state alone
        if learns and isinstance(self.upkeep, Tracked) and not transformed:
            passes.once(self, partial(self._follow, x.detach(), self.upkeep))
        step = weighted(self._step(x), self.controller, x)
        if not (learns and self.debias.terms):
            return step
        lacking, growth = self._what_the_inverse_lacks(x)
        if not transformed:
            self.growth = growth
        log_det = ops.with_gradient(step.log_det, self.weight, lacking)
        return FlowStep(step.z, log_det, step.recon)

    def _follow(self, x: Tensor, how: Tracked) -> None:
        """Bring a tracked inverse up to date, in a training step on x or with its first part."""
        part = shard.current()
        if part is not None and not part.first:
            return
        self._image = tuple(x.shape[2:]) if self.event_dims == 3 else ()
        if not self.held:
            self.keep_up()
        self._make_right_on(x, how)
        self._written(weight_inv=self.weight_inv)

    def exact_forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        z, log_det, recon = self._step(x)
        if isinstance(self.upkeep, Tracked):
            with torch.no_grad():
                recon = self._operator(x, self.weight, self.weight_inv, self.bias).recon
        return FlowStep(z, log_det + self._factorization(x).log_abs_det.to(log_det), recon)

    def _step(self, x: Tensor) -> FlowStep:
        keep, weights = self.upkeep, (self.weight, self.weight_inv)
        if isinstance(keep, Tracked):
            return self._operator(x, *weights, self.bias, reconstruct=False)
        step = self._operator(x, *weights, self.bias, penalty_share=keep.share)
        if not keep.symmetric:
            return step
        return FlowStep(step.z, step.log_det, (step.recon + self._error_of_images(x)) / 2)

    def _error_of_images(self, x: Tensor) -> Tensor:
        """``||W R y - y||^2`` of y = W x, the latter y and x held fixed; in the shape of recon."""
        wide = wide_dtype(x.dtype)
        with without_autocast(x.device):
            weight, inverse = self.weight.to(wide), self.weight_inv.to(wide)
            y = self._map(weight, x.detach().to(wide))
            error = self._map(weight, self._map(inverse, y)) - y.detach()
        return error.square().sum(tuple(range(-self.event_dims, 0)))

    def _operator(
        self,
        x: Tensor,
        weight: Tensor,
        weight_inv: Tensor,
        bias: Tensor | None,
        reconstruct: bool = True,
        penalty_share: float = 1.0,
    ) -> FlowStep:
        raise NotImplementedError

    def _inverse_of(self, shape: Sequence[int]) -> nn.Parameter:
        """An unset ``weight_inv``; one that is tracked is left alone by optimizers."""
        return nn.Parameter(torch.empty(shape), requires_grad=isinstance(self.upkeep, Penalty))

    def keep_up(self) -> None:
        """Count a training step of a tracked inverse, and fit R to W if that is due.

        The layer calls it itself. Only a CUDA graph must not: it is captured with ``held`` set, and
        this is called before each replay, as :class:`snf_ext.GraphedStep` does.
        """
        if isinstance(self.upkeep, Tracked):
            every = self.upkeep.every or self._interval()
            # By .data: what autograd has saved of R may as well be newer.
            weights = self.weight_inv.data, self.weight.data
            tracking.fit_when_due_(*weights, self._due, every, *self._geometry())

    def _interval(self) -> int:
        """Steps between fits where nobody says."""
        raise NotImplementedError

    def _geometry(self) -> tuple[Any, ...]:
        """What a fit has to know of convolutions."""
        return ()

    def _make_right_on(self, x: Tensor, how: Tracked) -> None:
        """Improve R between fits by a batch."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.upkeep, Tracked):
            destination[prefix + "due"] = self._due.clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        lists = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        # Only when to fit: a state of a layer that is kept otherwise will do.
        due = state_dict.get(prefix + "due")
        self._due.fill_(0 if due is None or due.is_meta else int(due))
        if prefix + "due" in unexpected_keys:
            unexpected_keys.remove(prefix + "due")

    def _factorization(self, x: Tensor) -> exact.Factorization:
        raise NotImplementedError

    def _what_the_inverse_lacks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """An estimate of W's share of the gradient of log |det W| less the learned inverse's.

        And ``||E^K v|| / ||E^(K-1) v||`` of its probes, which comes for free.
        """
        raise NotImplementedError

    def refine_inverse(self, z: Tensor, steps: int) -> Refined:
        """The learned inverse, improved by at most ``steps`` steps, with what is left to improve.

            x <- R y,  then  x <- x + R (y - W x),  with y = z - c

        Each step takes one product with W and one with R and multiplies the residual by
        ``I - W R``. It reaches float precision where the spectral radius of that is under 1: the
        better R has been learned, the sooner.

        Returns:
            The best iterate of each sample as z (float32 for half precision), its relative
            residual ``||y - W x|| / ||y||`` in the shape of ``log_det``, and how many steps were
            taken: fewer where no sample gets better any more.

        Raises:
            ValueError: z has the wrong shape, or ``steps`` is no int of at least 0.

        Cost: O(steps) forward passes, and one wait for the device a step, so that no graph of
        ``torch.compile`` spans it. Source and details: :func:`snf_ext.refine.refined`.

        >>> import snf_ext
        >>> layer = snf_ext.SelfNormConv2d(2, 3).eval()
        >>> x = torch.randn(5, 2, 4, 4)
        >>> back, residual, steps = layer.refine_inverse(layer(x).z, 20)
        >>> torch.allclose(back, x, atol=1e-5), residual.shape, residual.max().item() < 1e-6
        (True, torch.Size([5]), True)
        """
        return self._refined(z, checked_steps(steps, "steps"))

    def _refined(
        self, z: Tensor, steps: int, layer: str | None = None, wait: bool = True
    ) -> Refined:
        """As :meth:`refine_inverse`; with a warning that names ``layer`` where it diverges."""
        wide = wide_dtype(torch.promote_types(z.dtype, self.weight.dtype))
        forward, backward = (partial(self._map, w.to(wide)) for w in (self.weight, self.weight_inv))
        y = self._centred(z.to(wide))
        return refined(y, forward, backward, steps, self.event_dims, layer, wait)

    def _learned(self, y: Tensor) -> Tensor:
        """R y, under autocast in float32 as the forward pass."""
        y, inverse = widened_under_autocast(y, self.weight_inv)
        with without_autocast(y.device):
            return self._map(inverse, y)

    def _centred(self, z: Tensor) -> Tensor:
        """``z - c``, or ValueError if z has the wrong shape."""
        raise NotImplementedError

    def _map(self, weight: Tensor, x: Tensor) -> Tensor:
        """The linear map that ``weight`` stands for, of x."""
        raise NotImplementedError
