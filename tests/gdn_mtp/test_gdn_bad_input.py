"""Every argument of every public function, perturbed: an error names it, and nothing was written."""

import inspect

import gdn_mtp
import pytest
import torch
from gdn_support import BF16, FP16, FP32, NAN, Case, assert_same_bits
from kernel_dispatch import ArgumentError, ArgumentTypeError, NoKernelError
from torch._subclasses.fake_tensor import FakeTensorMode

CASE = Case(B=3, T=2, H=2, HV=4, K=16, V=8)
ONE_TOKEN = Case(**{**vars(CASE), "T": 1})
SLOTS = 7
WRITTEN = ("state", "initial_state", "output", "intermediate_states_buffer")
INDICES = ("initial_state_indices", "output_state_indices", "ssm_state_indices")
TOKENS = ("q", "k", "v", "a", "b", "A_log", "dt_bias")


def output(case):
    return torch.full((case.B, case.T, case.HV, case.V), NAN)


def buffer(case):
    return torch.full((case.B, case.T, case.HV, case.V, case.K), NAN)


def inputs(case):
    return {name: x.cpu() for name, x in case.inputs().items()} | {"scale": 0.5, "output": output(case)}


def pooled(case, name="initial_state"):
    return inputs(case) | {
        name: case.states(SLOTS).cpu(),
        "initial_state_indices": torch.tensor([4, -1, 2]),
        "use_qk_l2norm": True,
    }


def mtp():
    return pooled(CASE) | {
        "output_state_indices": torch.tensor([0, 6, 5]),
        "intermediate_states_buffer": buffer(CASE),
        "disable_state_update": False,
        "backend": "auto",
    }


def mtp_scatter():
    return pooled(CASE) | {
        "ssm_state_indices": torch.tensor([[4, 1], [0, 0], [3, -1]]),
        "disable_state_update": False,
        "backend": "auto",
    }


def pretranspose():
    return inputs(CASE) | {
        "state": CASE.states(CASE.B).cpu(),
        "use_qk_l2norm": True,
        "intermediate_states_buffer": buffer(CASE),
        "disable_state_update": False,
        "backend": "auto",
    }


def pretranspose_pool():
    return pooled(CASE) | {
        "state": None,
        "output_state_indices": torch.tensor([0, 6, 5]),
        "intermediate_states_buffer": buffer(CASE),
        "disable_state_update": False,
        "backend": "auto",
    }


def decode():
    return inputs(ONE_TOKEN) | {
        "state": ONE_TOKEN.states(CASE.B, "kv").cpu(),
        "use_qk_l2norm": True,
        "backend": "auto",
    }


def problem(**changes):
    fields = {name: getattr(CASE, name) for name in ("B", "T", "H", "HV", "K", "V")} | {
        "io_dtype": BF16,
        "gate_dtype": BF16,
        "dt_bias_dtype": FP32,
        "out_dtype": FP32,
        "state_dtype": FP32,
        "state_layout": "vk",
        "use_qk_l2norm": True,
        "update_state": True,
        "intermediate": "buffer",
        "index_dtype": torch.int64,
        "separate_write_indices": True,
    }
    return gdn_mtp.GatedDeltaRuleProblem(**{**fields, **changes})


def run_plan():
    arguments = mtp()
    for name in ("use_qk_l2norm", "disable_state_update", "backend"):
        del arguments[name]
    return arguments | {"state": arguments.pop("initial_state")}


FUNCTIONS = {
    "mtp": (gdn_mtp.gated_delta_rule_mtp, mtp),
    "mtp_scatter": (gdn_mtp.gated_delta_rule_mtp, mtp_scatter),
    "pretranspose": (gdn_mtp.gated_delta_rule_decode_pretranspose, pretranspose),
    "pretranspose_pool": (gdn_mtp.gated_delta_rule_decode_pretranspose, pretranspose_pool),
    "decode": (gdn_mtp.gated_delta_rule_decode, decode),
    "run": (gdn_mtp.plan(problem(), "cpu").run, run_plan),
}


def longer(tensor, dim, by=1):
    shape = list(tensor.shape)
    shape[dim] += by
    return torch.zeros(shape, dtype=tensor.dtype)


