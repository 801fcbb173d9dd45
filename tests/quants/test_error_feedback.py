"Error feedback: the moves, vectors of eight, and what a pass leaves; `test_refine` judges the encoder that uses it."
import pytest
import torch

from llm_quantize.quants import codec  # noqa: F401  fills the table of encoders
from llm_quantize.quants.blocks import ENCODERS
from llm_quantize.quants.error_feedback import FeedbackProblem, damped, feed_back, inverse_factor, stack_product, vector_codes
from llm_quantize.quants.iq_grids import grid_points


def problem(rows=48, columns=512, seed=0):
    "Weights and a second moment whose channels go together."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2048, columns, generator=g) @ (torch.eye(columns) + 0.6 * torch.randn(columns, columns, generator=g) / columns ** 0.5) * torch.randn(columns, generator=g).exp()
    return torch.randn(rows, columns, generator=g) * 0.02, x.T @ x / len(x)


def test_factor_and_metric():
    h = damped(problem()[1], 0.1)[None]
    u = inverse_factor(h)
    assert torch.allclose(u.mT @ u @ h, torch.eye(512).double(), atol=1e-8) and torch.equal(u, u.triu())


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_S", "IQ3_S", "IQ1_M"])
def test_vectors_are_points_with_lawful_signs(name):
    grid, g = ENCODERS[name].levels, torch.Generator().manual_seed(2)
    x = torch.randn(8, 300, generator=g) * grid.high / 2
    root = torch.randn(8, 8, generator=g) * 0.3 + torch.eye(8)
    codes = vector_codes(x, (root @ root.T)[None], torch.ones(300), grid, 8)
    points = {tuple(p) for p in grid_points(name).tolist()}
    for v in codes.T.reshape(-1, grid.dim).tolist():
        assert tuple(abs(c) for c in v) in points if grid.signs != "none" else tuple(round(c) for c in v) in points
    if grid.signs == "parity": assert ((codes < 0).sum(0) % 2 == 0).all()


def test_each_member_of_a_stack_meets_its_own_matrix():
    seed = torch.Generator().manual_seed(4)
    matrices, v = torch.randn(2, 3, 5, generator=seed), torch.randn(5, 8, generator=seed)
    product = stack_product(matrices, v)
    assert torch.allclose(product, torch.cat([matrices[0] @ v[:, :4], matrices[1] @ v[:, 4:]], 1), atol=1e-6)
    assert not torch.allclose(product, stack_product(matrices.flip(0), v))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "IQ2_XXS"])
def test_a_pass_leaves_less_cost_than_rounding_each_weight_alone(name):
    weights, moment = problem(rows=16)
    meant, importance = weights.T.contiguous(), (moment.diagonal() / moment.diagonal().mean()).view(-1, 1, 1)
    def cost(hessian):
        "By the true moment, of a pass that believes in another."
        coded = feed_back(FeedbackProblem(ENCODERS[name], damped(hessian, 0.01)[None], importance, 8, 1), meant)
        d = torch.cat([ENCODERS[name].weights(*block).flatten(0, 1) for block in coded]) - meant
        return (d * (moment @ d)).sum()
    assert cost(moment) < 0.9 * cost(moment.diagonal().diag())
