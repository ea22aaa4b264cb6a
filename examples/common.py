"""What both clients share: random weights, decisive prompts, and greedy and speculative decoding loops.

The models here have random weights, so nothing is downloaded. Random logits are often nearly tied, and on a
tie two correct bfloat16 implementations may pick different tokens or experts. `make_cases` therefore keeps,
out of many random prompts, the one whose float32 decisions are clearest, and reports that margin. It looks at
the untouched model only, so it cannot hide a mistake of the implementation under test.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel


@contextlib.contextmanager
def pytorch_models() -> Iterator[None]:
    """Models imported inside are what transformers computes in PyTorch.

    Where fla or causal_conv1d is installed, it would take their kernels, which need a GPU, even for a model
    on the CPU.
    """
    names = ("fla", "causal_conv1d")
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


@dataclasses.dataclass(frozen=True)
class Greedy:
    """One request decoded greedily: `tokens` [n] int64, and `logits` [n, vocab] float32 that chose them."""

    tokens: Tensor
    logits: Tensor

    @staticmethod
    def from_logits(logits: Sequence[Tensor]) -> Greedy:
        """From one [vocab] row per token."""
        stacked = torch.stack(list(logits)).float()
        return Greedy(stacked.argmax(-1), stacked)


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt and what the untouched model makes of it.

    prompt   [prompt_len] int64
    stock    the untouched model in its own dtype
    exact    [n, vocab] logits of its float32 copy along `stock.tokens`
    margin   smallest gap, in logits, between a chosen and the next-best token or expert of the float32 copy
    """

    prompt: Tensor
    stock: Greedy
    exact: Tensor
    margin: float


class Decoder(Protocol):
    """A model being served. Requests are numbered from 0 in the order of `prefill`."""

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Admit one request per prompt; logits [B, vocab] after each prompt's last token."""

    def decode(self, requests: Sequence[int], tokens: Tensor) -> Tensor:
        """Append tokens [n] to n requests; logits [n, vocab] for the tokens after them."""


class Engine(Decoder, Protocol):
    """A decoder that can also take several tokens at once and forget some of them again."""

    def verify(self, requests: Sequence[int], tokens: Tensor) -> Tensor:
        """Append tokens [n, T] provisionally; logits [n, T, vocab]. `commit` must follow."""

    def commit(self, requests: Sequence[int], kept: Sequence[int]) -> None:
        """Keep the first `kept[i]` (1 to T) verified tokens of `requests[i]`; undo the others."""


def top_gap(scores: Tensor, k: int = 1) -> Tensor:
    """How clearly the k best are chosen: k-th best minus next best, [..., n] -> [...]."""
    best = scores.topk(k + 1, dim=-1).values
    return best[..., k - 1] - best[..., k]