def tensor_perturbations(name, tensor):
    """(what, changed tensor) for one tensor argument."""
    yield "list", [1.0]
    yield "dtype", tensor.to(torch.int16 if name in INDICES else torch.float64)
    yield "bool", tensor != 0
    yield "rank", tensor[None]
    yield "rank-down", tensor[0]
    yield "meta", tensor.to("meta")
    if name not in INDICES:
        yield "stride", tensor.repeat_interleave(2, -1)[..., ::2]
    if name in WRITTEN:
        yield "expanded", tensor[:1].expand(tensor.shape)
    for dim in range(tensor.dim()):
        if name == "initial_state" and dim == 0:
            continue  # any pool size is right as long as the indices lie in it
        yield f"dim{dim}", longer(tensor, dim, -1 if name == "intermediate_states_buffer" else 1)


def value_perturbations(name, value):
    if name == "scale":
        yield "nan", NAN
        yield "inf", -float("inf")
        yield "str", "1"
        yield "bool", True
        yield "nan-tensor", torch.tensor(NAN)
        yield "half-tensor", torch.tensor(1.0, dtype=FP16)
        yield "two", torch.ones(2)
        yield "meta", torch.ones(1, device="meta")
    elif name in ("use_qk_l2norm", "disable_state_update"):
        yield "none", None
        yield "str", "yes"
    elif name == "backend":
        yield "int", 3
        yield "list", ["torch"]


def perturbations():
    for function, (call, arguments) in FUNCTIONS.items():
        for name, value in arguments().items():
            required = inspect.signature(call).parameters[name].default is inspect.Parameter.empty
            if required and name not in ("disable_state_update", "state"):
                yield pytest.param(function, name, None, id=f"{function}-{name}-none")
            changed = tensor_perturbations if isinstance(value, torch.Tensor) else value_perturbations
            for what, other in changed(name, value):
                if function == "run" and what == "dim0" and name == "state":
                    continue  # a pool, too
                yield pytest.param(function, name, other, id=f"{function}-{name}-{what}")


def assert_rejected(function, arguments, *names, error=ArgumentError, match=None):
    """The call raises, naming one of `names`, and leaves every tensor as it was."""
    call, _ = FUNCTIONS[function]
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and not x.is_meta}
    before = {name: x.clone() for name, x in tensors.items()}
    with pytest.raises(error, match=match) as caught:
        call(**arguments)
    message = str(caught.value)
    assert any(caught.value.argument == name or f"from {name}" in message for name in names), message
    for name, x in tensors.items():
        if x.dtype != torch.bool:
            assert_same_bits(x, before[name], name)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_unperturbed_call_runs(function):
    call, arguments = FUNCTIONS[function]
    arguments = arguments()
    call(**arguments)
    assert arguments["output"].isfinite().all()


@pytest.mark.parametrize(("function", "name", "value"), list(perturbations()))
def test_a_perturbed_argument_is_named(function, name, value):
    arguments = FUNCTIONS[function][1]() | {name: value}
    names = (
        (name, "k") if name == "q" else (name,)
    )  # where q is on another device, k is the first to disagree
    assert_rejected(function, arguments, *names)


OF_MTP = [x for x in perturbations() if x.values[0] == "mtp"]


@pytest.mark.parametrize(("function", "name", "value"), OF_MTP)
def test_a_perturbed_argument_is_named_where_autograd_looks_on(function, name, value):
    """The call then goes through the dispatcher."""
    arguments = mtp()
    arguments["b" if name == "dt_bias" else "dt_bias"].requires_grad_()
    assert_rejected(function, arguments | {name: value}, name, *(["k"] if name == "q" else []))


@pytest.mark.parametrize("scale", ["0.5", True, [1.0]])
def test_a_scale_that_is_no_number_is_named_where_a_call_is_traced(scale):
    arguments = mtp() | {"scale": scale}
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ArgumentTypeError, match=r"^scale: "):
        gdn_mtp.gated_delta_rule_mtp(**arguments)


def test_no_requests_need_a_provider_that_exists():
    arguments = inputs(Case(**{**vars(CASE), "B": 0}))
    states = {"state": CASE.states(0).cpu()}
    with pytest.raises(NoKernelError, match="no provider of that name"):
        gdn_mtp.gated_delta_rule_decode_pretranspose(**arguments, **states, backend="nobody")


