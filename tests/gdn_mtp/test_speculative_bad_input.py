"""Arguments of the speculative functions and plans, perturbed: an error names it, nothing was written."""

import inspect

import gdn_mtp
import pytest
import torch
from gdn_support import BF16, FP16, FP32, NAN, assert_same_bits
from kernel_dispatch import ArgumentError
from speculative_support import Setup

SETUP = Setup()
B, T = 3, 4
CACHE_TENSORS = gdn_mtp.speculative.CacheTensors._fields
INDICES = ("state_indices", "num_accepted", "accepted_nodes", "num_tokens", "parent_indices")
WRITTEN = ("state_pool", "output", "states")
ANY_STRIDE = ("state_indices",)


def new_cache():
    sizes = (SETUP.pool_size, SETUP.H, SETUP.HV, SETUP.K, SETUP.V)
    return gdn_mtp.SpeculativeCache(*sizes, max_tokens=T, device="cpu")


def pooled():
    """A pool, slots, and a cache with windows to accept from, not yet bound to the pool; and tokens."""
    pool, verified, cache = SETUP.pool().cpu(), new_cache(), new_cache()
    slots = torch.tensor([4, -1, 2], dtype=torch.int32)
    tokens = {name: x.cpu() for name, x in {**SETUP.tokens(B, T, 0), **SETUP.heads()}.items()}
    gdn_mtp.verify(**tokens, state_pool=pool, state_indices=slots, cache=verified, num_accepted=None)
    cache.load_state_dict(verified.state_dict())
    return {"state_pool": pool, "state_indices": slots, "cache": cache}, tokens


def verify():
    named, tokens = pooled()
    return {
        **tokens,
        **named,
        "num_accepted": torch.tensor([2, 0, 4], dtype=torch.int32),
        "num_tokens": torch.tensor([3, 0, 4], dtype=torch.int32),
        "parent_indices": torch.tensor([[-1, 0, 0, 2]] * B, dtype=torch.int32),
        "scale": 0.5,
        "use_qk_l2norm": True,
        "fold": "always",
        "output": torch.full((B, T, SETUP.HV, SETUP.V), NAN),
        "backend": "auto",
    }


def commit():
    nodes = torch.tensor([[0, 1], [-1, -1], [0, -1]], dtype=torch.int32)
    return {**pooled()[0], "num_accepted": None, "accepted_nodes": nodes, "backend": "auto"}


def materialize():
    states = torch.full((B, SETUP.HV, SETUP.V, SETUP.K), NAN)
    return {**commit(), "states": states}


def run(make):
    """The arguments of a plan's run: those of the function, less what the problem says."""
    return lambda: {name: x for name, x in make().items() if name not in ("use_qk_l2norm", "backend")}


def problem(mode, **fields):
    sizes = {"B": B, "T": 0, "H": SETUP.H, "HV": SETUP.HV, "K": SETUP.K, "V": SETUP.V, "capacity": 16}
    return gdn_mtp.SpeculativeProblem(**{**sizes, "mode": mode, "accept": "nodes", **fields})


VERIFY = {"T": T, "accept": "counts", "variable_tokens": True, "tree": True, "out_dtype": FP32}
FUNCTIONS = {
    "verify": (gdn_mtp.verify, verify),
    "commit": (gdn_mtp.commit, commit),
    "materialize": (gdn_mtp.materialize, materialize),
    "run_verify": (gdn_mtp.plan(problem("verify", **VERIFY), "cpu").run, run(verify)),
    "run_commit": (gdn_mtp.plan(problem("commit"), "cpu").run, run(commit)),
    "run_materialize": (gdn_mtp.plan(problem("materialize"), "cpu").run, run(materialize)),
}


