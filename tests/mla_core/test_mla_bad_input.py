"""Every argument of every public function, perturbed: the error names it and nothing is written."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_dispatch import ArgumentError, ArgumentTypeError, NoKernelError
from kernel_dispatch.plan_cache import ALIKE_LIMIT
from kernel_testing import poisoned
from mla_cases import BF16, FP16, Case, bits
from mla_core import DecodeProblem, decode, merge_states, plan, workspace_nbytes
from torch._subclasses.fake_tensor import FakeTensorMode

CASE = Case((130, 2, 70), q_len=2, num_heads=4)
RAGGED = Case((130, 2, 70), q_lens=(2, 1, 3), num_heads=4)
PROBLEM = {"batch": 3, "q_len": 2, "num_heads": 4, "page_size": 64, "max_seq_len": 192, "max_pages": 4}

Arguments = dict[str, object]
Change = Callable[[torch.Tensor], object]


def good_arguments(case: Case) -> Arguments:
    inputs = case.inputs()
    leading = inputs.query.shape[:-1]
    arguments = {
        "query": inputs.query,
        "kv_cache": inputs.kv_cache,
        "block_tables": inputs.block_tables,
        "seq_lens": inputs.seq_lens,
        "softmax_scale": torch.tensor([case.scale]),
        "output_scale": 1.0,
        "out": poisoned((*leading, 512), BF16),
        "lse": poisoned(leading, torch.float32),
        "workspace": torch.zeros(64, dtype=torch.uint8),
    }
    if case.q_lens:
        arguments["cum_seq_lens_q"] = inputs.cum_seq_lens_q
    return arguments


@dataclass(frozen=True)
class Bad:
    """One perturbation: argument, what is done to it, what is blamed (the argument itself unless said)."""

    argument: str
    what: str
    change: Change
    blamed: str | None = None
    case: Case = CASE

    def __str__(self) -> str:
        return f"{'ragged-' if self.case.q_lens else ''}{self.argument}-{self.what}"


def with_value(index: tuple[int, ...], value: float) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[index] = value
        return changed

    return change


def longer(dim: int) -> Change:
    return lambda tensor: torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)


def shorter(dim: int) -> Change:
    return lambda tensor: tensor.narrow(dim, 0, tensor.shape[dim] - 1)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand_as(tensor)


def same_for_all(argument: str, dtype: torch.dtype, case: Case = CASE) -> list[Bad]:
    """Perturbations that every tensor argument must survive."""
    return [
        Bad(argument, "list", lambda tensor: [1, 2], case=case),
        Bad(argument, "numpy", lambda tensor: tensor.float().numpy(), case=case),
        Bad(argument, "dtype", lambda tensor: tensor.to(dtype), case=case),
        Bad(argument, "rank", lambda tensor: tensor.unsqueeze(0).unsqueeze(0).unsqueeze(0), case=case),
        Bad(argument, "meta", lambda tensor: tensor.to("meta"), case=case),
        Bad(argument, "sparse", lambda tensor: tensor.float().to_sparse().to(tensor.dtype), case=case),
    ]


TENSORS = [
    *same_for_all("query", torch.float32),
    Bad("query", "none", lambda tensor: None),
    Bad("query", "num_heads", longer(2), blamed="out"),
    Bad("query", "batch", longer(0), blamed="block_tables"),
    Bad("query", "head_dim", shorter(3)),
    Bad("query", "stride", strided),
    *same_for_all("kv_cache", FP16),
    Bad("kv_cache", "none", lambda tensor: None),
    Bad("kv_cache", "head_dim", longer(2)),
    Bad("kv_cache", "two-heads", lambda tensor: tensor.unsqueeze(1).expand(-1, 2, -1, -1)),
    Bad("kv_cache", "no-pages", lambda tensor: tensor[:0]),
    Bad("kv_cache", "no-page-size", lambda tensor: tensor[:, :0]),
    Bad("kv_cache", "stride", strided),
    *same_for_all("block_tables", torch.int64),
    Bad("block_tables", "none", lambda tensor: None),
    Bad("block_tables", "batch", longer(0)),
    Bad("block_tables", "no-columns", lambda tensor: tensor[:, :0]),
    Bad("block_tables", "stride", strided),
    Bad("block_tables", "index", with_value((0, 1), 9)),
    Bad("block_tables", "huge-index", with_value((2, 1), 2147480000)),
    *same_for_all("seq_lens", torch.int64),
    Bad("seq_lens", "none", lambda tensor: None),
    Bad("seq_lens", "batch", shorter(0)),
    Bad("seq_lens", "stride", strided),
    Bad("seq_lens", "negative", with_value((1,), -1)),
    Bad("seq_lens", "beyond-the-table", with_value((1,), 257)),
    *same_for_all("out", torch.float32),
    Bad("out", "batch", shorter(0)),
    Bad("out", "q_len", shorter(1)),
    Bad("out", "num_heads", longer(2)),
    Bad("out", "head_dim", shorter(3)),
    Bad("out", "three-dimensions", lambda tensor: tensor[:, 0]),
    Bad("out", "stride", strided),
    Bad("out", "overlapping", expanded),
    *same_for_all("lse", torch.float64),
    Bad("lse", "batch", longer(0)),
    Bad("lse", "q_len", longer(1)),
    Bad("lse", "num_heads", shorter(2)),
    Bad("lse", "flat", lambda tensor: tensor.flatten(0, 1)),
    Bad("lse", "stride", strided),
    Bad("lse", "overlapping", expanded),
    *same_for_all("workspace", torch.int32),
    Bad("workspace", "stride", strided),
    Bad("workspace", "rank-2", lambda tensor: tensor.view(8, 8)),
    *same_for_all("cum_seq_lens_q", torch.int64, RAGGED),
    Bad("cum_seq_lens_q", "batch", shorter(0), case=RAGGED),
    Bad("cum_seq_lens_q", "stride", strided, case=RAGGED),
    Bad("cum_seq_lens_q", "start", with_value((0,), 1), case=RAGGED),
    Bad("cum_seq_lens_q", "end", with_value((3,), 7), case=RAGGED),
    Bad("cum_seq_lens_q", "decreasing", lambda tensor: tensor[[0, 2, 1, 3]], case=RAGGED),
    Bad("query", "four-dimensions", lambda tensor: tensor.unsqueeze(1), case=RAGGED),
    Bad("out", "total_q", shorter(0), case=RAGGED),
    Bad("lse", "total_q", shorter(0), case=RAGGED),
    *(
        Bad(name, what, lambda tensor, value=value: value)
        for name in ("softmax_scale", "output_scale")
        for what, value in (
            ("none", None),
            ("str", "1.0"),
            ("bool", True),
            ("nan", math.nan),
            ("inf", -math.inf),
            ("nan-tensor", torch.tensor([math.nan])),
            ("two-elements", torch.ones(2)),
            ("float64", torch.ones(1, dtype=torch.float64)),
            ("meta", torch.ones(1, device="meta")),
        )
    ),
]


def assert_refused(bad: Bad, call: Callable[[Arguments], object]) -> None:
    """The call raises an error naming the argument, and its outputs keep their bits."""
    arguments = good_arguments(bad.case)
    outputs = [tensor for name in ("out", "lse") if isinstance(tensor := arguments[name], torch.Tensor)]
    before = [bits(tensor) for tensor in outputs]
    arguments[bad.argument] = bad.change(arguments.get(bad.argument))
    with pytest.raises(ArgumentError) as error:
        call(arguments)
    assert error.value.argument == (bad.blamed or bad.argument)
    assert str(error.value).startswith(f"{error.value.argument}: ")
    for tensor, bits_before in zip(outputs, before, strict=True):
        assert torch.equal(bits(tensor), bits_before)


def decode_all(arguments: Arguments) -> object:
    max_q_len = 3 if "cum_seq_lens_q" in arguments else None
    return decode(**arguments, return_lse=True, max_q_len=max_q_len)


def run_plan(case: Case) -> Callable[[Arguments], None]:
    problem = DecodeProblem(
        **{**PROBLEM, "q_len": 3 if case.q_lens else 2},
        ragged=case.q_lens is not None,
        return_lse=True,
        softmax_scale_is_tensor=True,
    )
    return lambda arguments: plan(problem, "cpu").run(**arguments)


@pytest.mark.parametrize("bad", TENSORS, ids=str)
def test_decode_refuses(bad: Bad) -> None:
    assert_refused(bad, decode_all)
    decode_all(good_arguments(bad.case))


@pytest.mark.parametrize("bad", TENSORS, ids=str)
def test_decode_refuses_after_a_call_that_went_well(bad: Bad) -> None:
    decode_all(good_arguments(bad.case))
    assert_refused(bad, decode_all)


@pytest.mark.parametrize("name", ["out", "lse", "workspace", "cum_seq_lens_q"])
@pytest.mark.parametrize("value", ["x", [0, 1, 2, 3], 5, 5.0])
def test_what_is_no_tensor_is_refused_where_a_call_before_had_none(name: str, value: object) -> None:
    arguments = {**good_arguments(CASE), name: None}
    decode(**arguments, return_lse=True)
    with pytest.raises(ArgumentError) as error:
        decode(**{**arguments, name: value}, return_lse=True)
    assert error.value.argument == name


def test_a_number_for_return_lse_is_refused_after_a_call_with_a_bool() -> None:
    decode_all(good_arguments(CASE))
    with pytest.raises(ArgumentTypeError, match=r"^return_lse: "):
        decode(**good_arguments(CASE), return_lse=1)


def test_calls_of_many_batches_are_all_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case((3,) * batch, num_heads=4) for batch in range(1, ALIKE_LIMIT + 3)]
    for case in cases:
        decode(*case.inputs().positional, softmax_scale=case.scale)
    monkeypatch.setattr("mla_core.api.execute", must_not_run)
    for case in cases:
        decode(*case.inputs().positional, softmax_scale=case.scale)


def must_not_run(tensors: object, options: object) -> None:
    raise AssertionError("a call that looks like an earlier one was checked in full")


def blamed_by_a_plan(bad: Bad) -> Bad:
    """A plan knows the sizes, so that it blames the tensor that departs from them."""
    known = {"num_heads", "batch"}
    return Bad(bad.argument, bad.what, bad.change, None, bad.case) if bad.what in known else bad


@pytest.mark.parametrize("bad", TENSORS, ids=str)
def test_plan_run_refuses(bad: Bad) -> None:
    assert_refused(blamed_by_a_plan(bad), run_plan(bad.case))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("out", None),
        ("lse", None),
        ("softmax_scale", 0.1),  # the plan was made for a tensor
        ("output_scale", torch.ones(1)),  # and this for a float
        ("cum_seq_lens_q", torch.zeros(4, dtype=torch.int32)),
        ("query", torch.zeros(3, 4, 576, dtype=BF16)),  # q_len 1
        ("query", torch.zeros(3, 2, 4, 576, dtype=FP16)),
        ("block_tables", torch.zeros(3, 5, dtype=torch.int32)),
        ("kv_cache", torch.zeros(9, 32, 576, dtype=BF16)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_plan_run_refuses_what_the_plan_was_not_made_for(name: str, value: object) -> None:
    assert_refused(Bad(name, "other", lambda tensor: value), run_plan(CASE))


@pytest.mark.parametrize(
    ("output", "other"), [("out", "query"), ("lse", "workspace"), ("workspace", "kv_cache")]
)
@pytest.mark.parametrize("call", [decode_all, run_plan(CASE)], ids=["decode", "plan"])
def test_outputs_share_no_memory(call: Callable[[Arguments], object], output: str, other: str) -> None:
    arguments = good_arguments(CASE)
    shared = torch.zeros(1 << 20, dtype=torch.uint8)
    for name in (output, other):
        tensor = arguments[name]
        arguments[name] = shared[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    with pytest.raises(ArgumentError, match="shares memory with") as error:
        call(arguments)
    assert error.value.argument in (output, other)
    assert not shared.any()


@pytest.mark.parametrize("name", ["softmax_scale", "output_scale"])
@pytest.mark.parametrize("value", ["0.5", True, [1.0]])
def test_a_scale_that_is_no_number_is_named_where_a_call_is_traced(name: str, value: object) -> None:
    arguments = {**good_arguments(CASE), name: value}
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ArgumentTypeError, match=f"^{name}: "):
        decode(**arguments, return_lse=True)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"backend": "nobody"}, "no provider of that name"),
        ({"softmax_scale": math.nan}, "softmax_scale: nan"),
        ({"workspace": torch.zeros(8)}, "workspace: dtype float32"),
        ({"max_seq_len": 10**6}, "max_seq_len: 1000000"),
        ({"enable_pdl": "yes"}, "enable_pdl: "),
    ],
)
def test_a_call_without_requests_is_checked(change: Arguments, error: str) -> None:
    arguments = good_arguments(CASE)
    for name in ("query", "block_tables", "seq_lens", "out", "lse"):
        arguments[name] = arguments[name][:0]
    decode(**arguments, return_lse=True)
    with pytest.raises((ArgumentError, NoKernelError), match=error):
        decode(**{**arguments, **change}, return_lse=True)


def test_a_ragged_call_without_tokens_or_without_requests_is_checked() -> None:
    case = Case((5, 3), num_heads=2)
    query, *rest = case.inputs().positional
    ragged = {"softmax_scale": 1.0, "max_q_len": 1}
    with pytest.raises(ArgumentError, match="cum_seq_lens_q: runs from 0 to 7, expected 0 to 0 tokens"):
        decode(query[:0, 0], *rest, cum_seq_lens_q=torch.tensor([0, 3, 7], dtype=torch.int32), **ragged)
    none = [rest[0], *(x[:0] for x in rest[1:])]
    with pytest.raises(ArgumentError, match="cum_seq_lens_q: has no requests for 2 tokens"):
        decode(query[:, 0], *none, cum_seq_lens_q=torch.zeros(1, dtype=torch.int32), **ragged)


def test_a_workspace_that_is_too_small_is_refused_where_nothing_else_is_checked() -> None:
    problem = DecodeProblem(**PROBLEM, return_lse=True)
    launches: list[object] = []
    prepared = replace(
        plan(problem, "cpu"), workspace_nbytes=64, _launch=lambda *tensors: launches.append(tensors)
    )
    vars(prepared)["always_checked"] = False  # as on a GPU
    arguments = good_arguments(CASE)
    for workspace in (None, torch.zeros(63, dtype=torch.uint8)):
        with pytest.raises(ArgumentError, match=r"^workspace: "):
            prepared.run(**{**arguments, "workspace": workspace})
    assert not launches
    prepared.run(**{**arguments, "workspace": torch.zeros(64, dtype=torch.uint8)})
    assert len(launches) == 1


def test_memory_is_looked_at_in_every_call() -> None:
    """Also where a call looks like one before it."""
    arguments = good_arguments(CASE)
    decode(**arguments, return_lse=True)
    whole = arguments["kv_cache"].flatten()
    arguments["out"] = whole[: arguments["out"].numel()].view(arguments["out"].shape)
    before = whole.clone()
    with pytest.raises(ArgumentError, match=r"^out: shares memory with kv_cache"):
        decode(**arguments, return_lse=True)
    assert torch.equal(bits(whole), bits(before))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 2, 129, 576), "query: num_heads = 129, expected at most 128"),
        ((3, 2, 0, 576), "query: num_heads = 0, expected at least 1"),
        ((3, 0, 4, 576), "query: q_len = 0, expected at least 1"),
    ],
)
def test_decode_refuses_sizes_that_outputs_cannot_contradict(shape: tuple[int, ...], message: str) -> None:
    arguments = {**good_arguments(CASE), "query": torch.zeros(shape, dtype=BF16), "out": None, "lse": None}
    with pytest.raises(ArgumentError, match=message):
        decode(**arguments)


OPTIONS = [
    ("kv_lora_rank", 0, None),
    ("kv_lora_rank", 512.0, None),
    ("kv_lora_rank", 500, "query"),
    ("qk_rope_head_dim", -64, None),
    ("qk_rope_head_dim", True, None),
    ("qk_rope_head_dim", 63, "query"),
    ("max_seq_len", 0, None),
    ("max_seq_len", 257, None),
    ("max_seq_len", 129, "seq_lens"),
    ("max_seq_len", torch.tensor(192), None),
    ("out_dtype", torch.float32, None),
    ("out_dtype", "bfloat16", None),
    ("out_dtype", FP16, "out"),
    ("return_lse", None, None),
    ("return_lse", False, "lse"),
    ("is_var_seq", 0, None),
    ("is_var_seq", False, "seq_lens"),
    ("max_q_len", 2, None),
    ("max_q_len", 0, None),
    ("enable_pdl", "yes", None),
    ("backend", None, None),
    ("backend", 3, None),
]


@pytest.mark.parametrize(("name", "value", "blamed"), OPTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_decode_refuses_options(name: str, value: object, blamed: str | None) -> None:
    bad = Bad("output_scale", "unchanged", lambda scale: scale, blamed=blamed or name)
    assert_refused(bad, lambda arguments: decode(**{**arguments, "return_lse": True, name: value}))


@pytest.mark.parametrize("max_q_len", [None, 2])
def test_ragged_queries_need_a_bound_that_holds(max_q_len: int | None) -> None:
    bad = Bad("output_scale", "unchanged", lambda scale: scale, blamed="max_q_len", case=RAGGED)
    assert_refused(bad, lambda arguments: decode(**arguments, return_lse=True, max_q_len=max_q_len))


PROBLEM_FIELDS = [
    *((name, value) for name in PROBLEM for value in (0, -1, 2.0, True, "3")),
    *((name, value) for name in ("kv_lora_rank", "qk_rope_head_dim") for value in (0, None)),
    ("num_heads", 129),
    ("max_seq_len", 257),
    *((name, torch.float32) for name in ("q_dtype", "kv_dtype", "out_dtype")),
    ("q_dtype", None),
    ("kv_dtype", FP16),
    ("out_dtype", "bf16"),
    *((name, 1) for name in ("is_var_seq", "ragged", "return_lse", "enable_pdl")),
    *((name, None) for name in ("softmax_scale_is_tensor", "output_scale_is_tensor")),
]


@pytest.mark.parametrize(("name", "value"), PROBLEM_FIELDS, ids=str)
def test_problem_refuses(name: str, value: object) -> None:
    with pytest.raises(ArgumentError) as error:
        DecodeProblem(**{**PROBLEM, name: value})
    assert error.value.argument == name


def test_plan_and_workspace_nbytes_refuse() -> None:
    problem = DecodeProblem(**PROBLEM)
    for function in (plan, workspace_nbytes):
        with pytest.raises(ArgumentTypeError, match="problem: dict, expected a DecodeProblem"):
            function(PROBLEM)
        with pytest.raises(NoKernelError, match="no provider of that name"):
            function(problem, "cpu", "nothing")
        for backend in (None, 3, []):
            with pytest.raises(ArgumentTypeError) as error:
                function(problem, "cpu", backend)
            assert error.value.argument == "backend"
    absent = () if torch.cuda.is_available() else ("cuda", "cuda:1")
    for device in ("nowhere", 1.5, "meta", *absent):
        with pytest.raises(ArgumentError) as error:
            plan(problem, device)
        assert error.value.argument == "device"
    for arch in ("sm_1", 90):
        with pytest.raises(ArgumentError) as error:
            workspace_nbytes(problem, arch)
        assert error.value.argument == "arch"


MERGE = {"o_a": (3, 8), "lse_a": (3,), "o_b": (3, 8), "lse_b": (3,)}


@pytest.mark.parametrize("name", MERGE)
@pytest.mark.parametrize("what", ["list", "none", "dtype", "rank", "size", "meta"])
def test_merge_states_refuses(name: str, what: str) -> None:
    arguments: dict[str, object] = {key: torch.zeros(shape) for key, shape in MERGE.items()}
    tensor = torch.zeros(MERGE[name])
    arguments[name] = {
        "list": [1.0],
        "none": None,
        "dtype": tensor.double(),
        "rank": tensor.unsqueeze(0),
        "size": torch.cat((tensor, tensor)),
        "meta": tensor.to("meta"),
    }[what]
    with pytest.raises(ArgumentError) as error:
        merge_states(**arguments)
    # What o_a is, the others are held to.
    first_departure = "lse_a" if name == "o_a" and what in ("rank", "size", "meta") else name
    assert error.value.argument == first_departure
