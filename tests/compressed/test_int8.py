"Rounding to eight bits, the product of whole numbers, and error feedback."
import pytest
import torch

from llm_quantize.compressed.int8 import Int8Linear, feedback_rows, quantize_inputs, quantize_rows

@pytest.mark.parametrize("rows, columns, tokens", [(7, 16, 1), (48, 1100, 5), (64, 32, 40)])
def test_int8_linear_is_what_its_whole_numbers_say(rows, columns, tokens):
    generator = torch.Generator().manual_seed(1)
    w, x, bias = (torch.randn(shape, generator=generator) for shape in ((rows, columns), (tokens, columns), (rows,)))
    (q, s), (a, t) = quantize_rows(w), quantize_inputs(x)
    assert q.abs().max() == 127
    assert a.abs().amax(1).eq(127).all()
    wanted = (a.double() @ q.double().T) * t.double() * s.double().T + bias.double()
    assert torch.allclose(Int8Linear(q, s, bias)(x[None])[0].double(), wanted, atol=1e-5, rtol=1e-5)


def test_zeros_have_scale_one():
    for codes, scale in (quantize_rows(torch.zeros(3, 8)), quantize_inputs(torch.zeros(2, 8))):
        assert not codes.any()
        assert scale.eq(1).all()


def test_a_known_scale_cuts_off_what_is_louder():
    codes, scale = quantize_inputs(torch.tensor([[1.0, -9.0, 9.0]]), torch.tensor([1 / 127]))
    assert codes.tolist() == [[127, -128, 127]]
    assert torch.equal(scale, torch.tensor([1 / 127]))


def test_feedback_has_less_error_on_other_text():
    generator = torch.Generator().manual_seed(6)
    mix = torch.randn(64, 64, generator=generator)
    x, other = torch.randn(2000, 64, generator=generator) @ mix, torch.randn(500, 64, generator=generator) @ mix
    w = torch.randn(32, 64, generator=generator)
    def lost(codes, scale): return (other @ (codes.float() * scale).T - other @ w.T).square().sum().item()
    assert lost(*feedback_rows(w, x.T @ x)) < 0.7 * lost(*quantize_rows(w))


def test_feedback_of_inputs_that_do_not_go_together_is_rounding():
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(6))
    assert torch.equal(feedback_rows(w, torch.eye(64))[0], quantize_rows(w)[0])