@pytest.mark.parametrize("function", ["mtp", "pretranspose_pool", "run"])
@pytest.mark.parametrize("name", ["initial_state_indices", "output_state_indices"])
def test_index_out_of_range(function, name):
    arguments = FUNCTIONS[function][1]()
    arguments[name][2] = SLOTS
    assert_rejected(function, arguments, name)


def test_scatter_index_out_of_range():
    arguments = mtp_scatter()
    arguments["ssm_state_indices"][2, 1] = SLOTS
    assert_rejected("mtp_scatter", arguments, "ssm_state_indices")
    arguments["ssm_state_indices"] = torch.tensor([[4, 1], [SLOTS, SLOTS], [3, -1]])  # a padded request
    gdn_mtp.gated_delta_rule_mtp(**arguments)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"output_state_indices": None, "initial_state_indices": [3, -1, 3]}, "initial_state_indices"),
        ({"output_state_indices": [5, 5, 5]}, "output_state_indices"),
        (
            {"output_state_indices": [2, 0, 1]},
            "output_state_indices",
        ),  # request 0 writes what request 2 reads
    ],
)
def test_slots_that_collide(changes, name):
    tensors = {key: None if value is None else torch.tensor(value) for key, value in changes.items()}
    assert_rejected("mtp", mtp() | tensors, name)


@pytest.mark.parametrize(
    "rows", [[[1, 1], [0, 0], [3, -1]], [[1, 3], [0, 0], [3, -1]], [[2, 1], [0, 0], [3, 5]]]
)
def test_scatter_slots_that_collide(rows):
    arguments = mtp_scatter() | {"ssm_state_indices": torch.tensor(rows)}
    assert_rejected("mtp_scatter", arguments, "ssm_state_indices")


@pytest.mark.parametrize(
    ("function", "changes", "name"),
    [
        ("mtp_scatter", {"intermediate_states_buffer": buffer(CASE)}, "ssm_state_indices"),
        ("mtp_scatter", {"disable_state_update": True}, "ssm_state_indices"),
        ("mtp_scatter", {"output_state_indices": torch.tensor([0, 5, 6])}, "ssm_state_indices"),
        ("mtp", {"disable_state_update": True}, "output_state_indices"),
        ("pretranspose", {"state": None}, "state"),
        ("pretranspose", {"initial_state": CASE.states(SLOTS).cpu()}, "initial_state"),
        ("pretranspose", {"initial_state_indices": torch.arange(3)}, "initial_state_indices"),
        ("pretranspose", {"output_state_indices": torch.arange(3)}, "output_state_indices"),
        ("pretranspose_pool", {"initial_state_indices": None}, "initial_state_indices"),
        ("run", {"intermediate_states_buffer": None}, "intermediate_states_buffer"),
        ("run", {"output_state_indices": None}, "output_state_indices"),
        ("run", {"output": output(CASE).bfloat16()}, "output"),
        ("run", {"initial_state_indices": None}, "initial_state_indices"),
    ],
)
def test_arguments_that_exclude_or_need_each_other(function, changes, name):
    assert_rejected(function, FUNCTIONS[function][1]() | changes, name)


@pytest.mark.parametrize(
    ("function", "name", "dtype", "words"),
    [
        ("mtp", "k", FP16, "dtype float16, expected bfloat16 as q has"),
        ("mtp", "v", FP32, "dtype float32, expected bfloat16 as q has"),
        ("mtp", "b", FP32, "dtype float32, expected bfloat16 as a has"),
        (
            "mtp",
            "intermediate_states_buffer",
            BF16,
            "dtype bfloat16, expected float32 as initial_state has",
        ),
        ("run", "output_state_indices", torch.int32, "dtype int32, expected int64 from the plan"),
    ],
)
def test_dtypes_that_must_agree(function, name, dtype, words):
    arguments = FUNCTIONS[function][1]()
    arguments[name] = arguments[name].to(dtype)
    assert_rejected(function, arguments, name, error=ArgumentTypeError, match=words)


@pytest.mark.parametrize("value_heads", [3, 5])
def test_value_heads_that_are_no_multiple(value_heads):
    case = Case(**{**vars(CASE), "HV": value_heads})
    arguments = inputs(case) | {"state": case.states(case.B).cpu()}
    assert_rejected("pretranspose", arguments, "v")