def random_model(
    architecture: type[PreTrainedModel],
    config: PreTrainedConfig,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """A model with seeded random weights that keep activations of order one, whatever the device.

    Matrices get a standard deviation of fan_in ** -0.5. Vectors (norm weights, biases, gates) get 10 % noise
    around their constructor's value, so that dropping one of them changes the result.
    """
    model = architecture(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed_tokens" in name:
                parameter.copy_(noise)
            elif name.endswith("A_log"):
                parameter.copy_(noise - 3.0)  # decay of about 0.94 per token, so that the state remembers
            elif parameter.ndim >= 2:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.to(device=device, dtype=dtype)


class StockDecoder:
    """The untouched model with its own attention and cache, one request at a time; implements `Decoder`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.caches: list[Cache] = []

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Admit one request per prompt [prompt_len]; logits [B, vocab] after each prompt's last token."""
        outputs = [self.model(prompt[None], use_cache=True, logits_to_keep=1) for prompt in prompts]
        self.caches += [out.past_key_values for out in outputs]
        return torch.cat([out.logits[:, -1] for out in outputs])

    @torch.no_grad()
    def decode(self, requests: Sequence[int], tokens: Tensor) -> Tensor:
        """Append tokens [n] to n requests; logits [n, vocab] for the tokens after them."""
        pairs = zip(requests, tokens, strict=True)
        outputs = [
            self.model(token.view(1, 1), past_key_values=self.caches[request]) for request, token in pairs
        ]
        return torch.cat([out.logits[:, -1] for out in outputs])


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits [n, vocab] float32 that predict each of `tokens` [n] after `prompt`, in one forward pass."""
    ids = torch.cat([prompt, tokens[:-1]])[None]
    return model(ids, use_cache=False, logits_to_keep=len(tokens)).logits[0].float()


@torch.no_grad()
def decision_margins(model: PreTrainedModel, prompts: Tensor, num_tokens: int) -> Tensor:
    """Smallest gap of any token or expert choice while each of `prompts` [n, prompt_len] is continued: [n].

    A continuation that repeats itself (fewer than half of its tokens distinct) proves little and gets -inf.
    Experts count at the generated positions only: the one MoE layer has to be the last layer, where the
    choice at a prompt position reaches no other position.
    """
    cache, ids, tokens = None, prompts, []
    margins = torch.full((len(prompts),), torch.inf, device=prompts.device)
    for _ in range(num_tokens):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, output_router_logits=True)
        cache = out.past_key_values
        (router_logits,) = out.router_logits
        last_position = router_logits.view(len(prompts), ids.shape[1], -1)[:, -1]
        expert_gap = top_gap(last_position, model.config.num_experts_per_tok)
        margins = margins.minimum(top_gap(out.logits[:, -1])).minimum(expert_gap)
        ids = out.logits[:, -1:].argmax(-1)
        tokens.append(ids[:, 0])
    distinct = torch.tensor([row.unique().numel() for row in torch.stack(tokens, dim=1)])
    return margins.masked_fill(distinct.to(margins.device) * 2 < num_tokens, -torch.inf)


def make_cases(
    model: PreTrainedModel, prompt_lens: Sequence[int], num_tokens: int, seed: int, candidates: int = 128
) -> list[Case]:
    """One case per entry of `prompt_lens`: the clearest of `candidates` random prompts of that length."""
    exact_model = copy.deepcopy(model).float()
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for prompt_len in prompt_lens:
        shape = (candidates, prompt_len)
        prompts = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.device)
        margins = decision_margins(exact_model, prompts, num_tokens)
        prompt = prompts[margins.argmax()]
        (stock,) = generate(StockDecoder(model), [prompt], num_tokens)
        exact = teacher_forced(exact_model, prompt, stock.tokens)
        cases.append(Case(prompt, stock, exact, float(margins.max())))
    return cases


def generate(decoder: Decoder, prompts: Sequence[Tensor], num_tokens: int) -> list[Greedy]:
    """Plain greedy decoding of all prompts in one batch, one token per step."""
    requests = range(len(prompts))
    steps = [decoder.prefill(prompts)]
    for _ in range(num_tokens - 1):
        steps.append(decoder.decode(requests, steps[-1].argmax(-1)))
    return [Greedy.from_logits([step[request] for step in steps]) for request in requests]


class NoisyDrafter:
    """Stands in for a draft model: knows the continuation, and gets each token wrong with a probability.

    Once wrong it stays wrong for the rest of that draft, as a model led astray would.
    """

    def __init__(self, continuations: Sequence[Tensor], vocab_size: int, wrong: float, seed: int) -> None:
        self.continuations = continuations
        self.vocab_size = vocab_size
        self.wrong = wrong
        self.generator = torch.Generator().manual_seed(seed)

    def draft(self, request: int, start: int, num_drafts: int) -> Tensor:
        """Guesses [num_drafts] for the tokens of `request` from index `start` on."""
        known = self.continuations[request][start : start + num_drafts].cpu()
        right = torch.nn.functional.pad(known, (0, num_drafts - len(known)))  # guesses past the end are idle
        missed = (torch.rand(num_drafts, generator=self.generator) < self.wrong).cumsum(0) > 0
        offset = torch.randint(1, self.vocab_size, (num_drafts,), generator=self.generator)
        return torch.where(missed, (right + offset) % self.vocab_size, right)

    def draft_tree(self, request: int, start: int, pending: Tensor, shape: Sequence[int]) -> Tensor:
        """A tree of tokens [n] like `shape`, `pending` at node 0; guesses are for index `start` on.

        Of the children of a right node one, any, is right, and with the probability `wrong` none.
        """
        known = self.continuations[request].tolist()
        tree, right_nodes, depth = [int(pending)] + [0] * (len(shape) - 1), {0}, [0] * len(shape)
        for node in range(len(shape)):
            children = [child for child, parent in enumerate(shape) if parent == node]
            right = known[min(start + depth[node], len(known) - 1)]  # guesses past the end are idle
            offsets = torch.randperm(self.vocab_size - 1, generator=self.generator) + 1
            for child, offset in zip(children, offsets.tolist(), strict=False):
                tree[child], depth[child] = (right + offset) % self.vocab_size, depth[node] + 1
            missed = torch.rand((), generator=self.generator) < self.wrong
            if children and node in right_nodes and not missed:
                chosen = children[int(torch.randint(len(children), (), generator=self.generator))]
                tree[chosen] = right
                right_nodes.add(chosen)
        return torch.tensor(tree, device=pending.device)


class TreeEngine(Decoder, Protocol):
    """A decoder that takes trees of tokens and keeps one path of each."""

    def verify(self, requests: Sequence[int], tokens: Tensor, parents: Tensor) -> Tensor:
        """Append trees of tokens [n, T] provisionally; logits [n, T, vocab]. `commit` must follow.

        parents: [n, T] int32, an earlier token of the tree, or -1 for the last committed one.
        """

    def commit(self, requests: Sequence[int], kept: Sequence[Sequence[int]]) -> None:
        """Keep the path `kept[i]`, ascending indices from a root, of `requests[i]`; forget the others."""


def generate_speculative(
    engine: Engine, prompts: Sequence[Tensor], num_tokens: int, drafter: NoisyDrafter, num_drafts: int
) -> tuple[list[Greedy], list[list[int]]]:
    """Greedy decoding that verifies `num_drafts` guesses per step; requests advance at their own pace.

    Returns what `generate` returns, and for each request the number of accepted drafts of every step.
    """
    first = engine.prefill(prompts)
    logits = [[row] for row in first]
    accepted: list[list[int]] = [[] for _ in prompts]
    while active := [request for request in range(len(prompts)) if len(logits[request]) < num_tokens]:
        drafts = torch.stack([drafter.draft(request, len(logits[request]), num_drafts) for request in active])
        pending = torch.stack([logits[request][-1].argmax() for request in active])
        verified = engine.verify(active, torch.cat([pending[:, None], drafts.to(pending.device)], dim=1))
        agree = verified[:, :-1].argmax(-1).cpu() == drafts
        num_accepted = agree.cumprod(dim=1).sum(dim=1).tolist()
        for request, rows, count in zip(active, verified, num_accepted, strict=True):
            logits[request].extend(rows[: count + 1])
            accepted[request].append(count)
        engine.commit(active, [count + 1 for count in num_accepted])
    return [Greedy.from_logits(rows[:num_tokens]) for rows in logits], accepted


def generate_from_trees(
    engine: TreeEngine,
    prompts: Sequence[Tensor],
    num_tokens: int,
    drafter: NoisyDrafter,
    shape: Sequence[int],
) -> tuple[list[Greedy], list[list[list[int]]]]:
    """Greedy decoding that verifies a tree of guesses per step; `shape` holds the parent of each node.

    Node 0, with parent -1, is the pending token. Each request's tree has the right guesses along a path of
    its own, at times none. Returns what `generate` returns, and the accepted path of every step.
    """
    logits = [[row] for row in engine.prefill(prompts)]
    accepted: list[list[list[int]]] = [[] for _ in prompts]
    while active := [request for request in range(len(prompts)) if len(logits[request]) < num_tokens]:
        trees = [
            drafter.draft_tree(request, len(logits[request]), logits[request][-1].argmax(), shape)
            for request in active
        ]
        tokens = torch.stack(trees)
        parents = torch.tensor([list(shape)] * len(active), dtype=torch.int32, device=tokens.device)
        verified = engine.verify(active, tokens, parents)
        paths = [
            agreed_path(tree.tolist(), shape, rows.argmax(-1).tolist())
            for tree, rows in zip(trees, verified, strict=True)
        ]
        for request, rows, path in zip(active, verified, paths, strict=True):
            logits[request].extend(rows[path])
            accepted[request].append(path)
        engine.commit(active, paths)
    return [Greedy.from_logits(rows[:num_tokens]) for rows in logits], accepted


def agreed_path(tree: Sequence[int], shape: Sequence[int], choices: Sequence[int]) -> list[int]:
    """From node 0 on, the children that are what the model chose after their parent."""
    path = [0]
    while True:
        here = path[-1]
        agreed = [n for n, parent in enumerate(shape) if parent == here and tree[n] == choices[here]]
        if not agreed:
            return path
        path.append(agreed[0])