def tensor_perturbations(name, tensor):
    """(what, changed tensor) for one tensor argument."""
    yield "list", [1.0]
    yield "dtype", tensor.to(torch.int16 if name in INDICES else torch.float64)
    yield "rank", tensor[None]
    yield "rank-down", tensor[0]
    yield "meta", tensor.to("meta")
    if name not in ANY_STRIDE:
        yield "stride", tensor.repeat_interleave(2, -1)[..., ::2]
    if name in WRITTEN:
        yield "expanded", tensor[:1].expand(tensor.shape)
    for dim in range(tensor.dim()):
        if name == "accepted_nodes" and dim == 1:
            continue  # any number of nodes up to the capacity will do
        shape = list(tensor.shape)
        shape[dim] += 1
        yield f"dim{dim}", torch.zeros(shape, dtype=tensor.dtype)


VALUES = {
    "scale": {"nan": NAN, "inf": -float("inf"), "str": "1", "bool": True, "half": torch.ones((), dtype=FP16)},
    "use_qk_l2norm": {"none": None, "int": 1},
    "fold": {"none": None, "word": "never", "list": ["auto"], "bool": False, "float": 2.0, "large": 9},
    "backend": {"int": 3, "list": ["torch"]},
    "cache": {"dict": {}},
}


def perturbations():
    for function, (call, make) in FUNCTIONS.items():
        for name, value in make().items():
            required = inspect.signature(call).parameters[name].default is inspect.Parameter.empty
            if required and name != "num_accepted":  # where None says that nothing is accepted
                yield pytest.param(function, name, None, id=f"{function}-{name}-none")
            others = VALUES.get(name, {}).items()
            if isinstance(value, torch.Tensor):
                others = tensor_perturbations(name, value)
            for what, other in others:
                if (name, what) == ("state_pool", "expanded") and "materialize" in function:
                    continue  # it only reads
                yield pytest.param(function, name, other, id=f"{function}-{name}-{what}")


def assert_rejected(function, arguments, name):
    """The call raises, naming `name`, and leaves every tensor as it was, those of the cache included."""
    cache = arguments["cache"]
    tensors = {key: x for key, x in arguments.items() if isinstance(x, torch.Tensor) and not x.is_meta}
    if isinstance(cache, gdn_mtp.SpeculativeCache):
        tensors |= cache.state_dict()
    before = {key: x.clone() for key, x in tensors.items()}
    with pytest.raises(ArgumentError) as caught:
        FUNCTIONS[function][0](**arguments)
    message = str(caught.value)
    phrases = (f"from {name}", f"as {name} has", "expected meta")  # where another is the first to disagree
    assert caught.value.argument == name or any(phrase in message for phrase in phrases), message
    for key, x in tensors.items():
        assert_same_bits(x, before[key], key)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_unperturbed_call_runs(function):
    call, make = FUNCTIONS[function]
    arguments = make()
    pool = arguments["state_pool"].clone()
    call(**arguments)
    written = arguments.get("output", arguments.get("states", arguments["state_pool"]))
    assert written.isfinite().all()
    assert torch.equal(pool, arguments["state_pool"]) == ("materialize" in function)


@pytest.mark.parametrize(("function", "name", "value"), list(perturbations()))
def test_a_perturbed_argument_is_named(function, name, value):
    assert_rejected(function, FUNCTIONS[function][1]() | {name: value}, name)


OF_VERIFY = [x for x in perturbations() if x.values[0] == "verify"]


@pytest.mark.parametrize(("function", "name", "value"), OF_VERIFY)
def test_a_perturbed_argument_is_named_where_autograd_looks_on(function, name, value):
    """The call then goes through the dispatcher."""
    arguments = verify()
    arguments["b" if name == "dt_bias" else "dt_bias"].requires_grad_()
    assert_rejected(function, arguments | {name: value}, name)


@pytest.mark.parametrize("function", ["verify", "commit", "materialize"])
def test_what_is_accepted_has_to_be_said(function):
    """Left out, it would reject the last window."""
    call, make = FUNCTIONS[function]
    arguments = {name: x for name, x in make().items() if name not in ("num_accepted", "accepted_nodes")}
    cursor = arguments["cache"].cursor.clone()
    with pytest.raises(TypeError, match="num_accepted"):
        call(**arguments)
    assert torch.equal(arguments["cache"].cursor, cursor)
    call(**arguments, num_accepted=None)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", CACHE_TENSORS)
