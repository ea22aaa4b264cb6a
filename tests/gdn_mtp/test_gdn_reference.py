"""The oracle against a hand-computed case, plain Python loops, and the chunk form of the same recurrence."""

import math

import pytest
import torch
from gdn_mtp import gated_delta_rule_reference
from gdn_support import FP32, Case


def test_two_tokens_of_one_number_by_hand():
    one = torch.ones(1, 1, 1, 1)
    # softplus(a + dt_bias) = ln 2 for a = dt_bias = 0, so exp(g) = 1/2 with A_log = 0; beta = 1/2 with b = 0.
    result = gated_delta_rule_reference(
        q=torch.cat([3 * one, one], 1),
        k=torch.cat([one, 2 * one], 1),
        v=torch.cat([5 * one, 7 * one], 1),
        state=4 * one,
        A_log=torch.zeros(1),
        a=torch.zeros(1, 2, 1),
        dt_bias=torch.zeros(1),
        b=torch.zeros(1, 2, 1),
        scale=10.0,
        use_qk_l2norm=False,
    )
    # S: 4 -> 2, u = (5 - 2) / 2 = 1.5, S = 3.5, o = 10 * 3.5 * 3; S -> 1.75, u = (7 - 3.5) / 2, S = 5.25.
    torch.testing.assert_close(result.output.flatten(), torch.tensor([105.0, 52.5], dtype=torch.float64))
    torch.testing.assert_close(
        result.intermediate_states.flatten(), torch.tensor([3.5, 5.25], dtype=torch.float64)
    )
    torch.testing.assert_close(result.state.flatten(), torch.tensor([5.25], dtype=torch.float64))


def naive_head(q, k, v, g, beta, state, scale):
    """One head, in lists q, k [T][K], v [T][V], state [V][K]; returns outputs and the last state."""
    outputs = []
    for t in range(len(q)):
        state = [[math.exp(g[t]) * s for s in row] for row in state]
        retrieved = [sum(s * x for s, x in zip(row, k[t], strict=True)) for row in state]
        u = [beta[t] * (value - old) for value, old in zip(v[t], retrieved, strict=True)]
        state = [[s + u[i] * x for s, x in zip(row, k[t], strict=True)] for i, row in enumerate(state)]
        outputs.append([scale * sum(s * x for s, x in zip(row, q[t], strict=True)) for row in state])
    return outputs, state


@pytest.mark.parametrize("l2norm", [True, False])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_against_a_loop_over_heads_in_python_floats(ratio, l2norm):
    case = Case(B=2, T=3, H=2, HV=2 * ratio, K=5, V=4, io=FP32, gates=FP32, l2norm=l2norm)
    x = {name: tensor.double() for name, tensor in case.inputs().items()}
    state = case.states(2).double()
    result = case.reference(x, state)
    for i in range(case.B):
        for head in range(case.HV):
            q, k = (x[name][i, :, head // ratio] for name in "qk")
            if l2norm:
                q, k = (t / torch.sqrt((t**2).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
            a = (x["a"][i, :, head] + x["dt_bias"][head]).tolist()
            g = [-math.exp(x["A_log"][head]) * math.log1p(math.exp(value)) for value in a]
            beta = [1 / (1 + math.exp(-value)) for value in x["b"][i, :, head].tolist()]
            args = (q.tolist(), k.tolist(), x["v"][i, :, head].tolist(), g, beta, state[i, head].tolist())
            output, last = naive_head(*args, case.K**-0.5)
            torch.testing.assert_close(result.output[i, :, head].cpu(), torch.tensor(output).double())
            torch.testing.assert_close(result.state[i, head].cpu(), torch.tensor(last).double())


def test_against_the_chunk_form():
    """All updates of T tokens from one triangular system, and outputs from Gram matrices of q and k."""
    case = Case(B=1, T=12, H=1, HV=1, K=16, V=8, io=FP32, gates=FP32)
    x = {name: tensor.double().cpu() for name, tensor in case.inputs(seed=3).items()}
    state = case.states(1).double().cpu()
    q, k = (x[n][0, :, 0] / torch.sqrt((x[n][0, :, 0] ** 2).sum(-1, keepdim=True) + 1e-6) for n in "qk")
    v, beta = x["v"][0, :, 0], torch.sigmoid(x["b"][0, :, 0])
    g = -torch.exp(x["A_log"]) * torch.log1p(torch.exp(x["a"][0, :, 0] + x["dt_bias"]))
    total = g.cumsum(0)  # log decay from the start to token t
    since = torch.exp(total[:, None] - total[None, :])  # [t, s], decay from token s to token t
    system = torch.eye(case.T).double() + beta[:, None] * ((k @ k.T) * since).tril(-1)
    from_start = torch.exp(total)[:, None] * (k @ state[0, 0].T)
    u = torch.linalg.solve(system, beta[:, None] * (v - from_start))  # [T, V]
    output = torch.exp(total)[:, None] * (q @ state[0, 0].T) + ((q @ k.T) * since).tril() @ u
    last = torch.exp(total[-1]) * state[0, 0] + (since[-1, :, None] * u).T @ k
    result = case.reference(x, state)
    torch.testing.assert_close(result.output[0, :, 0], case.K**-0.5 * output)
    torch.testing.assert_close(result.state[0, 0], last)
    torch.testing.assert_close(result.intermediate_states[0, -1, 0], last)