@pytest.mark.parametrize("name", ["T", "H", "HV", "K", "V"])
def test_empty_dimensions(name):
    case = Case(**{**vars(CASE), name: 0})
    arguments = inputs(case) | {"state": case.states(case.B).cpu()}
    assert_rejected("pretranspose", arguments, "q", "v")


def test_a_pool_without_slots():
    arguments = mtp() | {"initial_state": CASE.states(0).cpu(), "initial_state_indices": torch.full((3,), -1)}
    assert_rejected("mtp", arguments, "initial_state")


def test_outputs_that_share_memory():
    arguments = inputs(Case(**{**vars(CASE), "io": FP32})) | {"state": CASE.states(CASE.B).cpu()}
    assert_rejected("pretranspose", arguments | {"output": arguments["v"]}, "output")
    in_state = arguments["state"].flatten()[: output(CASE).numel()].view(output(CASE).shape)
    assert_rejected("pretranspose", arguments | {"output": in_state}, "output", "state")
    pool = arguments["state"]
    in_pool = pool.as_strided((3, 2, *pool.shape[1:]), (0, 0, *pool.stride()[1:]))
    assert_rejected(
        "pretranspose", arguments | {"intermediate_states_buffer": in_pool}, "intermediate_states_buffer"
    )


def test_disable_state_update_has_no_default():
    arguments = mtp()
    del arguments["disable_state_update"]
    with pytest.raises(TypeError, match="disable_state_update"):
        gdn_mtp.gated_delta_rule_mtp(**arguments)


def test_an_unknown_backend_is_no_fallback():
    arguments = mtp()
    before = arguments["initial_state"].clone()
    with pytest.raises(NoKernelError, match="nonesuch"):
        gdn_mtp.gated_delta_rule_mtp(**arguments | {"backend": "nonesuch"})
    assert_same_bits(arguments["initial_state"], before, "initial_state")
    assert arguments["output"].isnan().all()


PROBLEM_PERTURBATIONS = [
    *[(name, value) for name in ("B", "T", "H", "HV", "K", "V") for value in (0, -1, 2.0, True, None)],
    ("HV", 3),
    *[
        (name, value)
        for name in ("io_dtype", "gate_dtype", "dt_bias_dtype", "out_dtype", "state_dtype")
        for value in (torch.float64, "bf16")
    ],
    *[(name, None) for name in ("io_dtype", "dt_bias_dtype", "state_dtype")],
    ("dt_bias_dtype", FP16),
    ("state_dtype", FP16),
    ("index_dtype", torch.int16),
    ("state_layout", "kk"),
    ("intermediate", None),
    *[(name, 1) for name in ("use_qk_l2norm", "update_state", "separate_write_indices")],
    ("intermediate", "scatter"),
    ("index_dtype", None),
    ("update_state", False),
]


@pytest.mark.parametrize(("name", "value"), PROBLEM_PERTURBATIONS)
def test_a_perturbed_problem_names_its_field(name, value):
    combined = {("index_dtype", None), ("update_state", False)}  # legal alone, but not with write indices
    expected = "separate_write_indices" if (name, value) in combined else name
    with pytest.raises(ArgumentError) as caught:
        problem(**{name: value})
    assert caught.value.argument == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"separate_write_indices": False, "update_state": False},
        {"separate_write_indices": False, "index_dtype": None},
        {},
    ],
)
def test_scatter_needs_indices_and_updates_and_no_write_indices(changes):
    with pytest.raises(ArgumentError) as caught:
        problem(intermediate="scatter", **changes)
    assert caught.value.argument == "intermediate"


ABSENT = () if torch.cuda.is_available() else ("cuda", "cuda:1")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("problem", "cpu"), ArgumentTypeError, "problem"),
        ((problem(), "cpu", "nonesuch"), NoKernelError, "nonesuch"),
        *[((problem(), "cpu", backend), ArgumentTypeError, "^backend: ") for backend in (None, 3, [])],
        *[((problem(), device), ArgumentError, "^device: ") for device in ("meta", "foo", 3.5, *ABSENT)],
    ],
)
def test_plan_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        gdn_mtp.plan(*arguments)
