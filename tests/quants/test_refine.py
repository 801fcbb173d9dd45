"Error feedback: every type, beside plain encoding under the full quadratic; stacks, dead channels, bytes that gguf reads."
import gguf
import numpy as np
import pytest
import torch

from llm_quantize.quants.blocks import ENCODERS
from llm_quantize.quants.codec import decode, encode
from llm_quantize.errors import ArgumentError
from llm_quantize.quants.error_feedback import FeedbackProblem, damped, feed_back
from llm_quantize.quants.refine import coordinate_descent, feedback_encode


def problem(rows=48, columns=512, seed=0):
    "Weights and a second moment whose channels go together."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2048, columns, generator=g) @ (torch.eye(columns) + 0.6 * torch.randn(columns, columns, generator=g) / columns ** 0.5) * torch.randn(columns, generator=g).exp()
    return torch.randn(rows, columns, generator=g) * 0.02, x.T @ x / len(x)


def cost(decoded, weights, moment):
    d = decoded - weights
    return ((d @ moment * d).sum() / (weights @ moment * weights).sum()).item()


@pytest.mark.parametrize("name", ENCODERS)
def test_costs_less_than_encoding_each_weight_alone(name):
    weights, moment = problem()
    data = feedback_encode(weights, moment, name)
    alone = encode(weights, name, moment.diagonal().contiguous())
    assert data.shape == alone.shape and data.dtype == torch.uint8
    assert cost(decode(data, name), weights, moment) < cost(decode(alone, name), weights, moment)


@pytest.mark.parametrize("name", [n for n in ENCODERS if n not in ("Q8_0",)])
def test_gguf_reads_the_same_weights(name):
    weights, moment = problem(rows=8)
    data = feedback_encode(weights, moment, name)
    read = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(read, decode(data, name).numpy())


@pytest.mark.parametrize("name", [n for n in ENCODERS if ENCODERS[n].groups * ENCODERS[n].elements == 256])
def test_no_pass_of_descent_raises_the_cost(name):
    weights, moment = problem(rows=24)
    importance = (moment.diagonal() / moment.diagonal().mean()).view(-1, 1, 1)
    job = FeedbackProblem(ENCODERS[name], damped(moment, 0.01)[None], importance, points=8, reach=1)
    meant = weights.T.contiguous()
    coded, costs = feed_back(job, meant), []
    for _ in range(4):
        d = torch.cat([job.encoder.weights(*block).flatten(0, 1) for block in coded]).double() - meant
        costs.append((d * (job.hessian[0] @ d)).sum(0)) # of each row
        coded = coordinate_descent(job, meant, coded, points=4)
    assert all((after <= before * 1.0001).all() for before, after in zip(costs, costs[1:]))
    assert costs[3].sum() < 0.99 * costs[0].sum()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "IQ1_M"])
def test_descent_is_read_by_gguf_and_repeat(name):
    weights, moment = problem(rows=8)
    data = feedback_encode(weights, moment, name, descent_passes=2)
    assert np.array_equal(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]), decode(data, name).numpy())
    assert torch.equal(data, feedback_encode(weights, moment, name, descent_passes=2)) and not torch.equal(data, feedback_encode(weights, moment, name))


@pytest.mark.parametrize("name", ["Q3_K", "IQ2_XXS", "IQ3_S", "IQ1_S"])
def test_a_stack_is_its_members(name):
    (a, h), (b, k) = problem(rows=16), problem(rows=16, seed=1)
    both = feedback_encode(torch.stack([a, b]), torch.stack([h, k]), name)
    one = torch.cat([feedback_encode(a, h, name), feedback_encode(b, k, name)])
    assert (decode(both, name) - decode(one, name)).abs().max() < 0.02 # near ties may fall otherwise
    assert (both == one).float().mean() > 0.98
    assert (both[:16] == feedback_encode(a, k, name)).float().mean() < 0.9 # with the other's moment it is another result


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_S", "Q4_0"])
def test_dead_channels_and_too_few_tokens(name):
    weights, moment = problem()
    moment[:, 7], moment[7] = 0, 0
    x = torch.randn(20, 512, generator=torch.Generator().manual_seed(5))
    for h in (moment, x.T @ x, torch.zeros(512, 512)): assert torch.isfinite(decode(feedback_encode(weights, h, name), name)).all()


def test_the_scale_of_the_moment_does_not_matter():
    weights, moment = problem(rows=8)
    assert torch.equal(feedback_encode(weights, moment, "Q3_K"), feedback_encode(weights, moment * 1024, "Q3_K"))


def test_ternary_weights_stay_as_they_are():
    weights = torch.randint(-1, 2, (16, 512), generator=torch.Generator().manual_seed(3)).float() * 0.5
    assert torch.equal(decode(feedback_encode(weights, problem()[1], "TQ2_0"), "TQ2_0"), weights)


@pytest.mark.parametrize("change, said", [(lambda w, h: (w, h[:8]), "hessian of shape"), (lambda w, h: (w, h * float("nan")), "NaN"), (lambda w, h: (w[:, :100], h[:100, :100]), "blocks of 256")])
def test_refuses(change, said):
    with pytest.raises(ArgumentError, match=said): feedback_encode(*change(*problem(rows=2)), "Q4_K")
