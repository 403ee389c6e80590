"""Forward-only relatives of Gradient Concept Influence: projections of activations on a direction.

With f(z; model) = <v, mean over the read tokens of the response of h_t> of an example z = (x, r):

    Vector Filter                       f(x, r; base)
    Projection Difference (response)    f(x, r; base) - f(x, r0; base)    r0: the base's own answer
    Projection Difference (training)    f(x, r; tuned) - f(x, r; base)

None of them has a learning rate or looks at the evaluation prompts; docs/methods.md (concept
influence) derives what each has to do with the gradient. Source: Concept Influence, arXiv
2602.14869; the response reading: Persona Vectors, arXiv 2507.21509.
"""

from __future__ import annotations

from torch import Tensor, nn

from taught.core.example import Examples, refuse_several
from taught.core.point import Point
from taught.errors import UserError
from taught.features.concept import ConceptMap
from taught.model.gradients import evaluating
from taught.model.readout import PACK_TOKENS, ReadPrompt, read_vectors
from taught.progress import Progress


def response_reads(examples: Examples, tokens: str) -> list[ReadPrompt]:
    """Examples as token inputs that are read at their response.

    Parameters
    ----------
    tokens : ``mean_response``: every scored token, the end of the turn included; ``last_response``: the last one alone

    Raises
    ------
    UserError
        An example has no response tokens, or two responses: its id.
    """
    refuse_several(examples, "a projection on a direction")
    empty = [example.id for example in examples if example.n_scored < 1]
    if empty:
        raise UserError(
            "a response is empty",
            value=empty[:10],
            rule="a projection is read at the tokens of the response",
            fix="remove these examples",
        )
    first = {"mean_response": 0, "last_response": -1}[tokens]
    return [ReadPrompt(p.id, p.ids, p.places[first:]) for p in examples]


def project(
    model: nn.Module,
    examples: Examples,
    concepts: ConceptMap,
    point: Point,
    *,
    batch_tokens: int = PACK_TOKENS,
    progress: Progress | None = None,
) -> Tensor:
    """f of every example and concept, float64 [P, C]: the Vector Filter where the model is the base.

    Cost: one forward pass over the examples, up to the block that is read.

    Raises
    ------
    UserError
        A response is empty, or a read-out is not finite: the ids of the examples.
    """
    reads = response_reads(examples, concepts.position)
    with evaluating(model):
        return read_vectors(model, reads, [point], concepts, tokens=batch_tokens, progress=progress)[0]