def test_a_perturbed_tensor_of_the_cache_is_named(function, name):
    """Someone has put another tensor into the cache, although its attributes are read-only."""
    for what, other in tensor_perturbations(name, getattr(pooled()[0]["cache"], name)):
        arguments = FUNCTIONS[function][1]()
        vars(arguments["cache"])[name] = other
        with pytest.raises(ArgumentError) as caught:
            FUNCTIONS[function][0](**arguments)
        assert caught.value.argument.startswith("cache."), f"{what}: {caught.value}"


OFF_PLAN = [
    ("run_verify", "num_accepted", {"num_accepted": None}),
    ("run_verify", "accepted_nodes", {"num_accepted": None, "accepted_nodes": commit()["accepted_nodes"]}),
    ("run_verify", "num_tokens", {"num_tokens": None}),
    ("run_verify", "parent_indices", {"parent_indices": None}),
    ("run_verify", "scale", {"scale": torch.tensor([0.5])}),
    ("run_verify", "output", {"output": torch.zeros(B, T, SETUP.HV, SETUP.V, dtype=BF16)}),
    ("run_verify", "state_indices", {"state_indices": torch.tensor([4, -1, 2])}),
    ("run_verify", "dt_bias", {"dt_bias": SETUP.heads()["dt_bias"].cpu().bfloat16()}),
    ("run_commit", "accepted_nodes", {"accepted_nodes": None}),
    ("run_commit", "num_accepted", {"accepted_nodes": None, "num_accepted": verify()["num_accepted"]}),
]


@pytest.mark.parametrize(("function", "name", "changes"), OFF_PLAN)
def test_what_the_function_takes_and_the_plan_is_not_for(function, name, changes):
    function_itself, make = FUNCTIONS[function.removeprefix("run_")]
    function_itself(**make() | changes)
    assert_rejected(function, FUNCTIONS[function][1]() | changes, name)


@pytest.mark.parametrize("name", ["a", "b"])
def test_gates_of_another_dtype_than_planned(name):
    arguments = FUNCTIONS["run_verify"][1]()
    arguments |= {gate: arguments[gate].float() for gate in "ab"}
    assert_rejected("run_verify", arguments, "a")


def test_states_less_aligned_than_planned():
    arguments = FUNCTIONS["run_materialize"][1]()
    shape = (B, SETUP.HV, SETUP.V, SETUP.K + 1)
    arguments["states"] = torch.full(shape, NAN)[..., 1:]
    assert_rejected("run_materialize", arguments, "state_pool")


@pytest.mark.parametrize("call", ["verify", "commit", "materialize"])
def test_arguments_of_another_mode_are_unknown(call):
    arguments = FUNCTIONS[f"run_{call}"][1]()
    foreign = {"verify": "states", "commit": "output", "materialize": "num_tokens"}[call]
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{foreign}'"):
        FUNCTIONS[f"run_{call}"][0](**arguments, **{foreign: None})


def test_a_call_that_fails_binds_the_cache_to_nothing():
    named, tokens = pooled()
    pool, slots, _ = named.values()
    cache = new_cache()
    with pytest.raises(ArgumentError, match=r"cache\.updates: HV = 4, expected 3"):
        gdn_mtp.commit(pool[:, :3], slots, cache, None)
    with pytest.raises(ArgumentError, match="state_indices: 8 at"):
        gdn_mtp.plan(problem("commit", accept="none"), "cpu").run(pool.clone(), slots + 4, cache)
    gdn_mtp.verify(**tokens, state_pool=pool, state_indices=slots, cache=cache, num_accepted=None)
    with pytest.raises(ArgumentError, match="cache: is of the state pool at"):
        gdn_mtp.commit(pool.clone(), slots, cache, None)
