"""What the exported modelling file computes: the oracle's picks in each of its forms, and how much it reads."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aslora_meft.export import modeling_meft_llama as modeling
from meft.routing.reference import chosen_neurons, reference

E, P, K, R, D = 16, 3, 7, 96, 24
OPTIONS = {"experts_per_token": P, "top_k": K}


def tensors(tokens, whole=False, dtype=torch.float32):
    """Random ones, or small whole numbers: exact sums, many equal scores."""
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((tokens, D), (E, D), (R, D), (R, D))
    if whole:
        return [torch.randint(-2, 3, size, generator=generator).to(dtype) for size in sizes]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def added(x, router, keys, values, factor=True):
    return modeling.added_by_neurons(x, router, keys.view(E, R // E, D), values, P, K, factor)


# Tokens, and whether they are read densely (else grouped by expert) on a CPU; None: the keys of one are gathered.
FORMS = pytest.mark.parametrize(
    ("tokens", "densely"), [(1, None), *((n, b) for n in (2, E // P + 1, 200) for b in (True, False))]
)


@pytest.fixture(autouse=True)
def form(request, monkeypatch):
    """Sets what `densely` says, and counts which form was taken."""
    taken = []
    densely = getattr(request.node, "callspec", None) and request.node.callspec.params.get("densely")
    if densely is not None:
        monkeypatch.setattr(modeling, "DENSE_UP_TO", 2**40 if densely else 0)
    for name in ("gathered", "dense", "grouped"):
        real = getattr(modeling, name)
        monkeypatch.setattr(modeling, name, lambda *args, real=real, name=name: taken.append(name) or real(*args))
    yield taken
    if "densely" in request.fixturenames:
        assert set(taken) == {{None: "gathered", True: "dense", False: "grouped"}[densely]}


@FORMS
@pytest.mark.parametrize("factor", [True, False])
def test_picks_are_the_oracles_with_ties_to_the_lower_id(tokens, densely, factor):
    """Whole numbers: each form must be bit-equal, whatever the order of its sums."""
    x, router, keys, values = tensors(tokens, whole=True)
    chosen = chosen_neurons(x, router, keys, router_factor=factor, **OPTIONS)
    scores = (x @ keys.T) * ((x @ router.T).repeat_interleave(R // E, dim=1) if factor else 1)
    edge = torch.where(chosen, scores, torch.inf).min(1).values
    tied = (scores == edge[:, None]) & ~chosen
    assert tokens < 5 or tied.any()  # there are ties at the edge
    expected = reference(x, router, keys, values, router_factor=factor, **OPTIONS)
    assert torch.equal(added(x, router, keys, values, factor), expected)


@FORMS
def test_sums_are_the_oracles(tokens, densely):
    x, router, keys, values = tensors(tokens)
    expected = reference(x, router, keys, values, **OPTIONS)
    assert (added(x, router, keys, values) - expected).abs().max() < 1e-5 * expected.abs().max()


@FORMS
def test_scores_of_16_bit_rows_are_summed_in_float32(tokens, densely):
    x, router, keys, _ = tensors(tokens, dtype=torch.bfloat16)
    wide = [tensor.float() for tensor in (x, router, keys)]
    found = modeling.dots_of_experts(x, keys.view(E, R // E, D), (wide[0] @ wide[1].T).topk(P).indices)
    assert found.dtype == torch.float32
    ids = (wide[0] @ wide[1].T).topk(P).indices
    expected = (wide[0] @ wide[2].T).view(tokens, E, -1).take_along_dim(ids[..., None], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "wanted"), [(1, "gathered"), (2, "dense"), (100, "dense"), (101, "grouped")])
def test_the_form_follows_the_number_of_tokens(tokens, wanted, form, monkeypatch):
    """As benchmarks/results/export_forms.md shows: few products an expert are one large product."""
    monkeypatch.setattr(modeling, "DENSE_UP_TO", 100 * (R // E) * D)
    added(*tensors(tokens))
    assert form == [wanted]


def test_the_dense_form_of_gpus_gives_the_same(form):
    """No GPU is needed: a tensor that says that it is on one."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    x, router, keys, values = tensors(200, whole=True)
    expected = added(x, router, keys, values)
    assert torch.equal(added(x.as_subclass(OnGpu), router, keys, values).as_subclass(torch.Tensor), expected)
    assert form[-1] == "dense"


class RowsRead(TorchDispatchMode):
    """Counts rows of tables that operations read: those that an index names, else all of them."""

    def __init__(self, **tables):
        super().__init__()
        self.names = {table.untyped_storage().data_ptr(): name for name, table in tables.items()}
        self.rows = dict.fromkeys(tables, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.count(func, args)
        return func(*args, **(kwargs or {}))

    def count(self, func, args):
        for argument in args:
            if not isinstance(argument, torch.Tensor):
                continue
            name = self.names.get(argument.untyped_storage().data_ptr())
            if name is None:
                continue
            if func is torch.ops.aten.index.Tensor:
                self.rows[name] += args[1][0].numel() * argument[0].numel() // D
            elif "embedding_bag" in str(func):
                self.rows[name] += args[1].numel()
            else:
                self.rows[name] += argument.numel() // D


def test_a_token_reads_the_router_the_keys_of_its_experts_and_the_values_of_its_neurons():
    x, router, keys, values = tensors(1)
    with RowsRead(router=router, keys=keys, values=values) as read:
        added(x, router, keys, values)
    assert read.rows == {"router": E, "keys": P * (R // E), "values": K}  # E + P k + K rows of d values
    with RowsRead(keys=keys) as read:  # the count can fail
        (x @ keys.T).sum()
    assert read.rows == {"keys": R}


def test_a_compiler_sees_one_operation_that_chooses_its_form_when_it_runs():
    """Sizes that a server's graph takes as unknown must not fix the form."""
    x, router, keys, values = tensors(200)
    module = modeling.MeftNeurons(modeling.MeftLlamaConfig(hidden_size=D, num_attention_heads=2, meft=fields()))
    with torch.no_grad():
        for parameter, tensor in ((module.router, router), (module.keys, keys), (module.values, values)):
            parameter.copy_(tensor.view(parameter.shape))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for tokens in (200, 3, 50):
            part = x[:tokens].clone()[None]  # strides as a model's hidden states have them
            assert torch.equal(compiled(part), module(part))
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function" and "meft" in str(node.target)]
    assert len(calls) == 1


def fields():
    return {"r": R, "num_experts": E, "router_factor": True, "layers": [0], **OPTIONS}


def test_the_operation_has_a_right_shape_for_compilers():
    x, router, keys, values = tensors(5)
    operation = torch.ops.meft.added_by_neurons.default
    torch.library.opcheck(operation, (x, router, keys.view(E, R // E, D), values, P, K, True))


def test_gradients_reach_the_input():
    """A LoRA can be trained over an exported model."""
    x, router, keys, values = tensors(5)
    x, wanted = x.requires_grad_(), x.detach().clone().requires_grad_()
    added(x, router, keys, values).square().sum().backward()
    reference(wanted, router, keys, values, **OPTIONS).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad, rtol=1e-4, atol=1e-4)
