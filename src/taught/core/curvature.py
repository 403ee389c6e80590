"""The metric of a step: training moves the parameters by - lr C^-1 grad L.

A curvature is how C is found; fitted to a problem it is a :class:`Metric`. C = 1 is plain SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from taught.core.registry import CURVATURES
from taught.model.gradients import Factor, Query, RowSparse
from taught.model.kernels import product

if TYPE_CHECKING:
    from taught.core.estimator import Work
    from taught.core.example import Examples
    from taught.core.problem import Problem
    from taught.sketches.project import Prescale
    from taught.sketches.store import Row, SketchStore
    from taught.stats.arrays import Floats

# Orthonormal columns, [m, m] and [n, n], for a parameter [m, n]: G becomes rows' G columns.
Basis = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Metric:
    """C of one problem: diagonal in a basis of each parameter, or solved for whole queries.

    Attributes
    ----------
    scale : diagonal of C^-1 by parameter name, in the parameter's shape; None: C = 1
    basis : the basis by parameter name in which C is diagonal; None: the parameters' own
    sketched : what divides sketches of queries; None: nothing does
    before : what gradients are multiplied by before they are sketched; None: nothing
    jointly : what solves C x = q over all parameters at once, in place of the queries; such a C divides no gradient of
        one parameter or example. None: each parameter is divided by itself
    parameters : the only ones that have a curvature and move; None: all that the problem moves
    """

    scale: Mapping[str, Tensor] | None = None
    basis: Mapping[str, Basis] | None = None
    parameters: tuple[str, ...] | None = None
    sketched: Sketched | None = None
    before: Prescale | None = None
    jointly: Callable[[dict[str, Query]], None] | None = None

    @property
    def plain(self) -> bool:
        """Whether C = 1 for whole gradients."""
        return self.scale is None and self.jointly is None

    @property
    def of_examples(self) -> bool:
        """Whether C^-1 of an example's gradient is there, so that a real step can be made in it."""
        return self.jointly is None and self.sketched is None

    def scale_of(self, name: str) -> Tensor | None:
        """One parameter's diagonal of C^-1, or None for 1."""
        return None if self.scale is None else self.scale[name]

    def solve(self, name: str, gradient: Tensor) -> Tensor:
        """C^-1 G of one parameter, in its shape and the precision of G."""
        assert self.jointly is None, "estimators that divide examples refuse such a curvature"
        if self.scale is None:
            return gradient
        if self.basis is None:
            return gradient * self.scale[name]
        rows, columns = self.basis[name]
        inside = product(product(rows.T, gradient.to(rows).T), columns.T) * self.scale[name]
        return product(product(rows, inside.T), columns).to(gradient)

    def solve_queries(self, queries: dict[str, Query]) -> None:
        """C^-1 q of some queries, by parameter name [K, *shape], in place."""
        if self.jointly is not None:
            self.jointly(queries)
        elif self.scale is not None:
            for name, query in queries.items():
                if isinstance(query, RowSparse):  # a look-up, which is in its own basis
                    query.values.mul_(self.scale[name][query.rows])
                    continue
                for one in query:
                    one.copy_(self.solve(name, one))

    def rotated(self, factor: Factor) -> Factor:
        """The factor of a gradient in the basis in which C is diagonal."""
        if self.basis is None:
            return factor
        assert factor.a is not None
        rows, columns = self.basis[factor.param]
        return replace(factor, d=product(factor.d.to(rows), rows.T), a=product(factor.a.to(rows), columns.T))


class Sketched(Protocol):
    """How a curvature of sketches divides queries."""

    def __call__(
        self, store: SketchStore, examples: Sequence[Row], prompts: Mapping[str, str], queries: Floats
    ) -> tuple[Floats, Floats | None]:
        """Divided queries, and what the inner products of each example with them are multiplied by.

        Parameters
        ----------
        examples : P rows of the store
        prompts : id -> digest of the evaluation prompts
        queries : float64 [K, Q]

        Returns
        -------
        queries : float64 [K, Q]
        factors : float64 [P]; None for - lr: values are changes per step. With factors they are values to rank by
        """


class Curvature(Protocol):
    """A way to find C; a frozen dataclass of its parameters, registered in ``CURVATURES``.

    It may have ``newton``: whether C is a curvature of the loss, so that a step is one of Newton's, whatever training
    does: it ranks examples, and its size foretells no change.
    """

    def fit(self, problem: Problem, examples: Examples, work: Work) -> Metric:
        """C at the problem's weights, from the examples that are trained on."""


@CURVATURES.register("identity")
@dataclass(frozen=True)
class Identity:
    """Plain SGD: C = 1."""

    def fit(self, problem: Problem, examples: Examples, work: Work) -> Metric:
        """Nothing is fitted."""
        return Metric()
